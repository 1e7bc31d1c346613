"""The graph branch of arXiv 2209.06585: a gate on the pooled features, from a label graph and label embeddings."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mldecoder.head.vocabulary import check_embeddings
from timm_mldecoder.models.classifier_model import (
    ClassifierModel,
    change_class,
    linear_classifier,
    module_path,
)
from timm_mldecoder.models.cosine import CosineClassifier

_logger = logging.getLogger(__name__)

SLOPE = 0.2  # of every LeakyReLU of the branch
NO_EDGE = -9e15  # attention logit of a pair of classes without an edge
DEFAULT_SCALE = 17.0


def label_edges(adjacency: Tensor, threshold: float = 0.4) -> Tensor:
    """Edges B of a label graph, 1 where the adjacency reaches the threshold.

    Args:
        adjacency: M [C, C] in [0, 1]: images that show classes i and j, divided by the occurrences of class i; its
            diagonal is 0.
        threshold: Smallest M[i, j] of an edge, above 0 and at most 1.

    Returns:
        Edges [C, C], uint8, so that a change of the model's dtype cannot move a value across the threshold.

    Raises:
        ValueError: If M is not a square matrix of values in [0, 1] with a zero diagonal, or the threshold is out of
            range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f'the threshold of a label graph must be above 0 and at most 1, got {threshold}')
    if adjacency.dim() != 2 or len(adjacency) != adjacency.shape[-1] or not len(adjacency):
        raise ValueError(f'the adjacency of a label graph must be [C, C], got {list(adjacency.shape)}')
    odd = (~((adjacency >= 0) & (adjacency <= 1))).nonzero().tolist()
    if odd:
        row, column = odd[0]
        value = adjacency[row, column].item()
        raise ValueError(f'adjacency[{row}, {column}] is {value}: the adjacency of a label graph is in [0, 1]')
    loops = adjacency.diagonal().nonzero().flatten().tolist()
    if loops:
        raise ValueError(f'the adjacency of a label graph must have a zero diagonal, got other values at {loops}')
    return (adjacency >= threshold).to(torch.uint8)


def weighted_adjacency(edges: Tensor, weight: float = 0.25, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weighted adjacency A = weight * B / (colsum(B) + 1e-6) + I of a label graph.

    Args:
        edges: B [C, C] of `label_edges`.
        weight: Share of the neighbours. With 0, A is B without I.
        dtype: Floating-point type of the result [C, C].
    """
    edges = edges.to(dtype)
    if not weight:
        return edges
    return weight * edges / (edges.sum(dim=0) + 1e-6) + torch.eye(len(edges), dtype=dtype, device=edges.device)


def propagation_matrix(edges: Tensor, weight: float = 0.25, dtype: torch.dtype = torch.float32) -> Tensor:
    """The normalised matrix (A D)^T D by which a graph layer propagates; A is the `weighted_adjacency`.

    D is diag(rowsum(A)^-1/2), with 0 for a row of zeros. Entry (i, j) of the result [C, C] is d_i A[j, i] d_j.
    """
    a = weighted_adjacency(edges, weight, dtype)
    degree = a.sum(dim=1)
    d = torch.where(degree > 0, degree.rsqrt(), 0)
    return d[:, None] * a.T * d


class GraphConvolution(nn.Module):
    """A layer X [C, in] -> P X W [C, out] without bias, with the propagation matrix P (arXiv 1609.02907)."""

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, propagation: Tensor) -> Tensor:
        return propagation @ (x @ self.weight.to(x.dtype))


class GraphAttention(nn.Module):
    """A layer of one attention head over the neighbours of each class, followed by ELU (arXiv 1710.10903).

    The attention weights have dropout in training.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))
        self.attention = nn.Parameter(torch.empty(2 * out_features, 1, device=device, dtype=dtype))
        self.dropout = nn.Dropout(0.1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for tensor in (self.weight, self.attention):
            nn.init.xavier_uniform_(tensor, gain=1.414)

    def forward(self, x: Tensor, propagation: Tensor) -> Tensor:
        x = x @ self.weight.to(x.dtype)
        receiver, sender = self.attention.to(x.dtype).chunk(2)
        logits = F.leaky_relu(x @ receiver + (x @ sender).T, SLOPE)
        shares = logits.masked_fill(propagation <= 0, NO_EDGE).softmax(dim=1)
        return F.elu(self.dropout(shares) @ x)


LAYERS = {'gcn': GraphConvolution, 'gat': GraphAttention}
CLASSIFIERS = ('cosine', 'linear')


class GraphClassifier(nn.Module):
    """A classifier on pooled features times a gate, which a label graph and label embeddings give (arXiv 2209.06585).

    The gate is sigmoid(max over classes) of two graph layers on the label embeddings. It does not depend on the
    image, so multiplying the pooled features by it equals multiplying the feature map before average pooling. It is
    computed in float32 at least, also under autocast.

    Label graph and label embeddings are buffers: a state dict brings them. They start as zeros, and the classifier
    refuses to run until they are set.

    Args:
        in_features: Width F of the pooled features.
        out_features: Number of classes C.
        width: Width E of the label embeddings.
        layer: 'gcn' or 'gat', the type of both graph layers, E -> F -> F.
        threshold: Threshold that the edges were made with, noted for `graph_options`.
        weight: Share of the neighbours, see `weighted_adjacency`.
        classifier: 'cosine' (normalised features and class weights, no bias) or 'linear' (with bias).
        scale: Factor of the cosine classifier's logits.

    Shapes:
        input [B, F], output [B, C]; buffers ``edges`` [C, C] and ``words`` [C, E].

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int,
        *,
        layer: str = 'gcn',
        threshold: float = 0.4,
        weight: float = 0.25,
        classifier: str = 'cosine',
        scale: float = DEFAULT_SCALE,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        for name, value, choices in (('layer', layer, LAYERS), ('classifier', classifier, CLASSIFIERS)):
            if value not in choices:
                raise ValueError(f'{name} of a graph classifier must be one of {list(choices)}, got {value!r}')
        if not 0 <= weight <= 1:
            raise ValueError(f'the weight of the neighbours in a label graph must be in [0, 1], got {weight}')
        if classifier == 'linear' and scale != DEFAULT_SCALE:
            raise ValueError(f"scale={scale} is for classifier='cosine': leave it out with 'linear'")
        place: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.layer, self.threshold, self.edge_weight = layer, float(threshold), float(weight)
        self.gc1 = LAYERS[layer](width, in_features, **place)
        self.gc2 = LAYERS[layer](in_features, in_features, **place)
        if classifier == 'cosine':
            self.classifier: CosineClassifier | nn.Linear = CosineClassifier(in_features, out_features, scale, **place)
        else:
            self.classifier = nn.Linear(in_features, out_features, **place)
        self.words: Tensor
        self.edges: Tensor
        self.folded: Tensor | None
        self.register_buffer('words', torch.zeros(out_features, width, **place))
        self.register_buffer('edges', torch.zeros(out_features, out_features, device=device, dtype=torch.uint8))
        self.register_buffer('folded', None, persistent=False)
        self.known = False  # whether edges and words have been set

    def reset_parameters(self) -> None:
        """Draw layers and classifier anew; label graph and label embeddings stay."""
        parts: tuple[Any, ...] = (self.gc1, self.gc2, self.classifier)
        for module in parts:
            module.reset_parameters()

    @property
    def weight(self) -> Tensor:
        """Weight [C, F] of the classifier after the gate."""
        return self.classifier.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias [C] of the linear classifier, None for the cosine classifier."""
        return self.classifier.bias

    @torch.no_grad()
    def set_graph(self, edges: Tensor, words: Tensor) -> None:
        """Set the edges [C, C] of `label_edges` and the label embeddings [C, E]."""
        self.edges.copy_(edges)
        self.words.copy_(words)
        self.known, self.folded = True, None

    def gate(self) -> Tensor:
        """The gate [F], in (0, 1)."""
        if not self.known:
            raise RuntimeError('this classifier has no label graph yet: load a checkpoint, or use add_graph_classifier')
        dtype = torch.promote_types(self.words.dtype, torch.float32)
        device = self.words.device.type
        with torch.autocast('cpu' if device == 'meta' else device, enabled=False):  # meta tensors have no autocast
            x, propagation = self.words.to(dtype), propagation_matrix(self.edges, self.edge_weight, dtype)
            for layer in (self.gc1, self.gc2):
                x = F.leaky_relu(layer(x, propagation), SLOPE)
            return x.max(dim=0).values.sigmoid()

    @torch.no_grad()
    def fold(self) -> None:
        """Compute the gate once and use it as a constant, until `train` or the next state dict.

        Raises:
            ValueError: If the module is in training mode, where the layers still change.
        """
        if self.training:
            raise ValueError('a graph classifier folds in eval mode: call model.eval() first')
        self.folded = self.gate()

    def train(self, mode: bool = True) -> 'GraphClassifier':
        if mode:
            self.folded = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate() if self.folded is None else self.folded
        return self.classifier((x * gate).to(x.dtype))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.folded = None
        if prefix + 'words' in state_dict and prefix + 'edges' in state_dict:
            self.known = True

    def extra_repr(self) -> str:
        options = graph_options(self)
        return ', '.join(f'{name}={options[name]}' for name in ('num_classes', 'width', 'layer', 'threshold', 'weight'))


class GraphModel(ClassifierModel):
    """A timm model with a graph classifier. Its ``reset_classifier`` is timm's, and builds a linear classifier."""

    classifier_option = 'graph_classifier'

    def classifier_options(self) -> dict | None:
        classifier = self.get_classifier()
        return graph_options(classifier) if isinstance(classifier, GraphClassifier) else None


def add_graph_classifier(
    model: Any,
    adjacency: Tensor,
    word_embeddings: Tensor,
    *,
    layer: str = 'gcn',
    threshold: float = 0.4,
    weight: float = 0.25,
    classifier: str = 'cosine',
    scale: float = DEFAULT_SCALE,
) -> nn.Module:
    """Replace the linear classifier of a timm model by a `GraphClassifier` of as many classes, in place.

    Pooling and dropout before it stay. A linear classifier keeps the weights it has; a cosine classifier starts fresh.
    The model's own `reset_classifier` makes a plain linear one again.

    Args:
        model: A model with timm's `get_classifier` and C classes.
        adjacency: M [C, C] of `label_edges`, in the order of the model's classes.
        word_embeddings: Label embeddings [C, E] in the same order, used as they are.
        layer: 'gcn' or 'gat', the type of the graph layers.
        threshold: Smallest entry of the adjacency that makes an edge.
        weight: Share of the neighbours, see `weighted_adjacency`.
        classifier: 'cosine' or 'linear'.
        scale: Factor of the cosine classifier's logits, above 0.

    Returns:
        The same model. ``forward`` gives logits [B, C].

    Raises:
        ValueError: If the classifier is not one linear layer; if the sizes of model, adjacency and label embeddings
            differ; if a value is not finite or an option is out of range.
    """
    edges = label_edges(adjacency, threshold)
    check_embeddings(word_embeddings, word_embeddings.shape[-1] if word_embeddings.dim() else 0, None)
    if len(word_embeddings) != len(edges):
        raise ValueError(f'the label graph has {len(edges)} classes, the word embeddings have {len(word_embeddings)}')
    options = dict(layer=layer, threshold=threshold, weight=weight, classifier=classifier, scale=scale)
    empty_graph_classifier(model, num_classes=len(edges), width=word_embeddings.shape[1], **options)
    model.get_classifier().set_graph(edges, word_embeddings)
    isolated = (~adjacency.bool().any(dim=1)).nonzero().flatten().tolist()
    if isolated:
        _logger.warning(f'Classes that the label graph never shows with another class (zero rows): {isolated}')
    return model


def empty_graph_classifier(model: nn.Module, *, num_classes: int, width: int, **options) -> nn.Module:
    """Replace the linear classifier of a timm model by a `GraphClassifier` whose tensors a state dict brings.

    Args:
        model: A model with timm's `get_classifier`.
        num_classes: Number of classes C, the same as the model's.
        width: Width E of the label embeddings.
        **options: Keyword options of `GraphClassifier`; `graph_options` gives them.

    Returns:
        The same model, which refuses to run until a state dict is loaded.

    Raises:
        ValueError: If the classifier is not one linear layer of so many classes, or an option is out of range.
    """
    old = linear_classifier(model, 'a graph classifier')
    if old.out_features != num_classes:
        raise ValueError(f'the label graph has {num_classes} classes, the model has {old.out_features}')
    place: dict[str, Any] = dict(device=old.weight.device, dtype=old.weight.dtype)
    new = GraphClassifier(old.in_features, num_classes, width, **options, **place)
    if type(new.classifier) is nn.Linear:
        with torch.no_grad():
            new.classifier.weight.copy_(old.weight)
            new.classifier.bias.copy_(torch.zeros_like(new.classifier.bias) if old.bias is None else old.bias)
    model.set_submodule(module_path(model, old), new.train(old.training))
    change_class(model, GraphModel)
    return model


def graph_options(classifier: GraphClassifier) -> dict[str, Any]:
    """The options that `empty_graph_classifier` rebuilds a classifier from, of types that JSON has."""
    kind = 'cosine' if isinstance(classifier.classifier, CosineClassifier) else 'linear'
    return {
        'num_classes': classifier.out_features,
        'width': classifier.words.shape[1],
        'layer': classifier.layer,
        'threshold': classifier.threshold,
        'weight': classifier.edge_weight,
        'classifier': kind,
        **({'scale': classifier.classifier.scale} if kind == 'cosine' else {}),
    }
