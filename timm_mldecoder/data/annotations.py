"""Annotations of a multi-label dataset: image files, class names and a sparse table of labels."""

import copy
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from timm_mldecoder.data import annotation_cache
from timm_mldecoder.data.annotation_cache import Table
from timm_mldecoder.data.images import Reading

_logger = logging.getLogger(__name__)

Numbers = Sequence[int] | np.ndarray
CACHED = 2**24  # bytes of annotation files from which they are cached
POSITIVE, NEGATIVE, IGNORED = 1, 0, -1  # IGNORED: not annotated, or marked difficult


def make_table(
    paths: Sequence[str | Path] | np.ndarray,
    image: Numbers,
    label: Numbers,
    value: Numbers,
    instances: Numbers | None = None,
) -> Table:
    """Sort annotations by image and class, one entry per image and class.

    Returns:
        `paths` [N] bytes, `start` [N + 1] (the entries of image i are start[i] up to start[i + 1]), `label` [A],
        `value` [A] and, if given, `instances` [A].
    """
    # One flat byte array instead of a list of str: workers would otherwise copy the whole list page by page as
    # reference counts change.
    if not isinstance(paths, np.ndarray):
        paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
    label = np.asarray(label, dtype=np.int64)
    bits = int(label.max(initial=1)).bit_length() + 2
    # One integer per entry sorts by image, then class, then value.
    key = (np.asarray(image, dtype=np.int64) << bits) | (label << 2) | (np.asarray(value, dtype=np.int64) + 1)
    table = {'paths': paths}
    if instances is None:
        key.sort(kind='stable')  # a merge sort: fast where most of a file is in order, as it is in Open Images
    else:
        order = np.argsort(key)
        key = key[order]
        first = np.flatnonzero(np.diff(key >> 2, prepend=-1))
        if len(key):
            table['instances'] = np.add.reduceat(np.asarray(instances, dtype=np.int32)[order], first)
        else:
            table['instances'] = np.zeros(0, dtype=np.int32)
    if len(key):
        last = np.append(np.diff(key >> 2) != 0, True)  # the largest value of each image and class
        both = ~last[:-1] & ((key[:-1] & 3) == NEGATIVE + 1) & ((key[1:] & 3) == POSITIVE + 1)
        if contradictions := int(np.count_nonzero(both)):
            _logger.info(f'{contradictions:,} labels are both present and absent in one image: they count as present')
        key = key[last]
    table['start'] = np.concatenate([[0], np.cumsum(np.bincount(key >> bits, minlength=len(paths)))])
    table['label'] = ((key >> 2) & ((1 << (bits - 2)) - 1)).astype(np.min_scalar_type(1 << (bits - 2)))
    table['value'] = ((key & 3) - 1).astype(np.int8)
    return table


class Annotations:
    """Labels of a set of images, sparse, so that millions of images by thousands of classes fit in memory.

    Args:
        class_names: Name of each class, in the order of the target vector.
        paths: One file per image, relative to the root of the dataset.
        image: Image index of each annotation, [A].
        label: Class index of each annotation, [A].
        value: POSITIVE, NEGATIVE or IGNORED for each annotation, [A]. If an image has several annotations of a class,
            the largest value counts.
        unlisted: Value of the classes that an image has no annotation of: NEGATIVE where the annotation is exhaustive
            (COCO, VOC), IGNORED where it is partial (Open Images).
        instances: Number of objects of each annotation, [A], if the dataset has objects. Those of one image and class
            are added up.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        paths: Sequence[str | Path] | np.ndarray,
        image: Numbers,
        label: Numbers,
        value: Numbers,
        unlisted: int = NEGATIVE,
        instances: Numbers | None = None,
    ):
        self._set(class_names, make_table(paths, image, label, value, instances), unlisted, None)

    @classmethod
    def from_table(
        cls,
        class_names: Sequence[str],
        table: Table,
        unlisted: int = NEGATIVE,
        folder: Path | None = None,
    ) -> 'Annotations':
        """Annotations from the arrays of `make_table`; `folder` is the cache that they are mapped from, if any."""
        annotations = cls.__new__(cls)
        annotations._set(class_names, table, unlisted, folder)
        return annotations

    def _set(self, class_names: Sequence[str], table: Table, unlisted: int, folder: Path | None) -> None:
        self.class_names = list(class_names)
        self.unlisted = unlisted
        self._table = table
        self._folder = folder
        self._images: np.ndarray | None = None  # of a subset: indices into the table

    def __getstate__(self) -> dict[str, Any]:
        """Leave out arrays that the receiver, a data loader worker, can map itself."""
        return {**self.__dict__, '_table': None if self._folder else self._table}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._table is None:
            self._table = annotation_cache.load(self._folder)
            if self._table is None:
                raise ValueError(f'{self._folder}: this cache of annotations was removed or damaged; start again')

    def __len__(self) -> int:
        return len(self._table['paths'] if self._images is None else self._images)

    @property
    def has_ignored(self) -> bool:
        """Whether any target holds a label to ignore: then losses must know of it, and targets must not be mixed."""
        return self.unlisted == IGNORED or bool((self._table['value'] == IGNORED).any())

    @property
    def paths(self) -> np.ndarray:
        """File of each image, relative to the root of the dataset, as bytes, [N]."""
        return self._table['paths'] if self._images is None else self._table['paths'][self._images]

    @property
    def instances(self) -> np.ndarray | None:
        """Number of objects of each of the `entries`, [A]; None if the dataset has no objects."""
        counts = self._table.get('instances')
        return counts if counts is None or self._images is None else counts[self._rows()]

    def path(self, index: int) -> str:
        """File of image `index`, relative to the root of the dataset."""
        return os.fsdecode(self._table['paths'][self._row(index)])

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image index, class index and value of every annotation, each [A], sorted by image and class."""
        label, value, counts = self._table['label'], self._table['value'], np.diff(self._table['start'])
        if self._images is not None:
            rows = self._rows()
            label, value, counts = label[rows], value[rows], counts[self._images]
        return np.repeat(np.arange(len(self)), counts), label, value

    def target(self, index: int) -> torch.Tensor:
        """Dense float32 target of image `index`, [num_classes], of 1, 0 and -1 (ignored)."""
        row = self._row(index)
        listed = slice(self._table['start'][row], self._table['start'][row + 1])
        target = np.full(len(self.class_names), self.unlisted, dtype=np.float32)
        target[self._table['label'][listed]] = self._table['value'][listed]
        return torch.from_numpy(target)

    def with_classes(self, class_names: Sequence[str]) -> 'Annotations':
        """The same labels with the numbers of `class_names`; those of other classes are left out."""
        image, label, value = self.entries()
        numbers = {name: number for number, name in enumerate(class_names)}
        renumbered = np.array([numbers.get(name, -1) for name in self.class_names], dtype=np.int64)[label]
        kept = renumbered >= 0
        instances = None if self.instances is None else self.instances[kept]
        return Annotations(
            class_names, self.paths, image[kept], renumbered[kept], value[kept], self.unlisted, instances
        )

    def with_paths(self, paths: Sequence[str]) -> 'Annotations':
        """The same labels of images with other paths."""
        image, label, value = self.entries()
        return Annotations(self.class_names, paths, image, label, value, self.unlisted, self.instances)

    def subset(self, images: np.ndarray) -> 'Annotations':
        """Some of the images, [N] indices, without a copy of the labels."""
        part = copy.copy(self)
        part._images = np.asarray(images) if self._images is None else self._images[images]
        return part

    def _row(self, index: int) -> int:
        return index if self._images is None else int(self._images[index])

    def _rows(self) -> np.ndarray:
        """Indices of the annotations of a subset."""
        start, counts = self._table['start'][self._images], np.diff(self._table['start'])[self._images]
        return np.repeat(start - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())


def cached_annotations(
    root: Path, name: str, flags: Sequence[object], files: Sequence[Path], build: Callable[[], Annotations]
) -> Annotations:
    """Build annotations, or load them from the cache of a dataset; those of small files are not cached.

    Args:
        root: Folder of the dataset.
        name: Name of the format.
        flags: What decides the annotations beside the files, in JSON form.
        files: Files that they are made of; some may not exist.
        build: Reads them.
    """
    files = [file for file in files if file.is_file()]
    if sum(file.stat().st_size for file in files) < CACHED:
        return build()

    def make() -> Table:
        made = build()
        shown = ', '.join(map(str, files))
        _logger.info(f'{shown}: read {len(made._table["label"]):,} labels of {len(made):,} images into a cache')
        classes = np.array([name.encode() for name in made.class_names], dtype=np.bytes_)
        return {**made._table, 'classes': classes, 'unlisted': np.array(made.unlisted)}

    table, folder = annotation_cache.load_or_build(root, f'{name}-{annotation_cache.digest(flags)}', files, make)
    classes = [name.decode() for name in table['classes'].tolist()]
    return Annotations.from_table(classes, table, int(table['unlisted']), folder)


class ClassIndex:
    """The class index of a target [C] with one positive class: a target transform for one class per image."""

    def __call__(self, target: torch.Tensor) -> int:
        return int(target.argmax())


class MultiLabelDataset(Dataset):
    """Images with dense multi-label targets, in the form that `timm.data.create_loader` expects.

    Yields `(image, target)`: a PIL image, or the result of `transform`, and a float32 tensor [num_classes].

    Unlike in `timm.data.ImageDataset`, an unreadable image is an error. timm uses the next image in its place, which
    changes the metrics.

    Args:
        annotations: Images and their labels.
        root: Folder that the paths of the images are relative to.
        transform: Applied to the PIL image.
        target_transform: Applied to the target.
        input_img_mode: PIL mode of the images.
    """

    # number of classes, the first ones, that the model was trained on; None if it was trained on all
    num_seen: int | None = None
    reading = Reading()  # how files become images

    def __init__(
        self,
        annotations: Annotations,
        root: str | Path = '',
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        input_img_mode: str = 'RGB',
    ):
        self.annotations = annotations
        self.root = root
        self.transform = transform
        self.target_transform = target_transform
        self.input_img_mode = input_img_mode

    @property
    def class_names(self) -> list[str]:
        """Name of each class, in the order of the target vector."""
        return self.annotations.class_names

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int):
        image = self._load(os.path.join(self.root, self.annotations.path(index)))
        target = self.annotations.target(index)
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def _load(self, path: str) -> Image.Image:
        try:
            return self.reading.open(path, self.input_img_mode)
        except OSError as error:
            raise OSError(f'cannot read the image {path}: {error}') from error  # PIL's own message may lack the path

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """File of image `index`, as in timm: relative to the root, or only its name, or with the root."""
        path = self.annotations.path(index)
        if basename:
            return os.path.basename(path)
        return os.path.join(self.root, path) if absolute else path

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """Files of all images, in order."""
        return [self.filename(index, basename, absolute) for index in range(len(self))]
