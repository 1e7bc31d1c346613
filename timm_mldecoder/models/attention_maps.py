"""Attention maps: where in an image the query of a class attends."""

import math

import torch
from torch import Tensor, nn

from timm_mldecoder.head import MLDecoder


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return the attention of the query of one class per image, the mean over heads.

    Args:
        model: A timm model with an ML-Decoder head, in eval mode.
        images: Preprocessed images, [B, C, H, W].
        classes: A class index per image, [B].

    Returns:
        Maps [B, h, w] over the grid of the head's tokens; each sums to 1.

    Raises:
        ValueError: If the model has no ML-Decoder head, reads several scales, or its tokens form no grid.
    """
    head = model.get_classifier()
    if not isinstance(head, MLDecoder):
        raise ValueError(f'attention maps need an ML-Decoder head, the model has {type(head).__name__}')
    seen: list = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.extend(args[:1]))
    try:
        features = model.forward_features(images)
        model.forward_head(features)
    finally:
        handle.remove()
    tokens = seen[0]
    if not isinstance(tokens, Tensor):
        raise ValueError('attention maps need one scale of features; this model has several')
    weights = head.attention_weights(tokens)  # [B, K, N]
    query = classes // head.group_fc.group_size
    rows = weights[torch.arange(len(classes), device=query.device), query]
    return rows.unflatten(1, _grid(model, features, tokens.shape[1], images.shape[-2:]))


def _grid(model: nn.Module, features: Tensor, num_tokens: int, image_size: torch.Size) -> tuple[int, int]:
    """Return the number of rows and columns of the tokens."""
    if features.dim() == 4:
        shape = features.shape[1:3] if getattr(model, 'output_fmt', 'NCHW') == 'NHWC' else features.shape[2:]
        if shape.numel() == num_tokens:
            return tuple(shape)
    height, width = image_size
    rows = round(math.sqrt(num_tokens * height / width))
    if rows == 0 or num_tokens % rows or rows * (num_tokens // rows) != num_tokens:
        raise ValueError(f'{num_tokens} tokens form no grid over an image of {height} x {width}')
    return rows, num_tokens // rows
