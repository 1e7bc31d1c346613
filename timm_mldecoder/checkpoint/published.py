"""Convert published checkpoint layouts (the reference repository's, timm's own ML-Decoder layer's) to this package's.

Weights only: no code in a file is run, and a tensor that does not fit is an error.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from timm_mldecoder.checkpoint.read import weights_of
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.models.classifier_model import misfits
from timm_mldecoder.models.graph import convert_backbone, convert_graph_state_dict

# Name of the group fully-connected weight, different in every layout -> the layout.
LAYOUTS = {
    'decoder.duplicate_pooling': 'the reference repository',
    'duplicate_pooling': "timm's own ML-Decoder layer",
    'group_fc.weight': 'timm_mldecoder',
}
# Names of the other two layouts without their leading `decoder.` -> ours; all other names are equal.
_RENAMES = {
    'embed_standart': 'embed',
    'query_embed': 'queries',
    'duplicate_pooling': 'group_fc.weight',
    'duplicate_pooling_bias': 'group_fc.bias',
    'wordvec_proj': 'queries.proj',
}
# Option of MLDecoder -> the tensor and dimension that it sets. The number of attention heads changes no shape.
_SHAPED_BY = {
    'num_classes': ('group_fc.bias', 0),
    'num_of_groups': ('group_fc.weight', 0),
    'decoder_embedding': ('group_fc.weight', 1),
    'dim_feedforward': ('layers.0.linear1.weight', 0),
}


class Head(NamedTuple):
    """An ML-Decoder head among the tensors of a file: its layout, and the prefix of the names of its tensors."""

    layout: str
    prefix: str


def convert_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under the names that ``model.load_state_dict`` expects.

    Reads the layouts of the reference repository (its TResNets with in-place ABN included), of timm's own ML-Decoder
    layer and of this package, and the graph models of arXiv 2209.06585, as `weights_of` reads them. Takes the arguments
    of timm's filters: ``timm.models.load_checkpoint(model, path, filter_fn=convert_state_dict)``. The reference's files
    of text queries hold no label embeddings: the model keeps its own.

    Args:
        state_dict: The content of the file; neither it nor the model is changed.
        model: A timm model with an ML-Decoder head, or an `MLDecoder`, built with the options of `head_options`.

    Raises:
        ValueError: If the file or the model has no ML-Decoder head, tensors are missing, unexpected or of another
            shape (all are listed), or neither the file nor the model has label embeddings.
    """
    tensors = weights_of(state_dict)
    if 'gc1.weight' in tensors or 'gc1.W' in tensors:  # the layout of arXiv 2209.06585
        return convert_graph_state_dict(tensors, model)
    slot = _slot(model)
    prefix = find_head(tensors).prefix
    head = {slot + name: tensor for name, tensor in _head_tensors(tensors, prefix).items()}
    backbone = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    converted = {**_own_classes(model, slot, head), **convert_backbone(backbone, model), **head}
    # a head with text queries loads label embeddings from a file only if they fit
    if lines := misfits(converted, model, any_shape=f'{slot}vocabulary.'):
        own = {name[len(slot) :]: tensor for name, tensor in converted.items() if name.startswith(slot)}
        options = ', '.join(f'{option}={value}' for option, value in _options_of_shapes(own).items())
        lines = [f'the checkpoint does not fit {type(model).__name__}:', *lines, f'its head was built with {options}']
        raise ValueError('\n  '.join(lines))
    return converted


def head_options(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """Return the options of `MLDecoder` that follow from the shapes of a checkpoint's tensors, ``num_classes`` first.

    ``add_ml_decoder_head(model, **head_options(state_dict))`` builds a head that the checkpoint fits. For the
    reference's text queries, ``word_embeddings`` (the width of the label embeddings) replaces the classes.

    Raises:
        ValueError: If the checkpoint has no ML-Decoder head, one with missing tensors, or one with text queries of
            this package, whose grouping does not follow from shapes.
    """
    tensors = weights_of(state_dict)
    head = _head_tensors(tensors, find_head(tensors).prefix)
    missing = sorted({name for name, _ in _SHAPED_BY.values()} - set(head))
    if missing:
        raise ValueError(f'the ML-Decoder head in the checkpoint is not complete: missing {", ".join(missing)}')
    if head['group_fc.weight'].dim() != 3:
        return _word_options(head)
    return _options_of_shapes(head)


def find_head(tensors: Mapping[str, Tensor]) -> Head:
    """Return the one ML-Decoder head among the tensors of a file.

    Raises:
        ValueError: If there is none, or more than one.
    """
    for marker, layout in LAYOUTS.items():
        prefixes = [name.removesuffix(marker) for name in tensors if f'.{name}'.endswith(f'.{marker}')]
        if len(prefixes) > 1:
            raise ValueError(f'the checkpoint has {len(prefixes)} ML-Decoder heads ({", ".join(prefixes)}), not one')
        if prefixes:
            return Head(layout, prefixes[0])
    raise ValueError(f'no ML-Decoder head in the checkpoint: no tensor is named {" or ".join(LAYOUTS)}')


def _head_tensors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of the head under our names, without prefix."""
    head = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            module, *rest = name[len(prefix) :].removeprefix('decoder.').split('.')
            head['.'.join([_RENAMES.get(module, module), *rest])] = tensor
    return head


def _options_of_shapes(head: Mapping[str, Tensor]) -> dict[str, int]:
    options = {
        option: head[name].shape[dim]
        for option, (name, dim) in _SHAPED_BY.items()
        if name in head and head[name].dim() > dim
    }
    return {**options, 'num_layers': len({name.split('.')[1] for name in head if name.startswith('layers.')})}


def _word_options(head: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the options of the reference's head with text queries, which does full decoding."""
    dim, group_size = head['group_fc.weight'].shape
    if 'vocabulary.embeddings' in head or group_size != 1:
        raise ValueError('the grouping of text queries does not follow from shapes: build the model with its options')
    shown = _options_of_shapes(head)
    width = head['queries.proj.weight'].shape[1] if 'queries.proj.weight' in head else dim
    return {
        'word_embeddings': width,
        'decoder_embedding': dim,
        **{option: shown[option] for option in ('dim_feedforward', 'num_layers')},
    }


def _own_classes(model: nn.Module, slot: str, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the label embeddings of the model, for a file without any."""
    vocabulary: Any = model.get_submodule(slot.removesuffix('.')).vocabulary
    if vocabulary is None or f'{slot}vocabulary.embeddings' in head:
        return {}
    if not vocabulary.known:
        raise ValueError('the head has no classes: call set_word_embeddings first')
    return {f'{slot}vocabulary.{name}': tensor for name, tensor in vocabulary.state_dict().items()}


def _slot(model: nn.Module) -> str:
    slots = [name for name, module in model.named_modules() if isinstance(module, MLDecoder)]
    if len(slots) != 1:
        raise ValueError(f'{type(model).__name__} has {len(slots)} ML-Decoder heads, not one: pass ml_decoder=True')
    return f'{slots[0]}.' if slots[0] else ''
