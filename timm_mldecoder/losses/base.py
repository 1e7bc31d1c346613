"""What the multi-label losses share: precision, label smoothing, ignored labels and reduction."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REDUCTIONS = {  # of the loss [B, C] of each entry, and which entries count
    'sum': lambda loss, counts: loss.sum(),  # as published for ASL, CSL and AAM: grows with batch and classes
    'batchmean': lambda loss, counts: loss.sum() / loss.shape[0],
    'mean': lambda loss, counts: loss.sum() / counts.sum().clamp(min=1),  # labels to ignore do not count
    'none': lambda loss, counts: loss,
}


class MultiLabelLoss(nn.Module):
    """Base class of the multi-label losses.

    Args:
        smoothing: Moves annotated targets this far towards 0.5, in [0, 1).
        reduction: One of `REDUCTIONS`.
    """

    def __init__(self, smoothing: float = 0.0, reduction: str = 'sum'):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f'unknown reduction {reduction!r}: choose one of {sorted(REDUCTIONS)}')
        if not 0 <= smoothing < 1:
            raise ValueError(f'label smoothing must be in [0, 1), got {smoothing}')
        self.smoothing = smoothing
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits [B, C] for targets [B, C]: a scalar, or [B, C] for reduction 'none'.

        Raises:
            ValueError: If the shapes differ or are not [B, C].
        """
        return REDUCTIONS[self.reduction](*self.entries(logits, target))

    def entries(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each entry, [B, C], 0 where it is left out, and which are not, bool [B, C]."""
        if logits.dim() != 2 or logits.shape != target.shape:
            raise ValueError(
                f'logits and targets need one shape [B, C], got {list(logits.shape)} and {list(target.shape)}'
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = target.to(logits.dtype)
        unannotated = target < 0
        smooth = target * (1 - self.smoothing) + 0.5 * self.smoothing
        loss = self.elementwise(logits, smooth.masked_fill(unannotated, 0), unannotated)
        left_out = self.left_out(logits.detach(), unannotated)
        return loss.masked_fill(left_out, 0), ~left_out

    def elementwise(self, logits: Tensor, target: Tensor, unannotated: Tensor) -> Tensor:
        """Return the loss of each entry, [B, C]; targets are in [0, 1], and 0 where `unannotated`."""
        raise NotImplementedError

    def left_out(self, logits: Tensor, unannotated: Tensor) -> Tensor:
        """Return which entries add nothing to the loss, bool [B, C]."""
        return unannotated


class RandomQueryLoss(nn.Module):
    """A multi-label loss for a head that adds random text queries in training (arXiv 2111.12933, section 2.3.3).

    Their logits follow those of the classes, and their target is positive.

    Args:
        loss: A loss of logits and targets of one shape.
    """

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits [B, C + random queries] for targets [B, C]."""
        return self.loss(logits, F.pad(target, (0, logits.shape[1] - target.shape[1]), value=1.0))


def power(base: Tensor, exponent: Tensor) -> Tensor:
    """Return ``base ** exponent`` for base >= 0, with a finite gradient for a fractional exponent at base 0."""
    return base.clamp(min=torch.finfo(base.dtype).tiny).pow(exponent)
