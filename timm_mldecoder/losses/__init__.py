"""Multi-label losses that `timm.loss` lacks: asymmetric (ASL), class-aware selective (CSL) and angular margin (AAM).

They share one convention for targets [B, C]: values in [0, 1], soft ones included, and below 0 where the label is not
annotated. Such a label adds nothing to the loss, except in CSL, which is about them. Do not mix targets (Mixup, CutMix)
that have labels below 0: the mixture would pass for a soft annotation.

All compute in float32 at least, also under autocast, and from logits: timm's `AsymmetricLossMultiLabel`, which agrees
otherwise, clamps probabilities at 1e-8, so that a positive below logit -18 has no gradient and never learns again.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REDUCTIONS = {
    'sum': lambda loss: loss.sum(),  # as published for all three losses: grows with batch and classes
    'batchmean': lambda loss: loss.sum() / loss.shape[0],
    'mean': lambda loss: loss.mean(),
    'none': lambda loss: loss,
}


class MultiLabelLoss(nn.Module):
    """What the losses have in common: precision, label smoothing, ignored labels, reduction.

    Args:
        smoothing: Moves annotated targets this far towards 0.5, in [0, 1).
        reduction: One of `REDUCTIONS`.
    """

    def __init__(self, smoothing: float = 0.0, reduction: str = 'sum'):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f'Unknown reduction {reduction!r}, choose one of {sorted(REDUCTIONS)}.')
        if not 0 <= smoothing < 1:
            raise ValueError(f'Label smoothing must be in [0, 1), got {smoothing}.')
        self.smoothing = smoothing
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of logits [B, C] for targets [B, C]; a scalar, or [B, C] for reduction 'none'.

        Raises:
            ValueError: If the shapes differ or are not [B, C].
        """
        if logits.dim() != 2 or logits.shape != target.shape:
            raise ValueError(
                f'Expected logits and targets of one shape [B, C], got {list(logits.shape)} and {list(target.shape)}.'
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = target.to(logits.dtype)
        unannotated = target < 0
        smooth = target * (1 - self.smoothing) + 0.5 * self.smoothing
        loss = self.elementwise(logits, smooth.masked_fill(unannotated, 0), unannotated)
        return REDUCTIONS[self.reduction](loss.masked_fill(self.left_out(logits.detach(), unannotated), 0))

    def elementwise(self, logits: Tensor, target: Tensor, unannotated: Tensor) -> Tensor:
        """Loss of each entry, [B, C]; targets are in [0, 1], and 0 where `unannotated`."""
        raise NotImplementedError

    def left_out(self, logits: Tensor, unannotated: Tensor) -> Tensor:
        """Which entries the loss does without, bool [B, C]."""
        return unannotated


class BinaryCrossEntropyLoss(MultiLabelLoss):
    """Binary cross-entropy that ignores labels below 0, which timm's does not."""

    def elementwise(self, logits: Tensor, target: Tensor, unannotated: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target, reduction='none')


class AsymmetricLoss(MultiLabelLoss):
    """Asymmetric loss (ASL, arXiv 2009.14119, section 2).

    L = - sum[ y (1 - p)^gamma_pos log p  +  (1 - y) (1 - q)^gamma_neg log q ],  q = min(1 - p + clip, 1).

    Args:
        gamma_neg: Focusing exponent of negatives.
        gamma_pos: Focusing exponent of positives.
        clip: Probability by which negatives are shifted; those below it count as solved.
        detach_focusing: Take the focusing weights as constants, as ML-Decoder was trained.
        smoothing: See `MultiLabelLoss`.
        reduction: See `MultiLabelLoss`.
    """

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 0.0,
        clip: float = 0.05,
        detach_focusing: bool = True,
        smoothing: float = 0.0,
        reduction: str = 'sum',
    ):
        super().__init__(smoothing, reduction)
        if min(gamma_neg, gamma_pos) < 0 or not 0 <= clip < 1:
            raise ValueError(
                f'Expected gammas of 0 or more and a clip in [0, 1), got {gamma_neg=}, {gamma_pos=}, {clip=}.'
            )
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
            focus = _power(target * miss + (1 - target) * false_alarm, gamma)
        return loss * focus

    def negative_gamma(self, unannotated: Tensor) -> Tensor | float:
        """Focusing exponent of the negative term, for all or for each entry [B, C]."""
        return self.gamma_neg


class ClassAwareSelectiveLoss(AsymmetricLoss):
    """Loss for partial annotation (CSL, arXiv 2110.10955): ASL with a say in the labels nobody annotated.

    Args:
        mode: 'ignore' leaves un-annotated entries out; 'negative' takes all of them for negatives, with the exponent
            `gamma_unann`; 'selective' does so too, but for those that are likely to be there after all.
        gamma_neg: Focusing exponent of annotated negatives.
        gamma_pos: Focusing exponent of positives.
        gamma_unann: Focusing exponent of un-annotated entries.
        weight_unann: Weight of un-annotated entries.
        clip: See `AsymmetricLoss`.
        class_prior: Estimated frequency of each class, [C]; see `timm_mldecoder.data.priors`. Without it, 'selective'
            goes by likelihood alone.
        prior_threshold: 'selective' leaves un-annotated entries of more frequent classes out.
        likelihood_topk: 'selective' leaves out as many times B of the batch's likeliest un-annotated entries.
        smoothing: See `MultiLabelLoss`.
        reduction: See `MultiLabelLoss`.
    """

    MODES = ('ignore', 'negative', 'selective')

    def __init__(
        self,
        mode: str = 'selective',
        gamma_neg: float = 1.0,
        gamma_pos: float = 0.0,
        gamma_unann: float = 2.0,
        weight_unann: float = 1.0,
        clip: float = 0.0,
        class_prior: Tensor | Sequence[float] | None = None,
        prior_threshold: float = 0.05,
        likelihood_topk: int = 5,
        smoothing: float = 0.0,
        reduction: str = 'sum',
    ):
        super().__init__(gamma_neg, gamma_pos, clip, detach_focusing=True, smoothing=smoothing, reduction=reduction)
        if mode not in self.MODES:
            raise ValueError(f'Unknown mode {mode!r} for un-annotated labels, choose one of {self.MODES}.')
        if class_prior is not None and mode != 'selective':
            raise ValueError(f"A class prior has a meaning in mode 'selective' only, got mode {mode!r}.")
        if min(gamma_unann, weight_unann, likelihood_topk) < 0:
            raise ValueError(f'Expected 0 or more, got {gamma_unann=}, {weight_unann=}, {likelihood_topk=}.')
        self.mode = mode
        self.gamma_unann = gamma_unann
        self.weight_unann = weight_unann
        self.likelihood_topk = likelihood_topk
        self.prior_threshold = prior_threshold
        prior = None if class_prior is None else torch.as_tensor(class_prior, dtype=torch.float32)
        self.register_buffer('class_prior', prior, persistent=False)

    def elementwise(self, logits: Tensor, target: Tensor, unannotated: Tensor) -> Tensor:
        loss = super().elementwise(logits, target, unannotated)
        return loss if self.weight_unann == 1 else torch.where(unannotated, self.weight_unann * loss, loss)

    def negative_gamma(self, unannotated: Tensor) -> Tensor:
        return torch.where(unannotated, self.gamma_unann, self.gamma_neg)

    def left_out(self, logits: Tensor, unannotated: Tensor) -> Tensor:
        if self.mode == 'ignore':
            return unannotated
        left_out = torch.zeros_like(unannotated)
        if self.mode == 'negative':
            return left_out
        if self.class_prior is not None:
            if self.class_prior.numel() != logits.shape[1]:
                raise ValueError(f'A class prior of {self.class_prior.numel()} entries for {logits.shape[1]} classes.')
            left_out |= self.class_prior > self.prior_threshold
        count = min(self.likelihood_topk * logits.shape[0], logits.numel())
        likeliest = logits.masked_fill(~unannotated, -math.inf).flatten().topk(count).indices
        left_out.view(-1)[likeliest] = True
        return left_out & unannotated


class AngularMarginLoss(MultiLabelLoss):
    """Asymmetric angular margin loss for cosine logits c (AAM, arXiv 2209.06585).

    L = - sum[ k/s y w log p+  +  (1 - k)/s (1 - y) w log p- ],  p+ = sigmoid(s (c - m)),  p- = sigmoid(-s (c + m)),
    with w = (y p- + (1 - y) p+)^(gamma_pos y + gamma_neg (1 - y)) after p- <- min(p- + 0.05, 1) if a gamma is positive,
    else 1 and no shift. At inference the score is sigmoid(s c).

    Args:
        scale: s; None for `automatic_scale` of the number of classes.
        margin: m.
        balance: k, the share of the positive term, in [0, 1].
        gamma_neg: Focusing exponent of negatives.
        gamma_pos: Focusing exponent of positives.
        scaled_logits: The logits are s c already (a head that scales its output), not c.
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
                f'Expected scale > 0, margin and gammas of 0 or more, and a balance in [0, 1], got '
                f'{scale=}, {margin=}, {balance=}, {gamma_neg=}, {gamma_pos=}.'
            )
        self.scale = scale
        self.margin = margin
        self.balance = balance
        self.gamma_neg = gamma_neg
        self.gamma_pos = gamma_pos
        self.scaled_logits = scaled_logits

    def elementwise(self, logits: Tensor, target: Tensor, unannotated: Tensor) -> Tensor:
        scale = automatic_scale(logits.shape[1]) if self.scale is None else self.scale
        scaled, margin = (logits if self.scaled_logits else scale * logits), scale * self.margin
        log_pos, log_neg, focus = F.logsigmoid(scaled - margin), F.logsigmoid(-scaled - margin), 1.0
        if self.gamma_neg or self.gamma_pos:
            p_neg = (log_neg.exp() + self.SHIFT).clamp(max=1)
            log_neg = p_neg.log()
            gamma = self.gamma_pos * target + self.gamma_neg * (1 - target)
            focus = _power(target * p_neg + (1 - target) * log_pos.exp(), gamma)
        positive = self.balance * target * log_pos
        negative = (1 - self.balance) * (1 - target) * log_neg
        return -(positive + negative) * focus / scale


class RandomQueryLoss(nn.Module):
    """A multi-label loss for a head that adds random word queries in training (arXiv 2111.12933, section 2.3.3).

    Their logits come after those of the classes, and their target is positive.

    Args:
        loss: Takes logits and targets of one shape.
    """

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of logits [B, C + random queries] for targets [B, C]."""
        return self.loss(logits, F.pad(target, (0, logits.shape[1] - target.shape[1]), value=1.0))


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    """base ** exponent for base >= 0, with a finite gradient where a fractional exponent meets a base of 0."""
    return base.clamp(min=torch.finfo(base.dtype).tiny).pow(exponent)


def automatic_scale(num_classes: int) -> float:
    """AAM's scale s for a number of classes C: sqrt(5) ln(C - 1), kept in [7, 30] (arXiv 2209.06585)."""
    return min(max(math.sqrt(5) * math.log(max(num_classes - 1, 1)), 7.0), 30.0)


LOSSES = {
    'bce': BinaryCrossEntropyLoss,
    'asl': AsymmetricLoss,
    'csl': ClassAwareSelectiveLoss,
    'aam': AngularMarginLoss,
}


def create_loss(name: str, **options) -> MultiLabelLoss:
    """The loss called `name`, one of `LOSSES`, with the options of its class.

    Raises:
        ValueError: If there is no such loss, or an option is out of range.
    """
    if name not in LOSSES:
        raise ValueError(f'Unknown multi-label loss {name!r}, choose one of {sorted(LOSSES)}.')
    return LOSSES[name](**options)
