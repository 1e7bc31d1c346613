"""JPEG files decoded at 1/2, 1/4 or 1/8 of their size, where crop and resize leave fewer pixels anyway.

The decoder leaves out the high frequencies of each block of 8 x 8 pixels; the rest of the resize is as before. Pixels
differ a little from those of a whole image that is resized. The draws of random crops are the same.
"""

import random

from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torchvision.transforms import Compose, RandomChoice, Resize
from torchvision.transforms.functional import pil_modes_mapping, resized_crop


def decode_fast(transform: Compose) -> Compose:
    """Let a transform of timm, or one of `squash`, decode the JPEG files that `Reading.fast` leaves undecoded."""
    first, *rest = transform.transforms
    if type(first) is RandomResizedCropAndInterpolation:
        return Compose([_SmallCrop(first), *rest])
    resize = first.transforms[0] if isinstance(first, RandomChoice) else first
    fixed = isinstance(resize, Resize) or (isinstance(resize, ResizeKeepRatio) and not resize.random_scale_prob)
    size = resize.size if fixed else None  # a random resize may need more pixels than its size
    return Compose([_Decode(size), first, *rest])


class _Decode:
    """Decode an image; its sides stay at least as long as those of `size` (height, width), None for all pixels."""

    def __init__(self, size: int | tuple[int, int] | None) -> None:
        self.size = (size, size) if isinstance(size, int) else size

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.size is None:
            return _decoded(image, 1)
        return _decoded(image, min(image.height / self.size[0], image.width / self.size[1]))

    def __repr__(self) -> str:
        return f'{type(self).__name__.strip("_")}({self.size})'


class _SmallCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop, of an image decoded at the least size that has a pixel for each one of the result."""

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        super().__init__(crop.size, crop.scale, crop.ratio)
        self.interpolation = crop.interpolation

    def __call__(self, img: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        several = isinstance(self.interpolation, (tuple, list))
        interpolation = random.choice(self.interpolation) if several else self.interpolation
        whole = img.size
        _decoded(img, min(height / self.size[0], width / self.size[1]))
        if img.size == whole:
            return resized_crop(img, top, left, height, width, list(self.size), interpolation)
        factor = round(whole[0] / img.width)
        box = tuple(side / factor for side in (left, top, left + width, top + height))  # between pixels, so not a crop
        return img.resize(self.size[::-1], pil_modes_mapping[interpolation], box)


def _decoded(image: Image.Image, factor: float) -> Image.Image:
    """Decode an image in place, at most `factor` times smaller.

    Raises:
        OSError: If the file is damaged.
    """
    factor = next((part for part in (8, 4, 2) if part <= factor), 1)
    try:
        if factor > 1:
            image.draft(image.mode, (image.width // factor, image.height // factor))  # nothing where it is decoded
        image.load()
    except Exception as error:  # damaged bytes make PIL's decoders raise anything
        raise OSError(str(error)) from error
    return image
