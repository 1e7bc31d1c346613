"""Classifiers: from query outputs [B, K, D] to class logits [B, C]."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mldecoder.head.queries import into_groups


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

    def __init__(self, dim: int, group_size: int, device=None, dtype=None) -> None:
        super().__init__((dim, group_size), group_size, device, dtype)

    def group_weights(self, label_embeddings: Tensor, num_queries: int) -> Tensor:
        return self.weight.expand(num_queries, -1, -1)

    def forward(self, x: Tensor, label_embeddings: Tensor) -> Tensor:  # one product for all groups
        return (x @ self.weight).flatten(1)[:, : len(label_embeddings)] + self.bias


class FactorizedTextClassifier(TextClassifier):
    """Group fully-connected weights made from the label embeddings (appendix B, equation 11): W_k = W_a N_k.

    N_k [E, group_size] has the embeddings of the group's classes; `weight` is the learned W_a [D, E].
    """

    def __init__(self, dim: int, group_size: int, embedding_width: int, device=None, dtype=None) -> None:
        super().__init__((dim, embedding_width), group_size, device, dtype)

    def group_weights(self, label_embeddings: Tensor, num_queries: int) -> Tensor:
        return into_groups(F.linear(label_embeddings, self.weight), self.group_size).transpose(1, 2)


class LearnedTextClassifier(TextClassifier):
    """One learned weight [D, group_size] per group: an ablation of appendix B that ignores the group's classes."""

    def __init__(self, num_queries: int, dim: int, group_size: int, device=None, dtype=None) -> None:
        super().__init__((num_queries, dim, group_size), group_size, device, dtype)

    def group_weights(self, label_embeddings: Tensor, num_queries: int) -> Tensor:
        return self.weight[:num_queries]


def grouped_matmul(x: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """``x[:, k] @ weight[k]`` of x [B, K, D] and weight [K, D, group_size], concatenated and cut: [B, num_classes]."""
    logits = torch.bmm(x.transpose(0, 1), weight)  # [K, B, group_size]
    return logits.transpose(0, 1).flatten(1)[:, :num_classes]
