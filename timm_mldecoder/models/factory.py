"""What ``timm.create_model`` does when ``ml_decoder`` is asked for; plugin.py leads here."""

import inspect
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch
from timm.models import _builder
from torch import nn

from timm_mldecoder.models.attach import add_ml_decoder_head, check_options

_logger = logging.getLogger(__name__)
_one_at_a_time = threading.RLock()


def create_with_head(
    entrypoint: Callable[..., nn.Module],
    ml_decoder: bool | Mapping,
    stored_head: bool = False,
    pretrained: bool = False,
    global_pool: str | None = None,
    **kwargs,
) -> nn.Module:
    """Build a timm model with an ML-Decoder head.

    Args:
        entrypoint: timm's model function.
        ml_decoder: True, or keyword options of `MLDecoder`.
        stored_head: the pretrained weights hold an ML-Decoder head too (``local-dir:``, ``hf-hub:``).
        pretrained: load the weights of the backbone, and of the head if it is stored and has the same classes.
        global_pool: the pooling the backbone is built with (it decides where some ViTs have their last norm).
        **kwargs: timm's own.

    Raises:
        ValueError: an unknown option, or a model without classes or un-pooled features.
    """
    options = _as_options(ml_decoder)
    stored_pool = options.pop('global_pool', None)
    check_options(options)
    saved = (kwargs.get('pretrained_model_args') or {}).get('num_classes')
    for name, value in (('features_only', True), ('num_classes', 0)):
        if kwargs.get(name) == value and not stored_head:
            raise ValueError(f'{name}={value} gives a model without a classifier: leave ml_decoder out')
    # An un-pooled model with classes is no model to timm; the head takes the pooling away after the weights are in.
    pool = global_pool or stored_pool
    if pool:
        kwargs['global_pool'] = pool

    # Of a folder with a head, also its backbone may be had.
    if kwargs.get('features_only'):
        return entrypoint(pretrained=pretrained, **kwargs)
    if kwargs.get('num_classes') == 0:
        kwargs['num_classes'] = saved
        model = create_with_head(entrypoint, ml_decoder, stored_head, pretrained, **kwargs)
        model.reset_classifier(0)
        return model

    # the number of classes that a stored model was saved with is nobody's wish, where new word embeddings come
    asked = kwargs.get('num_classes')
    options['num_classes'] = -1 if asked is None or asked == saved else asked
    if not (pretrained and stored_head):
        return add_ml_decoder_head(entrypoint(pretrained=pretrained, **kwargs), **options)
    with _held_back_load() as loads:
        model = entrypoint(pretrained=True, **kwargs)
    add_ml_decoder_head(model, **options)
    for load in loads:
        load_with_head(model, **load)
    return model


def _as_options(ml_decoder: bool | Mapping) -> dict:
    if ml_decoder is True:
        return {}
    if not isinstance(ml_decoder, Mapping):
        raise ValueError(f'ml_decoder must be True, False or a dict of options, got {ml_decoder!r}')
    return dict(ml_decoder)


@contextmanager
def _held_back_load():
    """Note what timm would load into the model it builds, to load it once the head is on.

    A stored ML-Decoder fits no linear classifier, and only timm's builder knows the arguments of the load (the filter
    that resizes position embeddings, the input channels).
    """
    loads: list[dict] = []
    with _one_at_a_time:
        load, _builder.load_pretrained = _builder.load_pretrained, lambda model, **kwargs: loads.append(kwargs)
        try:
            yield loads
        finally:
            _builder.load_pretrained = load


def load_with_head(model: nn.Module, filter_fn: Callable | None = None, **kwargs) -> None:
    """timm's ``load_pretrained`` for weights that hold an ML-Decoder head; strict, also where classes differ.

    Raises:
        RuntimeError: a tensor of the backbone is missing, unexpected or mis-shaped, or one of the head is and the
            classes are the same.
    """
    head_prefix = model.ml_decoder_slot + '.'
    # word queries fit any classes, and know whether they have their own
    has_words = model.get_classifier().vocabulary is not None
    same_classes = has_words or kwargs['num_classes'] == kwargs['pretrained_cfg']['num_classes']

    def filter_backbone(state_dict: dict, model: nn.Module) -> dict:
        head = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(head_prefix)}
        if filter_fn is not None:
            # timm's filters tell its own files from others' by the classifier
            stand_ins = {head_prefix + name: torch.zeros(0) for name in ('weight', 'bias')}
            state_dict = {**state_dict, **stand_ins}
            takes_model = len(inspect.signature(filter_fn).parameters) > 1
            state_dict = filter_fn(state_dict, model) if takes_model else filter_fn(state_dict)
            state_dict = {name: value for name, value in state_dict.items() if not name.startswith(head_prefix)}
        if not same_classes:
            _logger.warning(
                f'The weights are for {kwargs["pretrained_cfg"]["num_classes"]} classes, the model has '
                f'{model.num_classes}: the ML-Decoder head starts fresh.'
            )
            _check_backbone(model, state_dict, head_prefix)
            return state_dict
        return {**state_dict, **head}

    _builder.load_pretrained(model, filter_fn=filter_backbone, **kwargs)


def _check_backbone(model: nn.Module, state_dict: dict, head_prefix: str) -> None:
    wanted = {name for name in model.state_dict() if not name.startswith(head_prefix)}
    missing, unexpected = sorted(wanted - set(state_dict)), sorted(set(state_dict) - wanted)
    if missing or unexpected:
        raise RuntimeError(f'the weights do not fit the backbone: missing {missing}, unexpected {unexpected}')
