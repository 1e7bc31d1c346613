"""Multi-label losses: asymmetric (ASL), class-aware selective (CSL), angular margin (AAM), Hill, self-paced correction
(SPLC), binary cross-entropy.

They share one convention for targets [B, C]: values in [0, 1], soft ones included, and below 0 for unannotated labels.
An unannotated label adds nothing to the loss, except in CSL, and does not count in its mean. Do not mix targets (Mixup,
CutMix) with labels below 0: the mixture would look like a soft annotation.

All compute in float32 at least, also under autocast, and from logits: timm's `AsymmetricLossMultiLabel`, which
otherwise agrees, clamps probabilities at 1e-8, so that a positive below logit -18 has no gradient and never recovers.
"""

from timm_mldecoder.losses.angular_margin import AngularMarginLoss, automatic_scale
from timm_mldecoder.losses.asymmetric import AsymmetricLoss, BinaryCrossEntropyLoss
from timm_mldecoder.losses.base import REDUCTIONS, MultiLabelLoss, RandomQueryLoss
from timm_mldecoder.losses.hill import HillLoss, SelfPacedCorrectionLoss
from timm_mldecoder.losses.selective import ClassAwareSelectiveLoss

__all__ = [
    'LOSSES',
    'REDUCTIONS',
    'AngularMarginLoss',
    'AsymmetricLoss',
    'BinaryCrossEntropyLoss',
    'ClassAwareSelectiveLoss',
    'HillLoss',
    'MultiLabelLoss',
    'RandomQueryLoss',
    'SelfPacedCorrectionLoss',
    'automatic_scale',
    'create_loss',
]

LOSSES = {
    'bce': BinaryCrossEntropyLoss,
    'asl': AsymmetricLoss,
    'csl': ClassAwareSelectiveLoss,
    'aam': AngularMarginLoss,
    'hill': HillLoss,
    'splc': SelfPacedCorrectionLoss,
}


def create_loss(name: str, **options) -> MultiLabelLoss:
    """Return the loss `name` of `LOSSES`, with the options of its class.

    Raises:
        ValueError: If there is no such loss, or an option is out of range.
    """
    if name not in LOSSES:
        raise ValueError(f'unknown multi-label loss {name!r}: choose one of {sorted(LOSSES)}')
    return LOSSES[name](**options)
