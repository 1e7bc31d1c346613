"""What ``timm.create_model`` does for the options that choose a classifier of this package; called by plugin.py."""

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from timm.models import _builder
from torch import Tensor, nn

from timm_mldecoder.head.config import DEFAULT_NUM_QUERIES
from timm_mldecoder.head.ml_decoder import DEFAULT_EMBEDDING
from timm_mldecoder.models.attach import HEAD_OPTIONS, READ_OPTIONS, add_ml_decoder_head, check_options
from timm_mldecoder.models.classifier_model import module_path
from timm_mldecoder.models.cosine import add_cosine_classifier
from timm_mldecoder.models.graph import empty_graph_classifier
from timm_mldecoder.models.probe_model import add_probe_head, parse_probe

_logger = logging.getLogger(__name__)

# Options of the head that change no trained tensor and nothing about what the trained tensors compute.
_TRAINING_OPTIONS = ('dropout', 'classifier_dropout', 'random_queries', 'query_noise', 'query_cutout', 'class_names')


@dataclass(frozen=True)
class Classifier:
    """What the factory needs to know about a kind of classifier."""

    attach: Callable[..., nn.Module]  # put it on a timm model in place: ``attach(model, num_classes, **options)``
    parse: Callable[[object], dict]  # the option of ``create_model`` to a dict of options
    # given and stored options, and whether the classes differ, to a list of contradictions
    contradictions: Callable[[dict, dict, bool], list[str]]
    # whether the classifier on this model loads tensors that were trained on other classes
    any_classes: Callable[[nn.Module], bool] = lambda model: False
    class_independent: tuple[str, ...] = ()  # beginnings of the names of its tensors that belong to no class


def _parse_ml_decoder(value: object) -> dict:
    if value is True:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f'ml_decoder must be True, False or a dict of options, got {value!r}')
    check_options({name: value[name] for name in value if name not in ('global_pool', 'fresh_head')})
    return dict(value)


def _parse_graph(value: object) -> dict:
    if not isinstance(value, Mapping) or not {'num_classes', 'width'} <= set(value):
        raise ValueError(
            f'graph_classifier must be the options of timm_mldecoder.models.graph.graph_options, got {value!r}'
        )
    return dict(value)


def _attach_graph(model: nn.Module, requested: int, /, **options) -> nn.Module:
    if requested not in (-1, options['num_classes']):
        raise ValueError(f'a label graph of {options["num_classes"]} classes does not fit num_classes={requested}')
    return empty_graph_classifier(model, **options)


def _ml_decoder_contradictions(given: dict, stored: dict, other_classes: bool) -> list[str]:
    queries = {} if stored.get('word_embeddings') else {'num_of_groups': DEFAULT_NUM_QUERIES}
    defaults = HEAD_OPTIONS | READ_OPTIONS | {'decoder_embedding': DEFAULT_EMBEDDING} | queries
    ignored = (*_TRAINING_OPTIONS, *(('num_of_groups', 'group_size') if other_classes else ()))
    found = []
    for name in sorted(set(given) & set(defaults) - set(ignored)):
        ours, theirs = (defaults[name] if _is_default(value) else value for value in (given[name], stored.get(name)))
        if name == 'word_embeddings':
            if not isinstance(ours, (Tensor, int)):
                continue  # a file, which is read later
            ours = ours.shape[-1] if isinstance(ours, Tensor) else ours
        if ours != theirs:
            found.append(f'{name} is {ours!r}, the stored head has {theirs!r}')
    return found


def _differences(given: dict, stored: dict, other_classes: bool) -> list[str]:
    return [
        f'{name} is {given[name]!r}, the stored classifier has {stored.get(name)!r}'
        for name in given
        if not isinstance(given[name], Tensor) and given[name] != stored.get(name)
    ]


def _has_vocabulary(model: Any) -> bool:
    return getattr(model.get_classifier(), 'vocabulary', None) is not None


CLASSIFIERS = {
    'ml_decoder': Classifier(
        add_ml_decoder_head,
        _parse_ml_decoder,
        _ml_decoder_contradictions,
        any_classes=_has_vocabulary,
        class_independent=('embed.', 'layers.'),
    ),
    'cosine_classifier': Classifier(
        lambda model, num_classes, scale: add_cosine_classifier(model, scale),
        lambda value: {'scale': value},
        _differences,
    ),
    'graph_classifier': Classifier(_attach_graph, _parse_graph, _differences),
    'probe_head': Classifier(add_probe_head, parse_probe, _differences, any_classes=_has_vocabulary),
}


def create_model(build: Callable[..., nn.Module], pretrained: bool = False, **kwargs) -> nn.Module:
    """Build a timm model, with a classifier of this package if an option of `CLASSIFIERS` asks for one.

    A model without a classifier (``num_classes=0`` or ``features_only=True``) is timm's own, whatever the option.

    From a folder of ``save_for_hf`` (``local-dir:``, ``hf-hub:``) with one of these classifiers, ``pretrained=True``
    loads every tensor strictly. A classifier for other classes loads the tensors that belong to no class and
    initializes the others; ``fresh_head=True`` in the dict of ``ml_decoder`` initializes all of them. With ``False`` or
    another kind of classifier, only the backbone is loaded.

    Args:
        build: timm's model function.
        pretrained: Load the weights.
        **kwargs: Arguments of ``timm.create_model``, with those of the stored model filled in by timm.

    Raises:
        ValueError: If an option is unknown, has a wrong value, or contradicts the stored classifier.
        RuntimeError: If a tensor of the file is missing, unexpected or of another shape.
    """
    stored_args = kwargs.get('pretrained_model_args') or {}
    stored = next((name for name in CLASSIFIERS if _is_on(stored_args.get(name))), None)
    given = {name: kwargs.pop(name, None) for name in CLASSIFIERS}
    chosen = _chosen({name: value for name, value in given.items() if _is_on(value)}, stored, stored_args)
    options = CLASSIFIERS[chosen].parse(given[chosen]) if chosen else {}
    fresh = options.pop('fresh_head', False)
    pool = options.pop('global_pool', None)
    if pool and not stored_args and kwargs.get('global_pool') == '':
        kwargs['global_pool'] = pool  # from transformers, which passes on what timm recorded for the un-pooled model

    if chosen is None or kwargs.get('features_only') or kwargs.get('num_classes') == 0:
        if not (pretrained and stored):
            return build(pretrained=pretrained, **kwargs)
        with _loading_by(_BackboneLoader(build, stored, stored_args, kwargs)):
            return build(pretrained=True, **kwargs)

    if not kwargs.get('global_pool'):
        kwargs.pop('global_pool', None)  # timm has no un-pooled models with classes; the head removes the pooling
    kind, requested = CLASSIFIERS[chosen], kwargs.get('num_classes')
    # timm passes on the number of classes of a stored model, which must not win over that of new label embeddings
    num_classes = -1 if requested in (None, stored_args.get('num_classes')) else requested
    if chosen == stored:
        options = _complete(options, chosen, stored_args[stored], pretrained and not fresh, num_classes != -1)
    if pretrained and stored and (chosen != stored or fresh):
        with _loading_by(_BackboneLoader(build, stored, stored_args, kwargs)):
            model = build(pretrained=True, **kwargs)
        return kind.attach(model, num_classes, **options)
    if not (pretrained and stored):
        return kind.attach(build(pretrained=pretrained, **kwargs), num_classes, **options)
    deferred: list[tuple[nn.Module, dict]] = []
    with _loading_by(lambda model, **load_args: deferred.append((model, load_args))):
        model = build(pretrained=True, **kwargs)
    kind.attach(model, num_classes, **options)
    for part, load_args in deferred:
        _load_with_classifier(part, kind, **load_args) if part is model else _timm_load(part, **load_args)
    return model


def _complete(options: dict, name: str, stored: object, loads: bool, other_classes: bool) -> dict:
    """Return options with those of the stored classifier; a ValueError where it is loaded and they contradict it."""
    stored_options = CLASSIFIERS[name].parse(stored)
    stored_options.pop('global_pool', None)
    options = {name: value for name, value in options.items() if not _is_default(value)}
    found = CLASSIFIERS[name].contradictions(options, stored_options, other_classes) if loads else []
    if found:
        raise ValueError(f'leave {name} out, which contradicts the stored classifier: {"; ".join(found)}')
    return stored_options | options


def _is_on(value: object) -> bool:
    return value is not None and value is not False


def _is_default(value: object) -> bool:
    return value is None or (isinstance(value, int) and value == -1)


def _chosen(wanted: dict, stored: str | None, stored_args: Mapping) -> str | None:
    """Return the option that was requested, or else the stored one."""
    if len(wanted) > 1 and stored in wanted and wanted[stored] == stored_args[stored]:
        del wanted[stored]  # timm filled it in
    if len(wanted) > 1:
        raise ValueError(f'a model has one classifier: choose one of {", ".join(wanted)}')
    return next(iter(wanted), None)


# A function that loads instead of timm's within one `create_model`: per thread and asyncio task, so that models which
# are built at the same time elsewhere load as ever.
_replacement: ContextVar[Callable | None] = ContextVar('timm_mldecoder_load_pretrained', default=None)
_timm_load = _builder.load_pretrained


@wraps(_timm_load)
def _load_pretrained(model: nn.Module, *args, **kwargs) -> None:
    (_replacement.get() or _timm_load)(model, *args, **kwargs)


# Only timm's builder knows the arguments of a load (the filter that resizes position embeddings, the input channels).
# Replaced once, when this module is imported; without a replacement for the caller it is timm's function.
_builder.load_pretrained = _load_pretrained


@contextmanager
def _loading_by(function: Callable):
    token = _replacement.set(function)
    try:
        yield
    finally:
        _replacement.reset(token)


def _load_with_classifier(model: Any, kind: Classifier, filter_fn: Callable | None = None, **load_args) -> None:
    """Load stored weights into a model with the classifier they were stored with."""
    prefix = module_path(model, model.get_classifier()) + '.'
    stored_classes = load_args['pretrained_cfg']['num_classes']
    own = set(model.state_dict())
    if kind.any_classes(model) or load_args['num_classes'] == stored_classes:
        loaded = own
    else:
        kept = tuple(prefix + name for name in kind.class_independent)
        loaded = {name for name in own if not name.startswith(prefix) or (kept and name.startswith(kept))}
        fresh = sorted({name.removeprefix(prefix).partition('.')[0] for name in own - loaded})
        others = f'; {", ".join(kind.class_independent)}* are loaded (fresh_head=True initializes them too)'
        _logger.warning(
            f'the weights are for {stored_classes} classes, the model has {model.num_classes}: {", ".join(fresh)} of '
            f'{prefix}* are initialized randomly{others if kept else ""}'
        )

    def select(backbone: dict, classifier: dict) -> dict:
        if loaded != own:
            classifier = {name: value for name, value in classifier.items() if name in loaded}
        _check_names({*backbone, *classifier}, loaded)
        return backbone | classifier

    _load_selected(model, prefix, select, filter_fn, **load_args)


class _BackboneLoader:
    """Loads the backbone of a stored model into a timm model with another classifier, or without one."""

    def __init__(self, build: Callable, stored: str, stored_args: Mapping, kwargs: Mapping) -> None:
        kind = CLASSIFIERS[stored]
        options = kind.parse(stored_args[stored])
        pool = options.pop('global_pool', None)
        changed = ('features_only', 'out_indices', 'feature_cls', 'num_classes', 'global_pool', 'device')
        like = {name: value for name, value in kwargs.items() if name not in changed}
        like |= {'global_pool': pool} if pool else {}
        with torch.device('meta'):  # names alone
            model: Any = kind.attach(build(pretrained=False, **like), -1, **options)
        self.prefix = module_path(model, model.get_classifier()) + '.'
        self.stored = stored
        self.names = {name for name in model.state_dict() if not name.startswith(self.prefix)}

    def __call__(self, model: nn.Module, filter_fn: Callable | None = None, **load_args) -> None:
        own = set(model.state_dict())

        def select(backbone: dict, classifier: dict) -> dict:
            _check_names(set(backbone), self.names)
            _logger.info(f'the stored {self.stored} classifier is left out')
            fresh, unused = sorted(own - set(backbone)), sorted(set(backbone) - own)
            if fresh or unused:
                _logger.warning(
                    f'the weights were stored with {self.stored}: these tensors are initialized randomly: {fresh}; '
                    f'these tensors of the backbone are not used: {unused}'
                )
            return {name: value for name, value in backbone.items() if name in own}

        _load_selected(model, self.prefix, select, filter_fn, **load_args)


def _load_selected(model: nn.Module, prefix: str, select: Callable, filter_fn: Callable | None, **load_args) -> None:
    """timm's ``load_pretrained`` with what `select` returns for the tensors of the backbone and of the classifier."""

    def filter_weights(state_dict: dict, model: nn.Module) -> dict:
        classifier = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        backbone = {name: value for name, value in state_dict.items() if name not in classifier}
        if filter_fn is not None:
            # some filters of timm recognise its own files by the classifier
            stand_ins = {prefix + name: torch.zeros(0) for name in ('weight', 'bias')}
            takes_model = len(inspect.signature(filter_fn).parameters) > 1
            backbone = filter_fn(backbone | stand_ins, *([model] if takes_model else []))
            backbone = {name: value for name, value in backbone.items() if not name.startswith(prefix)}
        return select(backbone, classifier)

    _timm_load(model, **load_args | {'filter_fn': filter_weights, 'strict': False})  # `select` is strict about names


def _check_names(found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        raise RuntimeError(
            f'the weights do not fit: missing {sorted(wanted - found)}, unexpected {sorted(found - wanted)}'
        )
