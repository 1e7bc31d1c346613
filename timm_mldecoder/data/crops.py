"""How much of an image an evaluation transform of timm shows."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any


def shown_share(width: int, height: int, size: Sequence[int], crop_pct: float, crop_mode: str | None) -> float:
    """Share of the area of an image that evaluation shows, in [0, 1] (`timm.data.transforms_factory`).

    Args:
        width: Width of the image.
        height: Its height.
        size: Height and width that the model takes.
        crop_pct: Share of the resized image that is cropped.
        crop_mode: `center` (the shorter side is resized), `squash` (both are) or `border` (the longer one, and padded).
    """
    scaled = [side / crop_pct for side in (size[1], size[0])]
    ratios = [scaled[0] / width, scaled[1] / height]
    if crop_mode == 'squash':
        factors = ratios
    elif crop_mode == 'border':
        factors = [min(ratios)] * 2
    else:
        factors = [max(ratios)] * 2
    return min(1, size[1] / (width * factors[0])) * min(1, size[0] / (height * factors[1]))


def lost_share(sizes: Iterable[tuple[int, int]], config: dict[str, Any]) -> float:
    """Median share of the area of images that the evaluation of a data configuration of timm cuts off; 0 for none."""
    settings = config['input_size'][1:], config['crop_pct'], config['crop_mode']
    return 1 - median([shown_share(width, height, *settings) for width, height in sizes] or [1.0])
