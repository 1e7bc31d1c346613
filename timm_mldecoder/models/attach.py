"""Put an ML-Decoder head on a timm model.

The model becomes an instance of a subclass of its own class: its forward and its tensor names stay, and
`MLDecoderModel` replaces the methods that deal with the classifier. families.py says which module of each timm
family is the classifier, and how its features are read.
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from timm.layers import register_notrace_function, register_notrace_module
from timm.models._input import _get_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mldecoder.head import MLDecoder
from timm_mldecoder.models.classifier_model import ClassifierModel, change_class, is_loaded
from timm_mldecoder.models.families import classifier_paths, family_of, longest_module_path

_logger = logging.getLogger(__name__)

register_notrace_module(MLDecoder)  # to timm's fx tracer the head is one node

# Options about what of the backbone the head reads, with what None stands for: a value is needed for a checkpoint that
# does not show it, see `convert_state_dict`.
READ_OPTIONS = {'prefix_tokens': False, 'head_norm': True}
# MLDecoder's arguments that are none of a timm model's options.
NOT_OF_MODELS = ('num_classes', 'initial_num_features', 'zsl', 'channels_first', 'class_token_width', 'device', 'dtype')
# MLDecoder's options that a user chooses, with their defaults; classes and feature width come from the model.
HEAD_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(MLDecoder).parameters.items()
    if name not in NOT_OF_MODELS
} | dict.fromkeys(READ_OPTIONS)


def add_ml_decoder_head(
    model: nn.Module,
    num_classes: int = -1,
    num_of_groups: int = -1,
    decoder_embedding: int = 768,
    zsl: int = 0,
    **options,
) -> nn.Module:
    """Replace the pooling and classifier of a timm model by an ML-Decoder head, in place.

    Args:
        model: A timm classification model, pretrained or not; backbone tensors keep their names and values.
        num_classes: Number of classes C of the new head; -1 keeps the model's.
        num_of_groups: Number of queries, see `MLDecoder`.
        decoder_embedding: Width of the head, see `MLDecoder`.
        zsl: 1 requires ``word_embeddings``, as in the published signature.
        **options: Further keyword options of `MLDecoder`. ``word_embeddings`` may also be a file, see
            `timm_mldecoder.data.word_embeddings`; ``class_names`` then select and order its classes.
            ``prefix_tokens=True``: the head also reads class and register tokens. ``head_norm=False``: it reads the
            features in front of the classifier's own norm (ConvNeXt, DaViT), which is removed.

    Returns:
        The same model. ``forward`` returns logits [B, C].

    Raises:
        ValueError: If the model is not a timm model with image features and classes, an option is unknown or out of
            range, or the label embeddings are for another number of classes.
    """
    if zsl and options.get('word_embeddings') is None:
        raise ValueError(f'zsl={zsl} needs label embeddings, from which its queries are made: give word_embeddings')
    num_of_groups = max(num_of_groups, -1)  # any negative number is the default, as published
    options = {'num_of_groups': num_of_groups, 'decoder_embedding': decoder_embedding, **options}
    check_options(options)
    options = _read_label_embeddings(options)
    check_model(model)
    timm_model: Any = model  # with attributes that torch's types do not know
    if num_classes == -1:
        embeddings = options.get('word_embeddings')
        num_classes = len(embeddings) if isinstance(embeddings, Tensor) else timm_model.num_classes
    if num_classes < 1:
        raise ValueError(f'num_classes is {num_classes}: an ML-Decoder head needs at least 1 class')

    # the head is built first: a wrong option must leave the model as it was
    norm = options.get('head_norm') is not False
    head = _build_head(model, num_classes, feature_widths(model, norm), options)
    _check_reading(model, options)
    if num_of_groups > num_classes:
        _logger.warning(f'num_of_groups {num_of_groups} is reduced to the number of classes, {num_classes}')
    remove_classifier(model, norm)
    change_class(model, MLDecoderModel)
    stored = portable_options(options, head)
    timm_model.ml_decoder_options = {name: value for name, value in stored.items() if value != HEAD_OPTIONS[name]}
    model.set_submodule(timm_model.ml_decoder_slot, head)
    return model


def check_options(options: dict) -> None:
    """Raise ValueError for a name that is not an option of `MLDecoder`."""
    unknown = sorted(set(options) - set(HEAD_OPTIONS))
    if unknown:
        raise ValueError(f'unknown ML-Decoder option {", ".join(unknown)}; valid options: {", ".join(HEAD_OPTIONS)}')


def _read_label_embeddings(options: dict) -> dict:
    """Return the options with the tensor of a ``word_embeddings`` file and its class names."""
    if not isinstance(options.get('word_embeddings'), (str, PathLike)):
        return options
    from timm_mldecoder.data.word_embeddings import read_word_embeddings

    embeddings, names = read_word_embeddings(options['word_embeddings'], options.get('class_names'))
    return {**options, 'word_embeddings': embeddings, 'class_names': names}


def portable_options(options: Mapping, head: Any) -> dict:
    """Return options of a head in JSON form; label embeddings and class names travel with the weights."""
    stored = {name: value for name, value in options.items() if name != 'class_names'}
    if isinstance(options.get('word_embeddings'), Tensor):
        # learned tensors depend on the grouping, which must not follow a later number of classes
        group_size = head.group_fc.group_size
        stored |= {'word_embeddings': head.vocabulary.width, 'group_size': group_size}
        if stored.get('num_of_groups', -1) == -1:
            stored['num_of_groups'] = -(-head.num_classes // group_size)
    return stored


def _build_head(model: Any, num_classes: int, features, options: dict) -> MLDecoder:
    """Return a head on the model's device, with its dtype and training mode."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    options = {name: value for name, value in options.items() if name not in READ_OPTIONS}
    # the head gets tokens [B, N, F], and masks that need no check
    given = dict(initial_num_features=features, channels_first=False, device=like.device, dtype=like.dtype)
    head = MLDecoder(num_classes, **given, **options)
    head.checks_mask = False
    return head.train(model.training)


class MLDecoderModel(ClassifierModel):
    """A timm model with an ML-Decoder head.

    Attributes:
        ml_decoder_options: Options of `MLDecoder` other than defaults, in JSON form.
        ml_decoder_slot: Name of the submodule that is the head.
        ml_decoder_features: Width of the features the head reads; a sequence for several scales.
        ml_decoder_pool: The pooling that the backbone was built with, which decides where some ViTs have a norm.
    """

    classifier_option = 'ml_decoder'
    ml_decoder_removed: Sequence[str] = ()  # modules between features and classifier that ``head_norm=False`` removed
    ml_decoder_pooled = True  # without a head: whether `forward` returns the mean of the tokens, or the tokens

    @classmethod
    def class_members(cls, model_class: type) -> dict:
        family = family_of(model_class)
        replaced = {} if family.features is None else {'forward_features': family.features}
        return {'ml_decoder_family': family, **replaced}

    @property
    def num_classes(self) -> int:
        """Number of classes of the head, which a head with text queries may change; 0 without a head."""
        return getattr(self.get_classifier(), 'num_classes', 0)

    @num_classes.setter
    def num_classes(self, num_classes: int) -> None:
        if num_classes != self.num_classes:  # timm's own code sets it after removing a classifier
            raise AttributeError(f'the model has {self.num_classes} classes: change them with reset_classifier')

    def get_classifier(self) -> Any:
        try:
            return self.get_submodule(self.ml_decoder_slot)
        except AttributeError:  # timm's pruning removes the parent of the slot with the head
            return nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **kwargs) -> None:
        """Build a fresh ML-Decoder for `num_classes` with the same options.

        A head with text queries keeps its label embeddings if the number of classes does not change.

        Args:
            num_classes: Number of classes; 0 removes the head, and ``forward`` returns the mean of the tokens [B, F].
            global_pool: '' with 0 classes makes ``forward`` return the tokens themselves, [B, N, F].
            **kwargs: Ignored, as by timm's models.

        Raises:
            ValueError: If `global_pool` is given together with classes.
        """
        if num_classes and global_pool:
            raise ValueError(f'global_pool={global_pool!r} has no effect with an ML-Decoder head: leave it out')
        head: Any = nn.Identity()
        if num_classes:
            head = self._new_head(num_classes)
            old = getattr(self.get_classifier(), 'vocabulary', None)
            if old is not None and old.known and self.num_classes == num_classes:
                head.set_word_embeddings(old.embeddings, old.class_names)
        self.set_submodule(self.ml_decoder_slot, head)
        self.ml_decoder_pooled = global_pool != ''

    def _new_head(self, num_classes: int) -> nn.Module:
        return _build_head(self, num_classes, self.ml_decoder_features, self.ml_decoder_options)

    def forward_head(self, x=None, pre_logits: bool = False, patch_valid: Tensor | None = None, **kwargs) -> Tensor:
        """Return logits [B, C] for the output of ``forward_features``; with `pre_logits` the mean token [B, F]."""
        features = self._pre_logits(kwargs['patches'] if x is None else x)
        tokens = self._image_tokens(features)
        if patch_valid is not None and patch_valid.shape[1] != tokens.shape[1]:
            patch_valid = None  # the encoder has pooled the padding away (timm's gemma4 soft pooling)
        if pre_logits or (not self.num_classes and self.ml_decoder_pooled):
            return _mean(tokens, patch_valid, self.head_hidden_size)
        if not self.num_classes:
            return tokens
        head = self.get_classifier()
        prefix = self.ml_decoder_options.get('prefix_tokens')
        if head.position:
            tokens = features.permute(0, 3, 1, 2) if self._layout()[0] else features
        elif prefix:
            tokens = self._image_tokens(features, prefix=0)
            if patch_valid is not None:
                patch_valid = F.pad(patch_valid, (tokens.shape[1] - patch_valid.shape[1], 0), value=True)
        return head(tokens) if patch_valid is None else head(tokens, mask=patch_valid)

    def _pre_logits(self, x):
        """Return what the classifier of the timm model would have pooled, with class and register tokens."""
        before_norm = self.ml_decoder_options.get('head_norm') is False
        return x if self.ml_decoder_family.read_features or before_norm else super().forward_head(x, pre_logits=True)

    def _image_tokens(self, x, prefix: int | None = None):
        """Return the image tokens [B, N, F] of `_pre_logits`, a list for several scales.

        `prefix` is the number of tokens in front to leave out; None for all class and register tokens.
        """
        layout = *self._layout(), self.ml_decoder_prefix_tokens if prefix is None else prefix
        if isinstance(x, (list, tuple)):
            return [_as_tokens(scale, *layout) for scale in x]
        return _as_tokens(x, *layout)

    def _layout(self) -> tuple[bool, bool]:
        """Return whether maps are [B, H, W, F], and whether tokens are [B, F, N]."""
        return getattr(self, 'output_fmt', 'NCHW') == 'NHWC', self.ml_decoder_family.channels_first

    @property
    def ml_decoder_prefix_tokens(self) -> int:
        """Number of class and register tokens in front of the image tokens."""
        return _number_prefix_tokens(self)

    @property
    def ml_decoder_norm(self) -> list[str]:
        """Names of the tensors between features and classifier, which ``head_norm=False`` removes."""
        return [f'{name}.{tensor}' for name, part in _between(self) for tensor in part.state_dict()]

    def classifier_options(self) -> dict | None:
        # timm records the pooling as it is now, none; the backbone must be built with the pooling it had
        if not self.num_classes:
            return None
        # transformers builds the model from these arguments alone, and needs the size of the names before it loads them
        names = getattr(self.get_classifier(), 'class_names', None)
        return {
            **self.ml_decoder_options,
            **({'class_names': names} if names else {}),
            'global_pool': self.ml_decoder_pool,
        }

    def reset_classifier_tensors(self) -> None:
        vocabulary = self.get_classifier().vocabulary
        if vocabulary is not None:
            vocabulary.known = is_loaded(vocabulary.embeddings)
        super().reset_classifier_tensors()

    def __prepare_scriptable__(self):
        others = 'torch.compile, torch.export or torch.jit.trace'
        raise ValueError(f'torch.jit.script cannot compile {type(self).__name__}: use {others}')


def check_model(model: nn.Module) -> None:
    name = type(model).__name__
    refuse = family_of(type(model)).refuse
    if refuse:
        raise ValueError(f'{name} cannot take an ML-Decoder head: {refuse}. Apply MLDecoder to its features yourself')
    missing = [what for what in ('forward_features', 'forward_head', 'reset_classifier') if not hasattr(model, what)]
    if missing:
        raise ValueError(f'{name} is not a timm classifier (no {", ".join(missing)}): apply MLDecoder to its features')


def feature_widths(model: nn.Module, norm: bool = True):
    """Width of the features that a head on tokens reads; a sequence for several scales.

    Without `norm`, those in front of the classifier's norm.
    """
    if isinstance(model, MLDecoderModel):
        return model.ml_decoder_features
    family = family_of(type(model))
    features = family.read_features or not norm
    return family.widths(model) or (model.num_features if features else model.head_hidden_size)


def _number_prefix_tokens(model: Any) -> int:
    own = isinstance(model, MLDecoderModel)  # whose class has looked it up
    number = (model.ml_decoder_family if own else family_of(type(model))).prefix_tokens
    return (getattr(model, 'num_prefix_tokens', None) or 0) if number is None else number


def _between(model: Any) -> list[tuple[str, nn.Module]]:
    """Return the modules with tensors between the features of a timm model and its classifier, by name."""
    family = family_of(type(model))
    if family.read_features:
        return []
    own = isinstance(model, MLDecoderModel)
    slot = model.ml_decoder_slot if own else longest_module_path(model, classifier_paths(model)[0])
    parent, _, last = slot.rpartition('.')
    parts = dict(model.get_submodule(parent).named_children())
    if not parent:  # ViTs that were built with average pooling
        parts = {'fc_norm': parts['fc_norm']} if 'fc_norm' in parts else {}
    return [
        (f'{parent}.{name}'.lstrip('.'), part) for name, part in parts.items() if name != last and part.state_dict()
    ]


def _check_reading(model: Any, options: Mapping) -> None:
    """Raise ValueError unless `READ_OPTIONS` and the positional encoding fit the model."""
    name = type(model).__name__
    for option in READ_OPTIONS:
        if options.get(option) not in (None, False, True):
            raise ValueError(f'{option} must be True or False, got {options[option]!r}')
    if isinstance(model, MLDecoderModel):
        if options.get('head_norm') != model.ml_decoder_options.get('head_norm'):
            raise ValueError(f'{name} has a head already: give head_norm to a new model')
    elif options.get('head_norm') is False and not _between(model):
        raise ValueError(f'head_norm=False: {name} has no norm between features and classifier, leave it out')
    if options.get('prefix_tokens') and not _number_prefix_tokens(model):
        raise ValueError(f'prefix_tokens=True: {name} has no class or register tokens, leave it out')


def remove_classifier(model: Any, norm: bool = True) -> None:
    """Remove pooling, classifier and classifier dropout, and record what the head and `save_for_hf` need.

    A model that has a head on tokens already is left as it is. Without `norm`, the classifier's norm goes too.
    """
    if isinstance(model, MLDecoderModel):
        return
    features = feature_widths(model, norm)
    between = [] if norm else [name for name, _ in _between(model)]
    family = family_of(type(model))
    slot, *others = classifier_paths(model)
    model.ml_decoder_pool = _get_global_pool(model)
    for name, value in family.clear.items():
        setattr(model, name, value)
    for name in family.bypass:
        setattr(model, name, nn.Identity())
    model.reset_classifier(0, **family.unpool)
    for name in between:
        model.set_submodule(name, nn.Identity())
    model.ml_decoder_removed = between
    if (family.read_features or not norm) and isinstance(features, int):
        model.head_hidden_size = features
    _disable_dropout(model, slot)
    model.ml_decoder_features = features
    model.ml_decoder_slot = longest_module_path(model, slot)
    for path in others:
        sibling = longest_module_path(model, path)
        if sibling and path.partition('.')[0] != slot.partition('.')[0]:
            model.set_submodule(sibling, nn.Identity())
    model.pretrained_cfg = model.default_cfg = {
        **getattr(model, 'pretrained_cfg', {}),
        'classifier': model.ml_decoder_slot,
    }


def _disable_dropout(model: Any, slot: str) -> None:
    """Disable the classifier's own dropout: ML-Decoder has its own, and the published code does the same."""
    if hasattr(model, 'drop_rate'):
        model.drop_rate = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and name.startswith(('head_drop', f'{slot.partition(".")[0]}.')):
            module.p = 0.0


@torch.fx.wrap  # one node to any fx tracer, which cannot follow a branch on a number of dimensions
def _as_tokens(x: Tensor, channels_last: bool, channels_first: bool, prefix_tokens: int) -> Tensor:
    """A feature map ([B, H, W, F] if `channels_last`) or tokens ([B, F, N] if `channels_first`) to tokens [B, N, F]."""
    if x.dim() == 4:
        return x.flatten(1, 2) if channels_last else x.flatten(2).transpose(1, 2)
    return x.transpose(1, 2) if channels_first else x[:, prefix_tokens:]


register_notrace_function(_as_tokens)


def _mean(tokens: Tensor | list[Tensor], valid: Tensor | None, width: int) -> Tensor:
    """Mean over the (valid) tokens, [B, F]; of several scales side by side, or their mean if `width` is that of one."""
    if isinstance(tokens, list):
        means = [scale.mean(dim=1) for scale in tokens]
        joined = torch.cat(means, dim=1)
        return joined if joined.shape[1] == width else torch.stack(means).mean(dim=0)
    if valid is None:
        return tokens.mean(dim=1)
    weight = valid.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
