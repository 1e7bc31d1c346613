"""The decoder layer: queries attend to the image's tokens; no self-attention among queries."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mldecoder.head.dropout import Dropout, ReLUDropout


class CrossAttention(nn.Module):
    """Multi-head attention of queries [B or 1, K, D] to memory [B, N, D]; output [B, K, D].

    A mask [B, N] is False where no query may look.
    The input projections of query, key and value are stacked in that order, as in ``torch.nn.MultiheadAttention``.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, device=None, dtype=None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim, device=device, dtype=dtype))
        self.out_proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        self.out_proj.reset_parameters()
        nn.init.zeros_(self.out_proj.bias)

    def project(self, queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as [B or 1, heads, K or N, D / heads]; key and value in one matrix product."""
        return _project(queries, memory, self.in_proj_weight, self.in_proj_bias, self.num_heads)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.project(queries, memory)
        query = query.expand(memory.shape[0], -1, -1, -1)  # key's batch size is a constant to timm's ONNX exporter
        mask = None if mask is None else mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(output.transpose(1, 2).flatten(2))

    def attention_weights(self, queries: Tensor, memory: Tensor) -> Tensor:
        """What each query looks at, [B, K, N], the mean over heads; rows sum to 1."""
        query, key, _ = self.project(queries, memory)
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        return scores.softmax(dim=-1).mean(dim=1)


@torch.fx.wrap  # one node to an fx tracer: FX quantisation cannot convert a product with a part of a weight
def _project(queries: Tensor, memory: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    dim = queries.shape[-1]
    query_weight, memory_weight = weight.split([dim, 2 * dim])
    query_bias, memory_bias = bias.split([dim, 2 * dim])
    query = F.linear(queries, query_weight, query_bias)
    key, value = F.linear(memory, memory_weight, memory_bias).chunk(2, dim=-1)
    return tuple(x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))


class DecoderLayer(nn.Module):
    """Post-norm decoder layer without self-attention (arXiv 2111.12933, figure 3): queries to [B, K, D].

    Dropout acts on the residual branches, inside the feed-forward and on the attention weights.
    """

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, device=None, dtype=None) -> None:
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.multihead_attn = CrossAttention(dim, num_heads, dropout, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.linear1 = nn.Linear(dim, dim_feedforward, **factory)
        self.linear2 = nn.Linear(dim_feedforward, dim, **factory)
        self.norm3 = nn.LayerNorm(dim, **factory)
        self.dropout = Dropout(dropout)
        self.activation = ReLUDropout(dropout)

    def reset_parameters(self) -> None:
        for module in (self.norm1, self.multihead_attn, self.norm2, self.linear1, self.linear2, self.norm3):
            module.reset_parameters()

    def ask(self, queries: Tensor) -> Tensor:
        """What stands where a decoder has self-attention: the query added to itself, normalised."""
        return self.norm1(queries + self.dropout(queries))

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.ask(queries)
        x = self.norm2(x + self.dropout(self.multihead_attn(x, memory, mask)))
        hidden = self.activation(self.linear1(x))
        return self.norm3(x + self.dropout(self.linear2(hidden)))
