"""ML-Decoder onto a timm model that one holds.

The model becomes an instance of a subclass of its own class: its forward, its tensor names and what else it can do
stay, and `MLDecoderModel` answers for the head. How a family's features are read stands in families.py.
"""

import functools
import inspect
from os import PathLike

import torch
from torch import Tensor, nn

from timm_mldecoder.head import MLDecoder
from timm_mldecoder.models.families import Family, family_of

# MLDecoder's options that a user chooses; classes and feature width come from the model.
HEAD_OPTIONS = tuple(
    name
    for name in inspect.signature(MLDecoder).parameters
    if name not in ('num_classes', 'initial_num_features', 'device', 'dtype')
)


def add_ml_decoder_head(
    model: nn.Module, num_classes: int = -1, num_of_groups: int = -1, decoder_embedding: int = 768, **options
) -> nn.Module:
    """Replace the pooling and classifier of a timm model by an ML-Decoder head, in place.

    Args:
        model: a timm classification model, pretrained or not; backbone tensors keep their names and values.
        num_classes: classes of the new head; -1 keeps the model's.
        num_of_groups: queries of the head, see `MLDecoder`.
        decoder_embedding: width of the head, see `MLDecoder`.
        **options: further keyword options of `MLDecoder`. ``word_embeddings`` may also be a file, see
            `timm_mldecoder.data.word_embeddings`; ``class_names`` then pick and order its classes.

    Returns:
        The same model. ``forward`` gives logits [B, num_classes].

    Raises:
        ValueError: the model is not timm's, cannot give image features, or has no classes; an unknown option; label
            embeddings of another number of classes.
    """
    options = {'num_of_groups': num_of_groups, 'decoder_embedding': decoder_embedding, **options}
    check_options(options)
    words, class_names = _take_words(options)
    if words is not None:
        if num_classes not in (-1, len(words)):
            raise ValueError(f'word_embeddings are of {len(words)} classes, num_classes is {num_classes}')
        num_classes = len(words)
    num_classes = _check_model(model, num_classes)
    MLDecoder(num_classes, **options, device='meta')  # a wrong value is said before the model is touched
    if not isinstance(model, MLDecoderModel):
        _take_head_off(model)
        model.__class__ = ml_decoder_class(type(model))
    defaults = inspect.signature(MLDecoder).parameters
    model.ml_decoder_options = {name: value for name, value in options.items() if value != defaults[name].default}
    model.reset_classifier(num_classes)
    if words is not None:
        head = model.get_classifier()
        head.set_word_embeddings(words, class_names)
        # what is learned depends on the grouping, which must not follow the number of classes
        model.ml_decoder_options |= {'num_of_groups': head.config.num_queries, 'group_size': head.config.group_size}
    model._model_args = dict(model._model_args)  # notes the head for save_for_hf
    return model


def _take_words(options: dict) -> tuple[Tensor | None, list[str] | None]:
    """The label embeddings and class names of a word-query head, if any.

    Leaves the width of the embeddings behind: the options are written as JSON, and the embeddings travel with the
    weights.
    """
    words, class_names = options.get('word_embeddings'), options.pop('class_names', None)
    if isinstance(words, (str, PathLike)):
        from timm_mldecoder.data.word_embeddings import read_word_embeddings

        words, class_names = read_word_embeddings(words, class_names)
    if isinstance(words, Tensor):
        if words.dim() != 2:
            raise ValueError(f'word_embeddings must be [C, E], got a tensor of shape {tuple(words.shape)}')
        options['word_embeddings'] = words.shape[1]
        return words, class_names
    if class_names is not None:
        raise ValueError('class_names need word_embeddings, a tensor or a file')
    return None, None


def _keep_words(old: nn.Module, new: MLDecoder) -> None:
    """A fresh head for as many classes is for the same ones."""
    words, place = getattr(old, 'vocabulary', None), new.vocabulary
    if words is not None and place is not None and words.known and words.width == place.width:
        new.set_word_embeddings(words.embeddings, words.class_names)


def check_options(options: dict) -> None:
    """Raise ValueError for a name that `MLDecoder` has no option of."""
    unknown = sorted(set(options) - set(HEAD_OPTIONS))
    if unknown:
        raise ValueError(f'unknown ML-Decoder option {", ".join(unknown)}; valid options: {", ".join(HEAD_OPTIONS)}')


class MLDecoderModel:
    """What a timm model with an ML-Decoder head answers differently; mixed in before the model's own class."""

    ml_decoder_options: dict
    ml_decoder_slot: str  # where the head is registered, the place of the classifier it replaced

    @property
    def num_classes(self) -> int:
        """Classes of the head, which a head with word queries may change; 0 without a head."""
        return getattr(self.get_classifier(), 'num_classes', 0)

    @num_classes.setter
    def num_classes(self, num_classes: int) -> None:
        if num_classes != self.num_classes:  # timm's own code sets it after it has taken a classifier away
            raise AttributeError(f'the model has {self.num_classes} classes: change them with reset_classifier')

    def get_classifier(self) -> nn.Module:
        try:
            return self.get_submodule(self.ml_decoder_slot)
        except AttributeError:  # timm's pruning has taken the place away with the head
            return nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **kwargs) -> None:
        """A fresh ML-Decoder for ``num_classes``; 0 takes it off, and leaves the mean of the tokens.

        ``global_pool=''`` with 0 classes leaves the tokens themselves, [B, N, F].
        """
        if num_classes and global_pool:
            raise ValueError(f'global_pool={global_pool!r} has no meaning with an ML-Decoder head: leave it out')
        place = next(p for p in self.parameters() if p.is_floating_point())
        old, head = self.get_classifier(), nn.Identity()
        if num_classes:
            head = MLDecoder(
                num_classes,
                initial_num_features=self.ml_decoder_features,
                **self.ml_decoder_options,
                device=place.device,
                dtype=place.dtype,
            )
            if self.num_classes == num_classes:
                _keep_words(old, head)
        self.set_submodule(self.ml_decoder_slot, head.train(self.training))
        self.ml_decoder_pooled = global_pool != ''

    def forward_head(self, x=None, pre_logits: bool = False, patch_valid: Tensor | None = None, **kwargs) -> Tensor:
        """Features of ``forward_features`` to logits [B, C], or with ``pre_logits`` to their mean [B, F]."""
        tokens = self._image_tokens(kwargs['patches'] if x is None else x)
        if patch_valid is not None and patch_valid.shape[1] != tokens.shape[1]:
            patch_valid = None  # the encoder has pooled the padding away (timm's gemma4 soft pooling)
        if pre_logits or (not self.num_classes and self.ml_decoder_pooled):
            return _mean(tokens, patch_valid, self.head_hidden_size)
        if not self.num_classes:
            return tokens
        head = self.get_classifier()
        return head(tokens) if patch_valid is None else head(tokens, mask=patch_valid)

    def _image_tokens(self, x):
        """The image's tokens [B, N, F] (a list of them for several scales), without class and register tokens."""
        family = self.ml_decoder_family
        if not family.read_features:
            x = super().forward_head(x, pre_logits=True)
        if isinstance(x, (list, tuple)):
            return [self._as_tokens(scale) for scale in x]
        return self._as_tokens(x)

    def _as_tokens(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return x.flatten(1, 2) if getattr(self, 'output_fmt', 'NCHW') == 'NHWC' else x.flatten(2).transpose(1, 2)
        if self.ml_decoder_family.channels_first:
            return x.transpose(1, 2)
        prefix = self.ml_decoder_family.prefix_tokens
        return x[:, (getattr(self, 'num_prefix_tokens', None) or 0) if prefix is None else prefix :]

    @property
    def _model_args(self) -> dict:
        """What ``save_for_hf`` writes so that ``create_model`` builds this model again."""
        return self.__dict__.get('_model_args', {})

    @_model_args.setter
    def _model_args(self, args: dict) -> None:
        # timm records the pooling as it is now, which is none; how the backbone was built travels with the head.
        head, built_as = dict(self.ml_decoder_options), args.get('global_pool')
        if built_as:
            head['global_pool'] = built_as
        self.__dict__['_model_args'] = {**args, 'ml_decoder': head or True}

    def __reduce_ex__(self, protocol):
        # The class is made on the fly, so copies and pickles name the model's own class and make it again.
        return _empty_instance, (type(self).__mro__[2],), self.__getstate__()


@functools.cache
def ml_decoder_class(model_class: type) -> type:
    """The subclass of a timm class that holds an ML-Decoder head."""
    family = family_of(model_class)
    members = {'ml_decoder_family': family, '__doc__': model_class.__doc__, '__module__': __name__}
    if family.features is not None:
        members['forward_features'] = family.features
    return type(f'{model_class.__name__}MLDecoder', (MLDecoderModel, model_class), members)


def _empty_instance(model_class: type) -> nn.Module:
    cls = ml_decoder_class(model_class)
    return cls.__new__(cls)


def _check_model(model: nn.Module, num_classes: int) -> int:
    name = type(model).__name__
    refuse = family_of(type(model)).refuse
    if refuse:
        raise ValueError(
            f'{name} cannot take an ML-Decoder head: {refuse}. Use the classifier of the same family '
            f'(timm.list_models), or put timm_mldecoder.MLDecoder on its forward_features yourself'
        )
    missing = [what for what in ('forward_features', 'forward_head', 'reset_classifier') if not hasattr(model, what)]
    if missing:
        raise ValueError(
            f'{name} is not a timm classification model (it has no {", ".join(missing)}): '
            f'put timm_mldecoder.MLDecoder on its feature map yourself'
        )
    num_classes = model.num_classes if num_classes == -1 else num_classes
    if num_classes < 1:
        raise ValueError(f'num_classes must be at least 1, got {num_classes}: an ML-Decoder head needs classes')
    return num_classes


def _take_head_off(model: nn.Module) -> None:
    """Take pooling, classifier and classifier dropout away, and note where the head goes and what it will see."""
    family = family_of(type(model))
    slot, *others = _classifier_paths(model, family)
    for name, value in family.clear.items():
        setattr(model, name, value() if isinstance(value, type) else value)
    model.reset_classifier(0, **family.unpool)
    if family.read_features and family.widths(model) is None:
        model.head_hidden_size = model.num_features
    _switch_off_dropout(model, slot)
    model.ml_decoder_features = family.widths(model) or model.head_hidden_size
    model.ml_decoder_slot = _nearest(model, slot)
    for path in others:
        beside = _nearest(model, path)
        if beside and path.partition('.')[0] != slot.partition('.')[0]:
            model.set_submodule(beside, nn.Identity())
    model.pretrained_cfg = model.default_cfg = {
        **getattr(model, 'pretrained_cfg', {}),
        'classifier': model.ml_decoder_slot,
    }


def _classifier_paths(model: nn.Module, family: Family) -> list[str]:
    """Where the classifier is; two for a distilled model."""
    paths = getattr(model, 'pretrained_cfg', {}).get('classifier')
    paths = list(paths) if isinstance(paths, (list, tuple)) else [paths] if paths else []
    if not paths:  # built from its class, without timm's factory
        classifier = model.get_classifier()
        paths = [name for name, module in model.named_modules() if module is classifier]
    return [family.slot, *paths] if family.slot else paths


def _nearest(model: nn.Module, path: str) -> str:
    """The longest part of a module path that the model has, '' if it has none of it."""
    names = dict(model.named_modules())
    while path not in names:
        path = path.rpartition('.')[0]
    return path


def _switch_off_dropout(model: nn.Module, slot: str) -> None:
    """The classifier's own dropout: ML-Decoder has its own, and the published code does the same."""
    if hasattr(model, 'drop_rate'):
        model.drop_rate = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and name.startswith(('head_drop', f'{slot.partition(".")[0]}.')):
            module.p = 0.0


def _mean(tokens: Tensor | list[Tensor], valid: Tensor | None, width: int) -> Tensor:
    """Mean over the (valid) tokens, [B, F]; of several scales side by side, or their mean where the model says so."""
    if isinstance(tokens, list):
        means = [scale.mean(dim=1) for scale in tokens]
        together = torch.cat(means, dim=1)
        return together if together.shape[1] == width else torch.stack(means).mean(dim=0)
    if valid is None:
        return tokens.mean(dim=1)
    weight = valid.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
