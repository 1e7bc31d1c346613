"""Every rank needs the data of rank 0: labels are numbers, and the images are divided by their positions."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset

from timm_mldecoder.data import Annotations, MultiLabelDataset, class_to_index
from timm_mldecoder.data.summary import class_indices
from timm_mldecoder.distributed.world import World


class _Held(NamedTuple):
    """What a rank holds of a split."""

    classes: list[str]  # names in order
    samples: int | None  # number of samples; None for a stream
    digest: str  # of their names and labels


def check_ranks(world: World, splits: Mapping[str, Any]) -> None:
    """Compare the classes and samples of datasets with those of rank 0; a collective call.

    Raises:
        ValueError: On every rank, if one holds others.
    """
    if world.distributed:
        _compare(world, {split: _describe(dataset) for split, dataset in splits.items()})


def check_rank_names(world: World, names: np.ndarray, class_names: Sequence[str] | None) -> None:
    """Compare the names of images, and the classes of a model, with those of rank 0, as `check_ranks`."""
    if world.distributed:
        _compare(world, {'images': _Held(list(map(str, class_names or ())), len(names), _digest([names]))})


def _compare(world: World, held: dict[str, _Held]) -> None:
    digests = {split: hashlib.sha256(repr(part).encode()).hexdigest() for split, part in held.items()}
    for split in held:
        found = world.all_gather(digests[split])
        if len(set(found)) == 1:
            continue
        parts = world.all_gather(held[split])
        rank = next(rank for rank, digest in enumerate(found) if digest != found[0])
        raise ValueError(
            f'{split}: rank {rank} has other data than rank 0 ({_difference(parts[rank], parts[0])}): give all ranks '
            'the same files, and the same version of this package'
        )


def _difference(ours: _Held, first: _Held) -> str:
    for index, (own, name) in enumerate(zip(ours.classes, first.classes, strict=False)):
        if own != name:
            return f'class {index} is {own!r}, and {name!r} on rank 0'
    if len(ours.classes) != len(first.classes):
        return f'{len(ours.classes)} classes, and {len(first.classes)} on rank 0'
    if ours.samples != first.samples:
        return f'{ours.samples} images, and {first.samples} on rank 0'
    return 'other names or labels of the images, or another order'


def describe(dataset: Any) -> dict[str, Any]:
    """Return what a checkpoint keeps of the training images: their number (None for a stream), and a digest."""
    held = _describe(dataset)
    return dict(images=held.samples, digest=held.digest)


def _describe(dataset: Any) -> _Held:
    classes = list(map(str, class_to_index(dataset) or ()))
    if isinstance(dataset, MultiLabelDataset):
        annotations = dataset.annotations
        return _Held(classes, len(annotations), _digest_of(annotations))
    if isinstance(dataset, IterableDataset):
        return _Held(classes, None, '')
    labels = class_indices(dataset)
    return _Held(classes, len(dataset), _digest([_names(dataset), *([] if labels is None else [labels])]))


def _names(dataset: Any) -> np.ndarray:
    """Return the names of the files of a dataset relative to its folder, which may lie elsewhere on each machine."""
    holder = getattr(dataset, 'reader', dataset)
    samples = getattr(holder, 'samples', None)
    if not isinstance(samples, (list, tuple)) or not samples or not isinstance(samples[0][0], (str, os.PathLike)):
        return np.zeros(0)
    root = os.path.join(os.fspath(holder.root), '') if getattr(holder, 'root', None) else ''
    return np.array([os.fsencode(os.fspath(sample[0]).removeprefix(root)) for sample in samples])


def _digest(parts: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f'{part.dtype} {part.shape}'.encode())
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _digest_of(annotations: Annotations) -> str:
    """Return the `_digest` of paths, labels and values of annotations, of which a part is in memory at a time."""
    digest, width = hashlib.sha256(), max(1, annotations.paths.width)
    labels = sum(len(label) for _, label, _ in annotations.blocks())
    digest.update(f'|S{width} ({len(annotations)},)'.encode())
    for _, block in annotations.paths.blocks():
        digest.update(np.array(block.tolist(), dtype=f'S{width}').data)
    for part, dtype in ((1, annotations.label_type), (2, np.dtype(np.int8))):
        digest.update(f'{dtype} ({labels},)'.encode())
        for block in annotations.blocks():
            digest.update(np.ascontiguousarray(block[part], dtype=dtype).data)
    return digest.hexdigest()
