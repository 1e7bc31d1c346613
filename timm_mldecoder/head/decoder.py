"""ML-Decoder: embed the image's tokens, let queries attend to them, read each group of classes from its query."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mldecoder.head.group_fc import GroupFullyConnected
from timm_mldecoder.head.layer import DecoderLayer
from timm_mldecoder.head.queries import Queries

DEFAULT_NUM_QUERIES = 100
DEFAULT_EMBEDDING = 768


class MLDecoder(nn.Module):
    """ML-Decoder classification head (arXiv 2111.12933), in place of global pooling and a linear classifier.

    Args:
        num_classes: number of classes C.
        num_of_groups: number of queries K, each of which gives ceil(C / K) classes; -1 means 100. Never more than C.
        decoder_embedding: width D of queries and embedded tokens; -1 means 768.
        initial_num_features: width F of the backbone's features; a sequence of widths for features of several scales,
            each of which gets its own embedding.
        num_heads: attention heads; must divide D.
        dim_feedforward: hidden width of the feed-forward layer.
        dropout: probability of every dropout of the decoder.
        num_layers: decoder layers, one as published.
        learnable_queries: train the queries instead of keeping the vectors drawn at the start.

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
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dim = DEFAULT_EMBEDDING if decoder_embedding == -1 else decoder_embedding
        widths = [initial_num_features] if isinstance(initial_num_features, int) else list(initial_num_features)
        _check_options(num_classes, num_of_groups, dim, widths, num_heads)
        _check_layers(dim_feedforward, dropout, num_layers)
        num_queries = min(num_classes, DEFAULT_NUM_QUERIES if num_of_groups == -1 else num_of_groups)

        self.num_classes = num_classes
        self.dropout = dropout
        factory = dict(device=device, dtype=dtype)
        embeds = [nn.Linear(width, dim, **factory) for width in widths]
        self.embed = embeds[0] if isinstance(initial_num_features, int) else nn.ModuleList(embeds)
        self.queries = Queries(num_queries, dim, learnable_queries, **factory)
        self.layers = nn.ModuleList(
            DecoderLayer(dim, num_heads, dim_feedforward, dropout, **factory) for _ in range(num_layers)
        )
        self.group_fc = GroupFullyConnected(num_classes, num_queries, dim, **factory)

    @property
    def weight(self) -> nn.Parameter:
        """The classifier's weight [K, D, ceil(C / K)], where code written for ``nn.Linear`` looks for it."""
        return self.group_fc.weight

    @property
    def bias(self) -> nn.Parameter:
        """The classifier's bias [C]."""
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
        queries = self._queries(memory.shape[0])
        for layer in self.layers:
            queries = layer(queries, memory, mask)
        return self.group_fc(queries)

    def attention_weights(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Where each query looks in the last layer: [B, K, N], mean over heads, rows sum to 1.

        Class ``c`` belongs to query ``c // head.group_fc.group_size``; N runs over H x W row by row.
        """
        memory = self._memory(x)
        queries = self._queries(memory.shape[0])
        for layer in self.layers[:-1]:
            queries = layer(queries, memory)
        last = self.layers[-1]
        return last.multihead_attn.attention_weights(last.ask(queries), memory)

    def _memory(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Features to embedded tokens [B, N, D]; the tokens of several scales one after the other."""
        if not isinstance(self.embed, nn.ModuleList):
            return F.relu(self.embed(_tokens(x, self.embed.in_features)))
        if len(x) != len(self.embed):
            raise ValueError(f'MLDecoder was built for {len(self.embed)} scales of features, got {len(x)}')
        scales = [embed(_tokens(scale, embed.in_features)) for embed, scale in zip(self.embed, x, strict=True)]
        return F.relu(torch.cat(scales, dim=1))

    def _queries(self, batch_size: int) -> Tensor:
        """Queries [B, K, D] where dropout makes them differ from image to image, else [1, K, D]."""
        queries = self.queries().unsqueeze(0)
        if self.training and self.dropout > 0:
            queries = queries.expand(batch_size, -1, -1)
        return queries


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


def _check_options(num_classes: int, num_of_groups: int, dim: int, widths: list[int], num_heads: int) -> None:
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


def _check_layers(dim_feedforward: int, dropout: float, num_layers: int) -> None:
    if dim_feedforward < 1 or num_layers < 1:
        raise ValueError(
            f'dim_feedforward and num_layers must be at least 1, got {dim_feedforward} and {num_layers}'
        )
    if not 0 <= dropout < 1:
        raise ValueError(f'dropout must be in [0, 1), got {dropout}')
