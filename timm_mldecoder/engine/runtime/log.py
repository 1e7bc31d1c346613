"""Log lines in timm's form, step timing, and a progress bar on a terminal."""

import logging
import sys
import time
from dataclasses import dataclass

import torch
from timm.task import ClassificationEvaluator
from tqdm import tqdm

from timm_mldecoder.engine.runtime.memory import peak_memory

_logger = logging.getLogger(__name__)


class StepTimer:
    """Times of the optimizer steps of an epoch: the last one, and the mean of all."""

    def __init__(self) -> None:
        self.seconds = self.wait = self.total_seconds = self.total_wait = 0.0
        self.steps = self.images = self.total_images = 0
        self._wait = 0.0
        self._images = 0
        self._batch_mark = self._step_mark = time.perf_counter()

    def batch_arrived(self) -> None:
        """Record that the loader has delivered a batch."""
        self._wait += time.perf_counter() - self._batch_mark

    def batch_done(self, images: int) -> None:
        """Record that a batch was trained on; the wait for the next one begins."""
        self._images += images
        self._batch_mark = time.perf_counter()

    def step_done(self) -> None:
        """Record the end of an optimizer step."""
        self._batch_mark = time.perf_counter()
        self.seconds, self._step_mark = self._batch_mark - self._step_mark, self._batch_mark
        self.wait, self._wait = self._wait, 0.0
        self.images, self._images = self._images, 0
        self.total_seconds += self.seconds
        self.total_wait += self.wait
        self.total_images += self.images
        self.steps += 1

    def line(self, world_size: int) -> tuple[str, str]:
        """Return the part of timm's log line about time and images/s of all ranks, and the part about data."""
        mean, mean_wait = self.total_seconds / self.steps, self.total_wait / self.steps
        speed = world_size * self.images / max(self.seconds, 1e-9)
        mean_speed = world_size * self.total_images / max(self.total_seconds, 1e-9)
        timing = f'Time: {self.seconds:.3f}s, {speed:>7.2f}/s  ({mean:.3f}s, {mean_speed:>7.2f}/s)'
        waiting = f'Data: {self.wait:.3f} ({mean_wait:.3f})  Wait: {mean_wait / max(mean, 1e-9):.0%}'
        return timing, waiting


def progress_bar(label: str, total: int, primary: bool) -> tqdm:
    """Return a progress bar that is drawn on a terminal only, and removed when it is full."""
    return tqdm(total=total, desc=label, leave=False, disable=not (primary and sys.stderr.isatty()), dynamic_ncols=True)


def log_above(bar: tqdm, line: str) -> None:
    """Log a line above a progress bar."""
    bar.clear()
    _logger.info(line)
    bar.refresh()


def train_line(
    epoch: int, step: int, steps: int, loss: tuple[float, float], lr: float, timer: StepTimer, device: torch.device,
    world_size: int,
) -> str:  # fmt: skip
    """Return timm's training log line, with the share of time spent waiting for data and the peak of memory."""
    timing, waiting = timer.line(world_size)
    return (
        f'Train: {epoch} [{step:>4d}/{steps} ({100.0 * (step + 1) / steps:>3.0f}%)]  '
        f'Loss: {loss[0]:#.3g} ({loss[1]:#.3g})  {timing}  LR: {lr:.3e}  {waiting}  Mem: {peak_memory(device)}'
    )


@dataclass
class EvalLog:
    """Logs the progress of an evaluation, with the metrics so far; called after every batch."""

    NAMES = {'loss': 'Loss', 'top1': 'Acc@1', 'top5': 'Acc@5'}

    label: str
    evaluator: ClassificationEvaluator  # knows the metrics so far
    batches: int  # of the split
    interval: int  # batches between log lines
    primary: bool  # whether this rank logs

    def __post_init__(self) -> None:
        self._bar = progress_bar(self.label, self.batches, self.primary)
        self._begin = self._mark = time.perf_counter()

    def __call__(self, batch: int) -> None:
        now, last = time.perf_counter(), self.batches - 1
        seconds, self._mark = now - self._mark, now
        self._bar.update()
        if self.primary and (batch == last or batch % self.interval == 0):
            found = self.evaluator.summary().items()
            metrics = '  '.join(f'{self.NAMES.get(name, name)}: {value:>7.3f}' for name, value in found)
            times = f'{seconds:.3f} ({(now - self._begin) / (batch + 1):.3f})'
            log_above(self._bar, f'{self.label}: [{batch:>4d}/{last}]  Time: {times}  {metrics}')
        if batch == last:
            self._bar.close()
