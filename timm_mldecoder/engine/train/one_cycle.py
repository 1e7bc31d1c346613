"""The one-cycle schedule, which timm lacks, in the form of timm's schedulers."""

import math
from argparse import Namespace

from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

HIGH_MOMENTUM, LOW_MOMENTUM = 0.95, 0.85


class OneCycleScheduler(Scheduler):
    """One cycle of learning rate and momentum (arXiv 1708.07120), the same values as torch's `OneCycleLR`.

    The learning rate rises by a cosine to its peak and falls by another to next to nothing, while the momentum (the
    first beta of Adam) falls and rises. Unlike torch's the schedule is a function of the update count alone, so that a
    resumed run needs nothing else, and `lr_scale` of layer-wise decay is heeded.

    Args:
        optimizer: Its learning rates are the peaks.
        num_updates: Optimizer updates of the whole run.
        warmup_fraction: Part of the run in which the learning rate rises, in (0, 1).
        div_factor: Peak over first learning rate.
        final_div_factor: First over last learning rate.

    Raises:
        ValueError: If the cycle is too short to rise and fall, or the optimizer has no momentum.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_updates: int,
        warmup_fraction: float = 0.2,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
    ):
        super().__init__(optimizer, 'lr', t_in_epochs=False)
        self._peak = warmup_fraction * num_updates - 1  # the update with the highest learning rate
        self._last = num_updates - 1
        if not 0 < self._peak < self._last:
            raise ValueError(
                f'One cycle cannot rise and fall within {num_updates} updates and a warm-up fraction of '
                f'{warmup_fraction}: train longer, or change the fraction.'
            )
        if not {'betas', 'momentum'} & optimizer.defaults.keys():
            raise ValueError(f'One cycle takes an optimizer with momentum or betas, not {type(optimizer).__name__}.')
        self._first_scale = 1 / div_factor
        self._last_scale = self._first_scale / final_div_factor
        self.step_update(0)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set learning rates and momenta for the update that follows `num_updates` others."""
        super().step_update(num_updates, metric)
        momentum = self._at(num_updates, HIGH_MOMENTUM, LOW_MOMENTUM, HIGH_MOMENTUM)
        for group in self.optimizer.param_groups:
            if 'betas' in group:
                group['betas'] = (momentum, *group['betas'][1:])
            else:
                group['momentum'] = momentum

    def _get_lr(self, t: int) -> list[float]:
        scale = self._at(t, self._first_scale, 1.0, self._last_scale)
        return [value * scale for value in self.base_values]

    def _at(self, t: int, first: float, peak: float, last: float) -> float:
        """A value that moves from `first` over `peak` to `last`, at update t."""
        t = min(t, self._last)  # timm's loops ask once more when all is over
        if t <= self._peak:
            return _anneal(first, peak, t / self._peak)
        return _anneal(peak, last, (t - self._peak) / (self._last - self._peak))


def _anneal(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


def create_one_cycle(options: Namespace, optimizer: Optimizer, updates_per_epoch: int) -> OneCycleScheduler:
    """One cycle from --warmup-lr over --lr to --min-lr, which peaks after --warmup-epochs."""
    return OneCycleScheduler(
        optimizer,
        num_updates=options.epochs * updates_per_epoch,
        warmup_fraction=options.warmup_epochs / options.epochs,
        div_factor=options.lr / options.warmup_lr if options.warmup_lr else math.inf,
        final_div_factor=options.warmup_lr / options.min_lr if options.min_lr else math.inf,
    )
