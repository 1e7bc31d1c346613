"""Sharpness-aware minimisation (SAM, arXiv 2010.01412): step with gradients taken at the worst nearby weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from timm_mldecoder.train.nonfinite import Buffers


@contextmanager
def perturbed(model: nn.Module, rho: float) -> Iterator[None]:
    """Move the weights of a model by rho g / ||g||, g being their gradients, and restore them bit for bit.

    The gradients are consumed, to make room for those at the perturbed weights; the norm is over all of them, and the
    factor of a loss scaler cancels. If a gradient is not finite, neither are the perturbed weights nor the new
    gradients, and the step is skipped like any non-finite one. BatchNorm statistics are restored too: they belong to
    the weights that stay.

    Args:
        model: The model, its gradients those of all ranks.
        rho: Length of the move, in the units of the weights.
    """
    weights: list[Tensor] = [parameter for parameter in model.parameters() if parameter.grad is not None]
    before = [weight.detach().clone() for weight in weights]
    buffers = Buffers(model)
    with torch.no_grad():
        move = [weight.grad for weight in weights if weight.grad is not None]
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(move)))
        torch._foreach_mul_(move, rho / (length + 1e-12))  # no move where the gradient is 0
        torch._foreach_add_(weights, move)
    model.zero_grad()
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, before)
        buffers.restore()
