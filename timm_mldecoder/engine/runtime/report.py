"""What a run tells: log lines in timm's form, a progress bar on a terminal, `summary.csv`, the result as JSON."""

import csv
import io
import json
import logging
import math
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationEvaluator

from timm_mldecoder.engine.checkpoint.files import write_atomically

_logger = logging.getLogger(__name__)

Metrics = dict[str, float]


class Stopwatch:
    """Times of the updates of an epoch: the last one, and the mean of all."""

    def __init__(self) -> None:
        self.now = self.wait_now = self.total = self.wait_total = 0.0
        self.updates = self.images = self.images_now = 0
        self._wait = 0.0
        self._images = 0
        self._mark = self._update_mark = time.perf_counter()

    def batch_arrived(self) -> None:
        """A batch has come out of the loader."""
        self._wait += time.perf_counter() - self._mark

    def batch_done(self, images: int) -> None:
        """A batch has been trained on; the wait for the next one begins."""
        self._images += images
        self._mark = time.perf_counter()

    def update_done(self) -> None:
        """An update has been made."""
        self._mark = time.perf_counter()
        self.now, self._update_mark = self._mark - self._update_mark, self._mark
        self.wait_now, self._wait = self._wait, 0.0
        self.images_now, self._images = self._images, 0
        self.total += self.now
        self.wait_total += self.wait_now
        self.images += self.images_now
        self.updates += 1

    def line(self, world_size: int) -> tuple[str, str]:
        """Time and speed of all processes, and the wait for data, as the log line shows them."""
        mean, wait_mean = self.total / self.updates, self.wait_total / self.updates
        speed, mean_speed = (
            world_size * n / max(t, 1e-9) for n, t in ((self.images_now, self.now), (self.images, self.total))
        )
        timing = f'Time: {self.now:.3f}s, {speed:>7.2f}/s  ({mean:.3f}s, {mean_speed:>7.2f}/s)'
        waiting = f'Data: {self.wait_now:.3f} ({wait_mean:.3f})  Wait: {wait_mean / max(mean, 1e-9):.0%}'
        return timing, waiting


class ProgressBar:
    """A line on a terminal that is written over; nothing at all where stderr is a file."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._next = 0.0

    def show(self, label: str, done: int, total: int) -> None:
        """Draw `done` of `total`, at most ten times a second."""
        if not self._enabled or (time.monotonic() < self._next and done < total):
            return
        self._next = time.monotonic() + 0.1
        width = max(10, min(40, shutil.get_terminal_size().columns - len(label) - 24))
        filled = width * done // max(total, 1)
        sys.stderr.write(f'\r{label} [{"#" * filled}{"." * (width - filled)}] {done}/{total} ')
        if done >= total:
            self.clear()
        sys.stderr.flush()

    def clear(self) -> None:
        """Make room for a log line."""
        if self._enabled:
            sys.stderr.write('\r\033[K')


def train_line(
    epoch: int,
    update: int,
    updates: int,
    loss: tuple[float, float],
    lr: float,
    watch: Stopwatch,
    world_size: int,
    device: torch.device,
) -> str:
    """A training log line: timm's, and the share of time spent waiting for data, and the peak of memory."""
    timing, waiting = watch.line(world_size)
    return (
        f'Train: {epoch} [{update:>4d}/{updates} ({100.0 * (update + 1) / updates:>3.0f}%)]  '
        f'Loss: {loss[0]:#.3g} ({loss[1]:#.3g})  {timing}  LR: {lr:.3e}  {waiting}  Mem: {peak_memory(device)}'
    )


def eval_line(name: str, batch: int, last: int, seconds: tuple[float, float], metrics: Metrics) -> str:
    """An evaluation log line, with what the evaluator can tell so far."""
    names = {'loss': 'Loss', 'top1': 'Acc@1', 'top5': 'Acc@5'}
    shown = '  '.join(f'{names.get(key, key)}: {value:>7.3f}' for key, value in metrics.items())
    return f'{name}: [{batch:>4d}/{last}]  Time: {seconds[0]:.3f} ({seconds[1]:.3f})  {shown}'


class EvalReport:
    """Tells the progress of an evaluation; called after every batch.

    Args:
        name: What is evaluated.
        evaluator: Knows the metrics so far.
        batches: Batches of the split.
        interval: Batches between log lines.
        bar: Where progress is drawn.
        primary: Whether this process logs at all.
    """

    def __init__(
        self,
        name: str,
        evaluator: ClassificationEvaluator,
        batches: int,
        interval: int,
        bar: ProgressBar,
        primary: bool,
    ) -> None:
        self._name, self._evaluator = name, evaluator
        self._last, self._interval, self._bar, self._primary = batches - 1, interval, bar, primary
        self._begin = self._mark = time.perf_counter()

    def __call__(self, batch: int, output: torch.Tensor, target: torch.Tensor) -> None:
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self._bar.show(self._name, batch + 1, self._last + 1)
        if self._primary and (batch == self._last or batch % self._interval == 0):
            mean = (now - self._begin) / (batch + 1)
            self._bar.clear()
            _logger.info(eval_line(self._name, batch, self._last, (seconds, mean), self._evaluator.summary()))


def peak_memory(device: torch.device) -> str:
    """The most memory used so far: of the device, or of the process on a CPU."""
    if device.type == 'cuda':
        used = torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == 'darwin' else 1024
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f'{used / 2**20:.0f}MB'


def summary_row(epoch: int, train: Metrics, validation: Metrics | None, lr: float) -> Metrics:
    """The metrics of an epoch, named as in timm's `summary.csv`."""
    return {
        'epoch': epoch,
        **{f'train_{name}': value for name, value in train.items()},
        **{f'eval_{name}': value for name, value in (validation or {}).items()},
        'lr': lr,
    }


def write_summary(path: Path, rows: list[Metrics]) -> None:
    """Write every epoch so far, each once, under one header."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: name == 'lr')  # last, as in timm's
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def read_summary(path: Path, before: int) -> list[Metrics]:
    """The epochs of a summary that came before one; none where there is no such file."""
    if not path.exists():
        return []
    with open(path, newline='') as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [dict(row, epoch=int(row['epoch'])) for row in rows if row['epoch'] < before]


def print_result(rows: list[dict[str, Any]], metric: str, decreasing: bool) -> None:
    """Print the ten best epochs, the best last, as timm's sweep tools read them."""
    results = []
    for row in rows:
        parts = {'train': {}, 'eval': {}}
        for name, value in row.items():
            kind, _, rest = name.partition('_')
            if kind in parts:
                parts[kind][rest] = value
        result = {'epoch': row['epoch'], 'train': parts['train']}
        results.append({**result, 'validation': parts['eval']} if parts['eval'] else result)

    def rank(result: dict[str, Any]) -> float:
        value = result.get('validation', result['train']).get(metric, math.nan)
        return -math.inf if math.isnan(value) else -value if decreasing else value

    print(f'--result\n{json.dumps(sorted(results, key=rank)[-10:], indent=4)}')
