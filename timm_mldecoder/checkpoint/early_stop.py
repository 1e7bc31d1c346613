"""Early stop on a smoothed metric, as in the code of arXiv 2209.06585."""

from dataclasses import dataclass

PERFECT = 1e-4  # this close to 1, there is nothing left to improve
SMOOTHING = 0.8  # share of a new best metric in the smoothed one


@dataclass
class EarlyStop:
    """Stop once the metric has not exceeded its smoothed best for some evaluations in a row, or is 1.

    Let m be the larger metric of weights and EMA weights, rounded to 4 decimals. If m is 1 to 1e-4, stop. If m is above
    the smoothed metric s (0 at the start), s becomes 0.8 m + 0.2 s and the count starts again. Otherwise, after
    warm-up, the evaluation counts, and `patience` such evaluations in a row stop the run.

    Raises:
        ValueError: If the patience is below 1.
    """

    patience: int = 5  # evaluations without an improvement that stop the run, at least 1
    smoothed: float = 0.0
    waited: int = 0
    stopped: bool = False  # whether the run is to stop

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f'the patience of early stop must be at least 1, got {self.patience}')

    def step(self, *metrics: float, warmed_up: bool = True) -> bool:
        """Take in the metrics of one evaluation, and return `stopped`.

        Args:
            *metrics: Metric of the weights and, where there are EMA weights, theirs; in [0, 1], or NaN where undefined.
            warmed_up: Whether the warm-up of the learning rate is over.

        Raises:
            ValueError: If a metric is outside [0, 1].
        """
        if any(metric < 0 or metric > 1 for metric in metrics):
            raise ValueError(f'metrics of early stop must be in [0, 1], got {metrics}: divide percentages by 100')
        metric = round(max((metric for metric in metrics if metric == metric), default=0.0), 4)
        if metric > self.smoothed:
            self.smoothed = SMOOTHING * metric + (1 - SMOOTHING) * self.smoothed
            self.waited = 0
        elif warmed_up:
            self.waited += 1
        self.stopped = self.waited >= self.patience or abs(metric - 1) <= PERFECT
        return self.stopped

    def state_dict(self) -> dict[str, float | int]:
        """Return smoothed metric, count and result, for a checkpoint; the patience is an option."""
        return {'smoothed': self.smoothed, 'waited': self.waited, 'stopped': self.stopped}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.smoothed, self.waited = float(state['smoothed']), int(state['waited'])
        self.stopped = bool(state['stopped'])
