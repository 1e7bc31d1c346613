"""Finding the checkpoint to go on from, and taking it up."""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from timm_mldecoder.engine import report
from timm_mldecoder.engine.checkpoint import LAST, SUFFIX
from timm_mldecoder.engine.run import Run
from timm_mldecoder.engine.state import RUN
from timm_mldecoder.weights import read_checkpoint

_logger = logging.getLogger(__name__)


def resume(run: Run) -> None:
    """Take up the checkpoint that `--resume` names; a fresh start where it is 'auto' and there is none.

    Raises:
        ValueError: If the checkpoint does not load, or does not fit the run.
    """
    path, content = _find(run)
    if path is None:
        return
    state = run.state
    state.load_state_dict(content, run.options, run.world.rank, run.world.size)
    if state.schedule is not None:
        state.schedule.step_update(run.updates_done())
    if run.folder is not None:
        state.checkpoints.load_state_dict(content.get('saver', {}), path.parent)
        state.rows = state.rows or report.read_summary(run.folder / 'summary.csv', before=state.epoch)
        _logger.info(f"Resumed from '{path}' at epoch {state.epoch}, batch {state.batch}")


def _find(run: Run) -> tuple[Path | None, dict[str, Any]]:
    """The path and the content of the checkpoint, the same on every rank."""
    if run.options.resume != 'auto':
        return _load_or_suggest(Path(run.options.resume))
    found: list[Any] = [None]
    content: dict[str, Any] = {}
    if run.folder is not None:
        found[0], content = newest(run.folder)
        if found[0] is None and _numbered(run.folder):
            raise ValueError(f'--resume auto: no checkpoint in {run.folder} loads, and a fresh start would overwrite '
                             f'them; move them away, or choose another --experiment')
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[0] is not None and not content:
        content = read_checkpoint(found[0])
    return found[0], content


def newest(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint of a run that is furthest, among those that load; (None, {}) where there is none."""
    path, content = folder / LAST, _try(folder / LAST)
    reached = _progress(content) if content else (-1, 0)
    for other in _numbered(folder):
        if _progress_by_name(other) <= reached:
            break
        found = _try(other)
        if found:
            return other, found
    return (path, content) if content else (None, {})


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints whose names tell how far they are, the furthest first."""
    paths = [*folder.glob(f'recovery-*-*{SUFFIX}'), *folder.glob(f'checkpoint-*{SUFFIX}')]
    return sorted(paths, key=_progress_by_name, reverse=True)


def _try(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, nothing where there is none or it does not load."""
    if not path.exists():
        return {}
    try:
        return read_checkpoint(path)
    except ValueError as error:
        _logger.warning('Passed over: %s', error)
        return {}


def _progress(content: dict[str, Any]) -> tuple[int, int]:
    """Epochs done and batches of the next; timm's checkpoints know only epochs."""
    run = content.get(RUN, {})
    return run.get('epoch', content.get('epoch', -1) + 1), run.get('batch', 0)


def _progress_by_name(path: Path) -> tuple[int, int]:
    kind, *numbers = path.name.removesuffix(SUFFIX).split('-')
    epoch, batch = [int(number) for number in numbers] if kind == 'recovery' else (int(numbers[0]) + 1, 0)
    return epoch, batch


def _load_or_suggest(path: Path) -> tuple[Path, dict[str, Any]]:
    try:
        return path, read_checkpoint(path)
    except ValueError as error:
        other, _ = newest(path.parent)
        remedy = f'; the newest one that loads is {other}' if other else ''
        raise ValueError(f'--resume: {error}{remedy}') from error
