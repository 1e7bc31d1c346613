"""Put a head of `PROBES` on a timm model: what a probe of a frozen backbone trains, as a complete model."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from timm_mldecoder.models.attach import (
    MLDecoderModel,
    check_model,
    feature_widths,
    portable_options,
    remove_classifier,
)
from timm_mldecoder.models.classifier_model import change_class
from timm_mldecoder.models.probes import PROBES


class ProbeModel(MLDecoderModel):
    """A timm model with a head of `PROBES`, or with none."""

    classifier_option = 'probe_head'
    ml_decoder_options: Mapping = {}  # ``{'name': ..., **options}`` of the head, in JSON form

    @property
    def gives_class_token(self) -> bool:
        """Whether the backbone has a class token that the head may read."""
        owner = next((part for part in (self, getattr(self, 'embeds', None)) if hasattr(part, 'cls_token')), None)
        return bool(getattr(self, 'num_prefix_tokens', 0)) and getattr(owner, 'cls_token', None) is not None

    def read_tokens(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return image tokens [B, N, F] without class and register tokens, and the class token [B, F] if there is one.

        Args:
            images: Normalised images [B, C, H, W].
        """
        return self._tokens(self.forward_features(images))

    def _tokens(self, features) -> tuple[Tensor, Tensor | None]:
        features = self._pre_logits(features)
        return self._image_tokens(features), features[:, 0] if self.gives_class_token else None

    def forward_head(self, x=None, pre_logits: bool = False, patch_valid: Tensor | None = None, **kwargs) -> Tensor:
        """Return logits [B, C] for the output of ``forward_features``; with `pre_logits` the mean token [B, F]."""
        tokens, class_token = self._tokens(x)
        if self.num_classes and not pre_logits:
            return self.get_classifier()(tokens, class_token)
        return tokens.mean(dim=1) if pre_logits or self.ml_decoder_pooled else tokens

    def reset_classifier_tensors(self) -> None:
        head = self.get_classifier()
        if hasattr(head, 'vocabulary'):  # an ML-Decoder
            super().reset_classifier_tensors()
            return
        for module in head.modules():
            for name in ('reset_parameters', 'init_weights'):
                getattr(module, name, lambda: None)()

    def _new_head(self, num_classes: int) -> nn.Module:
        options = dict(self.ml_decoder_options)
        return build_probe(self, num_classes, options.pop('name'), **options)


def add_probe_head(model: Any, num_classes: int = -1, name: str = 'linear', **options) -> nn.Module:
    """Replace the pooling and classifier of a timm model by a head of `PROBES`, in place.

    ``save_for_hf`` stores the head, and ``timm.create_model(name, probe_head={'name': ..., **options})`` builds it.

    Args:
        model: A timm classification model; backbone tensors keep their names and values.
        num_classes: Number of classes C; -1 keeps the model's.
        name: Key of `PROBES`.
        **options: Keyword options of the head.

    Returns:
        The same model. ``forward`` returns logits [B, C].

    Raises:
        ValueError: If there is no such head, it does not take the options, or the backbone cannot feed it.
    """
    embeddings = options.get('word_embeddings')
    if num_classes == -1:
        num_classes = len(embeddings) if isinstance(embeddings, Tensor) else model.num_classes
    remove_head(model)
    head = build_probe(model, num_classes, name, **options)
    model.ml_decoder_options = {'name': name, **portable_options(options, head)}
    model.set_submodule(model.ml_decoder_slot, head)
    return model


def remove_head(model: Any) -> Any:
    """Make a timm model a `ProbeModel` without a head, in place, and return it.

    Raises:
        ValueError: If the model has no tokens of one width.
    """
    check_model(model)
    if not isinstance(feature_widths(model), int):
        raise ValueError(f'{type(model).__name__} has tokens of several scales; a probe reads one: try another model')
    remove_classifier(model)
    change_class(model, ProbeModel)
    model.set_submodule(model.ml_decoder_slot, nn.Identity())
    return model


def build_probe(model: Any, num_classes: int, name: str, **options) -> nn.Module:
    """Return a head for a model, on its device, with its dtype and training mode.

    Raises:
        ValueError: As in `add_probe_head`.
    """
    if name not in PROBES:
        raise ValueError(f'there is no probe head {name!r}: choose from {", ".join(PROBES)}')
    try:
        head: Any = PROBES[name](model.ml_decoder_features, num_classes, **options)
    except (TypeError, AssertionError) as error:
        raise ValueError(f'probe head {name}: {error}') from error
    if getattr(head, 'pool', None) == 'class_token' and not model.gives_class_token:
        raise ValueError(f'probe head {name}: {type(model).__bases__[1].__name__} has no class token, use linear')
    if not hasattr(head, 'num_classes'):
        head.num_classes = num_classes
    like = next(p for p in model.parameters() if p.is_floating_point())
    return head.to(like.device, like.dtype).train(model.training)


def parse_probe(value: object) -> dict:
    """Return the options in ``probe_head``, the name of a head or a mapping with it.

    Raises:
        ValueError: If it is neither.
    """
    value = {'name': value} if isinstance(value, str) else value
    if not isinstance(value, Mapping) or value.get('name') not in PROBES:
        raise ValueError(f'probe_head must be a name or a dict with one, of {", ".join(PROBES)}; got {value!r}')
    return dict(value)
