"""Sinusoidal positional encodings that are added to a feature map [B, F, H, W] in front of the head.

The published head has none: its tokens are a set. Projects put one of these between backbone and head.
"""

import math

import torch
from torch import Tensor


def sin2d(features: int, rows: int, columns: int, **factory) -> Tensor:
    """DETR's encoding (arXiv 2005.12872): rows in the first F / 2 channels, columns in the others, up to 2 pi."""
    if features % 4:
        raise ValueError(f"position='sin2d' needs a width that is a multiple of 4, got {features}")
    y, x = [torch.arange(1, size + 1, **factory) / (size + 1e-6) * 2 * math.pi for size in (rows, columns)]
    return _grid(y, x, features // 2).permute(2, 0, 1)


def penc2d(features: int, rows: int, columns: int, **factory) -> Tensor:
    """`PositionalEncoding2D(F)` of the package positional-encodings on a channels-last map: rows first, counted from 0.

    https://github.com/tatp22/multidim-positional-encoding
    """
    y, x = [torch.arange(size, **factory) for size in (rows, columns)]
    return _grid(y, x, 2 * math.ceil(features / 4))[..., :features].permute(2, 0, 1)


def penc2d_nchw(features: int, rows: int, columns: int, **factory) -> Tensor:
    """The same on a map [B, F, H, W] as it is, as chest X-ray projects call it: F counts as rows, H as columns."""
    y, x = [torch.arange(size, **factory) for size in (features, rows)]
    return _grid(y, x, 2 * math.ceil(features / 4))[..., :columns]


POSITIONS = {'sin2d': sin2d, 'penc2d': penc2d, 'penc2d_nchw': penc2d_nchw}


def _grid(rows: Tensor, columns: Tensor, channels: int) -> Tensor:
    """Encodings of the two coordinates side by side, [rows, columns, 2 * channels]."""
    shape = len(rows), len(columns), -1
    parts = _sinusoid(rows, channels)[:, None].expand(*shape), _sinusoid(columns, channels)[None].expand(*shape)
    return torch.cat(parts, dim=-1)


def _sinusoid(positions: Tensor, channels: int) -> Tensor:
    """Sine and cosine in turns, [positions, channels], of wavelengths 2 pi to 10,000 * 2 pi (arXiv 1706.03762)."""
    frequencies = 10_000 ** -(torch.arange(0, channels, 2, dtype=positions.dtype, device=positions.device) / channels)
    angles = positions[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


@torch.fx.wrap  # one node to an fx tracer, which cannot follow a branch on a number of dimensions
def add_position(x: Tensor, position: str) -> Tensor:
    """Add the encoding of `POSITIONS` to a feature map [B, F, H, W]; ValueError for another number of dimensions."""
    if x.dim() != 4:
        raise ValueError(f'position={position!r} needs a feature map [B, F, H, W], got {list(x.shape)}')
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x + POSITIONS[position](*x.shape[1:], dtype=dtype, device=x.device).to(x.dtype)
