"""The one-cycle schedule, which is not in timm, in the form of timm's schedulers."""

import math

from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

HIGH_MOMENTUM, LOW_MOMENTUM = 0.95, 0.85


class OneCycleScheduler(Scheduler):
    """One cycle of learning rate and momentum (arXiv 1708.07120), with the values of torch's `OneCycleLR`.

    The learning rate rises by a cosine to its peak and falls by another to nearly zero, while the momentum (the first
    beta of Adam) falls and rises. Unlike torch's, the schedule is a function of the step alone, so that a resumed run
    needs nothing else, and `lr_scale` of layer decay applies.

    Args:
        optimizer: The optimizer; its learning rates are the peaks.
        num_steps: Optimizer steps of the whole run.
        warmup_fraction: Part of the run in which the learning rate rises, in (0, 1).
        div_factor: Peak over first learning rate.
        final_div_factor: First over last learning rate.

    Raises:
        ValueError: If the cycle is too short to rise and fall, or the optimizer has no momentum.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_steps: int,
        warmup_fraction: float = 0.2,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
    ) -> None:
        super().__init__(optimizer, 'lr', t_in_epochs=False)
        self._peak = warmup_fraction * num_steps - 1  # the step with the highest learning rate
        self._last = num_steps - 1
        if not 0 < self._peak < self._last:
            raise ValueError(
                f'--sched onecycle cannot rise and fall within {num_steps} steps and a warm-up fraction of '
                f'{warmup_fraction}: raise --epochs, or change --warmup-epochs'
            )
        if not {'betas', 'momentum'} & optimizer.defaults.keys():
            name = type(optimizer).__name__
            raise ValueError(f'--sched onecycle needs an optimizer with momentum or betas, not {name}')
        self._first_scale = 1 / div_factor
        self._last_scale = self._first_scale / final_div_factor
        self.step_update(0)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set learning rates and momenta for the step that follows `num_updates` others."""
        super().step_update(num_updates, metric)
        momentum = self._value(num_updates, HIGH_MOMENTUM, LOW_MOMENTUM, HIGH_MOMENTUM)
        for group in self.optimizer.param_groups:
            if 'betas' in group:
                group['betas'] = (momentum, *group['betas'][1:])
            else:
                group['momentum'] = momentum

    def _get_lr(self, t: int) -> list[float]:
        scale = self._value(t, self._first_scale, 1.0, self._last_scale)
        return [value * scale for value in self.base_values]

    def _value(self, t: int, first: float, peak: float, last: float) -> float:
        """Return a value that moves from `first` over `peak` to `last`, at step t."""
        t = min(t, self._last)  # timm's loops call step_update once past the end
        if t <= self._peak:
            return _anneal(first, peak, t / self._peak)
        return _anneal(peak, last, (t - self._peak) / (self._last - self._peak))


def _anneal(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
