"""Annotations of a multi-label dataset: image files, class names and a sparse table of labels."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from timm_mldecoder.data import annotation_cache
from timm_mldecoder.data.compact import (
    BLOCK,
    IGNORED,
    NEGATIVE,
    POSITIVE,
    Numbers,
    Paths,
    Table,
    drop_pages,
    label_type,
    make_table,
)
from timm_mldecoder.data.images import Reading

_logger = logging.getLogger(__name__)

CACHED = 2**24  # bytes of annotation files from which they are cached


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
        paths: Paths | Sequence[str | Path] | np.ndarray,
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
        self.warnings: list[str] = []  # what a reader has to warn of, also when they come from a cache
        self.distinct = False  # whether no file is known to be listed twice, see `same_files`
        self._table = table
        self._folder = folder
        self._images: np.ndarray | None = None  # of a subset: indices into the table
        self._numbers: np.ndarray | None = None  # of other classes: new number of each in the table, -1 if it has none
        self._spelling: Callable[[bytes], bytes] | None = None  # of other paths: what makes them

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
        return len(self._table['offsets']) - 1 if self._images is None else len(self._images)

    @property
    def has_ignored(self) -> bool:
        """Whether any target holds a label to ignore: then losses must know of it, and targets must not be mixed."""
        value = self._table['value']
        if self.unlisted == IGNORED or not value.ndim:
            return self.unlisted == IGNORED or (int(value) == IGNORED and len(self._table['label']) > 0)
        return any((value[first : first + BLOCK] == IGNORED).any() for first in range(0, len(value), BLOCK))

    @property
    def paths(self) -> Paths:
        """File of each image, relative to the root of the dataset, as bytes, [N]."""
        return Paths(self._table['paths'], self._table['offsets'], self._images, self._spelling)

    @property
    def instances(self) -> np.ndarray | None:
        """Number of objects of each of the `entries`, [A]; None if the dataset has no objects."""
        if 'instances' not in self._table:
            return None
        return np.concatenate([np.zeros(0, np.int32), *(counted for *_, counted in self._blocks())])

    def path(self, index: int) -> str:
        """File of image `index`, relative to the root of the dataset."""
        return os.fsdecode(self.paths[index])

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image index, class index and value of every annotation, each [A], sorted by image and class.

        Takes 11 bytes per label and more: `blocks` needs memory for some of the images at a time.
        """
        empty = [(np.zeros(0, np.int64), np.zeros(0, self.label_type), np.zeros(0, np.int8))]
        image, label, value = zip(*empty, *self.blocks(), strict=True)
        return np.concatenate(image), np.concatenate(label), np.concatenate(value)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield the `entries` of some images at a time."""
        for image, label, value, _ in self._blocks():
            yield image, label, value

    @property
    def label_type(self) -> np.dtype:
        """Type of class indices."""
        return self._table['label'].dtype if self._numbers is None else label_type(len(self.class_names) - 1)

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, Any]]:
        table, start = self._table, self._table['start']
        step = max(1, min(BLOCK, BLOCK * (len(start) - 1) // max(1, len(table['label']))))
        for first in range(0, len(self), step):
            last = min(first + step, len(self))
            if self._images is None:
                counts = np.diff(start[first : last + 1])
                rows: slice | np.ndarray = slice(int(start[first]), int(start[last]))
            else:
                chosen = self._images[first:last]
                counts = start[chosen + 1] - start[chosen]
                rows = np.repeat(start[chosen] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
            image, label = np.repeat(np.arange(first, last), counts), table['label'][rows]
            value = table['value'][rows] if table['value'].ndim else np.full(len(label), table['value'])
            counted = table['instances'][rows] if 'instances' in table else None
            if self._numbers is not None:
                label = self._numbers[label]
                order = np.lexsort((label, image))
                order = order[label[order] >= 0]
                image, label, value = image[order], label[order].astype(self.label_type), value[order]
                counted = None if counted is None else counted[order]
            yield image, label, value, counted
            drop_pages(table)

    def class_counts(self) -> np.ndarray:
        """Number of images that show each class, [C]."""
        counts = np.zeros(len(self.class_names), dtype=np.int64)
        for _, label, value in self.blocks():
            counts += np.bincount(label[value == POSITIVE], minlength=len(counts))
        return counts

    def labels(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Class index and value of the labels of image `index`, both [L]."""
        row = self._row(index)
        listed = slice(int(self._table['start'][row]), int(self._table['start'][row + 1]))
        label, value = self._table['label'][listed], self._table['value']
        value = value[listed] if value.ndim else np.broadcast_to(value, label.shape)
        if self._numbers is not None:
            label = self._numbers[label]
            label, value = label[label >= 0], value[label >= 0]
        return label, value

    def target(self, index: int, dtype: Any = np.float32) -> torch.Tensor:
        """Dense target of image `index`, [num_classes], of 1, 0 and -1 (ignored)."""
        target = np.full(len(self.class_names), self.unlisted, dtype=dtype)
        label, value = self.labels(index)
        target[label] = value
        return torch.from_numpy(target)

    def with_classes(self, class_names: Sequence[str]) -> 'Annotations':
        """The same labels with the numbers of `class_names`; those of other classes are left out."""
        numbers = {name: number for number, name in enumerate(class_names)}
        renumbered = np.array([numbers.get(name, -1) for name in self.class_names], dtype=np.int64)
        part = self._alike()
        part.class_names = list(class_names)
        part._numbers = renumbered if self._numbers is None else np.append(renumbered, -1)[self._numbers]
        return part

    def with_paths(self, change: Callable[[str], str]) -> 'Annotations':
        """The same labels of images with other paths."""
        part, spelling = self._alike(), self._spelling
        part._spelling = Respelled(change) if spelling is None else Respelled(change, spelling)
        return part

    def subset(self, images: np.ndarray) -> 'Annotations':
        """Some of the images, [N] indices, without a copy of the labels."""
        part = self._alike()
        chosen = np.asarray(images) if self._images is None else self._images[images]
        small = np.int32 if len(self._table['offsets']) < 2**31 else np.int64
        part._images = chosen.astype(small)
        return part

    def _alike(self) -> 'Annotations':
        part = Annotations.__new__(Annotations)
        part.__dict__.update(self.__dict__)
        return part

    def _row(self, index: int) -> int:
        return index if self._images is None else int(self._images[index])


class Respelled:
    """A change of paths as text, applied to bytes after an earlier one."""

    def __init__(self, change: Callable[[str], str], before: Callable[[bytes], bytes] = bytes) -> None:
        self._change, self._before = change, before

    def __call__(self, path: bytes) -> bytes:
        return os.fsencode(self._change(os.fsdecode(self._before(path))))


def cached_annotations(
    root: Path,
    name: str,
    flags: Sequence[object],
    files: Sequence[Path],
    build: Callable[[Path | None], Annotations],
) -> Annotations:
    """Build annotations, or load them from the cache of a dataset; those of small files are not cached.

    Args:
        root: Folder of the dataset.
        name: Name of the format.
        flags: What decides the annotations beside the files, in JSON form.
        files: Files that they are made of; some may not exist.
        build: Reads them; it may write the arrays of the table into the folder that it is given.
    """
    files = [file for file in dict.fromkeys(files) if file.is_file()]

    def make(folder: Path | None) -> Table:
        made = build(folder)
        shown = ', '.join(map(str, files[:2])) + ', ...' * (len(files) > 2)
        _logger.info(f'{shown}: read {len(made._table["label"]):,} labels of {len(made):,} images into a cache')
        texts = dict(classes=made.class_names, warnings=made.warnings)
        packed = {key: np.array([text.encode() for text in lines], dtype=np.bytes_) for key, lines in texts.items()}
        return {**made._table, **packed, 'unlisted': np.array(made.unlisted)}

    if sum(file.stat().st_size for file in files) < CACHED:
        annotations = build(None)
    else:
        table, folder = annotation_cache.load_or_build(root, f'{name}-{annotation_cache.digest(flags)}', files, make)
        classes, warnings = ([text.decode() for text in table[key].tolist()] for key in ('classes', 'warnings'))
        annotations = Annotations.from_table(classes, table, int(table['unlisted']), folder)
        annotations.warnings = warnings
    for line in annotations.warnings:
        _logger.warning(line)
    return annotations


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
    target_dtype: Any = np.float32  # that of numpy
    has_files = True  # whether the paths of the annotations are those of files

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
        target = self.annotations.target(index, self.target_dtype)
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def _load(self, path: str) -> Any:
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
