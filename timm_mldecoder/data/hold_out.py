"""A validation split that is held out of the training split, with the same share of every class."""

import logging
import os
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_mldecoder.data.annotations import MultiLabelDataset
from timm_mldecoder.data.summary import shown_classes

_logger = logging.getLogger(__name__)


def stratify(image: np.ndarray, label: np.ndarray, images: int, fraction: float, seed: int) -> np.ndarray:
    """Choose a share of images that holds the same share of every class, also where images have several.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas, ECML PKDD 2011): the rarest class that is left is
    distributed first, each of its images to the part that lacks most of it. Images without a class are one more class.

    Args:
        image: Image index of each label, [A].
        label: Class index of each label, [A].
        images: Number of images, N.
        fraction: Share to choose.
        seed: Seed of the order in which images are distributed, which also decides ties.

    Returns:
        Whether each image is chosen, [N].
    """
    random = np.random.default_rng(seed)
    without = np.setdiff1d(np.arange(images), image)
    label = label.astype(np.int64)
    classes = int(label.max(initial=-1)) + 2
    image, label = np.append(image, without), np.append(label, np.full(len(without), classes - 1))
    rank = random.permutation(images)
    order = np.lexsort((rank[image], label))
    of_class = np.split(image[order], np.cumsum(np.bincount(label, minlength=classes))[:-1])
    order = np.argsort(image, kind='stable')
    of_image = np.split(label[order], np.cumsum(np.bincount(image, minlength=images))[:-1])

    left = np.bincount(label, minlength=classes).astype(np.float64)
    wanted = np.stack([left * (1 - fraction), left * fraction])  # images of each class that a part still lacks
    wanted_images = [images * (1 - fraction), images * fraction]
    part = np.full(images, -1)
    while left.any():
        rarest = int(np.where(left > 0, left, np.inf).argmin())
        for index in of_class[rarest].tolist():
            if part[index] >= 0:
                continue
            lack = wanted[:, rarest].tolist()
            tied = np.isclose(*lack)
            chosen = int(lack[1] > lack[0] if not tied else wanted_images[1] > wanted_images[0])
            part[index] = chosen
            wanted[chosen, of_image[index]] -= 1
            wanted_images[chosen] -= 1
            left[of_image[index]] -= 1
    return part == 1


def name_digests(dataset: Any) -> Tensor:
    """Return a number for each image, int64 [N]: of its file relative to the dataset, or of its bytes in records."""
    root = os.fspath(getattr(dataset, 'root', '') or '.')
    reader: Any = getattr(dataset, 'reader', None)
    keys: list[Any] = []
    if hasattr(reader, 'dataset'):  # of Hugging Face: names may be missing, or be those of several images
        for row in reader.dataset.select_columns(reader.image_key):
            image = row[reader.image_key]
            keys.append(image.get('bytes') or str(image.get('path')).encode())
    else:
        for name in map(str, dataset.filenames()):
            name = os.path.relpath(name, os.path.abspath(root)) if os.path.isabs(name) else os.path.normpath(name)
            keys.append(name.replace(os.sep, '/').encode(errors='surrogateescape'))
    digests = [blake2b(key, digest_size=8).digest() for key in keys]
    return torch.tensor([int.from_bytes(digest, 'big', signed=True) for digest in digests])


def hold_out(dataset: Any, fraction: float, seed: int, held_out: bool, known: Tensor | None = None) -> None:
    """Keep the part of a dataset that is held out for validation, or the rest.

    Args:
        dataset: The dataset, which is changed.
        fraction: Share to hold out.
        seed: Seed of the draw.
        held_out: Whether to keep what is held out.
        known: `name_digests` of the images that were held out before, in place of a draw.

    Raises:
        ValueError: If the dataset does not tell its labels without reading images, or a part is empty.
    """
    shown = shown_classes(dataset)
    if shown is None:
        raise ValueError('--val-fraction: this dataset does not tell its labels without reading images')
    digests = name_digests(dataset)
    found = 0 if known is None else int(torch.isin(known, digests).sum())
    if known is None or found < len(known) / 2:  # other data: drawn
        chosen = stratify(*shown, len(dataset), fraction, seed)
        if found:
            _logger.warning(f'{found} of the images that training held out are here; too few, so others are drawn')
    else:
        chosen = torch.isin(digests, known).numpy()
        if found < len(known) and held_out:
            _logger.warning(
                f'{len(known) - found} of the {len(known)} images that training held out are no longer there'
            )
    kept = np.flatnonzero(chosen == held_out)
    if not len(kept):
        raise ValueError(
            f'--val-fraction {fraction:g} of {len(dataset)} images leaves a split without images: the same share of '
            'each class is held out, and the classes are too small; pass a larger fraction'
        )
    if held_out:
        dataset.held_out = digests[torch.from_numpy(kept)]  # for the checkpoint
    if isinstance(dataset, MultiLabelDataset):
        dataset.annotations = dataset.annotations.subset(kept)
        return
    reader = dataset.reader
    if hasattr(reader, 'dataset'):  # of Hugging Face
        reader.dataset = reader.dataset.select(kept)
    elif isinstance(reader.samples, list):
        reader.samples = [reader.samples[index] for index in kept.tolist()]
    else:  # of tar files
        reader.samples, reader.targets = reader.samples[kept], reader.targets[kept]
