"""Train, evaluate and use models from Python: `train`, `evaluate` and `load`, with the flags of the commands."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from timm_mldecoder.checkpoint.files import BEST
from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import train_options, validate_options
from timm_mldecoder.modeling.load import Trained, load_trained
from timm_mldecoder.predict.parts import Label
from timm_mldecoder.predict.predictor import Predictor
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import fit
from timm_mldecoder.validate.checkpoints import list_candidates
from timm_mldecoder.validate.score import score_model

ImageOrPath = Image.Image | str | os.PathLike[str]


@dataclass(frozen=True)
class TrainResult:
    """What a training run left behind."""

    folder: Path | None  # folder of the run; None on all ranks but the first
    best: Path | None  # checkpoint of the best epoch, if one was saved
    rows: list[dict[str, float]]  # rows of summary.csv, one per validated epoch


def train(data: str | os.PathLike[str], **flags: Any) -> TrainResult:
    """Train a model as `timm-mldecoder train` does.

    Args:
        data: Dataset folder.
        **flags: Flags of the command with underscores for dashes: `use_ml_decoder_head=1`.

    Raises:
        ValueError: If a flag does not exist or its value is not allowed, or the data does not fit.
    """
    options = train_options(data=str(data), **{name: _plain(value) for name, value in flags.items()})
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

    Raises:
        ValueError: If the flags name several models, and as in `train`.
    """
    options = validate_options(data=str(data), **{name: _plain(value) for name, value in flags.items()})
    candidates = list_candidates(options)
    if len(candidates) != 1:
        raise ValueError(f'evaluate scores one model, the flags name {len(candidates)}: call it for each of them')
    model, checkpoint = candidates[0]
    with join_world(options.device) as world:
        return score_model(options.replace(model=model, checkpoint=checkpoint), world)


@dataclass
class LoadedModel:
    """A model with weights, what its outputs mean, and how images become its inputs; see `load`."""

    trained: Trained
    threshold: float | None = None
    top_k: int | None = None
    _predictor: Predictor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._predictor = Predictor(self.trained, threshold=self.threshold, top_k=self.top_k)
        self.transform = create_transform(**{**self.trained.data_config, 'is_training': False})

    @property
    def model(self) -> nn.Module:
        """The model, in eval mode on its device."""
        return self.trained.model

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the outputs; their numbers if the model has none."""
        return self._predictor.class_names

    @property
    def task(self) -> str:
        """'classification' or 'multilabel'."""
        return self.trained.task

    @property
    def thresholds(self) -> Tensor | None:
        """Probability from which each label is given, [C]; None for a single-label model."""
        return self._predictor.thresholds

    def predict(self, images: ImageOrPath | Iterable[ImageOrPath], batch_size: int = 64) -> list[list[Label]]:
        """Return the labels of each image with index, name and score, the likeliest first, as the command does.

        Raises:
            OSError: If an image cannot be read.
        """
        items = [images] if isinstance(images, (Image.Image, str, os.PathLike)) else list(images)
        device = next(self.model.parameters()).device
        found: list[list[Label]] = []
        with torch.inference_mode():
            for start in range(0, len(items), batch_size):
                batch = torch.stack([self.transform(self._open(item)) for item in items[start : start + batch_size]])
                found += self._predictor.labels(self._predictor(batch.to(device))[0])
        return found

    def _open(self, image: ImageOrPath) -> Image.Image:
        reading, mode = self._predictor.reading, self._predictor.image_mode
        return reading.convert(image, mode) if isinstance(image, Image.Image) else reading.open(image, mode)


def load(
    source: str | os.PathLike[str], device: str = 'cpu', *, use_ema: bool | None = None,
    threshold: float | None = None, top_k: int | None = None,
) -> LoadedModel:  # fmt: skip
    """Load a model for use: a checkpoint, the folder of a run or of convert, or the name of a pretrained timm model.

    Args:
        source: What to load.
        device: Device to put the model on.
        use_ema: Whether to take the EMA weights of a checkpoint; None takes those that training ranked it by.
        threshold: Probability of a label of a multi-label model; None for the tuned ones, else 0.5.
        top_k: Largest number of labels per image; None for no limit, or one of a single-label model.

    Raises:
        ValueError: If there is no such model, or it does not load.
    """
    return LoadedModel(load_trained(str(source), device=device, use_ema=use_ema), threshold, top_k)


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value
