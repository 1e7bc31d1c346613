"""Log lines in timm's form, step timing, and a progress bar on a terminal."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from timm.task import ClassificationEvaluator
from timm.utils.distributed import world_info_from_env
from tqdm import tqdm

_logger = logging.getLogger(__name__)
T = TypeVar('T')


def logged(label: str, items: Iterable[T], total: int, seconds: float = 10.0) -> Iterator[T]:
    """Yield items, and log how many of a total are done every few seconds, with or without a terminal."""
    start = mark = time.perf_counter()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        if now - mark >= seconds:
            mark, elapsed = now, now - start
            left = elapsed / number * (total - number)
            _logger.info(f'{label}: [{number}/{total}]  {elapsed:.0f} s, about {left:.0f} s to go')


@contextmanager
def warnings_of_first_rank() -> Iterator[None]:
    """Leave what every rank finds alike, such as copies in a dataset, to the first rank: the others log errors only."""
    before = logging.root.manager.disable
    if world_info_from_env()[1] != 0:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class StepTimer:
    """Times of the optimizer steps of an epoch: the last one, and the mean of all."""

    def __init__(self) -> None:
        self._start = self._mark = time.perf_counter()
        self._wait, self._images, self._steps = 0.0, 0, 0
        # seconds, seconds of waiting and images up to the last step, and up to the one before
        self._now = self._before = (0.0, 0.0, 0)

    def batch_arrived(self) -> None:
        """Record that the loader has delivered a batch."""
        self._wait += time.perf_counter() - self._mark

    def batch_done(self, images: int) -> None:
        """Record that a batch was trained on; the wait for the next one begins."""
        self._images += images
        self._mark = time.perf_counter()

    def step_done(self) -> None:
        """Record the end of an optimizer step."""
        self._mark = time.perf_counter()
        self._before, self._now = self._now, (self._mark - self._start, self._wait, self._images)
        self._steps += 1

    def line(self, world_size: int) -> tuple[str, str]:
        """Return the part of timm's log line about time and images/s of all ranks, and the part about data."""
        seconds, wait, images = (now - before for now, before in zip(self._now, self._before, strict=True))
        speed, mean_speed = (world_size * n / max(t, 1e-9) for t, n in ((seconds, images), self._now[::2]))
        mean, mean_wait = (total / self._steps for total in self._now[:2])
        timing = f'Time: {seconds:.3f}s, {speed:>7.2f}/s  ({mean:.3f}s, {mean_speed:>7.2f}/s)'
        return timing, f'Data: {wait:.3f} ({mean_wait:.3f})  Wait: {mean_wait / max(mean, 1e-9):.0%}'


def progress_bar(label: str, total: int, primary: bool) -> tqdm:
    """Return a progress bar that is drawn on a terminal only, and removed when it is full."""
    return tqdm(total=total, desc=label, leave=False, disable=not (primary and sys.stderr.isatty()), dynamic_ncols=True)


def log_above(bar: tqdm, line: str) -> None:
    """Log a line above a progress bar."""
    bar.clear()
    _logger.info(line)
    bar.refresh()


def peak_memory(device: torch.device) -> str:
    """Return the peak of memory so far, in MB: of the device, or of the process on a CPU."""
    if device.type == 'cuda':
        used = torch.cuda.max_memory_allocated(device)
    else:
        import resource  # POSIX only

        unit = 1 if sys.platform == 'darwin' else 1024
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f'{used / 2**20:.0f}MB'


def train_line(
    epoch: int, step: int, steps: int, values: list[float], clipped: bool, lr: float, timer: StepTimer,
    device: torch.device, world_size: int,
) -> str:  # fmt: skip
    """Return timm's training log line, with the share of time spent waiting for data and the peak of memory.

    `values` are the loss, and the means over the epoch so far of the loss and of the gradient norm before clipping.
    """
    gradient = f'  Grad: {values[2]:#.3g}' if clipped else ''
    timing, waiting = timer.line(world_size)
    return (
        f'Train: {epoch} [{step:>4d}/{steps} ({100.0 * (step + 1) / steps:>3.0f}%)]  '
        f'Loss: {values[0]:#.3g} ({values[1]:#.3g}){gradient}  {timing}  LR: {lr:.3e}  {waiting}  '
        f'Mem: {peak_memory(device)}'
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
