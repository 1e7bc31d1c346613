"""The cosine classifier on pooled features: metric learning for models without an ML-Decoder head."""

from torch import Tensor, nn
from torch.nn import functional as F


class CosineClassifier(nn.Linear):
    """A linear classifier on the angle alone (arXiv 2209.06585, section 3).

    Features and the weight vector of each class are L2-normalised; there is no bias. The cosine is kept in [-1, 1],
    which rounding might leave, and multiplied by `scale`.

    Args:
        in_features: width D of the features.
        out_features: number of classes C.
        scale: factor of the logits, above 0.

    Shapes:
        weight [C, D]; input [..., D], output [..., C].
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 1.0, device=None, dtype=None) -> None:
        if scale <= 0:
            raise ValueError(f'the scale of a cosine classifier must be above 0, got {scale}')
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.scale = float(scale)

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.weight)  # zeros, with which some models start, have no direction

    def forward(self, x: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=1))
        return self.scale * cosine.clamp(-1, 1)

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}'


def add_cosine_classifier(model: nn.Module, scale: float = 1.0) -> nn.Module:
    """Replace the linear classifier of a timm model by a fresh cosine classifier of as many classes, in place.

    Pooling and dropout before it stay, and so does its name: the weight is `fc.weight` where it was. The model's own
    `reset_classifier` makes a linear one again.

    Args:
        model: a model with timm's `get_classifier`.
        scale: factor of the logits, above 0; `timm_mldecoder.losses.AngularMarginLoss` goes with it.

    Returns:
        The same model. ``forward`` gives logits [B, C], `scale` times the cosine.

    Raises:
        ValueError: the classifier is not one linear layer, or the scale is not above 0.
    """
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
        found = ' and '.join(type(part).__name__ for part in parts)
        name = type(model).__name__
        raise ValueError(f'a cosine classifier takes the place of one nn.Linear; {name} classifies by {found}')
    name = next(name for name, module in model.named_modules() if module is classifier)
    weight = classifier.weight
    model.set_submodule(
        name, CosineClassifier(classifier.in_features, classifier.out_features, scale, weight.device, weight.dtype)
    )
    return model
