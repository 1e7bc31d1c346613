"""Train, evaluate and use models from Python: `train`, `evaluate` and `load`, with the flags of the commands."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_mldecoder.checkpoint.files import BEST
from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import train_options, validate_options
from timm_mldecoder.modeling.load import LoadedModel, load
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import fit
from timm_mldecoder.validate.checkpoints import list_candidates
from timm_mldecoder.validate.score import score_model

__all__ = ['LoadedModel', 'TrainResult', 'evaluate', 'load', 'train']


@dataclass(frozen=True)
class TrainResult:
    """What a training run left behind."""

    folder: Path | None  # folder of the run; None on all ranks but the first
    best: Path | None  # checkpoint of the best epoch, if one was saved
    rows: list[dict[str, float]]  # rows of summary.csv, one per validated epoch


def train(data: str | os.PathLike[str] | None = None, **flags: Any) -> TrainResult:
    """Train a model as `timm-mldecoder train` does.

    Args:
        data: Dataset folder; a run that is resumed by its name, `experiment=..., resume='auto'`, knows its own.
        **flags: Flags of the command with underscores for dashes: `use_ml_decoder_head=1`.

    Raises:
        ValueError: If a flag does not exist or its value is not allowed, or the data does not fit.
    """
    if data is not None:
        flags['data'] = data
    options = train_options(**{name: _plain(value) for name, value in flags.items()})
    if options.lr_find:
        raise ValueError('lr_find trains no model: use the command, timm-mldecoder train --lr-find')
    with join_world(options.device, options.device_modules or ()) as world:
        run = build_run(options, world)
        fit(run)
    best = run.folder / BEST if run.folder else None
    return TrainResult(run.folder, best if best and best.is_file() else None, list(run.state.rows))


def evaluate(data: str | os.PathLike[str], **flags: Any) -> dict[str, Any]:
    """Return the metrics of one model as `timm-mldecoder validate` computes them: in percent, under timm's names.

    Args:
        data: Dataset folder.
        **flags: Flags of the command: `checkpoint=...`, or `model=..., pretrained=True`.

    A folder of a run as `checkpoint` means its best one, as in `load`.

    Raises:
        ValueError: If the flags name no model or several, and as in `train`.
    """
    if not (flags.get('checkpoint') or flags.get('model')):
        raise ValueError('evaluate needs checkpoint=..., such as the folder of a run, or model=..., pretrained=True')
    best = Path(flags.get('checkpoint') or '') / BEST
    if best.is_file():
        flags['checkpoint'] = best
    options = validate_options(data=str(data), **{name: _plain(value) for name, value in flags.items()})
    candidates = list_candidates(options)
    if len(candidates) != 1:
        raise ValueError(f'evaluate scores one model, the flags name {len(candidates)}: call it for each of them')
    model, checkpoint = candidates[0]
    with join_world(options.device) as world:
        return score_model(options.replace(model=model, checkpoint=checkpoint), world)


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value
