"""Group fully-connected: each query's output gives the logits of its own group of classes."""

import math

import torch
from torch import Tensor, nn


class GroupFullyConnected(nn.Module):
    """K query outputs to C class logits (arXiv 2111.12933, section 2.3.2 and appendix B).

    ``out[b, k, :] = x[b, k, :] @ weight[k]``, flattened, cut to the first C, plus a bias. Class ``c`` is read from
    query ``c // group_size``.

    Args:
        num_classes: number of classes C.
        num_queries: number of queries K, at most C.
        dim: width D of a query's output.

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
        # Xavier-normal of the 3-D tensor, as published: the fans count the other two dimensions together.
        num_queries, dim, group_size = self.weight.shape
        nn.init.normal_(self.weight, std=math.sqrt(2.0 / (dim * group_size + num_queries * group_size)))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.bmm(x.transpose(0, 1), self.weight)  # [K, B, group_size]
        return logits.transpose(0, 1).flatten(1)[:, : self.num_classes] + self.bias

    def extra_repr(self) -> str:
        num_queries, dim, group_size = self.weight.shape
        return f'num_classes={self.num_classes}, num_queries={num_queries}, dim={dim}, group_size={group_size}'
