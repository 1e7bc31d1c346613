"""Find the checkpoint to resume from, and resume."""

import logging
import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from timm_mldecoder.checkpoint.files import (
    LAST,
    SUMMARY,
    Progress,
    checkpoints_in,
    numbered,
    progress_by_name,
    read_summary,
)
from timm_mldecoder.checkpoint.read import RUN, read_checkpoint
from timm_mldecoder.checkpoint.state import TrainingState
from timm_mldecoder.distributed.layout import Layout
from timm_mldecoder.distributed.read_sharded import SHARDS
from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import Options
from timm_mldecoder.loading.compare_classes import check_class_names
from timm_mldecoder.loading.loader import TrainLoader

_logger = logging.getLogger(__name__)

NOTHING: Progress = (-1, 0)  # less than any checkpoint


def resume(
    source: str,
    state: TrainingState,
    options: Options,
    world: World,
    layout: Layout,
    loader: TrainLoader,
    folder: Path | None,
) -> bool:
    """Resume from a checkpoint, or from the newest one of the run if the source is 'auto'; a collective call.

    `folder` is that of the run, None on all ranks but the first.

    Returns:
        Whether there was a checkpoint: 'auto' is a fresh start without one.

    Raises:
        ValueError: If the checkpoint does not load, or does not fit the run.
    """
    path, content = _find(source, world, folder, whole=layout.reads_whole)
    if path is None:
        return False
    check_class_names(loader.dataset, content.get('class_names'))
    try:
        layout.localize(content, path, state.models(), state.optimizer)
        state.restore(content, options, world, loader)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f'{path} does not have the entries of a checkpoint to resume from: {error!r}') from error
    except ValueError as error:
        raise ValueError(f'--resume {path}: {error}') from error
    world.barrier()  # every rank has read the file, which may be moved now
    if folder is not None:
        state.rows = state.rows or read_summary(path.parent / SUMMARY, before=state.epoch)
        if source != 'auto' or options.start_epoch is not None:
            same_run = path.parent.resolve() == folder.resolve()
            _set_aside(folder, (state.epoch, state.batch) if same_run else NOTHING, whole=layout.reads_whole)
        state.checkpoints.load_state_dict(content.get('saver', {}), path.parent)
        _logger.info(f"Resumed from '{path}' at epoch {state.epoch}, batch {state.batch}")
    return True


def held_out_before(options: Options, content: Mapping[str, Any]) -> Tensor | None:
    """Return the digests of the images that a run held out, if the options divide the data in the same way."""
    trained = vars(content['args']) if RUN in content else {}
    same = trained and all(options[name] == trained.get(name) for name in ('val_fraction', 'split_seed'))
    return content[RUN].get('held_out') if same else None


def held_out_to_resume(options: Options, world: World, output: Path) -> Tensor | None:
    """Return the digests of the images that the run to resume held out, None without one; a collective call.

    Args:
        options: Options of train.py.
        world: The ranks.
        output: Folder of the runs.
    """
    restarted = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'
    if not options.val_fraction or not (options.resume or restarted):
        return None
    known = None
    if world.primary:
        folder = output / options.experiment if options.experiment else None
        found = options.resume not in ('', 'auto') and Path(options.resume).is_file()
        content = _try(Path(options.resume), False) if found else newest(folder, False)[1] if folder else {}
        known = held_out_before(options, content)
    return world.broadcast(known)


def _set_aside(folder: Path, reached: Progress, whole: bool) -> None:
    """Move the checkpoints beyond `reached` away: they are not part of this run, but 'auto' would prefer them."""
    paths = checkpoints_in(folder)
    ahead = [path for path in paths if (progress_by_name(path) or _progress(_try(path, whole))) > reached]
    if not ahead:
        return
    aside = next(path for path in (folder / f'set-aside-{number}' for number in count(1)) if not path.exists())
    aside.mkdir()
    shards = {folder / name for path in ahead if (name := _try(path, whole=False).get(SHARDS))}
    for path in [*shards, *ahead, *folder.glob(SUMMARY)]:
        path.rename(aside / path.name)
    names = ', '.join(path.name for path in ahead)
    _logger.warning(f'moved to {aside}, because this run resumes from before them: {names}')


def _find(source: str, world: World, folder: Path | None, whole: bool) -> tuple[Path | None, dict[str, Any]]:
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
    path, content = folder / LAST, _try(folder / LAST, whole)
    reached = _progress(content) if content else NOTHING
    for other in numbered(folder):
        if (progress_by_name(other) or NOTHING) <= reached:
            break
        found = _try(other, whole)
        if found:
            return other, found
    return (path, content) if content else (None, {})


def _try(path: Path, whole: bool) -> dict[str, Any]:
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
