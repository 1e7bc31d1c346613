"""Training transforms of the multi-label recipes that are not in timm: squash-resize and Cutout in a random colour."""

import random
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from PIL import Image
from timm.data.transforms import (
    MaybePILToTensor,
    MaybeToTensor,
    RandomResizedCropAndInterpolation,
    ToNumpy,
    ToTensor,
    str_to_interp_mode,
)
from torchvision.transforms import Compose, RandomChoice, Resize

CUT = 0.05  # share of the area of images that an evaluation of several labels may lose without a warning


class Cutout:
    """Paint a rectangle of a random colour at a random position (arXiv 1708.04552).

    The sides of the rectangle are those of the image times `fraction`. Its centre is a random pixel, so that a part of
    it may lie outside of the image.

    Args:
        fraction: Sides of the rectangle as a fraction of those of the image, in (0, 1].
        probability: Probability to paint a rectangle, in [0, 1].

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, fraction: float, probability: float = 1.0):
        if not 0 < fraction <= 1 or not 0 <= probability <= 1:
            raise ValueError(f'fraction must be in (0, 1], probability in [0, 1], got {fraction} and {probability}')
        self.fraction = fraction
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.probability:
            return image
        width, height = (round(self.fraction * side) for side in image.size)
        left = random.randrange(image.width) - width // 2
        top = random.randrange(image.height) - height // 2
        colour = tuple(random.randrange(256) for _ in image.getbands())
        image = image.copy()
        image.paste(colour, (left, top, left + width, top + height))
        return image

    def __repr__(self) -> str:
        return f'{type(self).__name__}(fraction={self.fraction}, probability={self.probability})'


def squash(transform: Compose, interpolation: str = 'bilinear') -> Compose:
    """Replace the random resized crop of a training transform of timm: resize the whole image, ignoring its aspect.

    Args:
        transform: Result of `timm.data.create_transform` for training.
        interpolation: timm's name of a filter, or 'random' for bilinear or bicubic.

    Raises:
        ValueError: If the transform does not begin with a random resized crop.
    """
    crop, *rest = transform.transforms
    if not isinstance(crop, RandomResizedCropAndInterpolation):
        raise ValueError(f'squash replaces a random resized crop, the transform begins with {crop}')
    filters = ('bilinear', 'bicubic') if interpolation == 'random' else (interpolation,)
    resizes = [Resize(crop.size, str_to_interp_mode(name)) for name in filters]
    return Compose([RandomChoice(resizes) if len(resizes) > 1 else resizes[0], *rest])


def cut_out(transform: Compose, cutout: Cutout, place: str = 'before') -> Compose:
    """Insert Cutout into a training transform of timm.

    Args:
        transform: The transform.
        cutout: Cutout.
        place: 'before' the other augmentations, after the crop or resize; or 'after' them, on the last PIL image.
    """
    steps = list(transform.transforms)
    to_tensor = [isinstance(step, (MaybeToTensor, ToNumpy, ToTensor, MaybePILToTensor)) for step in steps]
    steps.insert(1 if place == 'before' else to_tensor.index(True), cutout)
    return Compose(steps)


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
