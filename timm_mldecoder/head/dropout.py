"""Dropout with little kept for the backward pass: in training the head's memory is mostly what its dropouts keep."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` that keeps a mask of one byte an element on every device; torch's keeps a float on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, train=True)[0] if self.training and self.p > 0 else x


class ReLUDropout(Dropout):
    """ReLU, then dropout, with one mask for both, and nothing of the input or of ReLU's output kept.

    Outside training it works in place: give it a tensor that nobody else reads.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _relu_dropout(x, self.p) if self.training and self.p > 0 else F.relu_(x)


@torch.fx.wrap  # one node to an fx tracer, which knows no autograd functions
def _relu_dropout(x: Tensor, p: float) -> Tensor:
    return _ReLUDropout.apply(x, p)


class _ReLUDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        output = F.relu_(F.dropout(x, p))  # in this order the same, and dropout's own copy is the one to overwrite
        ctx.save_for_backward(output <= 0)
        ctx.scale = 1 / (1 - p)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (blocked,) = ctx.saved_tensors
        return (grad * ctx.scale).masked_fill_(blocked, 0), None  # a product with the mask would make it floats first
