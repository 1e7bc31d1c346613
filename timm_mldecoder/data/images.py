"""Images as people have them: which files are images, and what their pixels become. Every reader uses this module."""

import io
import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps
from timm.data import ImageDataset
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import Dataset

_logger = logging.getLogger(__name__)

# Formats that Pillow only identifies, or decodes with another program.
_UNREADABLE = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}
_CLUTTER_FOLDERS = {'__macosx', '@eadir'}
_CLUTTER_FILES = {'thumbs.db', 'desktop.ini'}
_HIGH = 65535  # of 16-bit images
_LOOKED_AT = 200  # headers that `some_headers` reads


def _suffixes() -> tuple[str, ...]:
    formats = Image.registered_extensions()
    return tuple(sorted(suffix for suffix, name in formats.items() if name in Image.OPEN and name not in _UNREADABLE))


SUFFIXES = _suffixes()
_SUFFIXES = frozenset(SUFFIXES)


def is_clutter(name: str) -> bool:
    """Return whether one part of a path is hidden, or what a system leaves behind (`__MACOSX`, `Thumbs.db`)."""
    return (name.startswith('.') and name not in ('.', '..')) or name.lower() in _CLUTTER_FOLDERS | _CLUTTER_FILES


def is_image(path: str) -> bool:
    """Return whether a path, relative to the root of the data, has a suffix of an image and no part that is clutter."""
    pure = PurePath(path)
    return pure.suffix.lower() in _SUFFIXES and not any(is_clutter(part) for part in pure.parts)


def find_images(root: str | os.PathLike, exclude: Sequence[str | os.PathLike] = ()) -> list[str]:
    """Return the image files under a folder, sorted, relative to it, with `/`; what is ignored is logged by suffix.

    Args:
        root: The folder. Links to folders are followed.
        exclude: Folders to leave out, such as that of an output.
    """
    left_out = {os.path.realpath(folder) for folder in exclude}
    names: list[str] = []
    ignored: list[str] = []
    for folder, folders, files in os.walk(os.fspath(root), followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not is_clutter(name) and (not left_out or os.path.realpath(os.path.join(folder, name)) not in left_out)
        ]
        here = os.path.relpath(folder, root)
        for name in files:
            (names if is_image(name) else ignored).append(
                name if here == '.' else f'{here}/{name}'.replace(os.sep, '/')
            )
    log_ignored(root, ignored)
    return sorted(names)


def log_ignored(where: str | os.PathLike, names: Sequence[str]) -> None:
    """Log how many files beside the images are ignored, by suffix; hidden files and clutter are counted together."""
    counts = Counter(
        'hidden or of the system'
        if any(is_clutter(part) for part in PurePath(name).parts)
        else PurePath(name).suffix.lower() or 'without a suffix'
        for name in names
    )
    if counts:
        shown = ', '.join(f'{count} {kind}' for kind, count in counts.most_common(8))
        _logger.info(f'{where}: ignored files that are no images: {shown}')


def some_headers(dataset: Any) -> Iterator[Image.Image]:
    """Yield some images of a dataset of files, spread over it, not decoded; none of other datasets.

    Those that cannot be read are left out: the loader reports them.
    """
    if not hasattr(dataset, 'filename') or not hasattr(dataset, '__getitem__'):
        return
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(_LOOKED_AT, len(dataset)), dtype=int)).tolist():
        try:
            with Image.open(os.fspath(dataset.filename(index, absolute=True))) as image:
                image.getexif()
                yield image
        except Exception:  # damaged bytes make PIL raise anything
            continue


@dataclass(frozen=True)
class Reading:
    """How an image file becomes an image of a PIL mode: one rule for training, evaluation, prediction and the page.

    The first frame counts. Values of 16 bits and floats in [0, 1] are scaled to 8 bits, where Pillow clips them.
    """

    background: str = 'white'  # colour under transparent pixels, unless the mode has transparency itself
    image_range: tuple[float, float] | None = None  # values that become black and white in images of more than 8 bits
    exif_rotate: bool = False  # turn images as the EXIF tag of the camera says
    # leave JPEG files undecoded, for a transform of `decode_fast`; not among what a cache or a prediction is kept for
    fast: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ValueError(f'--background {self.background}: not a colour such as white or #808080') from error
        if self.image_range and not self.image_range[0] < self.image_range[1]:
            raise ValueError(f'--image-range {self.image_range[0]} {self.image_range[1]}: the first must be less')

    @classmethod
    def of(cls, options: Any) -> 'Reading':
        """The reading that options describe; the default for None, as of a model that no run of ours trained."""
        if options is None:
            return cls()
        image_range = tuple(options.image_range) if options.image_range else None
        return cls(options.background, image_range, options.exif_rotate)

    def open(self, file: str | os.PathLike | IO[bytes], mode: str | None) -> Image.Image:
        """Read an image file in a PIL mode; None keeps that of the file.

        Raises:
            OSError: If it is missing or damaged, or its values are in no known range.
        """
        try:
            if self.fast:
                file = io.BytesIO(Path(file).read_bytes() if isinstance(file, (str, os.PathLike)) else file.read())
                image = Image.open(file)
                upright = not self.exif_rotate or image.getexif().get(ExifTags.Base.Orientation, 1) == 1
                if image.format == 'JPEG' and image.mode == mode and upright:
                    return image  # PIL decodes it when its pixels are needed
                return self.convert(image, mode)
            with Image.open(file) as image:
                return self.convert(image, mode)
        except OSError:
            raise
        except Exception as error:  # damaged bytes make PIL's decoders raise anything
            raise OSError(str(error)) from error

    def convert(self, image: Image.Image, mode: str | None) -> Image.Image:
        """Convert an image to a PIL mode; None keeps its own.

        Raises:
            ValueError: If its values are in no known range.
        """
        if self.exif_rotate:
            image = ImageOps.exif_transpose(image)
        if mode is None:
            return image.convert(image.mode)
        if _is_deep(image.mode) and not _is_deep(mode):
            image = self._to_8_bits(image)
        if image.has_transparency_data and not _has_alpha(mode):
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, self.background), image)
        return image.convert(mode)

    def describe(self, name: str, dataset: Any) -> list[str]:
        """What to log of the images of a split, by the headers of some of its files: deep modes, EXIF rotation."""
        modes: Counter[str] = Counter()
        rotated = 0
        for image in some_headers(dataset):
            modes[image.mode] += 1
            rotated += image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        looked_at = modes.total()
        lines = []
        if deep := {mode: count for mode, count in modes.items() if _is_deep(mode)}:
            shown = ', '.join(f'{count} of mode {mode}' for mode, count in sorted(deep.items()))
            by = 'the range of the type (16 bits: 0 to 65535; float: 0 to 1)'
            if self.image_range:
                by = f'--image-range {self.image_range[0]:g} {self.image_range[1]:g}'
            lines.append(f'{name}: {shown}, of {looked_at} files looked at: scaled to 8 bits by {by}')
        if rotated and not self.exif_rotate:
            lines.append(
                f'{name}: {rotated} of {looked_at} files looked at have an EXIF rotation, which is not applied; '
                '--exif-rotate turns them upright'
            )
        return lines

    def _to_8_bits(self, image: Image.Image) -> Image.Image:
        values = np.asarray(image, dtype=np.float64)
        low, high = self.image_range or self._range(image.mode, values)
        scaled = np.nan_to_num((values - low) * (255 / (high - low)), nan=0.0, posinf=255.0, neginf=0.0)
        return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))

    @staticmethod
    def _range(mode: str, values: np.ndarray) -> tuple[float, float]:
        if mode.startswith('I;16'):
            return 0, _HIGH
        finite = values[np.isfinite(values)]
        low, high = finite.min(initial=0), finite.max(initial=0)
        known = (0, 1) if mode == 'F' else (0, 255) if high <= 255 else (0, _HIGH)
        if low < 0 or high > known[1]:
            raise ValueError(
                f'pixel values from {low:g} to {high:g} in an image of mode {mode}: pass --image-range LOW HIGH, the '
                'values that become black and white'
            )
        return known


def _is_deep(mode: str) -> bool:
    return mode in ('I', 'F') or mode.startswith('I;')


def _has_alpha(mode: str) -> bool:
    return mode in ('RGBA', 'RGBa', 'LA', 'La', 'PA', 'P')


class StrictImageDataset(ImageDataset):
    """timm's dataset of image files, in which an unreadable one is an OSError rather than the next image."""

    reading = Reading()  # how files become images

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            file, target = self.reader[index][:2]
            with file:
                image = self._decode(file)
        except Exception as error:  # damaged bytes make PIL's decoders raise anything
            raise OSError(str(error)) from error
        if self.transform is not None and not self.load_bytes:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def _decode(self, file: IO[bytes]) -> Any:
        if self.load_bytes:  # the transform decodes them (`--tf-preprocessing`)
            return self.transform(file.read())
        return self.reading.open(file, self.input_img_mode)


def strict(dataset: Dataset) -> Dataset:
    """Return a dataset that raises OSError for an unreadable image; streaming readers handle theirs themselves."""
    if type(dataset) is not ImageDataset:
        for count in vars(getattr(dataset, 'reader', dataset)).values():
            if isinstance(count, SharedCount):  # the epoch, which workers started by a server take over too
                count.shared_epoch = multiprocessing.get_context('spawn').Value('i', count.value)
        return dataset
    settings = ('reader', 'load_bytes', 'input_img_mode', 'transform', 'target_transform')
    return StrictImageDataset(None, **{name: getattr(dataset, name) for name in settings})


def image_path(dataset: Any, index: int) -> str:
    """Return the file of an image, or its number in a dataset without files."""
    try:
        name = dataset.filename(index, absolute=True) if hasattr(dataset, 'filename') else None
    except TypeError:  # of timm's reader of rows, of one without an image
        name = None
    return f'image {index} of the dataset' if name is None else os.fspath(name)  # rows may hold bytes without a name
