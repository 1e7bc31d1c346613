"""From a head's options to its parts: what the options must be, how classes fall into groups, what is built of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from timm_mldecoder.head.classifiers import (
    CosineGroupFullyConnected,
    GroupFullyConnected,
    LearnedPooling,
    SharedPooling,
    WordPooling,
)
from timm_mldecoder.head.queries import LearnedGroupQueries, Queries, WordGroupQueries, WordQueries

DEFAULT_NUM_QUERIES = 100


@dataclass(frozen=True)
class Plan:
    """How the classes are asked for and read.

    Attributes:
        num_classes: classes C at the start.
        num_queries: queries K at the start.
        group_size: classes a query stands for.
        dim: width D of a query.
        word_width: width E of label embeddings, None for fixed and learned queries.
        learned_queries: whether queries are trained vectors.
        classifier: a key of `build_classifier`'s table.
        cosine_scale: factor of the cosine classifier's logits.
    """

    num_classes: int
    num_queries: int
    group_size: int
    dim: int
    word_width: int | None
    learned_queries: bool
    classifier: str
    cosine_scale: float

    @property
    def most_classes(self) -> int | None:
        """So many classes fit the parts that know their groups; None where any number does."""
        learned = self.learned_queries or self.classifier == 'learned'
        return self.num_queries * self.group_size if learned or self.word_width is None else None


def make_plan(
    num_classes: int,
    num_of_groups: int,
    group_size: int | None,
    dim: int,
    word_width: int | None,
    learned_queries: bool,
    classifier: str | None,
    cosine_scale: float,
) -> Plan:
    """Resolve defaults, see `MLDecoder` for the arguments.

    Raises:
        ValueError: a classifier that does not go with the queries, or classes that do not fit.
    """
    if word_width is None:
        if group_size is not None:
            raise ValueError('group_size is an option of word queries: give word_embeddings, or num_of_groups')
        num_queries = min(num_classes, DEFAULT_NUM_QUERIES if num_of_groups == -1 else num_of_groups)
        group_size = -(-num_classes // num_queries)
        choices = ('group', 'cosine')
    else:
        if group_size is None:
            group_size = -(-num_classes // (num_classes if num_of_groups == -1 else min(num_classes, num_of_groups)))
        if group_size < 1 or group_size > dim:
            raise ValueError(f'group_size must be in 1 to decoder_embedding ({dim}), got {group_size}')
        num_queries = -(-num_classes // group_size) if num_of_groups == -1 else num_of_groups
        choices = ('shared' if group_size == 1 else 'word', 'shared', 'word', 'learned')
    classifier = classifier or choices[0]
    if classifier not in choices:
        kind = 'fixed and learned' if word_width is None else 'word'
        raise ValueError(f'classifier must be one of {sorted(set(choices))} with {kind} queries, got {classifier!r}')
    if cosine_scale != 1 and classifier != 'cosine' or cosine_scale <= 0:
        raise ValueError(f"cosine_scale must be above 0, and needs classifier='cosine', got {cosine_scale}")
    plan = Plan(num_classes, num_queries, group_size, dim, word_width, learned_queries, classifier, float(cosine_scale))
    if plan.most_classes is not None and num_classes > plan.most_classes:
        raise ValueError(
            f'{num_classes} classes do not fit {num_queries} groups of {group_size}: raise num_of_groups or group_size'
        )
    return plan


def build_queries(plan: Plan, **factory) -> nn.Module:
    """The module that makes the queries, from nothing or from label embeddings."""
    if plan.word_width is None:
        return Queries(plan.num_queries, plan.dim, plan.learned_queries, **factory)
    if plan.learned_queries:
        return LearnedGroupQueries(plan.num_queries, plan.dim, plan.group_size, **factory)
    if plan.group_size == 1:
        return WordQueries(plan.word_width, plan.dim, **factory)
    return WordGroupQueries(plan.word_width, plan.dim, plan.group_size, **factory)


def build_classifier(plan: Plan, **factory) -> nn.Module:
    """The module that reads logits from the queries' outputs, and from label embeddings if there are."""
    builders = {
        'group': lambda: GroupFullyConnected(plan.num_classes, plan.num_queries, plan.dim, **factory),
        'cosine': lambda: CosineGroupFullyConnected(
            plan.num_classes, plan.num_queries, plan.dim, plan.cosine_scale, **factory
        ),
        'shared': lambda: SharedPooling(plan.dim, plan.group_size, **factory),
        'word': lambda: WordPooling(plan.dim, plan.group_size, plan.word_width, **factory),
        'learned': lambda: LearnedPooling(plan.num_queries, plan.dim, plan.group_size, **factory),
    }
    return builders[plan.classifier]()


def check_sizes(num_classes: int, num_of_groups: int, dim: int, widths: Sequence[int], num_heads: int) -> None:
    """Raise ValueError for a number of classes or groups, or a width, that no head can have."""
    if num_classes < 1:
        raise ValueError(f'num_classes must be at least 1, got {num_classes}')
    if num_of_groups == 0 or num_of_groups < -1:
        raise ValueError(f'num_of_groups must be at least 1, or -1 for {DEFAULT_NUM_QUERIES}, got {num_of_groups}')
    if not widths or min(widths) < 1:
        raise ValueError(f"initial_num_features must be the backbone's feature width, got {widths}")
    if dim < 1 or num_heads < 1 or dim % num_heads:
        raise ValueError(
            f'decoder_embedding ({dim}) must be a multiple of num_heads ({num_heads}), both positive: '
            f'choose another width, or a number of heads that divides it'
        )


def check_layers(dim_feedforward: int, dropout: float, num_layers: int) -> None:
    """Raise ValueError for decoder layers that cannot be built."""
    if dim_feedforward < 1 or num_layers < 1:
        raise ValueError(f'dim_feedforward and num_layers must be at least 1, got {dim_feedforward} and {num_layers}')
    if not 0 <= dropout < 1:
        raise ValueError(f'dropout must be in [0, 1), got {dropout}')
