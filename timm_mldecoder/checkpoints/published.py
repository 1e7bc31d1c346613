"""Checkpoints from elsewhere in this package's layout: the reference repository's, and timm's own ML-Decoder layer's.

Weights only: nothing in a file is ever run, and a tensor that does not fit is an error, never left out.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from timm.models import clean_state_dict
from timm.models.tresnet import checkpoint_filter_fn as convert_tresnet
from torch import Tensor, nn

from timm_mldecoder.head import MLDecoder

# Where files keep their weights; the averaged ones first, as timm's own loader prefers them.
WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')

# The group fully-connected weight, which every layout names in its own way -> whose layout it is.
LAYOUTS = {
    'decoder.duplicate_pooling': 'the reference repository',
    'duplicate_pooling': "timm's own ML-Decoder layer",
    'group_fc.weight': 'timm_mldecoder',
}
# The other two layouts' names -> ours, once their leading `decoder.` is off; all other names are the same.
_RENAMES = {
    'embed_standart': 'embed',
    'query_embed': 'queries',
    'duplicate_pooling': 'group_fc.weight',
    'duplicate_pooling_bias': 'group_fc.bias',
    'wordvec_proj': 'queries.proj',
}
# Option of MLDecoder -> the tensor and its dimension that show it. The number of attention heads shows nowhere.
_SHOWN_BY = {
    'num_classes': ('group_fc.bias', 0),
    'num_of_groups': ('group_fc.weight', 0),
    'decoder_embedding': ('group_fc.weight', 1),
    'dim_feedforward': ('layers.0.linear1.weight', 0),
}

# What files hold beside tensors and plain values: the options and scores of a training run. Building one runs nothing.
_numpy_scalar = np.float64().__reduce__()[0]
_HARMLESS = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ('bool', 'int32', 'int64', 'float32', 'float64', 'str')},
    (_numpy_scalar, 'numpy.core.multiarray.scalar'),  # as numpy 1 wrote it, and as numpy 2 does
    (_numpy_scalar, 'numpy._core.multiarray.scalar'),
]


class Head(NamedTuple):
    """An ML-Decoder head found among the tensors of a file: the names of its tensors start with ``prefix``."""

    layout: str
    prefix: str


def convert_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a checkpoint under the names that ``model.load_state_dict`` expects.

    Reads the layouts of the reference repository (its TResNets with in-place ABN included), of timm's own ML-Decoder
    layer and of this package, under ``model`` or ``state_dict``, with or without ``module.``. Takes the arguments of
    timm's filters: ``timm.models.load_checkpoint(model, path, filter_fn=convert_state_dict)``. The reference's files of
    word queries hold no label embeddings: the model keeps its own.

    Args:
        state_dict: what the file holds; neither it nor the model is changed.
        model: a timm model with an ML-Decoder head, or an `MLDecoder`, built as `head_options` says.

    Raises:
        ValueError: the file or the model has no ML-Decoder head, tensors are missing, unexpected or of another shape
            (they are all listed), or neither the file nor the model has label embeddings.
    """
    slot = _slot(model)
    tensors = unwrap(state_dict)
    prefix = find_head(tensors).prefix
    head = {slot + name: tensor for name, tensor in _head_tensors(tensors, prefix).items()}
    backbone = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    if 'body.conv1.0.weight' in backbone:
        backbone = convert_tresnet(backbone, model)
        # batch norm counts its batches, in-place ABN does not
        backbone |= {name: torch.tensor(0) for name in model.state_dict() if name.endswith('num_batches_tracked')}
    converted = {**_own_classes(model, slot, head), **backbone, **head}
    _check_fit(converted, model, slot)
    return converted


def head_options(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """The options of `MLDecoder` that the shapes of a checkpoint's tensors show, ``num_classes`` first.

    ``add_ml_decoder_head(model, **head_options(state_dict))`` gives the head that the checkpoint fits. For the
    reference's word queries there is the width of the label embeddings, ``word_embeddings``, instead of the classes.

    Raises:
        ValueError: no ML-Decoder head in the checkpoint, one of this package's word queries, whose grouping no shape
            shows, or one with tensors missing.
    """
    tensors = unwrap(state_dict)
    head = _head_tensors(tensors, find_head(tensors).prefix)
    missing = sorted({name for name, _ in _SHOWN_BY.values()} - set(head))
    if missing:
        raise ValueError(f'the ML-Decoder head in the checkpoint is not complete: it lacks {", ".join(missing)}')
    if head['group_fc.weight'].dim() != 3:
        return _word_options(head)
    return _shown_options(head)


def find_head(tensors: Mapping[str, Tensor]) -> Head:
    """The one ML-Decoder head among the tensors of a file.

    Raises:
        ValueError: there is none, or more than one.
    """
    for marker, layout in LAYOUTS.items():
        prefixes = [name.removesuffix(marker) for name in tensors if f'.{name}'.endswith(f'.{marker}')]
        if len(prefixes) > 1:
            raise ValueError(f'the checkpoint has {len(prefixes)} ML-Decoder heads ({", ".join(prefixes)}), not one')
        if prefixes:
            return Head(layout, prefixes[0])
    raise ValueError(
        f'no ML-Decoder head in the checkpoint: none of its {len(tensors)} tensors is named {" or ".join(LAYOUTS)}'
    )


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of what a file holds, without the names that DistributedDataParallel and torch.compile add."""
    wrapper = next((key for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)), None)
    tensors = clean_state_dict(checkpoint if wrapper is None else checkpoint[wrapper])
    others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f'not a state dict: {", ".join(map(str, others))} are no tensors; weights are looked for at the top level '
            f'and under {", ".join(WRAPPERS)}'
        )
    return tensors


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a ``.safetensors`` or ``torch.save`` file holds, on the CPU.

    Beside tensors and plain values only ``argparse.Namespace`` and numpy scalars are accepted.

    Raises:
        ValueError: the file is not there, holds anything else, or is damaged. It is not read in another way.
    """
    if not Path(path).is_file():
        raise ValueError(f'{path}: no such file')
    if Path(path).suffix == '.safetensors':
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f'{path} is no whole safetensors file: {error}') from error
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler stumble over anything
        blocked = re.search(r'GLOBAL (\S+)', str(error))
        # torch goes on to advise a load that may run code
        told = f'{type(error).__name__}: {error}'.splitlines()[0].partition('. ')[0][:200]
        reason = f'it holds {blocked[1]}, which could run code' if blocked else f'it is damaged ({told})'
        raise ValueError(f'{path} is refused: {reason}. Only files of weights are read.') from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}, not the weights of a model by name')
    return dict(checkpoint)


def _head_tensors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of the head under our names, without prefix."""
    return {_our_name(name[len(prefix) :]): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _our_name(name: str) -> str:
    name = name.removeprefix('decoder.')
    module, dot, rest = name.partition('.')
    return _RENAMES.get(module, module) + dot + rest


def _shown_options(head: Mapping[str, Tensor]) -> dict[str, int]:
    options = {
        option: head[name].shape[dim]
        for option, (name, dim) in _SHOWN_BY.items()
        if name in head and head[name].dim() > dim
    }
    return {**options, 'num_layers': len({name.split('.')[1] for name in head if name.startswith('layers.')})}


def _word_options(head: Mapping[str, Tensor]) -> dict[str, int]:
    """The options of the reference's head of word queries, which are those of full decoding."""
    dim, group_size = head['group_fc.weight'].shape
    if 'vocabulary.embeddings' in head or group_size != 1:
        raise ValueError(
            'the shapes of word queries do not show how they group the classes: build the model as it was trained'
        )
    shown = _shown_options(head)
    width = head['queries.proj.weight'].shape[1] if 'queries.proj.weight' in head else dim
    return {
        'word_embeddings': width,
        'decoder_embedding': dim,
        **{option: shown[option] for option in ('dim_feedforward', 'num_layers')},
    }


def _own_classes(model: nn.Module, slot: str, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The label embeddings that the model has already, for a file without any."""
    vocabulary = model.get_submodule(slot.removesuffix('.')).vocabulary
    if vocabulary is None or f'{slot}vocabulary.embeddings' in head:
        return {}
    if not vocabulary.known:
        raise ValueError('give the head its classes first, with set_word_embeddings')
    return {f'{slot}vocabulary.{name}': tensor for name, tensor in vocabulary.state_dict().items()}


def _slot(model: nn.Module) -> str:
    slots = [name for name, module in model.named_modules() if isinstance(module, MLDecoder)]
    if len(slots) != 1:
        raise ValueError(
            f'{type(model).__name__} has {len(slots)} ML-Decoder heads, not one: build it with '
            f'timm.create_model(..., ml_decoder=True) or add_ml_decoder_head'
        )
    return f'{slots[0]}.' if slots[0] else ''


def _check_fit(converted: Mapping[str, Tensor], model: nn.Module, slot: str) -> None:
    own = model.state_dict()
    classes = f'{slot}vocabulary.'  # which a head of word queries takes from a file, or leaves, as it fits
    misfits = {
        'missing': [name for name in own if name not in converted],
        'unexpected': [name for name in converted if name not in own],
        'mis-shaped': [
            f'{name} (file {list(converted[name].shape)}, model {list(tensor.shape)})'
            for name, tensor in own.items()
            if name in converted and converted[name].shape != tensor.shape and not name.startswith(classes)
        ],
    }
    if not any(misfits.values()):
        return
    lines = [f'  {kind}: {", ".join(names)}' for kind, names in misfits.items() if names]
    head = {name[len(slot) :]: tensor for name, tensor in converted.items() if name.startswith(slot)}
    options = ', '.join(f'{option}={value}' for option, value in _shown_options(head).items())
    lines = [f'the checkpoint does not fit {type(model).__name__}:', *lines, f'  its head was built with {options}']
    raise ValueError('\n'.join(lines))
