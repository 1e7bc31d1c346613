"""Sharpness-aware minimisation (SAM, arXiv 2010.01412): an update goes by the gradients of a worse place nearby."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from timm_mldecoder.engine.train.nonfinite import Buffers


@contextmanager
def ascended(model: nn.Module, rho: float) -> Iterator[None]:
    """Move the weights of a model by rho g / ||g||, g being their gradients, and put them back to the last bit.

    The gradients are used up, to make room for those of the place there; their norm is over all of them. What a loss
    scaler has multiplied them by does not matter. Where one is not finite, neither are the weights within, nor what is
    computed with them, and the update will be left out as any such update.

    Running statistics are put back too: they are to be those of the weights that stay.

    Args:
        model: The model, its gradients those of all processes.
        rho: Length of the step, in the units of the weights.
    """
    weights = [parameter for parameter in model.parameters() if parameter.grad is not None]
    before = [weight.detach().clone() for weight in weights]
    buffers = Buffers(model)
    with torch.no_grad():
        step = [weight.grad for weight in weights]
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(step)))
        torch._foreach_mul_(step, rho / (length + 1e-12))  # no step at all from where they are 0
        torch._foreach_add_(weights, step)
    model.zero_grad()
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, before)
        buffers.put_back()
