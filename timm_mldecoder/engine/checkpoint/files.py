"""Checkpoint files: written whole or not at all, and ranked by metric; `weights.read_checkpoint` reads them.

timm's saver unlinks the old file before it moves the new one into place, and ranks a NaN first: it is not used here.
The layout is timm's, and its `load_checkpoint` and resume read these files.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_logger = logging.getLogger(__name__)

SUFFIX = '.pth.tar'
LAST, BEST = 'last' + SUFFIX, 'model_best' + SUFFIX
Progress = tuple[int, int]  # epochs done, and batches of the next
_NUMBERS = {'checkpoint': 1, 'milestone': 1, 'recovery': 2}  # in the names of each kind


def progress_by_name(path: Path) -> Progress | None:
    """How far a checkpoint is, None where its name does not tell."""
    kind, *numbers = path.name.removesuffix(SUFFIX).split('-')
    if len(numbers) != _NUMBERS.get(kind) or not all(number.isdecimal() for number in numbers):
        return None
    epoch, batch = int(numbers[0]), int(numbers[-1])
    return {'checkpoint': (epoch + 1, 0), 'milestone': (epoch, 0), 'recovery': (epoch, batch)}[kind]


def numbered(folder: Path) -> list[Path]:
    """The checkpoints whose names tell how far they are, the furthest first."""
    paths = [path for path in folder.glob(f'*{SUFFIX}') if progress_by_name(path) is not None]
    return sorted(paths, key=progress_by_name, reverse=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints of a run."""
    return [*numbered(folder), *(path for path in (folder / LAST, folder / BEST) if path.exists())]


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Let `write` fill a file that takes the place of `path` only once all of it is on the disk.

    Raises:
        OSError: If any step fails; `path` is then as it was.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns a failed write into a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).partition('\n')[0]
        raise OSError(f'could not write {path}: {reason}; the file is as it was') from error


class CheckpointFolder:
    """The checkpoints of a run: the last, the best, the best few, and those within an epoch.

    Args:
        folder: Where they are kept.
        decreasing: Whether a lower metric is better.
        max_history: How many numbered checkpoints to keep.
        metric: Name of the metric that ranks them.
    """

    def __init__(self, folder: Path, decreasing: bool = False, max_history: int = 10, metric: str = '') -> None:
        self.folder = folder
        self.metric = metric
        self.decreasing = decreasing
        self.max_history = max_history
        self.ranked: list[tuple[str, float]] = []  # (file name, metric), best first
        self.best_metric: float | None = None
        self.best_epoch: int | None = None

    def save_epoch(self, epoch: int, metric: float, content: Callable[[], dict[str, Any]]) -> None:
        """Save the end of an epoch, as the last checkpoint and by its rank.

        `last` is replaced at the very end: a run that is killed on the way goes on from the one before, and comes to
        the same files again.

        Args:
            epoch: Index of the epoch that ended.
            metric: What ranks it; a NaN ranks last.
            content: Called for what to save, once the history includes this epoch.
        """
        name = f'checkpoint-{epoch}{SUFFIX}'
        kept, dropped = self._rank(name, metric)
        is_best = self.best_metric is None or self.sort_key(metric) < self.sort_key(self.best_metric)
        if is_best:
            self.best_metric, self.best_epoch = metric, epoch
        self.ranked = kept

        pending = self.folder / f'pending{SUFFIX}'
        write_atomically(pending, lambda file: torch.save(content(), file))
        if any(kept_name == name for kept_name, _ in kept):
            _duplicate(pending, self.folder / name)
        if is_best:
            _duplicate(pending, self.folder / BEST)
        os.replace(pending, self.folder / LAST)
        _sync_folder(self.folder)
        for old in dropped:
            (self.folder / old).unlink(missing_ok=True)
        for recovery in self.recoveries():
            recovery.unlink(missing_ok=True)
        _logger.info('Current checkpoints:\n' + ''.join(f' {entry}\n' for entry in self.ranked))

    def save_recovery(self, epoch: int, batch: int, content: Callable[[], dict[str, Any]]) -> Path:
        """Save a position within an epoch, and return its path; the furthest of the other such files is kept, too."""
        path = self.folder / f'recovery-{epoch}-{batch}{SUFFIX}'
        write_atomically(path, lambda file: torch.save(content(), file))
        for old in [other for other in self.recoveries() if other != path][1:]:
            old.unlink(missing_ok=True)
        return path

    def save_milestone(self, epochs: int) -> None:
        """Keep the last checkpoint for good, under the number of epochs done."""
        _duplicate(self.folder / LAST, self.folder / f'milestone-{epochs}{SUFFIX}')

    def recoveries(self) -> list[Path]:
        """The checkpoints within an epoch, the furthest first."""
        return [path for path in numbered(self.folder) if path.name.startswith('recovery')]

    def state_dict(self) -> dict[str, Any]:
        """The history, in the form of timm's saver."""
        return dict(
            checkpoint_files=list(self.ranked),
            best_epoch=self.best_epoch,
            best_metric=self.best_metric,
            pending=(None, None),
            metric=self.metric,
        )

    def ranks_like(self, state: dict[str, Any]) -> bool:
        """Whether a history was ranked by the same metric, as far as it tells: timm's does not."""
        return state.get('metric', self.metric) == self.metric

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Take over the history of the run that saved into `folder`, and its best checkpoint where none is here."""
        if not self.ranks_like(state):
            _logger.warning(
                'The checkpoints so far are ranked by %s, those to come by %s: the ranking starts anew, '
                'and the numbered checkpoints so far are kept',
                state['metric'],
                self.metric,
            )
            return
        entries = list(state.get('checkpoint_files', []))
        epoch, metric = state.get('pending', (None, None))  # timm saves before it ranks
        if epoch is not None and metric is not None:
            entries.append((f'checkpoint-{epoch}{SUFFIX}', metric))
        entries = {name: value for name, value in entries if (self.folder / name).exists() and value is not None}
        self.ranked = sorted(entries.items(), key=lambda entry: self.sort_key(entry[1]))
        self.best_metric, self.best_epoch = state.get('best_metric'), state.get('best_epoch')
        if epoch is not None and (self.best_metric is None or self.sort_key(metric) < self.sort_key(self.best_metric)):
            self.best_metric, self.best_epoch = metric, epoch
        for best in (folder / f'checkpoint-{self.best_epoch}{SUFFIX}', folder / BEST):
            if best.exists() and not (self.folder / BEST).exists():
                _duplicate(best, self.folder / BEST)

    def _rank(self, name: str, metric: float) -> tuple[list[tuple[str, float]], list[str]]:
        """The entries to keep once `name` has joined them, and the names of those to drop."""
        entries = [entry for entry in self.ranked if entry[0] != name] + [(name, metric)]
        entries.sort(key=lambda entry: self.sort_key(entry[1]))
        kept, dropped = entries[: self.max_history], entries[self.max_history :]
        return kept, [old for old, _ in dropped]

    def sort_key(self, metric: float) -> tuple[bool, float]:
        """Sorts the best first, and a NaN last."""
        if math.isnan(metric):
            return True, 0.0
        return False, metric if self.decreasing else -metric


def _duplicate(source: Path, target: Path) -> None:
    """Give a complete file a second name: a link where the file system has them, else a copy."""
    temporary = target.with_name(f'.{target.name}.tmp')
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # no hard links here
        shutil.copy2(source, temporary)
    os.replace(temporary, target)


def _sync_folder(folder: Path) -> None:
    if os.name != 'posix':
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
