"""How each timm family gives its un-pooled features to the head: the one table in which families differ.

Most of timm needs no entry: ``reset_classifier(0, '')`` switches the pooling off, and what ``forward_head`` then gives
as pre-logits is what a pooling head would have pooled, with the norms and convolutions that stand before it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn


def last_stage_map(model: nn.Module, x: Tensor) -> Tensor:
    """The last map [B, F, H, W] of a model whose ``forward_features`` keeps only class tokens."""
    return model.forward_intermediates(x, indices=1, intermediates_only=True)[0]


@dataclass(frozen=True)
class Family:
    """What differs from the rule.

    Attributes:
        read_features: take what ``forward_features`` returns, because what stands between it and the classifier pools.
        unpool: the arguments of ``reset_classifier`` that take the pooling away.
        clear: attributes to set, for modules that nothing would use any more (as timm's own pruning of a head does);
            DistributedDataParallel refuses parameters without a gradient.
        slot: where the head goes, if not where ``pretrained_cfg['classifier']`` says.
        widths: the widths of several scales, for a model whose ``forward_features`` gives a list.
        prefix_tokens: class and register tokens in front of the image's, where the model does not say.
        channels_first: tokens come as [B, F, N].
        features: stands in for ``forward_features``.
        why: what makes the family differ, for the documentation.
        refuse: why the family cannot take the head.
    """

    why: str = ''
    read_features: bool = False
    unpool: Mapping[str, object] = field(default_factory=lambda: {'global_pool': ''})
    clear: Mapping[str, object] = field(default_factory=dict)
    slot: str = ''
    widths: Callable[[nn.Module], Sequence[int] | None] = lambda model: None
    prefix_tokens: int | None = None
    channels_first: bool = False
    features: Callable[[nn.Module, Tensor], Tensor] | None = None
    refuse: str = ''


RULE = Family(
    'un-pooled with `reset_classifier(0, "")`; the head reads what `forward_head` gives before the classifier'
)
_CLASS_ATTENTION = 'class attention runs after the image tokens are done; nothing but the class token would feel it'
_TWO_TOKENS = 'two class tokens with a classifier each; the head reads the image tokens'
_POOLED_STAGE = 'a stage between features and classifier works on the pooled vector only; the head reads the features'
_SCALES = 'several scales with a classifier each; the head reads the tokens of all, with an embedding a scale'
_PARTS = 'the classifier is a module of several parts; the head takes its place'
_MLP_HEAD = Family(_POOLED_STAGE, read_features=True, unpool={'reset_other': True})
_ENCODER = Family(refuse='it is the encoder of a larger model and was never a classifier')

# By the name of timm's class, looked up along the class's ancestors.
FAMILIES: dict[str, Family] = {
    'Cait': Family(_CLASS_ATTENTION, clear={'blocks_token_only': None, 'cls_token': None, 'num_prefix_tokens': 0}),
    'Xcit': Family(_CLASS_ATTENTION, clear={'cls_attn_blocks': None, 'cls_token': None, 'num_prefix_tokens': 0}),
    'VOLO': Family(_CLASS_ATTENTION, clear={'post_network': None, 'cls_token': None, 'use_aux_head': False}),
    'CoaT': Family(
        _SCALES + ' (the lite models have one scale)',
        read_features=True,
        unpool={},
        clear={'aggregate': None},
        prefix_tokens=1,
        widths=lambda model: model.embed_dims[1:] if model.parallel_blocks is not None else None,
    ),
    'CrossVit': Family(
        _SCALES, read_features=True, unpool={}, prefix_tokens=1, slot='head', widths=lambda model: model.embed_dim
    ),
    'EfficientViM': Family(
        _SCALES,
        read_features=True,
        unpool={},
        channels_first=True,
        slot='heads',
        widths=lambda model: (*model.embed_dim, model.embed_dim[-1]),
    ),
    'VisionTransformerDistilled': Family(_TWO_TOKENS, read_features=True, unpool={}, prefix_tokens=2),
    'PoolingVisionTransformer': Family(
        '`forward_features` gives class tokens only; the head reads the last map of `forward_intermediates`',
        read_features=True,
        unpool={},
        clear={'norm': nn.Identity},
        features=last_stage_map,
    ),
    'RepVit': Family(_PARTS, slot='head'),
    'IFormer': Family(_PARTS, slot='head'),
    'EfficientVit': _MLP_HEAD,
    'EfficientVitLarge': _MLP_HEAD,
    'MetaNeXt': _MLP_HEAD,
    'VGG': Family(_POOLED_STAGE, read_features=True, clear={'pre_logits': nn.Identity}),
    'DeepseekVitEncoder': _ENCODER,
    'Gemma4VitEncoder': _ENCODER,
    'MobileNetV5Encoder': _ENCODER,
    'Qwen3VitEncoder': _ENCODER,
}


def family_of(model_class: type) -> Family:
    """The table's entry for a timm class or its nearest ancestor that has one, else the rule."""
    return next((FAMILIES[cls.__name__] for cls in model_class.__mro__ if cls.__name__ in FAMILIES), RULE)
