"""Class-aware selective loss for partially annotated labels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_mldecoder.losses.asymmetric import AsymmetricLoss


class ClassAwareSelectiveLoss(AsymmetricLoss):
    """Loss for partial annotation (CSL, arXiv 2110.10955): ASL that also uses unannotated labels.

    Args:
        mode: 'ignore' ignores unannotated entries; 'ignore_normalize_classes' does, and multiplies those of an image
            with n annotated labels by 1 + 1 / (1 + n), as the published code (after arXiv 1902.09720); 'negative'
            treats all of them as negatives, with the exponent `gamma_unann`; 'selective' does the same, except for
            those that are likely to be positive.
        gamma_neg: Focusing exponent of annotated negatives.
        gamma_pos: Focusing exponent of positives.
        gamma_unann: Focusing exponent of unannotated entries.
        weight_unann: Weight of unannotated entries, `alpha_unann` of the published code.
        weight_pos: Weight of positives, its `alpha_pos`. A soft target y has y weight_pos + (1 - y) weight_neg.
        weight_neg: Weight of annotated negatives, its `alpha_neg`.
        clip: See `AsymmetricLoss`.
        class_prior: Estimated frequency of each class, [C]; see `timm_mldecoder.data.class_files`. Without it,
            'selective' uses the likelihood alone.
        prior_threshold: 'selective' ignores unannotated entries of more frequent classes.
        likelihood_topk: 'selective' ignores the `likelihood_topk` * B most likely unannotated entries of a batch.
        smoothing: See `MultiLabelLoss`.
        reduction: See `MultiLabelLoss`.
    """

    MODES = ('ignore', 'ignore_normalize_classes', 'negative', 'selective')

    def __init__(
        self,
        mode: str = 'selective',
        gamma_neg: float = 1.0,
        gamma_pos: float = 0.0,
        gamma_unann: float = 2.0,
        weight_unann: float = 1.0,
        weight_pos: float = 1.0,
        weight_neg: float = 1.0,
        clip: float = 0.0,
        class_prior: Tensor | Sequence[float] | None = None,
        prior_threshold: float = 0.05,
        likelihood_topk: int = 5,
        smoothing: float = 0.0,
        reduction: str = 'sum',
    ):
        super().__init__(gamma_neg, gamma_pos, clip, detach_focusing=True, smoothing=smoothing, reduction=reduction)
        if mode not in self.MODES:
            raise ValueError(f'unknown mode {mode!r} for unannotated labels: choose one of {self.MODES}')
        if class_prior is not None and mode != 'selective':
            raise ValueError(f"class_prior needs mode 'selective', got mode {mode!r}")
        values = dict(
            gamma_unann=gamma_unann,
            weight_unann=weight_unann,
            weight_pos=weight_pos,
            weight_neg=weight_neg,
            likelihood_topk=likelihood_topk,
        )
        if min(values.values()) < 0:
            raise ValueError(f'must be at least 0: {", ".join(f"{n}={v}" for n, v in values.items() if v < 0)}')
        self.mode = mode
        self.gamma_unann = gamma_unann
        self.weights = weight_pos, weight_neg, weight_unann
        self.likelihood_topk = likelihood_topk
        self.prior_threshold = prior_threshold
        prior = None if class_prior is None else torch.as_tensor(class_prior, dtype=torch.float32)
        self.class_prior: Tensor | None
        self.register_buffer('class_prior', prior, persistent=False)

    def elementwise(self, logits: Tensor, target: Tensor, unannotated: Tensor) -> Tensor:
        loss = super().elementwise(logits, target, unannotated)
        if self.weights != (1, 1, 1):
            positive, negative, missing = self.weights
            loss = loss * torch.where(unannotated, missing, positive * target + negative * (1 - target))
        if self.mode == 'ignore_normalize_classes':
            loss = loss * (1 + 1 / (1 + (~unannotated).sum(dim=1, keepdim=True)))  # annotated labels of the image
        return loss

    def negative_gamma(self, unannotated: Tensor) -> Tensor:
        return torch.where(unannotated, self.gamma_unann, self.gamma_neg)

    def left_out(self, logits: Tensor, unannotated: Tensor) -> Tensor:
        if self.mode.startswith('ignore'):
            return unannotated
        left_out = unannotated.new_zeros(unannotated.shape)
        if self.mode == 'negative':
            return left_out
        if self.class_prior is not None:
            if self.class_prior.numel() != logits.shape[1]:
                raise ValueError(f'class_prior has {self.class_prior.numel()} entries for {logits.shape[1]} classes')
            left_out |= self.class_prior > self.prior_threshold
        count = min(self.likelihood_topk * len(logits), logits.numel())
        left_out.view(-1)[logits.masked_fill(~unannotated, -math.inf).flatten().topk(count).indices] = True
        return left_out & unannotated
