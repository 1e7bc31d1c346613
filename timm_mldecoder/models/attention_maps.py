"""Attention maps: where in an image the query of a class attends, and pictures of that."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from timm_mldecoder.head import MLDecoder

# colours of attention from none to most: matplotlib's inferno, which the report and the page do without
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


@torch.no_grad()
def attention_maps(model: Any, images: Tensor, classes: Tensor) -> Tensor:
    """Return the attention of the query of one class per image, the mean over heads.

    Args:
        model: A timm model with an ML-Decoder head, in eval mode: in training mode it would change its statistics.
        images: Preprocessed images, [B, C, H, W].
        classes: A class index per image, [B].

    Returns:
        Maps [B, h, w] over the grid of the head's tokens; each sums to 1.

    Raises:
        ValueError: If the model has no ML-Decoder head, is in training mode, reads several scales, or its tokens form
            no grid; if there is not one class per image.
    """
    head = model.get_classifier()
    if not isinstance(head, MLDecoder):
        raise ValueError(f'attention maps need an ML-Decoder head, the model has {type(head).__name__}')
    if model.training:
        raise ValueError('attention maps need a model in eval mode: call model.eval() first')
    classes = torch.as_tensor(classes, device=images.device)
    if classes.shape != images.shape[:1] or not ((classes >= 0) & (classes < head.num_classes)).all():
        raise ValueError(f'expected a class below {head.num_classes} for each of {len(images)} images, got {classes}')
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
    if model.ml_decoder_options.get('prefix_tokens'):  # whose shares are left out
        weights = weights[..., model.ml_decoder_prefix_tokens :]
        weights = weights / weights.sum(dim=-1, keepdim=True)
    query = classes // head.group_fc.group_size
    rows = weights[torch.arange(len(classes), device=query.device), query]
    return rows.unflatten(1, _grid(model, features, weights.shape[-1], images.shape[-2:]))


def _grid(model: nn.Module, features: Tensor, num_tokens: int, image_size: torch.Size) -> tuple[int, int]:
    """Return the number of rows and columns of the tokens."""
    if features.dim() == 4:
        shape = features.shape[1:3] if getattr(model, 'output_fmt', 'NCHW') == 'NHWC' else features.shape[2:]
        if shape.numel() == num_tokens:
            return shape[0], shape[1]
    height, width = image_size
    rows = round(math.sqrt(num_tokens * height / width))
    if rows == 0 or num_tokens % rows:
        raise ValueError(f'{num_tokens} tokens form no grid over an image of {height} x {width}')
    return rows, num_tokens // rows


def denormalise(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return a transformed image [C, H, W] as pixels in [0, 1], [H, W] if grey, else [H, W, 3]."""
    scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in (std, mean))
    pixels = (image * scale + shift).clamp(0, 1)
    return pixels[0] if len(pixels) == 1 else pixels[:3].permute(1, 2, 0)


def thumbnail(pixels: Tensor, side: int) -> Image.Image:
    """Return pixels in [0, 1], [H, W] or [H, W, 3], as an RGB image whose longer side is `side` pixels."""
    image = Image.fromarray((255 * pixels).round().byte().cpu().numpy()).convert('RGB')
    scale = side / max(image.size)
    return image.resize([max(1, round(scale * length)) for length in image.size], Image.Resampling.BICUBIC)


def attention_overlay(pixels: Tensor, attention: Tensor, side: int) -> Image.Image:
    """Return an image in grey with an attention map over it.

    Args:
        pixels: Pixels in [0, 1], [H, W] or [H, W, 3].
        attention: Attention [h, w] that sums to 1.
        side: Longer side of the result, in pixels.
    """
    image = thumbnail(pixels, side)
    # one scale for all maps: 0 to the largest share that a token may have beside an even spread
    strength = (attention / max(attention.max().item(), 4 / attention.numel())).float().cpu().numpy()
    strength = np.asarray(Image.fromarray(strength).resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)
    heat = np.stack([np.interp(strength, np.linspace(0, 1, len(HEAT)), channel) for channel in zip(*HEAT, strict=True)])
    heat = Image.fromarray(heat.transpose(1, 2, 0).astype(np.uint8))
    return Image.blend(image.convert('L').convert('RGB'), heat, 0.6)
