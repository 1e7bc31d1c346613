"""A model with weights: a checkpoint, a folder, or a pretrained timm model."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from timm_mldecoder.checkpoint.files import BEST, LAST
from timm_mldecoder.checkpoint.folders import folder_channels, folder_settings, stored_folder
from timm_mldecoder.checkpoint.published import convert_state_dict
from timm_mldecoder.checkpoint.read import RUN, ranked_by_ema, read_checkpoint, weights_of
from timm_mldecoder.data.images import Reading
from timm_mldecoder.flags import Options, unchecked_options
from timm_mldecoder.flags import inherit as inherit_flags
from timm_mldecoder.flags.checks import check_task
from timm_mldecoder.flags.flag import show
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.modeling.classes import stored_embeddings, stored_words, thresholds_for
from timm_mldecoder.modeling.create import create_model, graph_settings
from timm_mldecoder.models.graph import empty_graph_classifier
from timm_mldecoder.runtime.errors import one_line

_logger = logging.getLogger(__name__)

IMAGE_MODES = {1: 'L', 3: 'RGB', 4: 'CMYK'}  # PIL mode by number of channels
ImageOrPath = Image.Image | np.ndarray | str | os.PathLike[str]


class Label(NamedTuple):
    """A label of an image, and its probability."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    name: str
    score: float


@dataclass
class LoadedModel:
    """A model with weights, what its outputs mean, and how images become its inputs; see `load`.

    Raises:
        ValueError: If there is a threshold or there are implications for a single-label model, or implications with a
            largest number of labels.
    """

    model: Any  # timm model
    # options that built it: those of the checkpoint, but for the ones that the user gave. None for a pretrained model
    # that `load` took from elsewhere
    options: Options | None
    # timm's data configuration; of `load_model` as far as a checkpoint holds it
    data_config: dict[str, Any]
    content: dict[str, Any]  # what the checkpoint holds; without one, task and thresholds of a model folder
    task: str  # 'classification' or 'multilabel'
    threshold: float | None = None  # probability of a label of a multi-label model; None: the tuned ones, else 0.5
    top_k: int | None = None  # largest number of labels per image; None: no limit, or one of a single-label model
    # which classes imply which, [2, E] of `read_implications`: with a label, those that it implies are given, with a
    # score as high at least
    implications: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        multilabel = self.task == 'multilabel'
        if self.threshold is not None and not multilabel:
            raise ValueError('--threshold is for multi-label models: pass --task multilabel if this is one')
        if self.implications is not None and (self.top_k or not multilabel):
            raise ValueError('--implications are for multi-label models, without --top-k, which could cut implied ones')

    @property
    def known_names(self) -> list[str] | None:
        """Class names in the order of the outputs, None if they are not known."""
        head = self.model.get_classifier()
        own = head.class_names if isinstance(head, MLDecoder) else None
        names = own or self.content.get('class_names') or self.model.pretrained_cfg.get('label_names')
        return [str(name) for name in names] if names else None

    @cached_property
    def class_names(self) -> list[str]:
        """Class names in the order of the outputs; their numbers if they are not known."""
        return self.known_names or [str(number) for number in range(self.model.num_classes)]

    @cached_property
    def thresholds(self) -> Tensor | None:
        """Probability from which each label is given, [C]; None for a single-label model, which gives the best.

        Raises:
            ValueError: If some classes have a tuned threshold, and others do not.
        """
        if self.task != 'multilabel':
            return None
        tuned = None
        if self.threshold is None:
            tuned = thresholds_for(self.content, self.class_names)
            if tuned is None and (stored := self.content.get('thresholds')):
                missing = next(name for name in self.class_names if name not in stored)
                raise ValueError(
                    f'class {missing!r} has no tuned threshold: run validate.py --write-thresholds, or pass --threshold'
                )
        default = torch.full((len(self.class_names),), 0.5 if self.threshold is None else self.threshold)
        return default if tuned is None else tuned

    @property
    def image_mode(self) -> str:
        """PIL mode of the images that the model takes: that of its training run, else by its channels."""
        channels = self.data_config.get('input_size', self.model.pretrained_cfg['input_size'])[0]
        return (self.options and self.options.input_img_mode) or IMAGE_MODES.get(channels, 'RGB')

    @cached_property
    def reading(self) -> Reading:
        """How image files become images of `image_mode`."""
        return Reading.of(self.options)

    @cached_property
    def transform(self) -> Any:
        """From an image of `image_mode` to an input [channels, height, width], as in evaluation."""
        return create_transform(**{**self.data_config, 'is_training': False})

    def scores(self, outputs: Any) -> Tensor:
        """Return the probabilities [B, C] of the outputs of the model, float32 on the CPU."""
        logits = (outputs[0] if isinstance(outputs, (tuple, list)) else outputs).float()
        return (logits.sigmoid() if self.task == 'multilabel' else logits.softmax(dim=1)).cpu()

    def labels(self, scores: Tensor) -> list[list[Label]]:
        """Return the labels of each image from its scores [B, C], the likeliest first.

        Those are the labels that reach their threshold, at most `top_k`, and those that they imply.
        """
        if self.thresholds is not None:
            scores = scores.masked_fill(scores < self.thresholds, -1)
        if self.implications is not None:
            implying, implied = self.implications
            scores = scores.scatter_reduce(1, implied.expand(len(scores), -1), scores[:, implying], 'amax')
        most = int((scores >= 0).sum(dim=1).max())
        top_k = self.top_k or (1 if self.thresholds is None else len(self.class_names))
        values, indices = (found.tolist() for found in scores.topk(min(top_k, most)))
        return [
            [Label(index, self.class_names[index], score) for index, score in zip(*found, strict=True) if score >= 0]
            for found in zip(indices, values, strict=True)
        ]

    def predict(self, images: ImageOrPath | Iterable[ImageOrPath], batch_size: int = 64) -> list[list[Label]]:
        """Return the labels of each image with index, name and score, the likeliest first, as the command does.

        Args:
            images: One image or several: paths, PIL images, or uint8 arrays [H, W], [H, W, 3] or [H, W, 4].
            batch_size: Images that the model takes at once.

        Raises:
            OSError: If an image cannot be read.
            TypeError: If an array has another shape or type.
        """
        one = isinstance(images, (Image.Image, str, os.PathLike)) or (
            isinstance(images, np.ndarray) and images.ndim < 4
        )
        items: list[Any] = [images] if one else list(images)  # type: ignore[arg-type]
        device = next(self.model.parameters()).device
        found: list[list[Label]] = []
        with torch.inference_mode():
            for start in range(0, len(items), batch_size):
                batch = torch.stack([self.prepare(item) for item in items[start : start + batch_size]])
                found += self.labels(self.scores(self.model(batch.to(device))))
        return found

    def prepare(self, image: ImageOrPath) -> Tensor:
        """Return an image as an input [channels, height, width]; an OSError if it cannot be read."""
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.ndim == 3 and image.shape[2] not in (3, 4):
                raise TypeError(f'expected uint8 [H, W], [H, W, 3] or [H, W, 4], got {image.dtype} {image.shape}')
            image = Image.fromarray(image)
        if isinstance(image, Tensor):
            raise TypeError('expected a path, a PIL image or a uint8 array; a tensor is an input of `model`')
        read: Any = self.reading.convert if isinstance(image, Image.Image) else self.reading.open
        return self.transform(read(image, self.image_mode))


def load(
    source: str | os.PathLike[str],
    device: str = 'cpu',
    *,
    use_ema: bool | None = None,
    task: str | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    content: dict[str, Any] | None = None,
) -> LoadedModel:
    """Load a model for use, in eval mode.

    Args:
        source: Checkpoint of train.py, which is loaded as it was trained; folder of a run, for its best checkpoint;
            folder of convert; or name of a pretrained timm model.
        device: Name of the device to put the model on.
        use_ema: Whether to take the EMA weights of a checkpoint; None takes those that training ranked it by.
        task: 'classification' or 'multilabel'; None for the model's own, the first if it does not know.
        threshold: Probability of a label of a multi-label model; None for the tuned ones, else 0.5.
        top_k: Largest number of labels per image; None for no limit, or one of a single-label model.
        content: What `read_checkpoint` read from a checkpoint; None reads it.

    Raises:
        ValueError: If there is no such model, it does not load, or a threshold is given for a single-label model.
    """
    path = Path(source)
    checkpoint = next((path / name for name in (BEST, LAST) if (path / name).is_file()), path)
    labels: dict[str, Any] = dict(threshold=threshold, top_k=top_k)
    if not checkpoint.is_file():
        model, settings = _load_pretrained(str(source), device, use_ema)
        task = task or settings.get('task', 'classification')
        return LoadedModel(model, None, resolve_data_config({}, model=model), settings, task, **labels)
    options = unchecked_options('validate', checkpoint=str(checkpoint), device=device, use_ema=use_ema)
    loaded = load_model(options, content)
    loaded.model.eval().to(device)
    config = {**resolve_data_config({}, model=loaded.model), **loaded.data_config}
    for name in ('mean', 'std'):
        if len(config[name]) > 1:
            config[name] = per_channel(config[name], config['input_size'][0])
    return replace(loaded, data_config=config, task=task or loaded.task, **labels)


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return mean or standard deviation of each channel, as timm's loader takes them: the average for other numbers."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _load_pretrained(source: str, device: str, use_ema: bool | None) -> tuple[Any, dict[str, Any]]:
    """Load a model folder or a pretrained timm model, and the settings of the folder."""
    name = f'local-dir:{source}' if Path(source).is_dir() else source
    if ':' not in name and not timm.is_model(name):
        raise ValueError(f'{source}: no such checkpoint, folder or timm model')
    folder = Path(source)
    if folder.is_dir() and not (folder / 'config.json').is_file():
        found = ', '.join(sorted(path.name for path in folder.glob('*.pth.tar'))) or 'none'
        raise ValueError(
            f'{source} has no model_best.pth.tar and no config.json: name one of its checkpoints ({found})'
        )
    if use_ema is not None:
        raise ValueError(f'--use-ema and --no-use-ema choose weights of a checkpoint; {source} is no such file')
    try:
        model = timm.create_model(name, pretrained=True).eval().to(device)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ValueError(f'{source} does not load: {one_line(error, 300)}') from error
    return model, folder_settings(name)


def load_model(options: Options, content: dict[str, Any] | None = None) -> LoadedModel:
    """Create the model of `--checkpoint` as train.py built it, or the pretrained one of `--model`.

    Options that the user gave (`options.given`) win over those of the checkpoint. `content` is what `read_checkpoint`
    read from it; None reads it.

    Raises:
        ValueError: If the checkpoint does not load, or does not fit the options.
    """
    if not options.checkpoint:
        settings = folder_settings(options.model)
        if 'task' in settings and 'task' not in options.given:
            options = options.replace(task=settings['task'])
        check_task(options)
        if options.in_chans is None and options.input_size is None:
            options = options.replace(in_chans=folder_channels(options.model))
        return LoadedModel(create_model(options, pretrained=True), options, {}, settings, options.task)
    content = read_checkpoint(options.checkpoint) if content is None else content
    config: dict[str, Any] = {}
    if RUN in content:
        options, config = inherit(options, content)
    else:
        check_task(options)
        if 'model' not in options.given:
            raise ValueError(
                f'{options.checkpoint} is not a checkpoint of train.py, and does not say which model its weights are '
                f'of: make a folder of it with python -m timm_mldecoder.convert {options.checkpoint} FOLDER --model '
                'NAME, or pass --model to validate.py'
            )
    try:
        weights = weights_of(content, options.use_ema)
    except ValueError as error:
        raise ValueError(f'--checkpoint {options.checkpoint}: {error}') from error
    stored = stored_embeddings(weights)
    if stored is not None and options.num_classes is None:
        options = options.replace(num_classes=len(stored))  # as trained: they decide how many classes a query has
    stored = None if 'model' in options.given else content.get(RUN, {}).get('model_config')
    with stored_folder(options.model, stored) as name:
        model = create_model(options.replace(model=name), words=stored_words(options, weights), pretrained=False)
    if options.graph:
        words = next((tensor for name, tensor in weights.items() if name.endswith('.words')), torch.empty(0, 0))
        sizes = dict(num_classes=words.shape[0], width=words.shape[1])
        empty_graph_classifier(model, **sizes, **graph_settings(options))
    _load_weights(model, weights, options, content)
    return LoadedModel(model, options, config, content, options.task)


def _load_weights(model: Any, weights: dict[str, Tensor], options: Options, content: Mapping[str, Any]) -> None:
    """Load the weights of a checkpoint, converted where train.py did not write it."""
    if options.use_ml_decoder_head and RUN not in content:
        try:
            weights = convert_state_dict(weights, model, num_heads=options.ml_decoder_kwargs.get('num_heads'))
        except ValueError as error:
            raise ValueError(
                f'--checkpoint {options.checkpoint}: {error}. python -m timm_mldecoder.convert has flags that say more '
                'about the file, and makes a folder of it'
            ) from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # torch names every key that does not fit
        trained = vars(content['args']) if RUN in content else {}
        other = sorted(name for name in options.given if name in trained and options[name] != trained[name])
        given = ', '.join(f'{options.flag(name)} {show(options[name])}' for name in other)
        raise ValueError(
            f'--checkpoint {options.checkpoint} holds another model{f" than {given}" * bool(given)}: '
            f'{one_line(error, 300)}'
        ) from error


def inherit(options: Options, content: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Return options and data configuration of a checkpoint of train.py, except for what the user gave."""
    updated = inherit_flags(options, vars(content['args']))
    given = {'input_size' if name == 'img_size' else name for name in options.given}
    config = {name: value for name, value in content[RUN]['data_config'].items() if name not in given}
    if options.use_ema is None:
        updated = updated.replace(use_ema=ranked_by_ema(content))
    before, after = options.to_dict(), updated.to_dict()
    taken = {name: value for name, value in after.items() if value != before[name]}
    shown = ', '.join(f'{name} {value}' for name, value in {**taken, **config}.items())
    _logger.info(f'Evaluated as trained, except for flags given here: {shown}')
    return updated, config
