"""What the decoder asks the image with: one vector a query."""

import torch
from torch import Tensor, nn


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
        return f'{num_queries}, {dim}, learnable={isinstance(self.weight, nn.Parameter)}'
