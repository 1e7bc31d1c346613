"""Heads for frozen backbones, each from tokens [B, N, F] to logits [B, C]: what a probe compares.

Their first arguments are the width F of the tokens and the number of classes C. A head is `classify` of `features`:
the latter depend on the tokens alone, so that a probe computes them once for all learning rates and seeds of a head.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mldecoder.head import MLDecoder


class Probe(nn.Module):
    """Base of the heads, which have one of `classify` and `classify_all`."""

    stacked = False  # whether `classify_all` computes heads together; they draw no random numbers then

    def features(self, tokens: Tensor, class_token: Tensor | None = None) -> Tensor:
        """Return what `classify` takes: the tokens, or what pooling and BatchNorm statistics make of them."""
        return tokens

    def classify(self, features: Tensor) -> Tensor:
        """Return logits [B, C]."""
        return self.classify_all([self], features)[0]

    @classmethod
    def classify_all(cls, heads: Sequence[Any], features: Tensor) -> Sequence[Tensor]:
        """Return the logits [B, C] of several heads of this class and the same sizes."""
        return [head.classify(features) for head in heads]

    def forward(self, tokens: Tensor, class_token: Tensor | None = None) -> Tensor:
        return self.classify(self.features(tokens, class_token))


class NormalizedProbe(Probe):
    """Base of the heads that begin with BatchNorm, and then need no gradient of what it divides."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(num_features)
        self.fc = nn.Linear(num_features, num_classes)

    def normalize(self, x: Tensor) -> Tensor:
        """Return ``(x - mean) / std`` of x [B, F]; in training those of the batch, which also go to the buffers."""
        norm: Any = self.norm  # its buffers are optional to torch's types
        if self.training:
            norm.num_batches_tracked.add_(1)
        return F.batch_norm(x, norm.running_mean, norm.running_var, None, None, self.training, norm.momentum, norm.eps)


class LinearProbe(NormalizedProbe):
    """Mean of the tokens, or the class token, then BatchNorm and a linear classifier, as DINOv2's linear evaluation.

    Args:
        pool: 'mean', 'max' or 'class_token'.
    """

    stacked = True
    POOLS = ('mean', 'max', 'class_token')

    def __init__(self, num_features: int, num_classes: int, pool: str = 'mean') -> None:
        super().__init__(num_features, num_classes)
        if pool not in self.POOLS:
            raise ValueError(f'pool must be one of {", ".join(self.POOLS)}, got {pool!r}')
        self.pool = pool

    def features(self, tokens: Tensor, class_token: Tensor | None = None) -> Tensor:
        """Return normalized pooled tokens [B, F]."""
        if self.pool == 'class_token':
            if class_token is None:
                raise ValueError("pool='class_token' needs a backbone with a class token, use 'mean' or 'max'")
            pooled = class_token
        else:
            pooled = tokens.mean(dim=1) if self.pool == 'mean' else tokens.amax(dim=1)
        return self.normalize(pooled)

    @classmethod
    def classify_all(cls, heads: Sequence['LinearProbe'], features: Tensor) -> Sequence[Tensor]:
        x = torch.addcmul(_stack(heads, 'norm.bias'), features, _stack(heads, 'norm.weight'))  # [heads, B, F]
        return torch.baddbmm(_stack(heads, 'fc.bias'), x, _stack(heads, 'fc.weight').squeeze(1).mT).unbind()


class LogSumExpProbe(NormalizedProbe):
    """A linear classifier on each token, pooled by the log of the mean of exponentials: a smooth maximum of logits."""

    def features(self, tokens: Tensor, class_token: Tensor | None = None) -> Tensor:
        """Return normalized tokens [B, N, F]."""
        return self.normalize(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])

    def classify(self, features: Tensor) -> Tensor:
        # scale and shift of BatchNorm in the classifier: there they cost C rows, not B x N
        weight, bias = self.fc.weight * self.norm.weight, self.fc.bias + self.fc.weight @ self.norm.bias
        logits = F.linear(features, weight, bias)
        return logits.logsumexp(dim=1) - math.log(features.shape[1])


class AttentionPoolProbe(Probe):
    """timm's `AttentionPoolLatent` (one learned query, feed-forward network) and a linear classifier.

    Keys and values are not computed for each token: a query attends to tokens x_n with ``q . (W x_n + b)``, so that W
    moves to the query (b adds the same to every token, without effect), and the weighted mean of ``W x_n + b`` is W of
    the weighted mean of the x_n, plus b. So N F^2 products become heads N F.

    Args:
        num_heads: Attention heads, a divisor of F; None means the largest up to 8.
        mlp_ratio: Hidden width of the feed-forward network, relative to F.
    """

    stacked = True

    def __init__(
        self, num_features: int, num_classes: int, num_heads: int | None = None, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        num_heads = num_heads or _largest_divisor(num_features, 8)
        self.pool = AttentionPoolLatent(num_features, num_heads=num_heads, mlp_ratio=mlp_ratio)
        self.fc = nn.Linear(num_features, num_classes)

    @classmethod
    def classify_all(cls, heads: Sequence['AttentionPoolProbe'], features: Tensor) -> Sequence[Tensor]:
        width, queries, weights = features.shape[-1], [], []
        for pool in (head.pool for head in heads):
            key, value = (weight.view(pool.num_heads, -1, width) for weight in pool.kv.weight.chunk(2))
            query = pool.q(pool.latent).view(pool.num_heads, 1, -1) * pool.scale
            queries.append((query @ key).squeeze(1))
            weights.append(value)
        pooled = _pooled_values(torch.cat(queries), torch.cat(weights), features)
        return [head._feed_forward(x) for head, x in zip(heads, pooled.chunk(len(heads), dim=1), strict=True)]

    def _feed_forward(self, pooled: Tensor) -> Tensor:
        x = self.pool.proj(pooled + self.pool.kv.bias[pooled.shape[1] :])
        return self.fc(x + self.pool.mlp(x))


class EfficientProbe(Probe):
    """Efficient probing (arXiv 2506.10178, section 3): learned queries attend to the tokens without projections.

    Query m averages slice m of the projected values; the slices together are the pooled vector [B, D]. Tokens are
    averaged before they are projected: M N F products in place of N F D.

    Args:
        num_queries: Number of queries M, a divisor of D; None means the largest up to 32.
        dim: Width D of the values; None means F.
    """

    stacked = True

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

    @classmethod
    def classify_all(cls, heads: Sequence['EfficientProbe'], features: Tensor) -> Sequence[Tensor]:
        queries = torch.cat([head.queries for head in heads]) * features.shape[-1] ** -0.5
        weights = torch.cat([head.value.weight for head in heads]).unflatten(0, (len(queries), -1))
        pooled = _pooled_values(queries, weights, features).chunk(len(heads), dim=1)
        return [head.fc(head.norm(x)) for head, x in zip(heads, pooled, strict=True)]


class MLDecoderProbe(MLDecoder, Probe):
    """`MLDecoder` on tokens, with tensors of the same names.

    Args:
        num_of_groups: See `MLDecoder`.
        dim: Width D of the head; -1 means 768.
        **options: Keyword-only options of `MLDecoder`.
    """

    def __init__(self, num_features: int, num_classes: int, num_of_groups: int = -1, dim: int = -1, **options) -> None:
        super().__init__(num_classes, num_of_groups, dim, num_features, **{'channels_first': False, **options})

    def classify(self, features: Tensor) -> Tensor:
        return super().forward(features)

    def forward(self, tokens, class_token: Tensor | None = None) -> Tensor:  # type: ignore[override]  # that of `Probe`
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


def _pooled_values(queries: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
    """Attend to tokens [B, N, F] with scaled queries [M, F], project mean m by weights[m] of [M, D / M, F]: [B, D]."""
    attention = F.linear(tokens, queries).softmax(dim=1)  # [B, N, M]
    pooled = attention.mT @ tokens  # [B, M, F]
    return torch.bmm(pooled.transpose(0, 1), weights.mT).transpose(0, 1).flatten(1)


def _stack(heads: Sequence[nn.Module], name: str) -> Tensor:
    """Return a parameter of each head, [heads, 1, ...]."""
    return torch.stack([head.get_parameter(name) for head in heads]).unsqueeze(1)


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)
