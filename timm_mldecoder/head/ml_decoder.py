"""ML-Decoder: embed the image tokens, let queries attend to them, compute each group of logits from its query."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mldecoder.head.config import HeadConfig, check_layers, check_sizes
from timm_mldecoder.head.layers import DecoderLayer, Dropout
from timm_mldecoder.head.position import POSITIONS, add_position
from timm_mldecoder.head.vocabulary import Vocabulary

DEFAULT_EMBEDDING = 768
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    'relu': F.relu,
    'leaky_relu': partial(F.leaky_relu, negative_slope=0.2),
}


class MLDecoder(nn.Module):
    """ML-Decoder classification head (arXiv 2111.12933), in place of global pooling and a linear classifier.

    docs/head.md has a table of the options with their shapes and sources.

    Args:
        num_classes: Number of classes C.
        num_of_groups: Number of queries K, each of which gives ceil(C / K) logits; a negative number means 100, or
            C with text queries. Never more than C.
        decoder_embedding: Width D of queries and embedded tokens; -1 means 768.
        initial_num_features: Width F of the backbone's features; a sequence of widths for features of several scales,
            each of which gets its own embedding.
        zsl: The published switch of zero-shot heads: 1 says that `word_embeddings` are given, 0 says nothing.
        num_heads: Attention heads; must divide D.
        dim_feedforward: Hidden width of the feed-forward network; 0 leaves it out.
        dropout: Probability of every dropout of the decoder.
        num_layers: Number of decoder layers, 1 as published.
        learnable_queries: Train the queries instead of keeping their initial values.
        memory_activation: Activation after the token embedding: 'relu', or 'leaky_relu' (slope 0.2).
        self_attention: Self-attention among the queries in place of ML-Decoder's residual, as in a transformer decoder:
            the baseline of the paper's section 2.2.
        attention_projections: Whether the cross-attention projects queries, keys, values and its output. Without, the
            token embedding is the only projection.
        classifier: 'group' fully-connected, or 'cosine' for its normalized form. With text queries 'shared' (default
            in full decoding), 'word' (made from the label embeddings; default in group decoding) or 'learned' (an
            ablation that is limited to the groups it was trained with).
        cosine_scale: Factor of the logits of the cosine classifier.
        word_embeddings: Label embeddings [C, E], from which text queries are made (zero-shot: the classes may change
            later); or their width E, for a head that gets its classes from a state dict or `set_word_embeddings`.
        class_names: Names of the classes of `word_embeddings`.
        group_size: Classes per text query, instead of ceil(C / K).
        random_queries: Random text queries added in training, see `Vocabulary`; adds as many logits.
        query_noise: Noise on the label embeddings in training, relative to their root mean square.
        query_cutout: Probability that an entry of a label embedding is zero in training.
        position: Positional encoding to add to the feature map: a key of `timm_mldecoder.head.position.POSITIONS`, or
            None for none, as published.
        classifier_dropout: Dropout probability of the query outputs in front of the classifier.
        channels_first: Whether features [B, F, F], whose shape does not say, are [B, F, N] (True) or [B, N, F].
        class_token_width: Width of a class token that each query output is concatenated with (GLoRI); 0 for none.

    Shapes:
        Features of width F to logits [B, C]: tokens [B, N, F] or [B, F, N], maps [B, F, ...] or [B, ..., F] of any
        number of dimensions, one token [B, F], or a list of them for several scales.

    Raises:
        ValueError: If an option is out of range, or features are of another width.
    """

    folded_queries: Tensor | None
    folded_projection: Tensor | None
    checks_mask = True  # whether a mask is checked for images without tokens, which waits for a GPU

    def __init__(
        self,
        num_classes: int,
        num_of_groups: int = -1,
        decoder_embedding: int = DEFAULT_EMBEDDING,
        initial_num_features: int | Sequence[int] = 2048,
        zsl: int = 0,
        *,
        num_heads: int = 8,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        num_layers: int = 1,
        learnable_queries: bool = False,
        memory_activation: str = 'relu',
        self_attention: bool = False,
        attention_projections: bool = True,
        classifier: str | None = None,
        cosine_scale: float = 1.0,
        word_embeddings: Tensor | int | None = None,
        class_names: Sequence[str] | None = None,
        group_size: int | None = None,
        random_queries: int = 0,
        query_noise: float = 0.0,
        query_cutout: float = 0.0,
        position: str | None = None,
        classifier_dropout: float = 0.0,
        channels_first: bool | None = None,
        class_token_width: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dim = DEFAULT_EMBEDDING if decoder_embedding == -1 else decoder_embedding
        check_sizes(num_classes, num_of_groups, dim, initial_num_features, num_heads)
        check_layers(dim_feedforward, dropout, num_layers, classifier_dropout, self_attention, attention_projections)
        _check_input(memory_activation, position)
        text = (class_names, random_queries, query_noise, query_cutout)
        _check_text(word_embeddings, zsl, *text)
        factory = dict(device=device, dtype=dtype)
        self.vocabulary = (
            None if word_embeddings is None else Vocabulary(word_embeddings, num_classes, *text, **factory)
        )
        self.config = HeadConfig.resolve(
            num_classes=num_classes,
            num_of_groups=max(num_of_groups, -1),  # as published
            group_size=group_size,
            dim=dim,
            embedding_width=None if self.vocabulary is None else self.vocabulary.width,
            learned_queries=learnable_queries,
            classifier=classifier,
            cosine_scale=float(cosine_scale),
            class_token_width=class_token_width,
        )
        if random_queries and self.config.max_classes is not None:
            raise ValueError('random_queries need queries and a classifier that take any number of classes')
        self.dropout = dropout
        self.memory_activation, self.position, self.channels_first = memory_activation, position, channels_first
        self.classifier_dropout = Dropout(classifier_dropout)
        layer = partial(DecoderLayer, dim, num_heads, dim_feedforward, dropout, self_attention, attention_projections)
        self._create_modules(initial_num_features, layer, num_layers, **factory)

    def _create_modules(
        self, widths: int | Sequence[int], layer: Callable[..., nn.Module], num_layers: int, **factory
    ) -> None:
        """Create token embeddings, queries, decoder layers and the classifier; `factory` is device and dtype."""
        several = [widths] if isinstance(widths, int) else widths
        embeds = [nn.Linear(width, self.config.dim, **factory) for width in several]
        self.embed: Any = embeds[0] if isinstance(widths, int) else nn.ModuleList(embeds)
        self.queries = self.config.build_queries(**factory)
        self.layers: Any = nn.ModuleList(layer(**factory) for _ in range(num_layers))
        self.group_fc: Any = self.config.build_classifier(**factory)
        self.register_buffer('folded_queries', None, persistent=False)
        self.register_buffer('folded_projection', None, persistent=False)

    @property
    def num_classes(self) -> int:
        """Number of classes C, which `set_word_embeddings` may change."""
        return self.config.num_classes if self.vocabulary is None else self.vocabulary.num_classes

    @property
    def class_names(self) -> list[str] | None:
        """Class names of a head with text queries, None if none were given."""
        return None if self.vocabulary is None else self.vocabulary.class_names

    @property
    def independent_classes(self) -> bool:
        """Whether the logit of a class depends on no other class: one text query per class, no self-attention."""
        config = self.config
        per_class = config.group_size == 1 and config.max_classes is None
        return per_class and not any(layer.self_attn is not None for layer in self.layers)

    @property
    def weight(self) -> nn.Parameter:
        """The classifier's weight, [K, D, ceil(C / K)] without text queries, where ``nn.Linear`` has its own."""
        return self.group_fc.weight

    @property
    def bias(self) -> nn.Parameter:
        """The classifier's bias, [C], or [1] with text queries."""
        return self.group_fc.bias

    def set_word_embeddings(self, embeddings: Tensor, class_names: Sequence[str] | None = None) -> None:
        """Change the classes of a head with text queries: their number, order and identity.

        Args:
            embeddings: Label embeddings [C, E] of the width E that the head was built with.
            class_names: A distinct name for each class.

        Raises:
            ValueError: If embeddings or names do not fit, see `Vocabulary`; or if the head has no text queries.
        """
        if self.vocabulary is None:
            raise ValueError('the classes of this head are fixed: build it with word_embeddings to change them later')
        limit = self.config.max_classes
        if limit is not None and len(embeddings) > limit:
            raise ValueError(f'{len(embeddings)} classes do not fit the {limit} that the head has learned weights for')
        self.vocabulary.set(embeddings, class_names)
        self.unfold()

    def reset_parameters(self) -> None:
        """Initialize every tensor again, buffers included; also fills a head built on the meta device.

        The label embeddings of known classes are not learned and stay.
        """
        self.unfold()
        for module in self.children():
            parts: Any = module if isinstance(module, nn.ModuleList) else [module]
            for part in parts:
                if not isinstance(part, Dropout):
                    part.reset_parameters()

    def fold(self) -> 'MLDecoder':
        """Compute the query side of the first layer once, for faster inference; returns the head.

        In eval mode normalized and projected queries are the same for every image. Undone by ``train()``, `unfold`,
        loading a state dict, moving or casting the head, `set_word_embeddings` and `reset_parameters`. After changing
        weights in another way, call it again.

        Raises:
            ValueError: If the head is in training mode.
        """
        if self.training:
            raise ValueError('fold() is for inference: call eval() first')
        self.unfold()
        with torch.no_grad():
            self.folded_queries, self.folded_projection = self._query_side(1)
        return self

    def unfold(self) -> None:
        """Undo `fold`."""
        self.folded_queries = self.folded_projection = None

    def train(self, mode: bool = True) -> 'MLDecoder':
        if mode:
            self.unfold()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> 'MLDecoder':
        self.unfold()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args) -> None:
        self.unfold()
        super()._load_from_state_dict(*args)

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        queries: Tensor | None = None,
        class_token: Tensor | None = None,
    ) -> Tensor:
        """Compute logits [B, C].

        Args:
            x: Features of the images, see the class.
            mask: [B, N], bool, False at padding tokens, which are left out of the attention.
            key_padding_mask: The same with torch's polarity, True at padding tokens.
            queries: Queries [K, D], or [B, K, D] of each image, in place of the head's own.
            class_token: [B, class_token_width], of a head with this option.

        Raises:
            ValueError: If a shape or dtype is another, an image has padding tokens only, or the head has text queries
                and is given others.
        """
        label_embeddings = self._label_embeddings()
        outputs = self._decode(x, label_embeddings, mask, key_padding_mask, queries)
        width = self.config.class_token_width
        if width or class_token is not None:
            outputs = _beside(outputs, class_token, width)
        return self.group_fc(self.classifier_dropout(outputs), label_embeddings)

    def decode(
        self,
        x: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """Compute the query outputs [B, K, D], from which the classifier computes logits; arguments of `forward`."""
        return self._decode(x, self._label_embeddings(), mask, key_padding_mask, queries)

    def attention_weights(
        self,
        x: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        queries: Tensor | None = None,
        average_heads: bool = True,
    ) -> Tensor:
        """Attention weights of the last layer, [B, K, N]: mean over heads, rows sum to 1; or [B, heads, K, N].

        Class ``c`` belongs to query ``c // head.group_fc.group_size``; N runs over H x W row by row. The
        arguments are those of `forward`.
        """
        tokens = self._embed_tokens(x)
        mask = _valid_tokens(tokens, mask, key_padding_mask, self.checks_mask)
        queries, projected = self._query_side(tokens.shape[0], queries)
        for layer, following in zip(self.layers[:-1], self.layers[1:], strict=True):
            queries, projected = following.query_side(layer.decode(queries, projected, tokens, mask))
        weights = self.layers[-1].multihead_attn.attention_weights(projected, tokens, mask)
        return weights.mean(dim=1) if average_heads else weights

    def _decode(
        self,
        x: Tensor | Sequence[Tensor],
        label_embeddings: Tensor | None,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        given: Tensor | None,
    ) -> Tensor:
        tokens = self._embed_tokens(x)
        if mask is not None or key_padding_mask is not None:
            mask = _valid_tokens(tokens, mask, key_padding_mask, self.checks_mask)
        first, *others = self.layers
        if self.folded_queries is not None and given is None:
            queries = first.decode(self.folded_queries, self.folded_projection, tokens, mask)
        else:
            queries = first(self._queries(label_embeddings, tokens.shape[0], given), tokens, mask)
        for layer in others:
            queries = layer(queries, tokens, mask)
        return queries

    def _embed_tokens(self, x: Any) -> Tensor:
        """Features to embedded tokens [B, N, D]; tokens of several scales are concatenated."""
        activate = ACTIVATIONS[self.memory_activation]
        several = isinstance(self.embed, nn.ModuleList)
        if not several and not isinstance(x, (list, tuple)):
            return activate(self.embed(self._tokens(x, self.embed.in_features)))
        embeds = self.embed if several else [self.embed]
        if len(x) != len(embeds):
            raise ValueError(f'MLDecoder was built for {len(embeds)} scales of features, got {len(x)}')
        scales = [embed(self._tokens(scale, embed.in_features)) for embed, scale in zip(embeds, x, strict=True)]
        return activate(torch.cat(scales, dim=1))

    def _tokens(self, x: Tensor, width: int) -> Tensor:
        if self.position is not None:
            x = add_position(x, self.position).flatten(2).transpose(1, 2)
        return _as_tokens(x, width, self.channels_first)

    def _label_embeddings(self) -> Tensor | None:
        """Label embeddings [C, E], None without text queries."""
        return None if self.vocabulary is None else self.vocabulary()

    def _queries(self, label_embeddings: Tensor | None, batch_size: int, given: Tensor | None = None) -> Tensor:
        """Queries [1, K, D] of the first layer; [B, K, D] if they differ from image to image, as dropout makes them."""
        if given is None:
            queries = self.queries(label_embeddings).unsqueeze(0)
        else:
            queries = self._check_queries(given, batch_size)
        return _expand(queries, batch_size) if self.training and self.dropout > 0 else queries

    def _check_queries(self, queries: Tensor, batch_size: int) -> Tensor:
        shape = self.config.num_queries, self.config.dim
        if self.vocabulary is not None:
            raise ValueError('the queries of this head are made of label embeddings: call set_word_embeddings')
        if queries.shape not in (shape, (batch_size, *shape)):
            raise ValueError(f'queries must be [K, D] = {list(shape)} or [B, K, D], got {list(queries.shape)}')
        return queries if queries.dim() == 3 else queries.unsqueeze(0)

    def _query_side(self, batch_size: int, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalized and projected queries of the first layer."""
        if self.folded_queries is not None and self.folded_projection is not None and given is None:
            return self.folded_queries, self.folded_projection
        return self.layers[0].query_side(self._queries(self._label_embeddings(), batch_size, given))


def _check_input(memory_activation: str, position: str | None) -> None:
    if memory_activation not in ACTIVATIONS:
        raise ValueError(f'memory_activation must be one of {sorted(ACTIVATIONS)}, got {memory_activation!r}')
    if position not in (None, *POSITIONS):
        raise ValueError(f'position must be None or one of {sorted(POSITIONS)}, got {position!r}')


def _check_text(words: Tensor | int | None, zsl: int, class_names: Sequence[str] | None, *augmentations: float) -> None:
    """Raise ValueError for options that need label embeddings, where there are none."""
    if words is not None:
        return
    if zsl:
        raise ValueError(f'zsl={zsl} needs label embeddings, from which its queries are made: give word_embeddings')
    if class_names is not None or any(augmentations):
        raise ValueError('class_names and augmentations of queries need text queries: give word_embeddings')


@torch.fx.wrap  # one node to an fx tracer: a buffer cannot expand to a traced size
def _expand(queries: Tensor, batch_size: int) -> Tensor:
    return queries.expand(batch_size, -1, -1)


@torch.fx.wrap  # one node to an fx tracer, which cannot follow a branch on a shape
def _as_tokens(x: Tensor, width: int, channels_first: bool | None = None) -> Tensor:
    """Features [B, F], [B, N, F], [B, F, ...] or [B, ..., F] of width F as tokens [B, N, F]."""
    if x.dim() == 2 and x.shape[1] == width:
        return x.unsqueeze(1)
    if x.dim() == 3 and x.shape[2] == width and channels_first is False:
        return x
    if x.dim() < 3 or width not in (x.shape[1], x.shape[-1]):
        raise ValueError(_wrong_features(x, width))
    if x.dim() == 3 and x.shape[1] == x.shape[2] and channels_first is None and width > 1:
        raise ValueError(
            f'features of shape {list(x.shape)} may be [B, N, F] or [B, F, N]: give the head channels_first=False '
            'for the former, True for the latter'
        )
    preferred = x.dim() > 3 if channels_first is None else channels_first  # where both fit, as published
    first = preferred if x.shape[1] == x.shape[-1] else x.shape[1] == width
    return x.flatten(2).transpose(1, 2) if first else x.flatten(1, -2)


def _wrong_features(x: Tensor, width: int) -> str:
    found = f'MLDecoder was built for features of width {width}, got a tensor of shape {list(x.shape)}: '
    if width in x.shape[2:-1]:
        return f'{found}move the channels with x.movedim({list(x.shape).index(width, 2)}, 1)'
    if x.dim() < 2:
        return f'{found}give [B, F], [B, N, F] or [B, F, H, W]'
    return f'{found}build it with the width of its features as initial_num_features, here {x.shape[1]} or {x.shape[-1]}'


@torch.fx.wrap
def _valid_tokens(
    tokens: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, check: bool = True
) -> Tensor | None:
    """Return the mask [B, N] that is False at padding tokens."""
    if mask is not None and key_padding_mask is not None:
        raise ValueError('give mask (True at tokens to keep) or key_padding_mask (True at padding tokens), not both')
    for name, value in (('mask', mask), ('key_padding_mask', key_padding_mask)):
        if value is not None and (value.dtype != torch.bool or value.shape != tokens.shape[:2]):
            raise ValueError(
                f'{name} must be bool [B, N] = {list(tokens.shape[:2])}, got {value.dtype} {list(value.shape)}'
            )
    mask = mask if key_padding_mask is None else ~key_padding_mask
    if mask is not None and check and not torch.compiler.is_compiling() and not mask.any(dim=1).all():
        image = int(mask.any(dim=1).logical_not().nonzero()[0])
        raise ValueError(
            f'image {image} has padding tokens only; mask is True at tokens to keep, key_padding_mask at padding tokens'
        )
    return mask


@torch.fx.wrap
def _beside(outputs: Tensor, class_token: Tensor | None, width: int) -> Tensor:
    """Query outputs [B, K, D] and a class token [B, width] to [B, K, D + width]."""
    if class_token is None or class_token.shape != (len(outputs), width):
        found = 'nothing' if class_token is None else list(class_token.shape)
        raise ValueError(f'class_token must be [B, class_token_width] = {[len(outputs), width]}, got {found}')
    return torch.cat([outputs, class_token.unsqueeze(1).expand(-1, outputs.shape[1], -1)], dim=-1)
