"""ML-Decoder: embed the image's tokens, let queries attend to them, read each group of classes from its query."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mldecoder.head.config import build_classifier, build_queries, check_layers, check_sizes, make_plan
from timm_mldecoder.head.decoder_layer import DecoderLayer
from timm_mldecoder.head.vocabulary import Vocabulary

DEFAULT_EMBEDDING = 768
ACTIVATIONS = {'relu': F.relu, 'leaky_relu': partial(F.leaky_relu, negative_slope=0.2)}


class MLDecoder(nn.Module):
    """ML-Decoder classification head (arXiv 2111.12933), in place of global pooling and a linear classifier.

    Args:
        num_classes: number of classes C.
        num_of_groups: number of queries K, each of which gives ceil(C / K) classes; -1 means 100, and with word queries
            C. Never more than C.
        decoder_embedding: width D of queries and embedded tokens; -1 means 768.
        initial_num_features: width F of the backbone's features; a sequence of widths for features of several scales,
            each of which gets its own embedding.
        num_heads: attention heads; must divide D.
        dim_feedforward: hidden width of the feed-forward layer.
        dropout: probability of every dropout of the decoder.
        num_layers: decoder layers, one as published.
        learnable_queries: train the queries instead of keeping the vectors drawn at the start.
        memory_activation: what follows the embedding of the tokens: 'relu', or 'leaky_relu' (slope 0.2).
        classifier: 'group' fully-connected, or 'cosine' for its normalised form. With word queries 'shared' (default in
            full decoding), 'word' (factorised through the label embeddings, default in group decoding) or 'learned'
            (an ablation that knows the groups of its training only).
        cosine_scale: factor of the logits of the cosine classifier.
        word_embeddings: label embeddings [C, E], which make the queries (zero-shot: the classes may change later); or
            their width E, for a head that gets its classes from a state dict or `set_word_embeddings`.
        class_names: names of the classes of `word_embeddings`.
        group_size: labels a word query stands for, instead of ceil(C / K).
        random_queries: random word queries added in training, see `Vocabulary`; they give C + random_queries logits.
        query_noise: noise on the word embeddings in training, relative to their root mean square.

    Shapes:
        features [B, F, H, W] or [B, N, F] (a list of them for several scales) to logits [B, C].

    Raises:
        ValueError: for an option out of range, or features that are pooled or of another width.
    """

    def __init__(
        self,
        num_classes: int,
        num_of_groups: int = -1,
        decoder_embedding: int = DEFAULT_EMBEDDING,
        initial_num_features: int | Sequence[int] = 2048,
        *,
        num_heads: int = 8,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        num_layers: int = 1,
        learnable_queries: bool = False,
        memory_activation: str = 'relu',
        classifier: str | None = None,
        cosine_scale: float = 1.0,
        word_embeddings: Tensor | int | None = None,
        class_names: Sequence[str] | None = None,
        group_size: int | None = None,
        random_queries: int = 0,
        query_noise: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dim = DEFAULT_EMBEDDING if decoder_embedding == -1 else decoder_embedding
        widths = [initial_num_features] if isinstance(initial_num_features, int) else list(initial_num_features)
        check_sizes(num_classes, num_of_groups, dim, widths, num_heads)
        check_layers(dim_feedforward, dropout, num_layers)
        if memory_activation not in ACTIVATIONS:
            raise ValueError(f'memory_activation must be one of {sorted(ACTIVATIONS)}, got {memory_activation!r}')
        factory = dict(device=device, dtype=dtype)

        self.vocabulary = None
        if word_embeddings is not None:
            self.vocabulary = Vocabulary(
                word_embeddings, num_classes, class_names, random_queries, query_noise, **factory
            )
        elif class_names is not None or random_queries or query_noise:
            raise ValueError('class_names, random_queries and query_noise need word queries: give word_embeddings')
        word_width = None if self.vocabulary is None else self.vocabulary.width
        self.plan = make_plan(
            num_classes, num_of_groups, group_size, dim, word_width, learnable_queries, classifier, cosine_scale
        )
        if random_queries and self.plan.most_classes is not None:
            raise ValueError('random_queries need queries and a classifier that take any number of words')

        self.dropout = dropout
        self.memory_activation = memory_activation
        embeds = [nn.Linear(width, dim, **factory) for width in widths]
        self.embed = embeds[0] if isinstance(initial_num_features, int) else nn.ModuleList(embeds)
        self.queries = build_queries(self.plan, **factory)
        self.layers = nn.ModuleList(
            DecoderLayer(dim, num_heads, dim_feedforward, dropout, **factory) for _ in range(num_layers)
        )
        self.group_fc = build_classifier(self.plan, **factory)

    @property
    def num_classes(self) -> int:
        """Number of classes C, which `set_word_embeddings` may change."""
        return self.plan.num_classes if self.vocabulary is None else self.vocabulary.num_classes

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes of word queries, None where none were given."""
        return None if self.vocabulary is None else self.vocabulary.class_names

    def set_word_embeddings(self, embeddings: Tensor, class_names: Sequence[str] | None = None) -> None:
        """Change the classes of a head with word queries: their number, order and identity.

        Args:
            embeddings: label embeddings [C, E] of the width E of the old ones.
            class_names: a distinct name for each class.

        Raises:
            ValueError: embeddings or names that do not fit, see `Vocabulary`; or a head without word queries.
        """
        if self.vocabulary is None:
            raise ValueError('the classes of this head are fixed: build it with word_embeddings to change them later')
        most = self.plan.most_classes
        if most is not None and len(embeddings) > most:
            raise ValueError(f'{len(embeddings)} classes do not fit the {most} that the learned parts of the head know')
        self.vocabulary.set(embeddings, class_names)

    @property
    def weight(self) -> nn.Parameter:
        """The classifier's weight ([K, D, ceil(C / K)] if not of words), where code for ``nn.Linear`` looks for it."""
        return self.group_fc.weight

    @property
    def bias(self) -> nn.Parameter:
        """The classifier's bias, [C], or [1] with word queries."""
        return self.group_fc.bias

    def reset_parameters(self) -> None:
        """Draw every tensor anew, the fixed queries too; also what fills a head built on the meta device."""
        embeds = self.embed if isinstance(self.embed, nn.ModuleList) else [self.embed]
        for module in (*embeds, self.queries, *self.layers, self.group_fc):
            module.reset_parameters()

    def forward(self, x: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Features to logits [B, C].

        Args:
            x: features of the image, see the class.
            mask: [B, N], False for padding tokens that no query may look at.
        """
        memory = self._memory(x)
        words = self._words()
        queries = self._queries(words, memory.shape[0])
        for layer in self.layers:
            queries = layer(queries, memory, mask)
        return self.group_fc(queries, *words)

    def attention_weights(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Where each query looks in the last layer: [B, K, N], mean over heads, rows sum to 1.

        Class ``c`` belongs to query ``c // head.group_fc.group_size``; N runs over H x W row by row.
        """
        memory = self._memory(x)
        queries = self._queries(self._words(), memory.shape[0])
        for layer in self.layers[:-1]:
            queries = layer(queries, memory)
        last = self.layers[-1]
        return last.multihead_attn.attention_weights(last.ask(queries), memory)

    def _memory(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Features to embedded tokens [B, N, D]; the tokens of several scales one after the other."""
        activate = ACTIVATIONS[self.memory_activation]
        if not isinstance(self.embed, nn.ModuleList):
            return activate(self.embed(_tokens(x, self.embed.in_features)))
        if len(x) != len(self.embed):
            raise ValueError(f'MLDecoder was built for {len(self.embed)} scales of features, got {len(x)}')
        scales = [embed(_tokens(scale, embed.in_features)) for embed, scale in zip(self.embed, x, strict=True)]
        return activate(torch.cat(scales, dim=1))

    def _words(self) -> tuple[Tensor, ...]:
        """The label embeddings [C, E], where the head has any."""
        return () if self.vocabulary is None else (self.vocabulary(),)

    def _queries(self, words: tuple[Tensor, ...], batch_size: int) -> Tensor:
        """Queries [B, K, D] where dropout makes them differ from image to image, else [1, K, D]."""
        queries = self.queries(*words).unsqueeze(0)
        if self.training and self.dropout > 0:
            queries = _expand(queries, batch_size)
        return queries


@torch.fx.wrap  # one node to an fx tracer: a buffer cannot expand to a traced size
def _expand(queries: Tensor, batch_size: int) -> Tensor:
    return queries.expand(batch_size, -1, -1)


@torch.fx.wrap  # one node to an fx tracer, which cannot follow a branch on a shape
def _tokens(x: Tensor, width: int) -> Tensor:
    """A feature map [B, F, H, W] or tokens [B, N, F] as tokens [B, N, F]."""
    if x.dim() == 4:
        x = x.flatten(2).transpose(1, 2)
    elif x.dim() != 3:
        raise ValueError(
            f'MLDecoder takes un-pooled features [B, F, H, W] or [B, N, F], got a tensor of shape {tuple(x.shape)}: '
            f'give it the feature map before global pooling (global_pool="" in timm)'
        )
    if x.shape[-1] != width:
        raise ValueError(
            f'MLDecoder was built for features of width {width}, got {x.shape[-1]}: build it with '
            f'initial_num_features={x.shape[-1]}, and give [B, F, H, W] or [B, N, F]'
        )
    return x
