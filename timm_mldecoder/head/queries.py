"""Decoder queries: fixed, learned, or built from label embeddings."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Queries(nn.Module):
    """K query vectors drawn from N(0, 1): fixed as published (arXiv 2111.12933, section 2.3.1), or learned.

    Args:
        num_queries: Number of queries K.
        dim: Width D of a query.
        learnable: Whether the queries are trained; otherwise they are a buffer, saved with the model.
    """

    def __init__(self, num_queries: int, dim: int, learnable: bool = False, device=None, dtype=None) -> None:
        super().__init__()
        weight = torch.empty(num_queries, dim, device=device, dtype=dtype)
        if learnable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer('weight', weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, label_embeddings: None = None) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        num_queries, dim = self.weight.shape
        return f'num_queries={num_queries}, dim={dim}, learnable={isinstance(self.weight, nn.Parameter)}'


class TextQueries(nn.Module):
    """One query per class (full decoding, section 2.3.3): ReLU of the projected label embedding, [C, E] to [C, D].

    If E = D, there is no projection.
    """

    def __init__(self, embedding_width: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        same = embedding_width == dim
        self.proj = nn.Identity() if same else nn.Linear(embedding_width, dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        if isinstance(self.proj, nn.Linear):
            self.proj.reset_parameters()

    def forward(self, label_embeddings: Tensor) -> Tensor:
        return F.relu(self.proj(label_embeddings))


class TextGroupQueries(nn.Module):
    """One query per group of classes (appendix B, equation 10): [C, E] to [ceil(C / group_size), D].

    One projection, E to ceil(D / group_size), acts on every class; the results of a group are concatenated and cut to
    D. Classes missing in the last group have zero embeddings, so that their places hold the bias of the projection.
    """

    def __init__(self, embedding_width: int, dim: int, group_size: int, device=None, dtype=None) -> None:
        super().__init__()
        self.dim = dim
        self.group_size = group_size
        self.proj = nn.Linear(embedding_width, -(-dim // group_size), device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.proj.reset_parameters()

    def forward(self, label_embeddings: Tensor) -> Tensor:
        return self.proj(into_groups(label_embeddings, self.group_size)).flatten(1)[:, : self.dim]

    def extra_repr(self) -> str:
        return f'dim={self.dim}, group_size={self.group_size}'


class LearnedGroupQueries(Queries):
    """One learned vector per group of classes: an ablation of appendix B that ignores which classes a group has."""

    def __init__(self, num_queries: int, dim: int, group_size: int, device=None, dtype=None) -> None:
        super().__init__(num_queries, dim, True, device, dtype)
        self.group_size = group_size

    def forward(self, label_embeddings: Tensor) -> Tensor:  # type: ignore[override]
        return self.weight[: -(-len(label_embeddings) // self.group_size)]


def into_groups(label_embeddings: Tensor, group_size: int) -> Tensor:
    """Reshape [C, E] to [ceil(C / group_size), group_size, E], padded with zeros."""
    missing = -len(label_embeddings) % group_size
    return F.pad(label_embeddings, (0, 0, 0, missing)).unflatten(0, (-1, group_size))
