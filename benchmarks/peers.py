"""What the head is measured against, written plainly: its matrix products alone, the reference's algorithm, and a full
transformer decoder."""

from functools import partial

import torch
from torch import Tensor, nn


class ReferenceHead(nn.Module):
    """The published algorithm: every query expanded to the batch from the start, K matrix products in a loop."""

    def __init__(self, num_classes: int, num_queries: int, width: int, dim: int = 768) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embed = nn.Linear(width, dim)
        self.queries = nn.Embedding(num_queries, dim).requires_grad_(False)
        self.layer = _ReferenceLayer(dim)
        self.weight = nn.Parameter(torch.empty(num_queries, dim, -(-num_classes // num_queries)))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.relu(self.embed(x.flatten(2).transpose(1, 2)))
        queries = self.queries.weight.unsqueeze(1).expand(-1, len(x), -1)
        hidden = self.layer(queries, memory.transpose(0, 1)).transpose(0, 1)
        logits = torch.zeros(*hidden.shape[:2], self.weight.shape[-1], device=x.device, dtype=hidden.dtype)
        for k in range(len(self.weight)):
            logits[:, k, :] = hidden[:, k, :] @ self.weight[k]
        logits = logits.flatten(1)[:, : self.num_classes]
        return logits + self.bias


class _ReferenceLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int = 8, dim_feedforward: int = 2048, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout, self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(dropout) for _ in range(4))
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        x = self.norm1(queries + self.dropout1(queries))
        x = self.norm2(x + self.dropout2(self.multihead_attn(x, memory, memory)[0]))
        return self.norm3(x + self.dropout3(self.linear2(self.dropout(torch.relu(self.linear1(x))))))


class FullDecoder(nn.Module):
    """A transformer decoder with self-attention and one query a class, as image classifiers had before ML-Decoder."""

    def __init__(self, num_classes: int, width: int, dim: int = 768) -> None:
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.queries = nn.Embedding(num_classes, dim)
        self.layer = nn.TransformerDecoderLayer(dim, nhead=8, dim_feedforward=2048, batch_first=True)
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.relu(self.embed(x.flatten(2).transpose(1, 2)))
        queries = self.queries.weight.expand(len(x), -1, -1)
        return (self.layer(queries, memory) * self.weight).sum(-1) + self.bias


class Products:
    """The matrix products of the head with its default widths, and nothing else: no cheaper head has the same layers.

    Args:
        features: [B, F, H, W], for their shape, device and dtype.
        num_classes: Number of classes C.
        num_queries: Number of queries K.
        training: Whether queries are projected per image, as dropout requires, and gradients computed: of both factors.
    """

    def __init__(self, features: Tensor, num_classes: int, num_queries: int, training: bool) -> None:
        dim, hidden, heads = 768, 2048, 8
        batch, width = features.shape[:2]
        tokens, queries = batch * features[0, 0].numel(), batch * num_queries
        draw = partial(torch.randn, device=features.device, dtype=features.dtype)
        linear = [  # rows, inputs, outputs; a weight is [outputs, inputs]
            (tokens, width, dim),
            (tokens, dim, 2 * dim),
            (queries if training else num_queries, dim, dim),
            (queries, dim, dim),
            (queries, dim, hidden),
            (queries, hidden, dim),
        ]
        self.factors = [(draw(rows, inputs), draw(outputs, inputs).mT) for rows, inputs, outputs in linear]
        number, rows, columns, inner = batch * heads, num_queries, tokens // batch, dim // heads
        self.factors += [
            (draw(number, rows, inner), draw(number, columns, inner).mT),
            (draw(number, rows, columns), draw(number, columns, inner)),
            (draw(num_queries, batch, dim), draw(num_queries, dim, -(-num_classes // num_queries))),
        ]
        self.gradients = [torch.randn_like(a @ b) for a, b in self.factors] if training else []

    def __call__(self) -> None:
        for a, b in self.factors:
            a @ b
        kept = []  # as any training step keeps the gradients of the weights until the optimizer step
        for (a, b), gradient in zip(self.factors, self.gradients, strict=False):
            gradient @ b.mT
            kept.append(gradient.mT @ a)
