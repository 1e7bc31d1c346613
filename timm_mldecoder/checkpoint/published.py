"""Convert published checkpoint layouts (the reference repository's, timm's own ML-Decoder layer's) to this package's.

Weights only: no code in a file is run. A tensor that does not fit is an error, and so is a file that does not show what
its logits depend on: a strict load with other logits would be worse than none.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_mldecoder.checkpoint.published_graph import convert_backbone, convert_graph_state_dict
from timm_mldecoder.checkpoint.read import weights_of
from timm_mldecoder.checkpoint.repairs import repair_attention
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.models.attach import MLDecoderModel
from timm_mldecoder.models.classifier_model import shorten, state_dict_mismatches

OURS = 'timm_mldecoder'
# Name of the group fully-connected weight, different in every layout -> the layout.
LAYOUTS = {
    'decoder.duplicate_pooling': 'the reference repository',
    'duplicate_pooling': "timm's own ML-Decoder layer",
    'group_fc.weight': OURS,
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
NUM_HEADS = 8  # a constant of the published code, as are these
_CONSTANTS = {'num_layers': 1, 'dim_feedforward': 2048}
_TRESNET = 'body.conv1.0.weight'  # of a TResNet with in-place ABN, which has other names than timm's
LONGEST = 500  # characters of an error


class Head(NamedTuple):
    """An ML-Decoder head among the tensors of a file: its layout, and the prefix of the names of its tensors."""

    layout: str
    prefix: str


def convert_state_dict(
    state_dict: Mapping[str, Any],
    model: nn.Module,
    *,
    head: str | None = None,
    self_attention: str | None = None,
    num_heads: int | None = None,
    ignore: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under the names that ``model.load_state_dict`` expects.

    Reads the layouts of the reference repository (its TResNets with in-place ABN included), of timm's own ML-Decoder
    layer and of this package, and the graph models of arXiv 2209.06585, as `weights_of` reads them, under any prefix.
    Also reads the decoder layers by which projects have repaired the published one, see docs/migrate.md. Takes the
    arguments of timm's filters: ``timm.models.load_checkpoint(model, path, filter_fn=convert_state_dict)``. The
    reference's files of text queries hold no label embeddings: the model keeps its own.

    Args:
        state_dict: The content of the file; neither it nor the model is changed.
        model: A timm model with an ML-Decoder head, or an `MLDecoder` (which gets the head of the file alone), built
            with the options of `head_options`; or a module of the user's own with one or more `MLDecoder` in it, under
            the names that they have in the file.
        head: Name of the head in a file with several.
        self_attention: What self-attention weights beside those of the cross-attention are for: 'use' for torch's own
            decoder layer, 'ignore' for weights that the forward pass never uses, 'reuse' if it uses those of the
            cross-attention for self-attention too. Not needed where the file shows it.
        num_heads: Number of attention heads, which changes no shape. Needed where a file has another number of layers
            or another feed-forward width than the published code.
        ignore: Beginnings of names of tensors that the logits do not depend on, such as those of a loss.

    Raises:
        ValueError: If the file or the model has no ML-Decoder head, or more than one; if tensors are missing,
            unexpected or of another shape; if neither the file nor the model has label embeddings; or if the file does
            not show what the logits depend on: self-attention, the number of heads, or what the head reads of the
            backbone (`prefix_tokens` and `head_norm` of the model's options).
    """
    tensors = _tensors_of(state_dict, ignore)
    if 'gc1.weight' in tensors or 'gc1.W' in tensors:  # the layout of arXiv 2209.06585
        return convert_graph_state_dict(tensors, model)
    if head is None and len(_slots(model)) > 1:
        return _convert_several(tensors, model, self_attention, num_heads)
    slot = _slot(model)
    target: Any = model.get_submodule(slot.removesuffix('.'))
    found = find_head(tensors, head)
    own = _head_tensors(tensors, found, self_attention)
    if found.layout != OURS:
        _check_num_heads(own, num_heads, target.layers[0].multihead_attn.num_heads)
    named = {slot + name: tensor for name, tensor in own.items()}
    converted = {**_own_classes(target, slot, named), **named}
    if slot:  # not the head alone
        rest = _without_position(_beside_heads(tensors, found, head), model, target)
        converted = {**_backbone_tensors(rest, model, slot, found, several=head is not None), **converted}
    # a head with text queries loads label embeddings from a file only if they fit
    if lines := state_dict_mismatches(converted, model, any_shape=f'{slot}vocabulary.'):
        options = ', '.join(f'{option}={value}' for option, value in _options_of_shapes(own).items())
        lines += [f'its head was built with {options}']
        raise ValueError(f'the checkpoint does not fit {type(model).__name__}: {"; ".join(lines)}'[:LONGEST])
    return converted


def _backbone_tensors(
    rest: Mapping[str, Tensor], model: nn.Module, slot: str, found: Head, several: bool
) -> dict[str, Tensor]:
    """Return the tensors of the backbone under the names of the model, from those beside the heads of a file."""
    prefix, others = _find_prefix(rest, model, slot, found, several)
    backbone = {name[len(prefix) :]: rest[name] for name in rest if name.startswith(prefix)}
    _check_reading(model, found.layout == OURS, found.prefix == prefix + slot, set(backbone))
    if others:
        raise ValueError(
            f'beside {prefix}* and the head the checkpoint has {shorten(others)}: if the logits do not depend on '
            'them, name them in ignore (convert: --ignore NAME)'
        )
    return convert_backbone(_without_norm(backbone, model), model)


def _convert_several(
    tensors: Mapping[str, Tensor], model: nn.Module, self_attention: str | None, num_heads: int | None
) -> dict[str, Tensor]:
    """`convert_state_dict` for a module of the user's own with several heads, all of which are in the file."""
    if any(isinstance(module, MLDecoderModel) for module in model.modules()):
        raise ValueError(
            f'{type(model).__name__} has several models with an ML-Decoder head: convert one after the other'
        )
    heads = _heads(tensors)
    converted = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(heads))}
    for prefix, layout in heads.items():
        own = _head_tensors(tensors, Head(layout, prefix), self_attention)
        if layout != OURS:
            head: Any = model.get_submodule(_slots(model)[0])
            _check_num_heads(own, num_heads, head.layers[0].multihead_attn.num_heads)
        converted |= {prefix + name: tensor for name, tensor in own.items()}
    prefix, others = _find_prefix(converted, model, '/', Head(OURS, ''), several=False)  # no name begins with a slash
    names = {name.removeprefix(prefix): tensor for name, tensor in converted.items() if name not in others}
    if lines := state_dict_mismatches(names | {name: converted[name] for name in others}, model):
        raise ValueError(f'the checkpoint does not fit {type(model).__name__}: {"; ".join(lines)}'[:LONGEST])
    return names


def head_options(
    state_dict: Mapping[str, Any],
    *,
    head: str | None = None,
    self_attention: str | None = None,
    num_heads: int | None = None,
) -> dict[str, Any]:
    """Return the options of `MLDecoder` that follow from the shapes of a checkpoint's tensors, ``num_classes`` first.

    ``add_ml_decoder_head(model, **head_options(state_dict))`` builds a head that the checkpoint fits. For the
    reference's text queries, ``word_embeddings`` (the label embeddings of the file, or their width) replaces the
    classes. The arguments are those of `convert_state_dict`.

    Raises:
        ValueError: If the checkpoint has no ML-Decoder head, one with missing tensors, one with text queries of
            this package, whose grouping does not follow from shapes, or one that does not show its self-attention or
            its number of heads.
    """
    tensors = _tensors_of(state_dict)
    found = find_head(tensors, head)
    own = _head_tensors(tensors, found, self_attention)
    missing = sorted({name for name, _ in _SHAPED_BY.values()} - set(own))
    if missing:
        raise ValueError(f'the ML-Decoder head in the checkpoint is not complete: missing {", ".join(missing)}')
    if found.layout != OURS:
        _check_num_heads(own, num_heads)
    ours = found.layout == OURS
    options = _options_of_shapes(own) if own['group_fc.weight'].dim() == 3 else _word_options(own, ours)
    return {**options, **({'num_heads': num_heads} if num_heads else {})}


def lacks_head_norm(
    state_dict: Mapping[str, Any], model: nn.Module, *, head: str | None = None, ignore: Sequence[str] = ()
) -> bool:
    """Return whether a file has none of the tensors between the model's features and its classifier.

    Its head then reads the features in front of them: build the model with the option ``head_norm=False``.
    """
    tensors = _tensors_of(state_dict, ignore)
    found, slot = find_head(tensors, head), _slot(model)
    rest = _beside_heads(tensors, found, head)
    prefix, _ = _find_prefix(rest, model, slot, found, several=head is not None)
    norm: Any = model.ml_decoder_norm
    return bool(norm) and not any(prefix + name in rest for name in norm)


def find_head(tensors: Mapping[str, Tensor], name: str | None = None) -> Head:
    """Return the one ML-Decoder head among the tensors of a file, or the one with this name.

    Raises:
        ValueError: If there is none, or more than one without a name.
    """
    heads = _heads(tensors)
    if not heads:
        raise ValueError(f'no ML-Decoder head in the checkpoint: no tensor is named {" or ".join(LAYOUTS)}')
    prefix = f'{name.rstrip(".")}.'.lstrip('.') if name is not None else next(iter(heads))
    if prefix not in heads or (name is None and len(heads) > 1):
        names = shorten([prefix.rstrip('.') or "''" for prefix in heads], 300)
        wrong = f'no ML-Decoder head {name!r}' if name is not None else f'{len(heads)} ML-Decoder heads'
        raise ValueError(f'the checkpoint has {wrong}: choose one with head (convert: --head NAME) of {names}')
    return Head(heads[prefix], prefix)


def _heads(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the layout of each head in a file by the prefix of its tensors."""
    heads = {}
    for name in tensors:
        marker = next((marker for marker in LAYOUTS if f'.{name}'.endswith(f'.{marker}')), None)
        if marker:
            heads[name.removesuffix(marker)] = LAYOUTS[marker]
    return heads


def _tensors_of(state_dict: Mapping[str, Any], ignore: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the weights of a file without those to ignore, and without what torch.compile adds to names."""
    tensors = {name.replace('_orig_mod.', ''): tensor for name, tensor in weights_of(state_dict).items()}
    unknown = [name for name in ignore if not any(tensor.startswith(name) for tensor in tensors)]
    if unknown:
        raise ValueError(f'ignore: no tensor of the checkpoint begins with {", ".join(unknown)}')
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(ignore))}


def _beside_heads(tensors: Mapping[str, Tensor], found: Head, name: str | None) -> dict[str, Tensor]:
    """Return the tensors outside the head; outside all heads if the user has named one."""
    prefixes = (found.prefix,) if name is None else tuple(_heads(tensors))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def _find_prefix(
    tensors: Mapping[str, Tensor], model: nn.Module, slot: str, found: Head, several: bool
) -> tuple[str, list[str]]:
    """Return the prefix of a model's tensors in a file, and the names without it.

    It is the one under which most names and shapes are the model's, '' if less than half of them are. With `several`
    heads, of which the user has named one, the file may hold several such models: that of the head is taken, and the
    others are left out.

    Raises:
        ValueError: If several prefixes fit as well.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith(slot)}
    votes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        for start in (0, *(dot.end() for dot in re.finditer(r'\.', name))):
            votes[name[:start]] += shapes.get(name[start:]) == tensor.shape
            votes[name[:start]] += len(shapes) * (name[start:] == _TRESNET)
    most = max(votes.values(), default=0)
    prefixes = [prefix for prefix, number in votes.items() if number == most]
    if most < len(shapes) / 2:
        return '', []
    near = {prefix: len(os.path.commonprefix([prefix, found.prefix])) for prefix in prefixes}
    best = [prefix for prefix in prefixes if near[prefix] == max(near.values())]
    if len(best) > 1 or (len(prefixes) > 1 and not several):
        raise ValueError(
            f'the checkpoint has {len(prefixes)} models that fit {type(model).__name__} ({shorten(prefixes)}): leave '
            'all but one out with ignore (convert: --ignore NAME)'
        )
    twins = tuple(prefix for prefix in prefixes if prefix != best[0])
    others = [name for name in tensors if not name.startswith(best[0]) and not (twins and name.startswith(twins))]
    return best[0], others


def _without_position(tensors: Mapping[str, Tensor], model: nn.Module, head: MLDecoder) -> dict[str, Tensor]:
    """Leave out the frequencies of a positional encoding, which the package positional-encodings stores.

    Raises:
        ValueError: If the head does not have one of its encodings.
    """
    own = tuple(name for name in model.state_dict() if name.endswith('inv_freq'))
    frequencies = [name for name in tensors if name.endswith('.inv_freq') and not (own and name.endswith(own))]
    if frequencies and not (head.position or '').startswith('penc2d'):
        raise ValueError(
            f'{frequencies[0]} of the checkpoint is of a positional encoding in front of the head, which head options '
            "express: position='penc2d_nchw' if it is added to the map [B, F, H, W] as it is, position='penc2d' if to "
            '[B, H, W, F] (convert: --ml-decoder-kwargs position=penc2d_nchw)'
        )
    return {name: tensor for name, tensor in tensors.items() if name not in frequencies}


def _check_reading(whole: nn.Module, ours: bool, in_place: bool, names: set[str]) -> None:
    """Raise ValueError unless it is known what the head of a file reads of the backbone.

    Args:
        whole: The model; what a module of the user's own reads, its code says.
        ours: Whether the file has the layout of this package.
        in_place: Whether its head is where the model has it.
        names: Names of the backbone's tensors in the file.
    """
    path, model = next(((n, m) for n, m in whole.named_modules() if isinstance(m, MLDecoderModel)), ('', None))
    if model is None or (ours and in_place) or not names & set(whole.state_dict()):  # another backbone does not fit
        return
    given, name = model.ml_decoder_options, type(model).__bases__[1].__name__
    norm = [f'{path}.{tensor}'.lstrip('.') for tensor in model.ml_decoder_norm]
    if norm and not names & set(norm):
        raise ValueError(
            f'the checkpoint has no {shorten(norm)}: its head reads the features in front of them. Build the model '
            'with the head option head_norm=False (convert does)'
        )
    unknown = {}
    if norm and (not in_place or 'fc_norm' in norm[0]):  # timm pools in front of fc_norm, so that it shows nothing
        unknown['head_norm'] = f'in front of {norm[0].rpartition(".")[0]} (False) or after it (True)'
    if number := model.ml_decoder_prefix_tokens:
        unknown['prefix_tokens'] = f'also its {number} class and register tokens (True) or image tokens alone (False)'
    for option, meaning in unknown.items():
        if given.get(option) is None:
            raise ValueError(
                f'no tensor shows what the head of the checkpoint reads of {name}: {meaning}. Build the model with the '
                f'head option {option}=True or {option}=False (convert: --ml-decoder-kwargs {option}=True)'
            )


def _without_norm(backbone: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Leave out the norm that ``head_norm=False`` has removed from the model; a file may hold it unused."""
    removed = [
        f'{path}.{name}.'.lstrip('.')
        for path, module in model.named_modules()
        if isinstance(module, MLDecoderModel)
        for name in module.ml_decoder_removed
    ]
    return {name: tensor for name, tensor in backbone.items() if not name.startswith(tuple(removed))}


def _check_num_heads(head: Mapping[str, Tensor], given: int | None, built: int | None = None) -> None:
    """Raise ValueError unless the number of heads is known, and that of the model that was built, if any."""
    shown = _options_of_shapes(head)
    changed = [f'{name}={shown[name]}' for name, value in _CONSTANTS.items() if shown.get(name, value) != value]
    if changed and given is None and built in (None, NUM_HEADS):
        raise ValueError(
            f'no tensor shows the number of attention heads. The published code has {NUM_HEADS}, but also '
            f'{", ".join(f"{name}={value}" for name, value in _CONSTANTS.items())}; this file {", ".join(changed)}: '
            f'pass num_heads={NUM_HEADS} or another number (convert: --ml-decoder-kwargs num_heads={NUM_HEADS})'
        )
    if built is not None and given not in (None, built):
        raise ValueError(f'num_heads={given}: the model was built with num_heads={built}')


def _head_tensors(tensors: Mapping[str, Tensor], found: Head, self_attention: str | None) -> dict[str, Tensor]:
    """Return the tensors of the head under our names, without prefix, its attention as `repair_attention` has it."""
    head = {name[len(found.prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(found.prefix)}
    if found.layout == OURS:
        if self_attention:
            raise ValueError(
                f'self_attention={self_attention!r}: the file has the layout of this package, leave it out'
            )
        return head
    renamed = {}
    for name, tensor in head.items():
        module, *rest = re.sub(r'^(decoder\.)+', '', name).split('.')
        renamed['.'.join([_RENAMES.get(module, module), *rest])] = tensor
    if 'queries' in renamed:  # a bare parameter: queries [K, D], or label embeddings [C, E] of text queries
        words = renamed['group_fc.weight'].dim() == 2
        if not words and 'queries.proj.weight' in renamed:
            raise ValueError('query_embed has a projection and each query its classes: no option of the head has both')
        renamed['vocabulary.embeddings' if words else 'queries.weight'] = renamed.pop('queries')
        if words:
            renamed['vocabulary.names_utf8'] = torch.empty(0, dtype=torch.uint8)
    return repair_attention(renamed, self_attention)


def _options_of_shapes(head: Mapping[str, Tensor]) -> dict[str, Any]:
    options = {
        option: head[name].shape[dim]
        for option, (name, dim) in _SHAPED_BY.items()
        if name in head and head[name].dim() > dim
    }
    if 'group_fc.weight' in head and head['group_fc.weight'].dim() == 2:  # one weight [D, g] for all queries
        options = {name: options[name] for name in options if name == 'dim_feedforward'}
        options['decoder_embedding'] = len(head['group_fc.weight'])
    options['num_layers'] = len({name.split('.')[1] for name in head if name.startswith('layers.')})
    return {**options, **({'self_attention': True} if 'layers.0.self_attn.in_proj_weight' in head else {})}


def _word_options(head: Mapping[str, Tensor], ours: bool) -> dict[str, Any]:
    """Return the options of the reference's head with text queries, which does full decoding."""
    dim, group_size = head['group_fc.weight'].shape
    if (ours and 'vocabulary.embeddings' in head) or group_size != 1:
        raise ValueError('the grouping of text queries does not follow from shapes: build the model with its options')
    shown = _options_of_shapes(head)
    width = head['queries.proj.weight'].shape[1] if 'queries.proj.weight' in head else dim
    return {
        'word_embeddings': head.get('vocabulary.embeddings', width),
        'decoder_embedding': dim,
        **{name: shown[name] for name in ('dim_feedforward', 'num_layers', 'self_attention') if name in shown},
    }


def _own_classes(target: MLDecoder, slot: str, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the label embeddings of the model's head, for a file without any."""
    vocabulary = target.vocabulary
    if vocabulary is None or f'{slot}vocabulary.embeddings' in head:
        return {}
    if not vocabulary.known:
        raise ValueError('the head has no classes: call set_word_embeddings first')
    return {f'{slot}vocabulary.{name}': tensor for name, tensor in vocabulary.state_dict().items()}


def _slots(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, MLDecoder)]


def _slot(model: nn.Module) -> str:
    slots = _slots(model)
    if len(slots) != 1:
        raise ValueError(f'{type(model).__name__} has {len(slots)} ML-Decoder heads, not one: pass ml_decoder=True')
    return f'{slots[0]}.' if slots[0] else ''
