"""Losses that are robust to labels that annotators missed (arXiv 2112.07368): Hill, and self-paced correction."""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_mldecoder.losses.base import MultiLabelLoss, power


class FocalMarginLoss(MultiLabelLoss):
    """What both share (section 3.2): positives have - (1 - p_m)^gamma log p_m, with p_m = sigmoid(logit - margin).

    Args:
        gamma: Focusing exponent of positives.
        margin: Shift of the logits of positives.
        smoothing: See `MultiLabelLoss`.
        reduction: See `MultiLabelLoss`.
    """

    def __init__(self, gamma: float = 2.0, margin: float = 1.0, smoothing: float = 0.0, reduction: str = 'sum'):
        super().__init__(smoothing, reduction)
        if gamma < 0:
            raise ValueError(f'gamma must be at least 0, got {gamma}')
        self.gamma = gamma
        self.margin = margin

    def positive(self, logits: Tensor) -> Tensor:
        """Return the loss of each entry as a positive."""
        shifted = logits - self.margin
        return -F.logsigmoid(shifted) * power(torch.sigmoid(-shifted), torch.full_like(shifted, self.gamma))

    def negative(self, logits: Tensor) -> Tensor:
        """Return the loss of each entry as a negative."""
        raise NotImplementedError

    def elementwise(self, logits: Tensor, target: Tensor, unannotated: Tensor) -> Tensor:
        return target * self.positive(logits) + (1 - target) * self.negative(logits)


class HillLoss(FocalMarginLoss):
    """Hill loss (section 3.3): negatives have (lamb - p) p^2, whose gradient vanishes near p = 1, at missed positives.

    Args:
        lamb: The lambda of the formula.
        **options: Those of `FocalMarginLoss`.
    """

    def __init__(self, lamb: float = 1.5, **options):
        super().__init__(**options)
        if lamb <= 0:
            raise ValueError(f'lamb must be above 0, got {lamb}')
        self.lamb = lamb

    def negative(self, logits: Tensor) -> Tensor:
        p = torch.sigmoid(logits)
        return (self.lamb - p) * p.square()


class SelfPacedCorrectionLoss(FocalMarginLoss):
    """Self-paced loss correction (SPLC, section 3.4): a negative whose probability is above `threshold` is a positive.

    Other negatives have - log(1 - p). The authors start the correction in the second epoch; here it acts from the first
    step, on what starts above the threshold: start from a trained model, or raise the threshold.

    Args:
        threshold: Probability above which a negative is a missed positive.
        **options: Those of `FocalMarginLoss`.
    """

    def __init__(self, threshold: float = 0.6, **options):
        super().__init__(**options)
        if not 0 < threshold <= 1:
            raise ValueError(f'threshold must be in (0, 1], got {threshold}')
        self.threshold = threshold

    def negative(self, logits: Tensor) -> Tensor:
        missed = torch.sigmoid(logits.detach()) > self.threshold
        return torch.where(missed, self.positive(logits), -F.logsigmoid(-logits))
