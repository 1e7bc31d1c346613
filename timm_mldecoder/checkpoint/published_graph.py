"""Checkpoints of the authors' code of the graph branch (arXiv 2209.06585), under the names of this package."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.tresnet import checkpoint_filter_fn as convert_tresnet
from torch import Tensor, nn

from timm_mldecoder.models.classifier_model import module_path, state_dict_mismatches
from timm_mldecoder.models.cosine import CosineClassifier
from timm_mldecoder.models.graph import GraphClassifier, weighted_adjacency

PRELU_START = 0.25  # torch's start value of the PReLU that the authors' code adds to timm models and never calls
# The authors' names of tensors -> ours
AUTHORS_NAMES = {
    'inp': 'words',
    'A': 'edges',
    'head.weight': 'classifier.weight',
    'head.bias': 'classifier.bias',
    'gc1.W': 'gc1.weight',
    'gc1.a': 'gc1.attention',
    'gc2.W': 'gc2.weight',
    'gc2.a': 'gc2.attention',
}


def convert_graph_state_dict(
    state_dict: Mapping[str, Tensor], model: Any, class_names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Tensors of a checkpoint in the layout of the authors' code, under the names of a model with a graph classifier.

    The file has ``backbone.`` (or ``backbone.model.``), ``head.``, ``gc1.``, ``gc2.``, ``inp`` (word vectors) and ``A``
    (the weighted adjacency before normalization). Left out are ``gc_weights``, the folded gate, and what the authors'
    wrapper of a timm model never uses: its own classifier and a PReLU at its start value.

    Args:
        state_dict: Tensors of the file, which stay as they are.
        model: A timm model with a `GraphClassifier` of the same layer, classifier and sizes.
        class_names: Names of the model's classes in their order. The file has the sorted names; without names its
            order is kept.

    Returns:
        What ``model.load_state_dict`` expects.

    Raises:
        ValueError: If the model or the file has no graph branch or one of another kind; if ``A`` is not what the
            model's weight makes of 0 and 1; if a tensor is missing, unexpected or of another shape, all listed.
    """
    graph = model.get_classifier()
    if not isinstance(graph, GraphClassifier):
        raise ValueError(f'{type(model).__name__} has no graph classifier: use add_graph_classifier first')
    layer = next((name for name, key in (('gcn', 'gc1.weight'), ('gat', 'gc1.W')) if key in state_dict), None)
    if layer is None:
        raise ValueError('no graph branch in the checkpoint: it has neither gc1.weight nor gc1.W')
    if layer != graph.layer:
        raise ValueError(f'the checkpoint has a graph branch of layer {layer!r}, the model of {graph.layer!r}')
    slot = module_path(model, graph)
    converted = _backbone_tensors(state_dict, slot, model)
    converted |= {f'{slot}.{name}': tensor for name, tensor in _branch_tensors(state_dict, graph, class_names).items()}
    if lines := state_dict_mismatches(converted, model):
        raise ValueError(f'the checkpoint does not fit {type(model).__name__}: {"; ".join(lines)}')
    return converted


def convert_backbone(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a backbone under timm's names; those of a TResNet with in-place ABN differ."""
    if 'body.conv1.0.weight' not in tensors:
        return tensors
    # BatchNorm counts its batches, in-place ABN does not
    counts = {name: torch.tensor(0) for name in model.state_dict() if name.endswith('num_batches_tracked')}
    return convert_tresnet(tensors, model) | counts


def _backbone_tensors(state_dict: Mapping[str, Tensor], slot: str, model: nn.Module) -> dict[str, Tensor]:
    prefix = 'backbone.'
    found = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    if found and all(name.startswith('model.') for name in found):  # the authors' wrapper of a timm model
        found = {name.removeprefix('model.'): tensor for name, tensor in found.items()}
        found = {name: value for name, value in found.items() if not name.startswith((f'{slot}.', 'classifier.'))}
        if 'act2.weight' in found and (found['act2.weight'] == PRELU_START).all():
            del found['act2.weight']
    return convert_backbone(found, model)


def _branch_tensors(
    state_dict: Mapping[str, Tensor], graph: GraphClassifier, class_names: Sequence[str] | None
) -> dict[str, Tensor]:
    """The tensors of head and graph branch under our names, in the order of the model's classes."""
    found = {name: value for name, value in state_dict.items() if not name.startswith('backbone.')}
    found.pop('gc_weights', None)
    if 'head.weight' in found and isinstance(graph.classifier, CosineClassifier):
        found['head.weight'] = found['head.weight'].T
    num_classes, names = graph.out_features, class_names or range(graph.out_features)
    if len(set(names)) != num_classes or len(names) != num_classes:
        raise ValueError(f'{num_classes} distinct class names are needed, got {list(names)!r:.200}')
    rows = {name: row for row, name in enumerate(sorted(names))}
    order = torch.tensor([rows[name] for name in names])
    for name in ('inp', 'A', 'head.weight', 'head.bias'):
        if name not in found:
            continue
        if not found[name].dim() or len(found[name]) != num_classes:
            shape = list(state_dict[name].shape)
            raise ValueError(f'{name} of the checkpoint is {shape}, the model has {num_classes} classes')
        found[name] = _edges_of(found[name], graph.edge_weight)[:, order] if name == 'A' else found[name]
        found[name] = found[name][order]
    return {AUTHORS_NAMES.get(name, name): tensor for name, tensor in found.items()}


def _edges_of(a: Tensor, weight: float) -> Tensor:
    """The edges that A was made from, see `weighted_adjacency`."""
    if a.shape == (len(a), len(a)):
        identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
        edges = (a - identity if weight else a) > 0
        if torch.allclose(a, weighted_adjacency(edges, weight, a.dtype), rtol=0, atol=1e-4):
            return edges.to(torch.uint8)
    raise ValueError(f'A of the checkpoint is not a label graph of weight {weight:g}: pass the weight it was made with')
