"""How timm's families differ: which module gets the head, and how the un-pooled features are read.

Most timm models need no entry: ``reset_classifier(0, '')`` disables the pooling, and the pre-logits of ``forward_head``
are then what the pooling would have pooled, after the norms and convolutions in front of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


def last_stage_map(model: Any, x: Tensor) -> Tensor:
    """Return the last feature map [B, F, H, W] of a model whose ``forward_features`` returns class tokens only."""
    return model.forward_intermediates(x, indices=1, intermediates_only=True)[0]


@dataclass(frozen=True)
class Family:
    """How a family differs from `RULE`."""

    why: str = ''  # what makes the family differ, for the documentation
    read_features: bool = False  # read the output of ``forward_features``, because what follows it pools
    # arguments of ``reset_classifier`` that disable the pooling
    unpool: Mapping[str, object] = field(default_factory=lambda: {'global_pool': ''})
    # attributes to set, for modules that nothing uses without the classifier (as timm's own pruning of a head does):
    # DistributedDataParallel refuses parameters without a gradient
    clear: Mapping[str, object] = field(default_factory=dict)
    bypass: Sequence[str] = ()  # attributes to replace by ``nn.Identity``, for the same reason
    slot: str = ''  # path of the head's module, if other than ``pretrained_cfg['classifier']``
    # widths of several scales, for a model whose ``forward_features`` returns a list
    widths: Callable[[Any], Sequence[int] | None] = lambda model: None
    # number of class and register tokens in front of the image's, where the model does not say
    prefix_tokens: int | None = None
    channels_first: bool = False  # tokens are [B, F, N]
    features: Callable[[nn.Module, Tensor], Tensor] | None = None  # replacement for ``forward_features``
    refuse: str = ''  # why the family cannot take the head


RULE = Family(
    'un-pooled with `reset_classifier(0, "")`; the head reads what `forward_head` returns before the classifier'
)
_CLASS_ATTENTION = 'class attention runs after the image tokens are final and changes the class token only; removed'
_TWO_TOKENS = 'two class tokens with a classifier each; the head reads the image tokens'
_POOLED_STAGE = 'a stage between features and classifier works on the pooled vector only; the head reads the features'
_SCALES = 'several scales with a classifier each; the head reads the tokens of all, with one embedding per scale'
_PARTS = 'the classifier is a module of several parts; the head replaces it'
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
        '`forward_features` returns class tokens only; the head reads the last map of `forward_intermediates`',
        read_features=True,
        unpool={},
        bypass=('norm',),
        features=last_stage_map,
    ),
    'RepVit': Family(_PARTS, slot='head'),
    'IFormer': Family(_PARTS, slot='head'),
    'EfficientVit': _MLP_HEAD,
    'EfficientVitLarge': _MLP_HEAD,
    'MetaNeXt': _MLP_HEAD,
    'VGG': Family(_POOLED_STAGE, read_features=True, bypass=('pre_logits',)),
    'DeepseekVitEncoder': _ENCODER,
    'Gemma4VitEncoder': _ENCODER,
    'MobileNetV5Encoder': _ENCODER,
    'Qwen3VitEncoder': _ENCODER,
}


def family_of(model_class: type) -> Family:
    """Return the entry of a timm class or of its nearest ancestor that has one, else `RULE`."""
    return next((FAMILIES[cls.__name__] for cls in model_class.__mro__ if cls.__name__ in FAMILIES), RULE)


def classifier_paths(model: Any) -> list[str]:
    """Paths of the modules that the head replaces, first the one that gets it; two for a distilled model."""
    paths = getattr(model, 'pretrained_cfg', {}).get('classifier')
    paths = list(paths) if isinstance(paths, (list, tuple)) else [paths] if paths else []
    if not paths:  # built from its class, without timm's factory
        classifier = model.get_classifier()
        paths = [name for name, module in model.named_modules() if module is classifier]
    slot = family_of(type(model)).slot
    return [slot, *paths] if slot else paths


def longest_module_path(model: nn.Module, path: str) -> str:
    """The longest beginning of a module path that exists in the model, '' if none does."""
    names = dict(model.named_modules())
    while path not in names:
        path = path.rpartition('.')[0]
    return path
