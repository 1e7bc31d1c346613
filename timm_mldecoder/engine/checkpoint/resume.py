"""Finding the checkpoint to go on from, and taking it up."""

import logging
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist

from timm_mldecoder.checkpoints.published import read_checkpoint
from timm_mldecoder.engine.checkpoint.files import LAST, Progress, checkpoints_in, numbered, progress_by_name
from timm_mldecoder.engine.checkpoint.state import RUN
from timm_mldecoder.engine.input.dataset_checks import check_class_names
from timm_mldecoder.engine.runtime import report
from timm_mldecoder.engine.train.run import Run

_logger = logging.getLogger(__name__)

NOTHING: Progress = (-1, 0)  # less than any checkpoint


def resume(run: Run, source: str) -> bool:
    """Take up a checkpoint.

    Args:
        run: The run, on all ranks.
        source: A path, or 'auto' for the newest checkpoint of the run.

    Returns:
        Whether there was one: 'auto' is a fresh start where there is none.

    Raises:
        ValueError: If the checkpoint does not load, or does not fit the run.
    """
    path, content = _find(run, source)
    if path is None:
        return False
    state = run.state
    check_class_names(run.train_loader.dataset, content.get('class_names'))
    state.load_state_dict(content, run.options, run.world.rank, run.world.size)
    if state.schedule is not None:
        state.schedule.step_update(run.updates_done())
    if dist.is_initialized():
        dist.barrier()  # every rank has read the file, which may be moved now
    if run.folder is not None:
        state.rows = state.rows or report.read_summary(path.parent / 'summary.csv', before=state.epoch)
        if source != 'auto' or run.options.start_epoch is not None:
            same_run = path.parent.resolve() == run.folder.resolve()
            _set_aside(run.folder, (state.epoch, state.batch) if same_run else NOTHING)
        state.checkpoints.load_state_dict(content.get('saver', {}), path.parent)
        _logger.info(f"Resumed from '{path}' at epoch {state.epoch}, batch {state.batch}")
    return True


def _set_aside(folder: Path, reached: Progress) -> None:
    """Move the checkpoints further than `reached` away: they are no part of this run, but 'auto' would prefer them."""
    ahead = [path for path in checkpoints_in(folder) if (progress_by_name(path) or _progress(_try(path))) > reached]
    if not ahead:
        return
    aside = next(path for path in (folder / f'set-aside-{number}' for number in count(1)) if not path.exists())
    aside.mkdir()
    for path in [*ahead, *folder.glob('summary.csv')]:
        path.rename(aside / path.name)
    _logger.warning(f'Moved to {aside}, as this run goes on from before them: {", ".join(path.name for path in ahead)}')


def _find(run: Run, source: str) -> tuple[Path | None, dict[str, Any]]:
    """The path and the content of the checkpoint, the same on every rank."""
    if source != 'auto':
        return _load_or_suggest(Path(source))
    found: list[Any] = [None]
    content: dict[str, Any] = {}
    if run.folder is not None:
        found[0], content = newest(run.folder)
        if found[0] is None and numbered(run.folder):
            raise ValueError(
                f'--resume auto: no checkpoint in {run.folder} loads, and a fresh start would overwrite '
                f'them; move them away, or choose another --experiment'
            )
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[0] is not None and not content:
        content = read_checkpoint(found[0])
    return found[0], content


def newest(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint of a run that is furthest, among those that load; (None, {}) where there is none."""
    path, content = folder / LAST, _try(folder / LAST)
    reached = _progress(content) if content else NOTHING
    for other in numbered(folder):
        if progress_by_name(other) <= reached:
            break
        found = _try(other)
        if found:
            return other, found
    return (path, content) if content else (None, {})


def _try(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, nothing where there is none or it does not load."""
    if not path.exists():
        return {}
    try:
        return read_checkpoint(path)
    except ValueError as error:
        _logger.warning('Passed over: %s', error)
        return {}


def _progress(content: dict[str, Any]) -> Progress:
    """How far a checkpoint is; timm's know only epochs."""
    run = content.get(RUN, {})
    return run.get('epoch', content.get('epoch', -1) + 1), run.get('batch', 0)


def _load_or_suggest(path: Path) -> tuple[Path, dict[str, Any]]:
    try:
        return path, read_checkpoint(path)
    except ValueError as error:
        other, _ = newest(path.parent)
        remedy = f'; the newest one that loads is {other}' if other else ''
        raise ValueError(f'--resume: {error}{remedy}') from error
