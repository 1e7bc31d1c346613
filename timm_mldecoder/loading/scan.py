"""Read every image of a dataset once, in parallel: what is in the files, and which of them cannot be read."""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from timm_mldecoder.data.images import Reading, image_path
from timm_mldecoder.loading.workers import init_worker

THUMBNAIL = 16  # pixels of a side
_SAMPLES = 256  # pixels of the shorter side that the hash is made of
_BATCH = 32


class ImageFacts(NamedTuple):
    """What a file holds."""

    position: int  # in the dataset; `index` is a method of tuples
    path: str
    reason: str  # why it cannot be read; empty if it can
    mode: str = ''  # of the file
    size: tuple[int, int] = (0, 0)  # width and height
    rotated: bool = False  # by EXIF
    frames: int = 1
    content: bytes = b''  # digest of the bytes
    look: bytes = b''  # perceptual hash, 128 bits
    thumbnail: bytes = b''  # RGB, THUMBNAIL x THUMBNAIL


class Scan(Dataset):
    """The facts of the images of a dataset; the image itself is decoded whole, and not kept."""

    def __init__(self, dataset: Any, reading: Reading, mode: str, indices: Sequence[int], hashes: bool = True) -> None:
        self.dataset, self.reading, self.mode, self.indices, self.hashes = dataset, reading, mode, indices, hashes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> ImageFacts:
        index = self.indices[number]
        facts = ImageFacts(index, image_path(self.dataset, index), '')
        try:
            content = _read(self.dataset, index)
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                as_it_is = image.mode == self.mode and not image.has_transparency_data and not self.reading.exif_rotate
                converted = image if as_it_is else self.reading.convert(image, self.mode)
                facts = facts._replace(
                    mode=image.mode,
                    size=image.size,
                    rotated=image.getexif().get(ExifTags.Base.Orientation, 1) != 1,
                    frames=getattr(image, 'n_frames', 1),
                )
                if not self.hashes:
                    return facts
                look, thumbnail = describe(converted)
        except AssertionError:  # of timm's reader of Hugging Face datasets
            return facts._replace(reason='a row without bytes and path')
        except UnidentifiedImageError:  # whose text is the address of an object
            return facts._replace(reason='not an image of a known format' if content else 'an empty file')
        except Exception as error:  # damaged bytes make PIL raise anything
            return facts._replace(reason=' '.join(str(error).split()) or type(error).__name__)
        digest = hashlib.sha1(content, usedforsecurity=False).digest()
        return facts._replace(content=digest, look=look, thumbnail=thumbnail)


def _read(dataset: Any, index: int) -> bytes:
    """Bytes of an image file, of a folder, a list, a tar file or a Hugging Face dataset."""
    if hasattr(dataset, 'reader'):
        with dataset.reader[index][0] as file:
            return file.read()
    with open(dataset.filename(index, absolute=True), 'rb') as file:
        return file.read()


def describe(image: Image.Image) -> tuple[bytes, bytes]:
    """Perceptual hash and thumbnail of an image.

    The hash has 8 x 8 bits that say whether a grey value is above its left neighbour, and as many for the neighbour
    above (dHash, N. Krawetz, 2013): scaling, compression and brightness change few of them.
    """
    step = max(1, min(image.size) // _SAMPLES)  # a mean over some pixels is close to that over all, and much faster
    image = image.resize((image.width // step, image.height // step), Image.Resampling.NEAREST)
    grey = image.convert('L')
    across = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    down = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits([across[:, 1:] > across[:, :-1], down[1:] > down[:-1]])
    small = image.convert('RGB').resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return bits.tobytes(), small.tobytes()


def scan(
    dataset: Any, reading: Reading, mode: str, workers: int, indices: Sequence[int] | None = None, hashes: bool = True
) -> Iterator[ImageFacts]:
    """Yield the facts of images in their order.

    Args:
        dataset: Dataset of files, or of rows that hold files.
        reading: How files become images; what it refuses cannot be read.
        mode: PIL mode that they are converted to.
        workers: Processes that read; 0 for this one.
        indices: Indices of the images; None for all.
        hashes: Whether to compute digests, perceptual hashes and thumbnails.

    Raises:
        ValueError: If the dataset is a stream, or has no files.
    """
    reads = hasattr(dataset, '__getitem__') and (hasattr(dataset, 'reader') or hasattr(dataset, 'filename'))
    if not reads:
        raise ValueError('only folders, lists, tar files and Hugging Face datasets (hfds/) can be checked')
    indices = range(len(dataset)) if indices is None else indices
    items = Scan(dataset, reading, mode, indices, hashes)
    loader = DataLoader(items, batch_size=_BATCH, num_workers=workers, collate_fn=list, worker_init_fn=init_worker)
    for batch in loader:
        yield from batch


def state_of(path: str) -> tuple[int, int] | None:
    """Size and time of change of a file; None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
