"""The cosine classifier on pooled features: metric learning for models without an ML-Decoder head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mldecoder.models.classifier_model import ClassifierModel, change_class, linear_classifier, module_path


class CosineClassifier(nn.Linear):
    """A linear classifier of the angle alone (arXiv 2209.06585, section 3).

    Features and the weight vector of each class are L2-normalised; there is no bias. The cosine is clamped to [-1, 1],
    which rounding might exceed, and multiplied by `scale`.

    Args:
        in_features: Width D of the features.
        out_features: Number of classes C.
        scale: Factor of the logits, above 0.

    Shapes:
        weight [C, D]; input [..., D], output [..., C].

    Raises:
        ValueError: If `scale` is not above 0.
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 1.0, device=None, dtype=None) -> None:
        _check_scale(scale)
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.scale = float(scale)

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.weight)  # zeros, from which some models start, have no direction
        with torch.no_grad():
            # unit vectors, as in the authors' code: with weight decay the norm sets the effective learning rate
            self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=1))
        return self.scale * cosine.clamp(-1, 1)

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}'


class CosineModel(ClassifierModel):
    """A timm model with a cosine classifier. Its ``reset_classifier`` is timm's, and builds a linear classifier."""

    classifier_option = 'cosine_classifier'

    def classifier_options(self) -> float | None:
        classifier = self.get_classifier()
        return classifier.scale if isinstance(classifier, CosineClassifier) else None


def add_cosine_classifier(model: nn.Module, scale: float = 1.0) -> nn.Module:
    """Replace the linear classifier of a timm model by a fresh cosine classifier of as many classes, in place.

    Pooling, dropout and the name of the classifier stay: the weight is `fc.weight` where it was. ``save_for_hf`` stores
    the classifier, and ``timm.create_model(name, cosine_classifier=scale)`` builds it.

    Args:
        model: A model with timm's `get_classifier`.
        scale: Factor of the logits, above 0; `timm_mldecoder.losses.AngularMarginLoss` is the loss for it.

    Returns:
        The same model. ``forward`` returns logits [B, C], `scale` times the cosine.

    Raises:
        ValueError: If the classifier is not one linear layer, or the scale is not above 0.
    """
    _check_scale(scale)
    old = linear_classifier(model, 'a cosine classifier')
    new = CosineClassifier(old.in_features, old.out_features, scale, old.weight.device, old.weight.dtype)
    model.set_submodule(module_path(model, old), new)
    change_class(model, CosineModel)
    return model


def _check_scale(scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float('inf'):
        raise ValueError(f'the scale of a cosine classifier must be a finite number above 0, got {scale!r}')
