"""The model that the options of either script describe, with the weights that they name."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import set_fast_norm
from timm.models import load_checkpoint
from timm.utils import set_jit_fuser
from torch import Tensor, nn
from torch.jit.frontend import FrontendError
from torch.utils.data import Dataset

from timm_mldecoder.checkpoint.folders import folder_channels, folder_settings, stored_folder
from timm_mldecoder.checkpoint.published import convert_state_dict
from timm_mldecoder.checkpoint.read import ranked_by_ema, read_checkpoint, weights_of, without_split_bn
from timm_mldecoder.checkpoint.schema import RUN
from timm_mldecoder.data.label_graph import read_label_graph
from timm_mldecoder.data.word_embeddings import read_word_embeddings
from timm_mldecoder.flags import Options, validate_options
from timm_mldecoder.flags import inherit as inherit_flags
from timm_mldecoder.flags.checks import check_task
from timm_mldecoder.flags.flag import show
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.loading.datasets import image_channels
from timm_mldecoder.modeling.classes import (
    class_names_of,
    stored_embeddings,
    stored_words,
    thresholds_for,
    training_words,
)
from timm_mldecoder.modeling.errors import check_loaded, refuse
from timm_mldecoder.models.cosine import add_cosine_classifier
from timm_mldecoder.models.fusion import fuse_batch_norm
from timm_mldecoder.models.graph import add_graph_classifier, empty_graph_classifier
from timm_mldecoder.runtime.errors import one_line

_logger = logging.getLogger(__name__)

IMAGE_MODES = {1: 'L', 3: 'RGB', 4: 'CMYK'}  # PIL mode by number of channels
BEST = ('model_best.pth.tar', 'last.pth.tar')  # of the folder of a run
HEAD_DEFAULTS = dict(num_of_groups=-1, decoder_embedding=768)


def create_model(
    options: Options,
    *,
    words: Mapping[str, Any] | None = None,
    pretrained: bool,
    fresh_head: bool = False,
    **settings: Any,
) -> Any:
    """Create the model with the classifier that the options request.

    Args:
        words: Options of `MLDecoder` for text queries, if the head has any.
        pretrained: Whether to load pretrained weights.
        fresh_head: Whether to leave stored weights of an ML-Decoder head out.
        **settings: Further arguments of `timm.create_model`.

    Raises:
        ValueError: If the model does not take the options.
    """
    if options.fast_norm:
        set_fast_norm()
    if options.fuser:
        set_jit_fuser(options.fuser)
    head: dict[str, Any] = {}
    if options.use_ml_decoder_head:
        sizes = dict(num_of_groups=options.num_of_groups, decoder_embedding=options.decoder_embedding)
        # sizes that were not given leave those of a stored head alone
        sizes = {name: size for name, size in sizes.items() if size != HEAD_DEFAULTS[name] or name in options.given}
        fresh = {'fresh_head': True} if fresh_head else {}
        head = {'ml_decoder': {**sizes, **(words or {}), **options.ml_decoder_kwargs, **fresh}}
    elif 'use_ml_decoder_head' in options.given:
        head = {'ml_decoder': False}  # also where the stored model has one
    with refuse(options):
        model = timm.create_model(
            options.model,
            pretrained=pretrained,
            num_classes=options.num_classes,
            in_chans=image_channels(options),
            global_pool=None if options.use_ml_decoder_head else options.gp,
            scriptable=options.torchscript,
            **head,
            **options.model_kwargs,
            **settings,
        )
        if options.cosine_classifier and not options.graph:
            try:
                add_cosine_classifier(model, options.cosine_classifier)
            except ValueError as error:
                raise ValueError(f'--cosine-classifier {options.cosine_classifier:g}: {error}') from error
    return model


def script(model: nn.Module) -> nn.Module:
    """Compile a model with torch.jit.script; a ValueError if that cannot be, as with an ML-Decoder head."""
    try:
        return torch.jit.script(model)
    except (ValueError, RuntimeError, FrontendError) as error:  # torch's are the latter two
        raise ValueError(f'--torchscript: use --torchcompile ({one_line(error, 300)})') from error


def create_train_model(options: Options, dataset: Dataset | None) -> Any:
    """Create the model to train, with the label embeddings of the training classes and the weights to start from.

    Args:
        options: Options of train.py.
        dataset: Training split.

    Raises:
        ValueError: If the options do not fit the model, the classes, or a file of weights.
    """
    # num_classes -1: adapt the head, whatever the file holds
    overlay = dict(file=options.pretrained_path, num_classes=-1) if options.pretrained_path else {}
    overlay |= options.pretrained_cfg_overlay
    model = create_model(
        options,
        words=training_words(options, dataset),
        pretrained=options.pretrained,
        fresh_head=options.fresh_head,
        drop_rate=options.drop,
        drop_path_rate=options.drop_path,
        drop_block_rate=options.drop_block,
        bn_momentum=options.bn_momentum,
        bn_eps=options.bn_eps,
        **(dict(pretrained_cfg_overlay=overlay) if overlay else {}),
    )
    check_loaded(options, model)
    with refuse(options):
        if options.graph:
            names = class_names_of(dataset)
            adjacency, _ = read_label_graph(options.graph, names)
            words, _ = read_word_embeddings(options.word_embeddings, names)
            add_graph_classifier(model, adjacency, words, **_graph_settings(options))
        if options.initial_checkpoint:
            load_checkpoint(model, options.initial_checkpoint, filter_fn=without_split_bn)
        if options.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
    if not (options.cosine_classifier or options.graph):
        _scale_head(model, options.head_init_scale, options.head_init_bias)
    _logger.info(f'Model {timm.models.safe_model_name(options.model)} created, param count:{count_parameters(model)}')
    return model


def _graph_settings(options: Options) -> dict[str, Any]:
    """Return the options of a graph classifier; without `--cosine-classifier` it is linear."""
    if not options.cosine_classifier:
        return dict(layer=options.graph_layer, classifier='linear')
    return dict(layer=options.graph_layer, classifier='cosine', scale=options.cosine_classifier)


class Trained(NamedTuple):
    """A model with weights, and what they bring along."""

    model: Any  # timm model
    # options that built it: those of the checkpoint, but for the ones that the user gave. None for a pretrained model
    # that `load_trained` took from elsewhere
    options: Options | None
    data_config: dict[str, Any]  # timm's data configuration, as far as a checkpoint holds it
    content: dict[str, Any]  # what the checkpoint holds; without one, task and thresholds of a model folder

    @property
    def image_mode(self) -> str:
        """PIL mode of the images that the model takes: that of its training run, else by its channels."""
        channels = self.data_config.get('input_size', self.model.pretrained_cfg['input_size'])[0]
        return (self.options and self.options.input_img_mode) or IMAGE_MODES.get(channels, 'RGB')

    @property
    def class_names(self) -> list[str] | None:
        """Class names in the order of the outputs, if they are known."""
        head = self.model.get_classifier()
        own = head.class_names if isinstance(head, MLDecoder) else None
        return own or self.content.get('class_names') or self.model.pretrained_cfg.get('label_names')

    @property
    def task(self) -> str:
        """'classification' or 'multilabel'; the first for a model that does not know."""
        return self.options.task if self.options else self.content.get('task', 'classification')

    def thresholds(self, names: list[str] | None) -> Tensor | None:
        """Return the tuned thresholds of these classes, [C], None without any; a ValueError for other classes."""
        tuned = thresholds_for(self.content, names)
        if tuned is None and self.content.get('thresholds'):
            missing = next((name for name in names or () if name not in self.content['thresholds']), 'without a name')
            raise ValueError(
                f'class {missing!r} has no tuned threshold: run validate.py --write-thresholds, or pass --threshold'
            )
        return tuned


def load_model(options: Options, content: dict[str, Any] | None = None) -> Trained:
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
        return Trained(create_model(options, pretrained=True), options, {}, settings)
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
        empty_graph_classifier(model, **sizes, **_graph_settings(options))
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
    return Trained(model, options, config, content)


def load_trained(
    source: str, *, device: str = 'cpu', use_ema: bool | None = None, content: dict[str, Any] | None = None
) -> Trained:
    """Load a model for use, in eval mode: the entry for other programs.

    Args:
        source: Checkpoint of train.py, which is loaded as it was trained; folder of a run, for its best checkpoint;
            folder of convert; or name of a pretrained timm model.
        device: Name of the device to put the model on.
        use_ema: Whether to take the EMA weights of a checkpoint; None takes those that training ranked it by.
        content: What `read_checkpoint` read from a checkpoint; None reads it.

    Raises:
        ValueError: If there is no such model, or it does not load.
    """
    path = Path(source)
    checkpoint = next((path / name for name in BEST if (path / name).is_file()), path)
    if not checkpoint.is_file():
        return _load_pretrained(str(source), device, use_ema)
    options = validate_options(data_dir='.', checkpoint=str(checkpoint), device=device, use_ema=use_ema)
    options = options.replace(data_dir='')  # no data is read
    trained = load_model(options, content)
    trained.model.eval().to(device)
    config = {**resolve_data_config({}, model=trained.model), **trained.data_config}
    for name in ('mean', 'std'):
        if len(config[name]) > 1:
            config[name] = per_channel(config[name], config['input_size'][0])
    return trained._replace(data_config=config)


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return mean or standard deviation of each channel, as timm's loader takes them: the average for other numbers."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _load_pretrained(source: str, device: str, use_ema: bool | None) -> Trained:
    """Load a model folder, or a pretrained timm model."""
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
    return Trained(model, None, resolve_data_config({}, model=model), folder_settings(name))


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


def fuse_model(model: nn.Module, input_size: Sequence[int]) -> None:
    """Fold BatchNorm layers into the convolutions before them, in place; a ValueError if that changes the logits."""
    weight = next(model.parameters())
    image = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0))  # leaves the global RNG state alone
    try:
        fused = fuse_batch_norm(model.eval(), image.to(weight))
    except ValueError as error:
        raise ValueError(f'--fuse-bn: {error}') from error
    _logger.info(f'--fuse-bn: {fused} BatchNorm layers are part of convolutions now')


@torch.no_grad()
def _scale_head(model: Any, scale: float | None, bias: float | None) -> None:
    found = model.get_classifier()
    for classifier in found if isinstance(found, tuple) else (found,):  # distilled models have two
        if scale is not None:
            classifier.weight.mul_(scale)
            classifier.bias.mul_(scale)
        if bias is not None:
            classifier.bias.fill_(bias)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
