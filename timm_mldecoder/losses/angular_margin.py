"""Asymmetric angular margin loss for cosine logits."""

import math

import torch.nn.functional as F
from torch import Tensor

from timm_mldecoder.losses.base import MultiLabelLoss, power


class AngularMarginLoss(MultiLabelLoss):
    """Asymmetric angular margin loss for cosine logits c (AAM, arXiv 2209.06585).

    L = - sum[ k/s y w log p+  +  (1 - k)/s (1 - y) w log p- ],  p+ = sigmoid(s (c - m)),  p- = sigmoid(-s (c + m)),
    with w = (y p- + (1 - y) p+)^(gamma_pos y + gamma_neg (1 - y)) after p- <- min(p- + 0.05, 1) if a gamma is positive,
    else 1 and no shift. At inference the score is sigmoid(s c). The paper calls the exponent of the positive
    term gamma-; here, as in its code, it is `gamma_pos`.

    Args:
        scale: The scale s; None for `automatic_scale` of the number of classes.
        margin: The margin m.
        balance: The share k of the positive term, in [0, 1].
        gamma_neg: Focusing exponent of negatives.
        gamma_pos: Focusing exponent of positives.
        scaled_logits: The logits are s c (of a classifier that scales its output) and not c.
        smoothing: See `MultiLabelLoss`.
        reduction: See `MultiLabelLoss`.
    """

    SHIFT = 0.05

    def __init__(
        self,
        scale: float | None = 30.0,
        margin: float = 0.35,
        balance: float = 0.8,
        gamma_neg: float = 0.0,
        gamma_pos: float = 0.0,
        scaled_logits: bool = False,
        smoothing: float = 0.0,
        reduction: str = 'sum',
    ):
        super().__init__(smoothing, reduction)
        if (scale is not None and scale <= 0) or margin < 0 or not 0 <= balance <= 1 or min(gamma_neg, gamma_pos) < 0:
            raise ValueError(
                f'scale must be above 0, margin and gammas at least 0 and balance in [0, 1], got '
                f'{scale=}, {margin=}, {balance=}, {gamma_neg=}, {gamma_pos=}'
            )
        self.scale = scale
        self.margin = margin
        self.balance = balance
        self.gamma_neg = gamma_neg
        self.gamma_pos = gamma_pos
        self.scaled_logits = scaled_logits

    def elementwise(self, logits: Tensor, target: Tensor, unannotated: Tensor) -> Tensor:
        scale = automatic_scale(logits.shape[1]) if self.scale is None else self.scale
        scaled = logits if self.scaled_logits else scale * logits
        margin = scale * self.margin
        log_pos = F.logsigmoid(scaled - margin)
        log_neg = F.logsigmoid(-scaled - margin)
        focus = 1.0
        if self.gamma_neg or self.gamma_pos:
            p_neg = (log_neg.exp() + self.SHIFT).clamp(max=1)
            log_neg = p_neg.log()
            gamma = self.gamma_pos * target + self.gamma_neg * (1 - target)
            focus = power(target * p_neg + (1 - target) * log_pos.exp(), gamma)
        positive = self.balance * target * log_pos
        negative = (1 - self.balance) * (1 - target) * log_neg
        return -(positive + negative) * focus / scale


def automatic_scale(num_classes: int) -> float:
    """Return AAM's scale for C classes: sqrt(5) ln(C - 1), clamped to [7, 30] (arXiv 2209.06585)."""
    return min(max(math.sqrt(5) * math.log(max(num_classes - 1, 1)), 7.0), 30.0)
