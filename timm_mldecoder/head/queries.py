"""What the decoder asks the image with: one vector a query."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Queries(nn.Module):
    """K query vectors drawn once from N(0, 1): fixed as published (arXiv 2111.12933, section 2.3.1), or learned.

    Args:
        num_queries: number of queries K.
        dim: width D of a query.
        learnable: train the queries; otherwise they are a buffer, saved with the model and never changed.
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

    def forward(self) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        num_queries, dim = self.weight.shape
        return f'num_queries={num_queries}, dim={dim}, learnable={isinstance(self.weight, nn.Parameter)}'


class WordQueries(nn.Module):
    """A query for each label (full decoding, section 2.3.3): ReLU of the projected label embedding, [C, E] to [C, D].

    Where E = D there is nothing to project.
    """

    def __init__(self, width: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Identity() if width == dim else nn.Linear(width, dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        if isinstance(self.proj, nn.Linear):
            self.proj.reset_parameters()

    def forward(self, words: Tensor) -> Tensor:
        return F.relu(self.proj(words))


class WordGroupQueries(nn.Module):
    """A query for each group of labels (appendix B, equation 10): [C, E] to [ceil(C / group_size), D].

    One projection, E to D / group_size, acts on every label; those of a group stand side by side. D is cut where it is
    no multiple of the group size, and a last group that is not full has zeros for the missing labels.
    """

    def __init__(self, width: int, dim: int, group_size: int, device=None, dtype=None) -> None:
        super().__init__()
        self.dim = dim
        self.group_size = group_size
        self.proj = nn.Linear(width, -(-dim // group_size), device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.proj.reset_parameters()

    def forward(self, words: Tensor) -> Tensor:
        return self.proj(in_groups(words, self.group_size)).flatten(1)[:, : self.dim]

    def extra_repr(self) -> str:
        return f'dim={self.dim}, group_size={self.group_size}'


class LearnedGroupQueries(Queries):
    """An ablation of appendix B: a trained vector for each group of labels, blind to which labels they are."""

    def __init__(self, num_queries: int, dim: int, group_size: int, device=None, dtype=None) -> None:
        super().__init__(num_queries, dim, True, device, dtype)
        self.group_size = group_size

    def forward(self, words: Tensor) -> Tensor:
        return self.weight[: -(-len(words) // self.group_size)]


def in_groups(words: Tensor, group_size: int) -> Tensor:
    """Label embeddings [C, E] as [ceil(C / group_size), group_size, E], zeros in the places left over."""
    missing = -len(words) % group_size
    return F.pad(words, (0, 0, 0, missing)).unflatten(0, (-1, group_size))
