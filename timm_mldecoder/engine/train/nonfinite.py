"""Losses and gradients that are not finite: the update is left out on all processes, and told."""

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from timm_mldecoder.engine.runtime.failure import RunFailed

_logger = logging.getLogger(__name__)

SKIP, ABORT = POLICIES = ('skip', 'abort')
FILE = 'nonfinite.json'


class TrainedBatch(NamedTuple):
    """What is known of a batch whose gradients have been computed, until its update is made.

    Attributes:
        loss: Its mean loss, a scalar on the device.
        images: How many it has.
        indices: Those of its images in the data set; empty for a streamed one.
    """

    loss: Tensor
    images: int
    indices: list[int]


class Buffers:
    """A copy of the buffers of a model, which a forward pass changes before it is known to be of any use."""

    def __init__(self, model: nn.Module) -> None:
        buffers = list(model.buffers())
        # one call for all of a kind is a call to the device for dozens of buffers, not for each
        self._kinds = [[buffer for buffer in buffers if buffer.dtype == kind] for kind in {b.dtype for b in buffers}]
        self._copies = [[buffer.clone() for buffer in kind] for kind in self._kinds]

    def keep(self) -> None:
        """Copy the buffers as they are now."""
        for copies, kind in zip(self._copies, self._kinds, strict=True):
            torch._foreach_copy_(copies, kind)

    def put_back(self) -> None:
        """Set the buffers to the copy."""
        for copies, kind in zip(self._copies, self._kinds, strict=True):
            torch._foreach_copy_(kind, copies)


def spoilt_loss(batches: list[TrainedBatch]) -> Tensor:
    """Whether a loss is not finite: a scalar on the device, so that nothing has waited for it yet."""
    return ~torch.stack([batch.loss for batch in batches]).isfinite().all()


def spoilt_gradient(model: nn.Module) -> Tensor | bool:
    """Whether a gradient is not finite, in the same form."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients:
        return False
    # the extremes: unlike a sum of squares they do not overflow where every entry is finite
    if gradients[0].is_cpu:  # where the norm is a tenth as fast, and takes a tenth of the time of a step
        extremes = [extreme for gradient in gradients for extreme in gradient.aminmax()]
    else:
        extremes = torch._foreach_norm(gradients, math.inf)
    return ~torch.stack(extremes).isfinite().all()


def check_limit(in_a_row: int, limit: int, where: str) -> None:
    """Raise a `RunFailed` once `limit` updates in a row have been left out."""
    if in_a_row >= limit:
        raise RunFailed(
            f'{where}: loss or gradients not finite for {in_a_row} updates in a row (--nonfinite-limit); '
            f'no parameter has been changed by them. A lower --lr, --clip-grad or longer warm-up may help'
        )


def report(folder: Path | None, where: dict[str, Any], batches: list[TrainedBatch], dataset: Any) -> None:
    """Write down what it takes to look at the first update that is not finite; a collective call.

    Args:
        folder: Where `nonfinite.json` goes; None on all but the first process.
        where: Epoch and update.
        batches: Those of the update, on this process.
        dataset: Knows the files of the images, where they are files.
    """
    own = [
        {
            'loss': str(batch.loss.item()),  # JSON has neither NaN nor infinity
            'indices': batch.indices,
            'files': [dataset.filename(index) for index in batch.indices] if hasattr(dataset, 'filename') else [],
        }
        for batch in batches
    ]
    ranks: list[Any] = [own]
    if dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
    if folder is not None and not (folder / FILE).exists():
        content = {**where, 'ranks': [{'rank': rank, 'batches': each} for rank, each in enumerate(ranks)]}
        (folder / FILE).write_text(json.dumps(content, indent=2))
        _logger.warning('The batches of this update are described in %s', folder / FILE)
