"""Binary cross-entropy and asymmetric loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_mldecoder.losses.base import MultiLabelLoss, power


class BinaryCrossEntropyLoss(MultiLabelLoss):
    """Binary cross-entropy that ignores labels below 0; timm's does not."""

    def elementwise(self, logits: Tensor, target: Tensor, unannotated: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target, reduction='none')


class AsymmetricLoss(MultiLabelLoss):
    """Asymmetric loss (ASL, arXiv 2009.14119, section 2).

    L = - sum[ y (1 - p)^gamma_pos log p  +  (1 - y) (1 - q)^gamma_neg log q ],  q = min(1 - p + clip, 1).

    The defaults are those of `--loss asl`, timm's. ASL and ML-Decoder were trained with `gamma_pos=0`,
    `detach_focusing=True` and `reduction='sum'`.

    Args:
        gamma_neg: Focusing exponent of negatives.
        gamma_pos: Focusing exponent of positives.
        clip: Probability by which negatives are shifted; negatives below it have no loss.
        detach_focusing: Treat the focusing weights as constants, as in the training of ML-Decoder.
        smoothing: See `MultiLabelLoss`.
        reduction: See `MultiLabelLoss`.
    """

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
        detach_focusing: bool = False,
        smoothing: float = 0.0,
        reduction: str = 'batchmean',
    ):
        super().__init__(smoothing, reduction)
        if min(gamma_neg, gamma_pos) < 0 or not 0 <= clip < 1:
            raise ValueError(f'gammas must be at least 0 and clip in [0, 1), got {gamma_neg=}, {gamma_pos=}, {clip=}')
        self.gamma_neg = gamma_neg
        self.gamma_pos = gamma_pos
        self.clip = clip
        self.detach_focusing = detach_focusing

    def elementwise(self, logits: Tensor, target: Tensor, unannotated: Tensor) -> Tensor:
        miss = torch.sigmoid(-logits)  # 1 - p, without its rounding for p near 1
        log_q = (miss + self.clip).clamp(max=1).log() if self.clip else F.logsigmoid(-logits)
        loss = -(target * F.logsigmoid(logits) + (1 - target) * log_q)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_focusing):
            false_alarm = (torch.sigmoid(logits) - self.clip).clamp(min=0)  # 1 - q
            gamma = self.gamma_pos * target + self.negative_gamma(unannotated) * (1 - target)
            focus = power(target * miss + (1 - target) * false_alarm, gamma)
        return loss * focus

    def negative_gamma(self, unannotated: Tensor) -> Tensor | float:
        """Return the focusing exponent of the negative term, for all entries or per entry [B, C]."""
        return self.gamma_neg
