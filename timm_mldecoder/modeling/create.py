"""The model that options describe; what is wrong with its arguments or weights, in a line that names the flag."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.layers import set_fast_norm
from timm.models import load_checkpoint
from timm.utils import set_jit_fuser
from torch import Tensor, nn
from torch.jit.frontend import FrontendError
from torch.utils.data import Dataset

from timm_mldecoder.checkpoint.read import read_checkpoint, weights_of, without_split_bn
from timm_mldecoder.data.label_graph import read_label_graph
from timm_mldecoder.data.word_embeddings import read_word_embeddings
from timm_mldecoder.flags.model import HeadOptions, ModelOptions
from timm_mldecoder.flags.options import CreateOptions, CreateTrainOptions
from timm_mldecoder.modeling.classes import class_names_of, read_classes
from timm_mldecoder.models.classifier_model import classifiers_of
from timm_mldecoder.models.cosine import add_cosine_classifier
from timm_mldecoder.models.fusion import fuse_batch_norm
from timm_mldecoder.models.graph import add_graph_classifier
from timm_mldecoder.runtime.errors import one_line

_logger = logging.getLogger(__name__)

HEAD_DEFAULTS = dict(num_of_groups=-1, decoder_embedding=768)


def has_text_queries(options: CreateOptions) -> bool:
    """Return whether the options request a head with text queries."""
    return bool(options.use_ml_decoder_head and options.word_embeddings)


def create_model(
    options: CreateOptions,
    *,
    words: Mapping[str, Any] | None = None,
    pretrained: bool,
    fresh_head: bool = False,
    **settings: Any,
) -> Any:
    """Create the model with the classifier that the options request.

    Args:
        words: Options of `MLDecoder` for text queries, if the head has any.
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
    with errors_naming_flags(options):
        model = timm.create_model(
            options.model,
            pretrained=pretrained,
            num_classes=options.num_classes,
            in_chans=options.channels,
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


def create_train_model(options: CreateTrainOptions, dataset: Dataset | None) -> Any:
    """Create the model to train, with the label embeddings of the training classes and the weights to start from.

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
    with errors_naming_flags(options):
        if options.graph:
            names = class_names_of(dataset)
            adjacency, _ = read_label_graph(options.graph, names)
            words, _ = read_word_embeddings(options.word_embeddings, names)
            add_graph_classifier(model, adjacency, words, **graph_settings(options))
        if options.initial_checkpoint:
            load_checkpoint(model, options.initial_checkpoint, filter_fn=without_split_bn)
        if options.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
    if not (options.cosine_classifier or options.graph):
        _scale_head(model, options.head_init_scale, options.head_init_bias)
    _logger.info(f'Model {timm.models.safe_model_name(options.model)} created, param count:{count_parameters(model)}')
    return model


def training_words(options: CreateOptions, dataset: Any) -> dict[str, Any]:
    """Return the options of a head with text queries for the classes to train on; none without label embeddings."""
    if not has_text_queries(options):
        if options.class_split and options.score_classes != 'seen':
            raise ValueError(
                '--class-split: only text queries can score unseen classes; pass --word-embeddings with '
                '--use-ml-decoder-head 1, or --score-classes seen'
            )
        return {}
    classes = read_classes(options.word_embeddings, dataset)
    return dict(
        word_embeddings=classes.embeddings,
        class_names=classes.names,
        random_queries=options.random_queries,
        query_noise=options.query_noise,
        query_cutout=options.query_cutout,
    )


def graph_settings(options: HeadOptions) -> dict[str, Any]:
    """Return the options of a graph classifier; without `--cosine-classifier` it is linear."""
    if not options.cosine_classifier:
        return dict(layer=options.graph_layer, classifier='linear')
    return dict(layer=options.graph_layer, classifier='cosine', scale=options.cosine_classifier)


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
    for classifier in classifiers_of(model):
        if scale is not None:
            classifier.weight.mul_(scale)
            classifier.bias.mul_(scale)
        if bias is not None:
            classifier.bias.fill_(bias)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# What timm's models raise for an argument that they do not have, or for a value that is not what they expect.
_REFUSALS = (TypeError, AssertionError, AttributeError, LookupError, ArithmeticError)


@contextmanager
def errors_naming_flags(options: ModelOptions) -> Iterator[None]:
    """Turn what timm raises for wrong arguments, and for weights that are missing or do not fit, into a ValueError."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # a file does not load or does not fit, or there are no weights
        raise _name_file(options, error) from error
    except _REFUSALS as error:
        refused = _refused_file(options) if isinstance(error, AttributeError) else None  # timm takes its entries as is
        if refused:
            raise refused from error
        given = _unchecked(options, error)
        if not (given or isinstance(error, (TypeError, AssertionError))):
            raise
        reason = one_line(error, 300) if str(error) and not isinstance(error, LookupError) else repr(error)
        raise ValueError(f'--model {options.model}: {reason}{given}') from error


def check_loaded(options: ModelOptions, model: nn.Module) -> None:
    """Refuse a file of `--pretrained-path` of which the model has nothing: timm loads what fits, be it nothing.

    The values are compared, since timm renames the tensors of some files.
    """
    if not options.pretrained_path:
        return
    try:
        content = read_checkpoint(options.pretrained_path, whole=False)
    except ValueError:  # a format that only timm reads, such as .npz
        return
    stored: dict[torch.Size, list[Tensor]] = {}
    for tensor in _tensors(content):
        stored.setdefault(tensor.shape, []).append(tensor)
    learned = (value for value in model.parameters() if value.numel() and value.min() < value.max())
    if not any(torch.equal(own, tensor.to(own)) for own in learned for tensor in stored.get(own.shape, ())):
        raise ValueError(
            f'--pretrained-path {options.pretrained_path}: holds no weights of --model {options.model}; pass a file of '
            'that model'
        )


def _tensors(content: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in content.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


def _unchecked(options: ModelOptions, error: Exception) -> str:
    """Return the flags whose values timm's models get unchecked, in parentheses, if there are any."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    given = [
        f'{options.flag(name)} {key}={value}'
        for name in ('model_kwargs', 'pretrained_cfg_overlay')
        for key, value in getattr(options, name).items()
    ]
    if found and found[1] in options.given:
        given = [f'{options.flag(found[1])} {getattr(options, found[1])}']
    return f' ({", ".join(given)})' if given else ''


def _weight_files(options: ModelOptions) -> dict[str, str]:
    """Return the user's files of weights by the flag that names each."""
    files = {'--initial-checkpoint': options.initial_checkpoint, '--pretrained-path': options.pretrained_path}
    return {flag: path for flag, path in files.items() if path}


def _refused_file(options: ModelOptions) -> ValueError | None:
    """Return the error of the user's first file of weights that has no valid weights, None if all have."""
    for flag, path in _weight_files(options).items():
        try:
            weights_of(read_checkpoint(path))
        except ValueError as reason:
            text = str(reason)
            return ValueError(f'{flag}: {text if path in text else f"{path}: {text}"}')
    return None


def _name_file(options: ModelOptions, error: Exception) -> ValueError:
    """Return an error that names the user's file of weights, if there is one."""
    files = ', '.join(f'{flag} {path}' for flag, path in _weight_files(options).items())
    source = files or f'--model {options.model}'
    text = f'{source}: {one_line(error, 300)}{_unchecked(options, error)}'
    if isinstance(error, RuntimeError) and '--initial-checkpoint' in _weight_files(options):
        path = options.initial_checkpoint
        text += (
            f'. --initial-checkpoint takes all weights of the same model. For other classes or another head pass '
            f'--pretrained --pretrained-path {path} (the backbone), or make a folder of it with python -m '
            'timm_mldecoder.convert and pass --pretrained --model local-dir:FOLDER'
        )
    return _refused_file(options) or ValueError(text)
