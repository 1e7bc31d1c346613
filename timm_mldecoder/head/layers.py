"""The layers that queries pass: dropout, attention to the image tokens, the decoder layer, and the classifiers."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mldecoder.head.queries import into_groups


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` that saves one byte per element for the backward pass, and draws faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return _dropout(x, self.p) if self.training and self.p > 0 else x


class ReLUDropout(Dropout):
    """ReLU followed by dropout. Saves one mask for both, one byte per element, and neither input nor output."""

    def forward(self, x: Tensor) -> Tensor:
        return _relu_dropout(x, self.p) if self.training and self.p > 0 else F.relu(x, inplace=True)


@torch.fx.wrap  # one node to an fx tracer, which cannot follow a branch on a device
def _dropout(x: Tensor, p: float) -> Tensor:
    if _has_fused_dropout(x):
        return torch.native_dropout(x, p, train=True)[0]
    return x.masked_fill(_draw_dropped(x.shape, p), 0).mul_(1 / (1 - p))


def _has_fused_dropout(x: Tensor) -> bool:
    return not x.is_cpu or torch.compiler.is_compiling()


def _draw_dropped(shape: torch.Size, p: float) -> Tensor:
    """Draw on a CPU which elements to drop, each with probability p to 32 bits, from half the random bits of torch."""
    number = shape.numel()
    bits = torch.empty(-(-number // 2), dtype=torch.int64).random_(-(2**63), None)  # to None: all 64 bits
    return (bits.view(torch.int32)[:number] < int(2**32 * p) - 2**31).view(shape)


@torch.fx.wrap  # one node to an fx tracer, which cannot trace an autograd function
def _relu_dropout(x: Tensor, p: float) -> Tensor:
    return _ReLUDropout.apply(x, p)


class _ReLUDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        output = F.relu_(_dropout(x, p))  # the two commute; dropout's output is a copy, safe to overwrite
        ctx.save_for_backward(output <= 0)
        ctx.scale = 1 / (1 - p)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (blocked,) = ctx.saved_tensors
        return (grad * ctx.scale).masked_fill_(blocked, 0), None  # multiplying by the mask would convert it to float


class Attention(nn.Module):
    """Multi-head attention of queries [B or 1, K, D] to tokens [B, N, D]; output [B, K, D].

    The parameters have the names and layout of `torch.nn.MultiheadAttention`: the query, key and value projections are
    stacked in this order.

    Args:
        dim: Width D.
        num_heads: Number of heads, a divisor of D.
        dropout: Dropout probability of the attention weights.
        projections: Whether queries, keys, values and the output are projected. Without, the module has no parameters:
            each head compares its slice of the queries with its slice of the tokens, and averages the latter.
    """

    def __init__(
        self, dim: int, num_heads: int, dropout: float, projections: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.projections = projections
        if projections:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim, device=device, dtype=dtype))
            self.in_proj_bias = nn.Parameter(torch.empty(3 * dim, device=device, dtype=dtype))
            self.out_proj = nn.Linear(dim, dim, device=device, dtype=dtype)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.projections:
            nn.init.xavier_uniform_(self.in_proj_weight)
            nn.init.zeros_(self.in_proj_bias)
            self.out_proj.reset_parameters()
            nn.init.zeros_(self.out_proj.bias)

    def project_queries(self, queries: Tensor) -> Tensor:
        """Project and split queries [B or 1, K, D] into [B or 1, heads, K, D / heads]."""
        if self.projections:
            dim = queries.shape[-1]
            queries = _project(queries, self.in_proj_weight, self.in_proj_bias, 0, dim)
        return self._split_heads(queries)

    def project_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project and split tokens [B, N, D] into keys and values, each [B, heads, N, D / heads]."""
        if not self.projections:
            return self._split_heads(tokens), self._split_heads(tokens)
        dim = tokens.shape[-1]
        keys, values = _project(tokens, self.in_proj_weight, self.in_proj_bias, dim, 3 * dim).chunk(2, dim=-1)
        return self._split_heads(keys), self._split_heads(values)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend; a mask [B, N] is False at tokens to leave out."""
        if not self.projections:
            return self.attend(self.project_queries(queries), tokens, mask)
        queries, keys, values = _project_all(queries, tokens, self.in_proj_weight, self.in_proj_bias)
        queries, keys, values = self._split_heads(queries), self._split_heads(keys), self._split_heads(values)
        return self._attend(queries, keys, values, tokens.shape[0], mask)

    def attend(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend with queries that `project_queries` has already projected."""
        return self._attend(queries, *self.project_tokens(tokens), tokens.shape[0], mask)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, batch_size: int, mask: Tensor | None) -> Tensor:
        queries = queries.expand(batch_size, -1, -1, -1)
        mask = None if mask is None else mask[:, None, None, :]
        if self.training and self.dropout > 0:
            output = _attend_with_dropout(queries, keys, values, mask, self.dropout)
        else:
            output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        output = output.transpose(1, 2).flatten(2)
        return self.out_proj(output) if self.projections else output

    def attention_weights(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention weights of projected queries, [B, heads, K, N], rows sum to 1."""
        keys, _ = self.project_tokens(tokens)
        scores = queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], float('-inf'))
        return scores.softmax(dim=-1)


@torch.fx.wrap  # one node to an fx tracer: FX quantisation cannot convert a product with a part of a weight
def _project(x: Tensor, weight: Tensor, bias: Tensor, start: int, end: int) -> Tensor:
    return F.linear(x, weight[start:end], bias[start:end])


@torch.fx.wrap
def _project_all(queries: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project queries and tokens. The weight is split once: the gradient of a slice is as large as the whole weight."""
    sizes = queries.shape[-1], 2 * queries.shape[-1]
    query_weight, token_weight = weight.split(sizes)
    query_bias, token_bias = bias.split(sizes)
    keys, values = F.linear(tokens, token_weight, token_bias).chunk(2, dim=-1)
    return F.linear(queries, query_weight, query_bias), keys, values


@torch.fx.wrap
def _attend_with_dropout(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    if _has_fused_dropout(queries):
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return _dropout(scores.softmax(dim=-1), dropout) @ values


class DecoderLayer(nn.Module):
    """Post-norm decoder layer (arXiv 2111.12933, figure 3): queries [B or 1, K, D] to [B, K, D].

    ML-Decoder adds each query to itself where a transformer decoder has self-attention among the queries (section
    2.3.1). Dropout acts on the residual branches, inside the feed-forward network and on the attention weights.
    Parameter names are those of `torch.nn.TransformerDecoderLayer`.

    Args:
        dim: Width D.
        num_heads: Attention heads.
        dim_feedforward: Hidden width of the feed-forward network; 0 leaves it and its norm out.
        dropout: Probability of every dropout.
        self_attention: Whether queries attend to each other, as in a transformer decoder.
        attention_projections: See `Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        self_attention: bool = False,
        attention_projections: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.self_attn = Attention(dim, num_heads, dropout, **factory) if self_attention else None
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.multihead_attn = Attention(dim, num_heads, dropout, attention_projections, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.linear1: Any = None
        self.linear2: Any = None
        self.norm3: Any = None
        if dim_feedforward:
            self.linear1 = nn.Linear(dim, dim_feedforward, **factory)
            self.linear2 = nn.Linear(dim_feedforward, dim, **factory)
            self.norm3 = nn.LayerNorm(dim, **factory)
        self.dropout = Dropout(dropout)
        self.activation = ReLUDropout(dropout)

    def reset_parameters(self) -> None:
        parts: list[Any] = [module for module in self.children() if not isinstance(module, Dropout)]
        for module in parts:
            module.reset_parameters()

    def normalize_queries(self, queries: Tensor) -> Tensor:
        """The first residual block: queries that attend to the tokens, [B or 1, K, D]."""
        residual = queries if self.self_attn is None else self.self_attn(queries, queries)
        return self.norm1(queries + self.dropout(residual))

    def query_side(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """All that does not depend on the tokens: normalized queries, and the same projected for the attention."""
        queries = self.normalize_queries(queries)
        return queries, self.multihead_attn.project_queries(queries)

    def decode(self, queries: Tensor, projected: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The rest of the layer, given `query_side`."""
        return self._after_attention(queries, self.multihead_attn.attend(projected, tokens, mask))

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        queries = self.normalize_queries(queries)
        return self._after_attention(queries, self.multihead_attn(queries, tokens, mask))

    def _after_attention(self, queries: Tensor, attended: Tensor) -> Tensor:
        x = self.norm2(queries + self.dropout(attended))
        if self.linear1 is None:
            return x
        hidden = self.activation(self.linear1(x))
        return self.norm3(x + self.dropout(self.linear2(hidden)))


class GroupFullyConnected(nn.Module):
    """Group fully-connected layer (arXiv 2111.12933, section 2.3.2 and appendix B).

    ``out[b, k, :] = x[b, k, :] @ weight[k]``, flattened, cut to the first C, plus a bias. Class ``c`` belongs to query
    ``c // group_size``.

    Args:
        num_classes: Number of classes C.
        num_queries: Number of queries K, at most C.
        dim: Width D of a query's output.

    Shapes:
        weight [K, D, group_size], bias [C]; input [B, K, D], output [B, C].
    """

    def __init__(self, num_classes: int, num_queries: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.group_size = -(-num_classes // num_queries)
        self.weight = nn.Parameter(torch.empty(num_queries, dim, self.group_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Xavier-normal of the 3-D tensor, as published: each fan also counts the other two dimensions
        num_queries, dim, group_size = self.weight.shape
        nn.init.normal_(self.weight, std=math.sqrt(2.0 / (dim * group_size + num_queries * group_size)))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, label_embeddings: None = None) -> Tensor:
        return grouped_matmul(x, self.weight, self.num_classes) + self.bias

    def extra_repr(self) -> str:
        num_queries, dim, group_size = self.weight.shape
        return f'num_classes={self.num_classes}, num_queries={num_queries}, dim={dim}, group_size={group_size}'


class CosineGroupFullyConnected(GroupFullyConnected):
    """Normalized group fully-connected layer, for metric learning (arXiv 2209.06585, section 3).

    Query outputs and the weight column of each class are L2-normalized; a learned bias is added to the cosine; the sum
    is multiplied by `scale`. Not clamped.
    """

    def __init__(
        self, num_classes: int, num_queries: int, dim: int, scale: float = 1.0, device=None, dtype=None
    ) -> None:
        super().__init__(num_classes, num_queries, dim, device, dtype)
        self.scale = scale

    def forward(self, x: Tensor, label_embeddings: None = None) -> Tensor:
        cosine = grouped_matmul(F.normalize(x, dim=-1), F.normalize(self.weight, dim=1), self.num_classes)
        return self.scale * (cosine + self.bias)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, scale={self.scale}'


class TextClassifier(nn.Module):
    """Base of the classifiers for text queries: outputs [B, K, D] and label embeddings [C, E] to logits [B, C].

    The bias [1] is shared by all classes, so that the number of classes may change.
    """

    def __init__(self, weight_shape: tuple[int, ...], group_size: int, device=None, dtype=None) -> None:
        super().__init__()
        self.group_size = group_size
        self.weight = nn.Parameter(torch.empty(weight_shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.weight)
        nn.init.zeros_(self.bias)

    def group_weights(self, label_embeddings: Tensor, num_queries: int) -> Tensor:
        """Weights of the groups of these classes, [K, D, group_size]."""
        raise NotImplementedError

    def forward(self, x: Tensor, label_embeddings: Tensor) -> Tensor:
        return grouped_matmul(x, self.group_weights(label_embeddings, x.shape[1]), len(label_embeddings)) + self.bias

    def extra_repr(self) -> str:
        return f'weight={list(self.weight.shape)}, group_size={self.group_size}'


class SharedTextClassifier(TextClassifier):
    """One weight [D, group_size] shared by all groups: only the query depends on the class (section 2.3.3)."""

    def group_weights(self, label_embeddings: Tensor, num_queries: int) -> Tensor:
        return self.weight.expand(num_queries, -1, -1)

    def forward(self, x: Tensor, label_embeddings: Tensor) -> Tensor:  # one product for all groups
        return (x @ self.weight).flatten(1)[:, : len(label_embeddings)] + self.bias


class FactorizedTextClassifier(TextClassifier):
    """Group fully-connected weights made from the label embeddings (appendix B, equation 11): W_k = W_a N_k.

    N_k [E, group_size] has the embeddings of the group's classes; `weight` is the learned W_a [D, E].
    """

    def group_weights(self, label_embeddings: Tensor, num_queries: int) -> Tensor:
        return into_groups(F.linear(label_embeddings, self.weight), self.group_size).transpose(1, 2)


class LearnedTextClassifier(TextClassifier):
    """Learned weights [K, D, group_size], one per group: an ablation of appendix B that ignores the group's classes."""

    def group_weights(self, label_embeddings: Tensor, num_queries: int) -> Tensor:
        return self.weight[:num_queries]


def grouped_matmul(x: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """``x[:, k] @ weight[k]`` of x [B, K, D] and weight [K, D, group_size], concatenated and cut: [B, num_classes]."""
    logits = torch.bmm(x.transpose(0, 1), weight)  # [K, B, group_size]
    return logits.transpose(0, 1).flatten(1)[:, :num_classes]
