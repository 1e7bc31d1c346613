"""Losses and gradients that are not finite: the optimizer step is skipped on all ranks, and reported."""

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_mldecoder.distributed.world import World, local

_logger = logging.getLogger(__name__)

REPORT = 'nonfinite.json'


class TrainedBatch(NamedTuple):
    """A batch whose gradients have been computed, until the optimizer step."""

    loss: Tensor  # its mean loss, a scalar on the device
    images: int  # number of its images
    indices: list[int]  # their indices in the dataset; empty for a stream


class Buffers:
    """A copy of the buffers of a model, which a forward pass changes before the step is known to be finite."""

    def __init__(self, model: nn.Module) -> None:
        buffers = list(model.buffers())
        # one call to the device per dtype, not per buffer
        self._groups = [[buffer for buffer in buffers if buffer.dtype == kind] for kind in {b.dtype for b in buffers}]
        self._copies = [[buffer.clone() for buffer in group] for group in self._groups]

    def save(self) -> None:
        """Copy the buffers as they are now."""
        for copies, group in zip(self._copies, self._groups, strict=True):
            torch._foreach_copy_(copies, group)

    def restore(self) -> None:
        """Set the buffers to the copy."""
        for copies, group in zip(self._copies, self._groups, strict=True):
            torch._foreach_copy_(group, copies)


def nonfinite_loss(batches: list[TrainedBatch]) -> Tensor:
    """Return whether a loss is not finite, as a scalar on the device, so that nothing waits for it yet."""
    return ~torch.stack([batch.loss for batch in batches]).isfinite().all()


def nonfinite_gradient(model: nn.Module) -> Tensor | bool:
    """Return whether a gradient is not finite, in the same form."""
    gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    gradients = [gradient for gradient in gradients if gradient.numel()]  # a rank may hold nothing of a short one
    if not gradients:
        return False
    # extremes: unlike a sum of squares they do not overflow where every entry is finite
    if gradients[0].is_cpu:  # where the norm is ten times slower, and takes a tenth of the time of a step
        extremes = [extreme for gradient in gradients for extreme in gradient.aminmax()]
    else:
        extremes = torch._foreach_norm(gradients, math.inf)
    return ~torch.stack(extremes).isfinite().all()


def report(
    folder: Path | None, position: dict[str, int], batches: list[TrainedBatch], dataset: Any, world: World
) -> None:
    """Describe the first step that is not finite in a file of the folder of the run; a collective call."""
    own = [
        {
            'loss': str(batch.loss.item()),  # JSON has neither NaN nor infinity
            'indices': batch.indices,
            'files': [dataset.filename(index) for index in batch.indices] if hasattr(dataset, 'filename') else [],
        }
        for batch in batches
    ]
    ranks = world.all_gather(own)
    if folder is not None and not (folder / REPORT).exists():
        content = {**position, 'ranks': [{'rank': rank, 'batches': each} for rank, each in enumerate(ranks)]}
        (folder / REPORT).write_text(json.dumps(content, indent=2))
        _logger.warning(f'the batches of this step are described in {folder / REPORT}')
