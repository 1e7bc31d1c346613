"""Finding the checkpoint to go on from, and taking it up."""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from timm_mldecoder.engine import report
from timm_mldecoder.engine.checkpoint import LAST, SUFFIX, load_checkpoint
from timm_mldecoder.engine.run import Run
from timm_mldecoder.engine.state import RUN

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
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[0] is not None and not content:
        content = load_checkpoint(found[0])
    return found[0], content


def newest(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint of a run that is furthest, among those that load; (None, {}) where there is none."""
    best: tuple[Path | None, dict[str, Any]] = None, {}
    furthest = (-1, 0)
    for path in [folder / LAST, *folder.glob(f'recovery-*{SUFFIX}'), *folder.glob(f'checkpoint-*{SUFFIX}')]:
        if not path.exists():
            continue
        try:
            content = load_checkpoint(path)
        except ValueError as error:
            _logger.warning('Passed over: %s', error)
            continue
        run = content.get(RUN, {})
        progress = run.get('epoch', content.get('epoch', -1) + 1), run.get('batch', 0)
        if progress > furthest:
            furthest, best = progress, (path, content)
    return best


def _load_or_suggest(path: Path) -> tuple[Path, dict[str, Any]]:
    try:
        return path, load_checkpoint(path)
    except ValueError as error:
        other, _ = newest(path.parent)
        remedy = f'; the newest one that loads is {other}' if other else ''
        raise ValueError(f'--resume: {error}{remedy}') from error
