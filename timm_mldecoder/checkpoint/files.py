"""The folder of a run: checkpoints, written completely or not at all, ranked, and found again; and `summary.csv`.

timm's saver unlinks the old file before it moves the new one into place, and ranks a NaN first, so it is not used here.
"""

import csv
import io
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch

from timm_mldecoder.checkpoint.read import RUN, read_checkpoint
from timm_mldecoder.distributed.read_sharded import PREFIX, SHARDS
from timm_mldecoder.distributed.world import World
from timm_mldecoder.runtime.files import TEMPORARY, duplicate, sync_folder, write_atomically

_logger = logging.getLogger(__name__)

SUFFIX = '.pth.tar'
LAST, BEST = 'last' + SUFFIX, 'model_best' + SUFFIX
PENDING = 'pending' + SUFFIX
LOCK = '.lock'
Progress = tuple[int, int]  # epochs done, and batches of the next
NOTHING: Progress = (-1, 0)  # less than any checkpoint
_NUMBERS = {'checkpoint': 1, 'milestone': 1, 'recovery': 2}  # numbers in the names of each kind


def progress_by_name(path: Path) -> Progress | None:
    """Return how far a checkpoint is, None if its name does not show it."""
    kind, *numbers = path.name.removesuffix(SUFFIX).split('-')
    if len(numbers) != _NUMBERS.get(kind) or not all(number.isdecimal() for number in numbers):
        return None
    epoch, batch = int(numbers[0]), int(numbers[-1])
    return {'checkpoint': (epoch + 1, 0), 'milestone': (epoch, 0), 'recovery': (epoch, batch)}[kind]


def numbered(folder: Path) -> list[Path]:
    """Return the checkpoints whose names show how far they are, the furthest first."""
    found = [(reached, path) for path in folder.glob(f'*{SUFFIX}') if (reached := progress_by_name(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def checkpoints_in(folder: Path) -> list[Path]:
    """Return all checkpoints of a run."""
    return [*numbered(folder), *(path for path in (folder / LAST, folder / BEST) if path.exists())]


def lock(folder: Path) -> IO:
    """Lock the folder of a run for this process, and remove what a killed process left half-written.

    The lock ends with the process, or when the returned file is closed.

    Raises:
        ValueError: If another run holds the lock.
    """
    try:
        import fcntl
    except ImportError as error:
        raise ValueError('training needs the file locks of Linux or macOS (fcntl)') from error
    file = open(folder / LOCK, 'w')  # noqa: SIM115 - open for as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(f'--experiment: another run is training in {folder}; choose another name') from error
    for path in (*folder.glob(f'.*{TEMPORARY}'), folder / PENDING):
        path.unlink(missing_ok=True)
    remove_unused_shards(folder)
    return file


def shards_of(path: Path) -> Path | None:
    """Return the folder with the tensors of a checkpoint, None if they are in the file; a ValueError if damaged."""
    content = read_checkpoint(path, whole=False)
    return path.parent / content[SHARDS] if SHARDS in content else None


def remove_unused_shards(folder: Path) -> None:
    """Remove the folders of tensors that no checkpoint names: of dropped ones, and of one that was being written."""
    found = set(folder.glob(f'{PREFIX}*'))
    if not found:
        return
    try:
        used = {shards_of(path) for path in folder.glob(f'*{SUFFIX}')}  # copies that the user made, too
    except ValueError as error:
        _logger.warning(f'{error}: no folder of tensors is removed from {folder}')
        return
    for unused in found - used:
        shutil.rmtree(unused)


def duplicate_checkpoint(source: Path, target: Path) -> None:
    """Give a checkpoint a second name, in this folder or another, to which its folder of tensors is copied."""
    shards = shards_of(source)
    if shards is not None and not (target.parent / shards.name).exists():
        (target.parent / shards.name).mkdir()
        for file in shards.iterdir():
            duplicate(file, target.parent / shards.name / file.name)
    duplicate(source, target)


@dataclass
class CheckpointFolder:
    """The checkpoints of a run: the last, the best, the best few, and those within an epoch."""

    folder: Path  # of the run
    decreasing: bool = False  # whether a lower metric is better
    max_history: int = 10  # number of numbered checkpoints to keep
    metric: str = ''  # name of the metric that ranks them
    ranked: list[tuple[str, float]] = field(default_factory=list)  # numbered checkpoints and their metrics, best first
    best_metric: float | None = None  # None before any
    best_epoch: int | None = None

    def rank(self, epoch: int, metric: float) -> tuple[bool, list[str]]:
        """Rank the metric of an epoch; return whether it is the best so far, and the names of files that drop out."""
        name = f'checkpoint-{epoch}{SUFFIX}'
        entries = [entry for entry in self.ranked if entry[0] != name] + [(name, metric)]
        entries.sort(key=lambda entry: self.sort_key(entry[1]))
        self.ranked = entries[: self.max_history]
        is_best = self.best_metric is None or self.sort_key(metric) < self.sort_key(self.best_metric)
        if is_best:
            self.best_metric, self.best_epoch = metric, epoch
        return is_best, [old for old, _ in entries[self.max_history :]]

    def save_epoch(self, epoch: int, content: dict[str, Any], is_best: bool, dropped: list[str]) -> None:
        """Save the end of an epoch as the last checkpoint and, by its rank, under further names.

        `last` is replaced at the very end: a run that is killed before resumes from the previous one and writes the
        same files again. `is_best` and `dropped` are what `rank` returned before the content was collected.
        """
        name = f'checkpoint-{epoch}{SUFFIX}'
        pending = self.folder / PENDING
        write_atomically(pending, lambda file: torch.save(content, file))
        if any(kept == name for kept, _ in self.ranked):
            duplicate(pending, self.folder / name)
        if is_best:
            duplicate(pending, self.folder / BEST)
        os.replace(pending, self.folder / LAST)
        sync_folder(self.folder)
        for old in dropped:
            (self.folder / old).unlink(missing_ok=True)
        for recovery in self.recoveries():
            recovery.unlink(missing_ok=True)
        remove_unused_shards(self.folder)
        listing = ''.join(f' {kept}: {self.metric} {metric:.3f}\n' for kept, metric in self.ranked)
        _logger.info(f'Current checkpoints:\n{listing}')

    def save_recovery(self, epoch: int, batch: int, content: dict[str, Any]) -> Path:
        """Save a position within an epoch, and return its path; of older such files the furthest is kept."""
        path = self.folder / f'recovery-{epoch}-{batch}{SUFFIX}'
        write_atomically(path, lambda file: torch.save(content, file))
        for old in [other for other in self.recoveries() if other != path][1:]:
            old.unlink(missing_ok=True)
        remove_unused_shards(self.folder)
        return path

    def save_milestone(self, epochs: int) -> None:
        """Keep the last checkpoint permanently, under the number of epochs done."""
        duplicate(self.folder / LAST, self.folder / f'milestone-{epochs}{SUFFIX}')

    def complete(self, path: Path, epochs: int, milestones: Sequence[int]) -> None:
        """Keep what is resumed from if it is a milestone that is not there: the run was killed before it was kept."""
        kept = self.folder / f'milestone-{epochs}{SUFFIX}'
        if epochs in milestones and path.parent.resolve() == self.folder.resolve() and not kept.exists():
            duplicate(path, kept)

    def recoveries(self) -> list[Path]:
        """Return the checkpoints within an epoch, the furthest first."""
        return [path for path in numbered(self.folder) if path.name.startswith('recovery')]

    def state_dict(self) -> dict[str, Any]:
        """Return the history, in the form of timm's saver."""
        return dict(
            checkpoint_files=list(self.ranked),
            best_epoch=self.best_epoch,
            best_metric=self.best_metric,
            pending=(None, None),
            metric=self.metric,
        )

    def same_metric(self, state: dict[str, Any]) -> bool:
        """Return whether a history was ranked by the same metric, as far as it shows: timm's does not."""
        return state.get('metric', self.metric) == self.metric

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Take over the history of the run that saved into `folder`, and its best checkpoint if none is here."""
        if not self.same_metric(state):
            metrics = f'ranked by {state["metric"]}, new ones by {self.metric}'
            _logger.warning(f'the checkpoints so far are {metrics}: they are kept, and the ranking starts again')
            return
        entries = list(state.get('checkpoint_files', []))
        epoch, metric = state.get('pending', (None, None))  # timm saves before it ranks
        pending = epoch is not None and metric is not None
        if pending:
            entries.append((f'checkpoint-{epoch}{SUFFIX}', metric))
        # names alone: what drops out of the ranking is deleted
        own = {path.name for path in numbered(self.folder)}
        entries = {name: value for name, value in entries if name in own and value is not None}
        self.ranked = sorted(entries.items(), key=lambda entry: self.sort_key(entry[1]))
        self.best_metric, self.best_epoch = state.get('best_metric'), state.get('best_epoch')
        if pending and (self.best_metric is None or self.sort_key(metric) < self.sort_key(self.best_metric)):
            self.best_metric, self.best_epoch = metric, epoch
        for best in (folder / f'checkpoint-{self.best_epoch}{SUFFIX}', folder / BEST):
            if best.exists() and not (self.folder / BEST).exists():
                try:
                    duplicate_checkpoint(best, self.folder / BEST)
                except ValueError as error:
                    _logger.warning('skipped: %s', error)

    def sort_key(self, metric: float) -> tuple[bool, float]:
        """Return a key that sorts the best first, and a NaN last."""
        if math.isnan(metric):
            return True, 0.0
        return False, metric if self.decreasing else -metric


def find_checkpoint(source: str, world: World, folder: Path | None, whole: bool) -> tuple[Path | None, dict[str, Any]]:
    """Return the path and the content of the checkpoint, the same on every rank."""
    if source != 'auto':
        return _load_or_suggest(Path(source), whole)
    path, content = newest(folder, whole) if folder is not None else (None, {})
    unusable = folder is not None and path is None and bool(numbered(folder))
    path, unusable = world.broadcast((path, unusable))
    if unusable:
        raise ValueError(
            f'--resume auto: no checkpoint in {folder or "the folder"} loads, and a fresh start would overwrite them: '
            'move them away, or choose another --experiment'
        )
    return path, content or (read_checkpoint(path, whole) if path is not None else {})


def newest(folder: Path, whole: bool = True) -> tuple[Path | None, dict[str, Any]]:
    """Return the checkpoint of a run that is furthest among those that load; (None, {}) if there is none."""
    path, content = folder / LAST, try_checkpoint(folder / LAST, whole)
    reached = _progress(content) if content else NOTHING
    for other in numbered(folder):
        if (progress_by_name(other) or NOTHING) <= reached:
            break
        found = try_checkpoint(other, whole)
        if found:
            return other, found
    return (path, content) if content else (None, {})


def try_checkpoint(path: Path, whole: bool) -> dict[str, Any]:
    """Return what a checkpoint holds, nothing if there is none or it does not load."""
    if not path.exists():
        return {}
    try:
        return read_checkpoint(path, whole)
    except ValueError as error:
        _logger.warning('skipped: %s', error)
        return {}


def _progress(content: dict[str, Any]) -> Progress:
    """Return how far a checkpoint is; timm's know only epochs."""
    run = content.get(RUN, {})
    return run.get('epoch', content.get('epoch', -1) + 1), run.get('batch', 0)


def _load_or_suggest(path: Path, whole: bool) -> tuple[Path, dict[str, Any]]:
    try:
        return path, read_checkpoint(path, whole)
    except ValueError as error:
        other, _ = newest(path.parent, whole)
        remedy = f'; the newest one that loads is {other}' if other else ''
        raise ValueError(f'--resume: {error}{remedy}') from error


def set_aside(folder: Path, reached: Progress, whole: bool) -> None:
    """Move the checkpoints beyond `reached` away: they are not part of this run, but 'auto' would prefer them."""
    paths = checkpoints_in(folder)
    ahead = [path for path in paths if (progress_by_name(path) or _progress(try_checkpoint(path, whole))) > reached]
    if not ahead:
        return
    aside = next(path for path in (folder / f'set-aside-{number}' for number in count(1)) if not path.exists())
    aside.mkdir()
    shards = {folder / name for path in ahead if (name := try_checkpoint(path, whole=False).get(SHARDS))}
    for path in [*shards, *ahead, *folder.glob(SUMMARY)]:
        path.rename(aside / path.name)
    names = ', '.join(path.name for path in ahead)
    _logger.warning(f'moved to {aside}, because this run resumes from before them: {names}')


SUMMARY = 'summary.csv'
Metrics = dict[str, float]


def summary_row(epoch: int, train: Metrics, validation: Metrics | None, lr: float) -> Metrics:
    """Return the metrics of an epoch under the names of timm's `summary.csv`."""
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


def read_summary(path: Path, before: float = math.inf) -> list[Metrics]:
    """Return the epochs of a summary before one, none without a file; a ValueError if it is not a summary."""
    if not path.exists():
        return []
    try:
        with open(path, newline='') as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        return [{**row, 'epoch': int(row['epoch'])} for row in rows if row['epoch'] < before]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is not a summary of epochs: {error!r}') from error


def print_result(rows: list[Metrics], metric: str, decreasing: bool) -> None:
    """Print loss and ranking metric of the ten best epochs as JSON, the best last; `summary.csv` has all metrics."""
    results = []
    for row in rows:
        result = {'epoch': row['epoch'], 'train': _group(row, 'train_', ('loss', metric))}
        validation = _group(row, 'eval_', ('loss', metric))
        results.append({**result, 'validation': validation} if validation else result)

    def rank(result: dict) -> float:
        value = result.get('validation', result['train']).get(metric, math.nan)
        return -math.inf if math.isnan(value) else -value if decreasing else value

    print(f'--result\n{json.dumps(sorted(results, key=rank)[-10:], indent=4)}')


def _group(row: Mapping[str, float], prefix: str, names: Sequence[str]) -> Metrics:
    return {name: row[prefix + name] for name in dict.fromkeys(names) if prefix + name in row}
