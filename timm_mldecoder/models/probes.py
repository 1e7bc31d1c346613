"""Heads for frozen backbones, each from tokens [B, N, F] to logits [B, C]: what a probe compares.

Their first arguments are the width F of the tokens and the number of classes C.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from timm_mldecoder.head import MLDecoder


class LinearProbe(nn.Module):
    """Mean of the tokens, or the class token, then BatchNorm and a linear classifier, as DINOv2's linear evaluation.

    Args:
        pool: 'mean', 'max' or 'class_token'.
    """

    POOLS = ('mean', 'max', 'class_token')

    def __init__(self, num_features: int, num_classes: int, pool: str = 'mean') -> None:
        super().__init__()
        if pool not in self.POOLS:
            raise ValueError(f'pool must be one of {", ".join(self.POOLS)}, got {pool!r}')
        self.pool = pool
        self.norm = nn.BatchNorm1d(num_features)
        self.fc = nn.Linear(num_features, num_classes)

    def forward(self, tokens: Tensor, class_token: Tensor | None = None) -> Tensor:
        if self.pool == 'class_token':
            if class_token is None:
                raise ValueError("pool='class_token' needs a backbone with a class token, use 'mean' or 'max'")
            pooled = class_token
        else:
            pooled = tokens.mean(dim=1) if self.pool == 'mean' else tokens.amax(dim=1)
        return self.fc(self.norm(pooled))


class LogSumExpProbe(nn.Module):
    """A linear classifier on each token, pooled by the log of the mean of exponentials: a smooth maximum of logits."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(num_features)
        self.fc = nn.Linear(num_features, num_classes)

    def forward(self, tokens: Tensor, class_token: Tensor | None = None) -> Tensor:
        logits = self.fc(self.norm(tokens.flatten(0, 1))).unflatten(0, tokens.shape[:2])
        return logits.logsumexp(dim=1) - math.log(tokens.shape[1])


class AttentionPoolProbe(nn.Module):
    """timm's `AttentionPoolLatent` (one learned query, feed-forward network) and a linear classifier.

    Args:
        num_heads: Attention heads, a divisor of F; None means the largest up to 8.
        mlp_ratio: Hidden width of the feed-forward network, relative to F.
    """

    def __init__(
        self, num_features: int, num_classes: int, num_heads: int | None = None, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        num_heads = num_heads or _largest_divisor(num_features, 8)
        self.pool = AttentionPoolLatent(num_features, num_heads=num_heads, mlp_ratio=mlp_ratio)
        self.fc = nn.Linear(num_features, num_classes)

    def forward(self, tokens: Tensor, class_token: Tensor | None = None) -> Tensor:
        return self.fc(self.pool(tokens))


class EfficientProbe(nn.Module):
    """Efficient probing (arXiv 2506.10178, section 3): learned queries attend to the tokens without projections.

    Query m averages slice m of the projected values; the slices together are the pooled vector [B, D].

    Args:
        num_queries: Number of queries M, a divisor of D; None means the largest up to 32.
        dim: Width D of the values; None means F.
    """

    def __init__(
        self, num_features: int, num_classes: int, num_queries: int | None = None, dim: int | None = None
    ) -> None:
        super().__init__()
        dim = dim or num_features
        num_queries = num_queries or _largest_divisor(dim, 32)
        if dim % num_queries:
            raise ValueError(f'num_queries must divide the width of the values ({dim}), got {num_queries}')
        self.queries = nn.Parameter(torch.empty(num_queries, num_features))
        self.reset_parameters()
        self.value = nn.Linear(num_features, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim)
        self.fc = nn.Linear(dim, num_classes)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries, std=0.02)

    def forward(self, tokens: Tensor, class_token: Tensor | None = None) -> Tensor:
        num_queries, width = self.queries.shape
        attention = (self.queries @ tokens.transpose(1, 2) * width**-0.5).softmax(dim=-1)  # [B, M, N]
        values = self.value(tokens).unflatten(-1, (num_queries, -1)).transpose(1, 2)  # [B, M, N, D / M]
        pooled = (attention.unsqueeze(2) @ values).flatten(1)
        return self.fc(self.norm(pooled))


class MLDecoderProbe(MLDecoder):
    """`MLDecoder` on tokens, with tensors of the same names.

    Args:
        num_of_groups: See `MLDecoder`.
        dim: Width D of the head; -1 means 768.
        **options: Keyword-only options of `MLDecoder`.
    """

    def __init__(self, num_features: int, num_classes: int, num_of_groups: int = -1, dim: int = -1, **options) -> None:
        super().__init__(num_classes, num_of_groups, dim, num_features, **{'channels_first': False, **options})

    def forward(self, tokens, class_token: Tensor | None = None) -> Tensor:
        return super().forward(tokens)


# the options of `MLDecoder` that leave its redundant projections out; chosen with benchmarks/probing.py
SMALL_ML_DECODER = dict(num_heads=8, dim_feedforward=0, dropout=0.0, attention_projections=False)


def small_ml_decoder_options(num_features: int, dim: int | None = None, **options) -> dict:
    """Return the options of `MLDecoderProbe` that make it small; those given here win."""
    learned = options.get('word_embeddings') is None
    dim = dim or max(8, min(num_features, 256) // 8 * 8)
    return {'dim': dim, **SMALL_ML_DECODER, 'learnable_queries': learned, **options}


def small_ml_decoder(num_features: int, num_classes: int, dim: int | None = None, **options) -> MLDecoderProbe:
    """An ML-Decoder with about as many parameters as efficient probing; docs/head.md has the count.

    Args:
        dim: Width D, a multiple of 8; None means the largest up to F and 256.
        **options: Keyword-only options of `MLDecoder`, in place of `SMALL_ML_DECODER`. Queries are learned, unless they
            are made from ``word_embeddings``.
    """
    return MLDecoderProbe(num_features, num_classes, **small_ml_decoder_options(num_features, dim, **options))


# name -> function of num_features, num_classes and options that builds the head
PROBES: dict[str, Callable[..., nn.Module]] = {
    'linear': LinearProbe,
    'max': partial(LinearProbe, pool='max'),
    'class_token': partial(LinearProbe, pool='class_token'),
    'logsumexp': LogSumExpProbe,
    'attention_pool': AttentionPoolProbe,
    'efficient_probing': EfficientProbe,
    'ml_decoder': MLDecoderProbe,
    'ml_decoder_small': small_ml_decoder,
}


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)
