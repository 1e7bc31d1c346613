"""Options of `MLDecoder`: checked, with their defaults resolved, and turned into queries and a classifier."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from torch import nn

from timm_mldecoder.head.layers import (
    CosineGroupFullyConnected,
    FactorizedTextClassifier,
    GroupFullyConnected,
    LearnedTextClassifier,
    SharedTextClassifier,
)
from timm_mldecoder.head.queries import LearnedGroupQueries, Queries, TextGroupQueries, TextQueries

DEFAULT_NUM_QUERIES = 100


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How classes are divided into queries, and which queries and classifier the head has."""

    num_classes: int  # number of classes C that the head is built with
    num_queries: int  # number of queries K that the head is built with
    group_size: Any = None  # classes per query, an int once resolved
    dim: int  # width D of a query
    embedding_width: int | None = None  # width E of label embeddings, None without text queries
    learned_queries: bool = False  # whether queries are trained vectors
    classifier: Any = None  # a key of the table in `build_classifier`
    cosine_scale: float = 1.0  # factor of the cosine classifier's logits
    class_token_width: int = 0  # width of what the classifier reads beside each query output

    @classmethod
    def resolve(cls, *, num_of_groups: int, **options) -> 'HeadConfig':
        """Resolve the defaults of `MLDecoder`'s options.

        Args:
            num_of_groups: Option of `MLDecoder`, -1 for the default.
            **options: Attributes of this class except num_queries; group_size and classifier may be None.

        Raises:
            ValueError: If the classifier does not go with the queries, or the classes do not fit the groups.
        """
        config = cls(num_queries=num_of_groups, **options)
        _check_types(bool, learnable_queries=config.learned_queries)
        grouping = config._text_groups() if config.embedding_width is not None else config._groups()
        config = replace(config, **grouping)
        if config.class_token_width < 0 or (config.class_token_width and config.embedding_width is not None):
            raise ValueError(
                f'class_token_width must be at least 0, and 0 with text queries, got {config.class_token_width}'
            )
        choices = config._classifier_choices()
        if config.classifier is None:
            config = replace(config, classifier=choices[0])
        if config.classifier not in choices:
            kind = 'fixed and learned' if config.embedding_width is None else 'text'
            raise ValueError(
                f'classifier must be one of {sorted(set(choices))} with {kind} queries, got {config.classifier!r}'
            )
        if config.cosine_scale <= 0 or (config.cosine_scale != 1 and config.classifier != 'cosine'):
            raise ValueError(f"cosine_scale must be above 0, and needs classifier='cosine', got {config.cosine_scale}")
        if config.max_classes is not None and config.num_classes > config.max_classes:
            raise ValueError(
                f'{config.num_classes} classes do not fit {config.num_queries} groups of {config.group_size}: '
                f'raise num_of_groups or group_size'
            )
        return config

    def _groups(self) -> dict[str, Any]:
        if self.group_size is not None:
            raise ValueError('group_size is an option of text queries: give word_embeddings, or num_of_groups')
        num_queries = min(self.num_classes, DEFAULT_NUM_QUERIES if self.num_queries == -1 else self.num_queries)
        return dict(num_queries=num_queries, group_size=-(-self.num_classes // num_queries))

    def _text_groups(self) -> dict[str, Any]:
        """With text queries the group size is what the weights depend on, and may be given."""
        group_size = self.group_size
        if group_size is None:
            groups = self.num_classes if self.num_queries == -1 else min(self.num_classes, self.num_queries)
            group_size = -(-self.num_classes // groups)
        if not 1 <= group_size <= self.dim:
            raise ValueError(f'group_size must be in 1 to decoder_embedding ({self.dim}), got {group_size}')
        num_queries = -(-self.num_classes // group_size) if self.num_queries == -1 else self.num_queries
        return dict(num_queries=num_queries, group_size=group_size)

    def _classifier_choices(self) -> tuple[str, ...]:
        """Classifiers that go with the queries, the default first."""
        if self.embedding_width is None:
            return 'group', 'cosine'
        return 'shared' if self.group_size == 1 else 'word', 'shared', 'word', 'learned'

    @property
    def max_classes(self) -> int | None:
        """Most classes that the learned weights have room for; None if any number fits."""
        limited = self.embedding_width is None or self.learned_queries or self.classifier == 'learned'
        return self.num_queries * self.group_size if limited else None

    def build_queries(self, **factory) -> nn.Module:
        """Build the module that gives the queries [K, D]; `factory` is device and dtype."""
        if self.embedding_width is None:
            return Queries(self.num_queries, self.dim, self.learned_queries, **factory)
        if self.learned_queries:
            return LearnedGroupQueries(self.num_queries, self.dim, self.group_size, **factory)
        if self.group_size == 1:
            return TextQueries(self.embedding_width, self.dim, **factory)
        return TextGroupQueries(self.embedding_width, self.dim, self.group_size, **factory)

    def build_classifier(self, **factory) -> nn.Module:
        """Build the module that computes the logits; `factory` is device and dtype."""
        width = self.dim + self.class_token_width
        build, arguments = {
            'group': (GroupFullyConnected, (self.num_classes, self.num_queries, width)),
            'cosine': (CosineGroupFullyConnected, (self.num_classes, self.num_queries, width, self.cosine_scale)),
            'shared': (SharedTextClassifier, ((self.dim, self.group_size), self.group_size)),
            'word': (FactorizedTextClassifier, ((self.dim, self.embedding_width), self.group_size)),
            'learned': (LearnedTextClassifier, ((self.num_queries, self.dim, self.group_size), self.group_size)),
        }[self.classifier]
        return build(*arguments, **factory)


def check_sizes(num_classes: int, num_of_groups: int, dim: int, features: int | Sequence[int], num_heads: int) -> None:
    """Raise TypeError or ValueError for an invalid number of classes, groups or heads, or an invalid width."""
    _check_types(int, num_classes=num_classes, num_of_groups=num_of_groups, decoder_embedding=dim, num_heads=num_heads)
    widths = [features] if isinstance(features, int) else list(features)
    if num_classes < 1:
        raise ValueError(f'num_classes must be at least 1, got {num_classes}')
    if num_of_groups == 0:
        raise ValueError(
            f'num_of_groups must be at least 1, or negative for {DEFAULT_NUM_QUERIES}, got {num_of_groups}'
        )
    if not widths or min(widths) < 1:
        raise ValueError(f"initial_num_features must be the backbone's feature width, got {widths}")
    if dim < 1 or num_heads < 1 or dim % num_heads:
        raise ValueError(
            f'decoder_embedding ({dim}) must be a multiple of num_heads ({num_heads}), both positive: '
            f'choose another width, or a number of heads that divides it'
        )


def check_layers(
    dim_feedforward: int,
    dropout: float,
    num_layers: int,
    classifier_dropout: float,
    self_attention: bool,
    attention_projections: bool,
) -> None:
    """Raise TypeError or ValueError for invalid options of the decoder layers."""
    _check_types(int, dim_feedforward=dim_feedforward, num_layers=num_layers)
    _check_types(bool, self_attention=self_attention, attention_projections=attention_projections)
    if dim_feedforward < 0:
        raise ValueError(f'dim_feedforward must be at least 1, or 0 for no feed-forward network, got {dim_feedforward}')
    if num_layers < 1:
        raise ValueError(f'num_layers must be at least 1, got {num_layers}')
    for name, value in (('dropout', dropout), ('classifier_dropout', classifier_dropout)):
        if not 0 <= value < 1:
            raise ValueError(f'{name} must be in [0, 1), got {value}')


def _check_types(kind: type, **values: Any) -> None:
    for name, value in values.items():
        fits = value in (0, 1) if kind is bool else not isinstance(value, bool)
        if not (isinstance(value, Integral) and fits):
            raise TypeError(f'{name} must be of type {kind.__name__}, got {value!r}')
