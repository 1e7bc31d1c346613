"""Statistics of a dataset: what to look at before training, and how often classes occur together."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from timm_mldecoder.data.annotations import IGNORED, POSITIVE, Annotations, MultiLabelDataset
from timm_mldecoder.data.compact import Paths
from timm_mldecoder.data.same_files import file_ids, repeated

SHOWN = 5  # names per log line


def class_to_index(dataset: Any) -> dict[str, int] | None:
    """Index of each class by name, sorted by index; None if the dataset does not know its classes.

    Known for multi-label datasets of this package, timm's readers (image folders, Hugging Face and TensorFlow datasets
    with class labels, any with a class map), torchvision's datasets, and WebDataset shards whose `_info.json` has a
    list `class_names`.
    """
    if isinstance(dataset, MultiLabelDataset):
        return {name: index for index, name in enumerate(dataset.class_names)}
    reader = getattr(dataset, 'reader', None)
    known = getattr(reader, 'class_to_idx', None) or getattr(dataset, 'class_to_idx', None)
    if not known:
        info = getattr(reader, 'info', None)
        names = info.get('class_names') if isinstance(info, Mapping) else None
        known = {name: index for index, name in enumerate(names or ())}
    return dict(sorted(known.items(), key=lambda item: item[1])) or None


@dataclass(frozen=True)
class DatasetSummary:
    """What a dataset holds."""

    images: int | None  # number of images; None for streaming datasets that do not report it
    class_names: list[str] | None = None  # name of each class; None if unknown
    # number of images that show each class, [C]; None if the targets cannot be read without the images
    positives: np.ndarray | None = field(default=None, compare=False)
    ignored_share: float = 0.0  # share of (image, class) pairs without a target, in [0, 1]
    duplicates: list[str] | None = None  # files that are listed more than once; None if the images are not files
    contradictions: list[str] = field(default_factory=list)  # those of them that have other labels each time

    @property
    def never_positive(self) -> list[str]:
        """Names, or indices if there are no names, of the classes that no image shows."""
        absent = [] if self.positives is None else np.flatnonzero(self.positives == 0).tolist()
        return [self.class_names[index] if self.class_names else str(index) for index in absent]

    @property
    def positives_per_class(self) -> tuple[int, float, int] | None:
        """Fewest, median and most images that show a class."""
        if self.positives is None or not len(self.positives):
            return None
        counts = self.positives.tolist()
        return min(counts), median(counts), max(counts)

    def log_lines(self, split: str) -> list[str]:
        """What to log before training; each line begins with the name of the split."""
        known = self.class_names if self.class_names is not None else self.positives
        lines = [f'{_count(self.images)} images, {_count(None if known is None else len(known))} classes']
        if self.positives_per_class:
            fewest, middle, most = self.positives_per_class
            lines[0] += f', images per class: {fewest:,} to {most:,}, median {middle:,.0f}'
        if self.ignored_share:
            lines.append(f'{self.ignored_share:.1%} of the labels are not annotated and ignored')
        if self.never_positive:
            lines.append(f'{len(self.never_positive):,} classes have no image: {_list(self.never_positive)}')
        if self.duplicates:
            lines.append(f'{len(self.duplicates):,} files are listed more than once: {_list(self.duplicates)}')
        return [f'{split}: {line}' for line in lines]

    def warnings(self, split: str, training: bool = True) -> list[str]:
        """What to warn of: labels that contradict each other and, in training, classes of which nothing is learnt."""
        lines = []
        if self.contradictions:
            number = len(self.contradictions)
            lines.append(f'{number:,} files are listed with other labels each time: {_list(self.contradictions)}')
        if training and self.positives is not None and self.images:
            if len(self.positives) == 1 and self.positives[0] == self.images:
                lines.append('there is one class, which every image has: there is nothing to learn')
            elif everywhere := np.flatnonzero(self.positives == self.images).tolist():
                names = [self.class_names[index] if self.class_names else str(index) for index in everywhere]
                lines.append(f'every image has the class {_list(names)}: training cannot learn what it looks like')
        return [f'{split}: {line}' for line in lines]


def summarize(dataset: Any) -> DatasetSummary:
    """Summary of a dataset of this package, of timm or of torchvision; no image is read."""
    classes = class_to_index(dataset)
    names = list(classes) if classes else None
    if isinstance(dataset, MultiLabelDataset):
        annotations = dataset.annotations
        positives = np.zeros(len(annotations.class_names), dtype=np.int64)
        listed = ignored = 0
        for _, label, value in annotations.blocks():
            listed, ignored = listed + len(label), ignored + int((value == IGNORED).sum())
            positives += np.bincount(label[value == POSITIVE], minlength=len(positives))
        total = len(annotations) * len(positives)
        ignored += total - listed if annotations.unlisted == IGNORED else 0
        share = ignored / total if total else 0.0
        return DatasetSummary(len(annotations), names, positives, share, *_repeated(dataset))
    targets = class_indices(dataset)
    if targets is not None:
        targets = np.bincount(targets, minlength=len(names or ()))
    return DatasetSummary(_length(dataset), names, targets, 0.0, *_repeated(dataset))


def overlap(train: Any, validation: Any) -> list[str]:
    """Files that both splits hold, in whatever spelling; empty if either does not consist of files."""
    paths, first, second = _paths(train), _file_ids(train), _file_ids(validation)
    if paths is None or first is None or second is None:
        return []
    shared = np.intersect1d(first, second, return_indices=True)[1]
    return sorted(os.fsdecode(path) for path in paths[shared])


def cooccurrence(source: Annotations | MultiLabelDataset, counts: str = 'instances') -> tuple[np.ndarray, list[str]]:
    """How often classes occur together: M[i, j] = (images that show i and j) / (occurrences of i), M[i, i] = 0.

    The published label graphs of VOC and COCO (arXiv 2209.06585) divide by objects, those of ML-GCN (arXiv 1904.03582)
    by images.

    Args:
        source: Training split; for 'instances' created with `instances=True`.
        counts: What an occurrence is: an object ('instances') or an image ('images').

    Returns:
        M, float64 [C, C], before thresholding; the row of a class without occurrences is 0. And the class names.

    Raises:
        ValueError: If `counts` is unknown, or the dataset has no objects.
    """
    annotations = source.annotations if isinstance(source, MultiLabelDataset) else source
    if counts not in ('instances', 'images'):
        raise ValueError(f"counts must be 'instances' or 'images', got {counts!r}")
    if counts == 'instances' and annotations.instances is None:
        raise ValueError("the dataset has no number of objects per image: use counts='images'")
    num_classes = len(annotations.class_names)
    image, label, value = annotations.entries()
    shown = value == POSITIVE
    image, label = image[shown], label[shown].astype(np.int64)
    weights = annotations.instances[shown] if counts == 'instances' and annotations.instances is not None else None
    occurrences = np.bincount(label, weights, minlength=num_classes)

    together = np.zeros((num_classes, num_classes))
    chunk = max(1, (1 << 24) // max(num_classes, 1))  # images at a time: 64 MiB of float32
    for first in range(0, len(annotations), chunk):
        part = slice(*np.searchsorted(image, [first, first + chunk]))
        dense = np.zeros((min(chunk, len(annotations) - first), num_classes), dtype=np.float32)
        dense[image[part] - first, label[part]] = 1
        together += dense.T @ dense  # exact: counts of a chunk are below 2 ** 24
    np.fill_diagonal(together, 0)
    return together / np.maximum(occurrences, 1)[:, None], annotations.class_names


def class_indices(dataset: Any) -> np.ndarray | None:
    """Return the class index of each sample, [N], without reading an image; None where the dataset does not tell."""
    samples = _samples(dataset)
    holder = getattr(dataset, 'reader', dataset)  # the targets of tar files are those of the reader
    targets = getattr(holder, 'targets', None) if samples is None else [sample[1] for sample in samples]
    if targets is None:
        return None
    targets = np.asarray(targets)
    return targets if targets.ndim == 1 and targets.dtype.kind in 'iu' and targets.min(initial=0) >= 0 else None


def shown_classes(dataset: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Return image and class index of each class that an image shows, both [A], without reading an image.

    None where the dataset does not tell. Takes 16 bytes per label: see `shown_blocks`.
    """
    blocks = shown_blocks(dataset)
    if blocks is None:
        return None
    empty = np.zeros(0, dtype=np.int64)
    image, label = zip(*blocks, (empty, empty), strict=True)
    return np.concatenate(image), np.concatenate(label)


def shown_blocks(dataset: Any) -> Iterable[tuple[np.ndarray, np.ndarray]] | None:
    """Return the parts of `shown_classes`, those of annotations for some images at a time."""
    if isinstance(dataset, MultiLabelDataset):
        return _positive(dataset.annotations)
    found = _shown_classes(dataset)
    return None if found is None else [found]


def _positive(annotations: Annotations) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for image, label, value in annotations.blocks():
        shown = value == POSITIVE
        yield (image, label) if shown.all() else (image[shown], label[shown])


def _shown_classes(dataset: Any) -> tuple[np.ndarray, np.ndarray] | None:
    if (indices := class_indices(dataset)) is not None:
        return np.arange(len(indices)), indices
    reader: Any = getattr(dataset, 'reader', None)
    if not hasattr(reader, 'iter_targets') or reader.dense_target:
        return None
    several = [target if isinstance(target, (list, tuple)) else [target] for target in reader.iter_targets()]
    image = np.repeat(np.arange(len(several)), [len(labels) for labels in several])
    return image, np.array([label for labels in several for label in labels], dtype=np.int64)


def _samples(dataset: Any) -> list | None:
    """(path, class index) of each image: timm's reader, torchvision's image folders, torchvision's Stanford-Cars."""
    for holder, name in ((getattr(dataset, 'reader', None), 'samples'), (dataset, 'samples'), (dataset, '_samples')):
        samples = getattr(holder, name, None)
        if isinstance(samples, (list, tuple)) and samples and isinstance(samples[0][0], (str, os.PathLike)):
            return list(samples)
    return None


def _paths(dataset: Any) -> Paths | None:
    if isinstance(dataset, MultiLabelDataset):
        return dataset.annotations.paths if dataset.has_files else None
    samples = _samples(dataset)
    return None if samples is None else Paths.of([sample[0] for sample in samples])


def _file_ids(dataset: Any) -> np.ndarray | None:
    paths: Any = _paths(dataset)
    root = dataset.root if isinstance(dataset, MultiLabelDataset) else ''
    return None if paths is None else file_ids(paths, root)


def _repeated(dataset: Any) -> tuple[list[str] | None, list[str]]:
    """Files that are listed more than once, and those among them with other labels, each with all of its paths."""
    if isinstance(dataset, MultiLabelDataset) and dataset.annotations.distinct:
        return [], []
    ids, paths = _file_ids(dataset), _paths(dataset)
    if ids is None or paths is None:
        return None, []
    groups = repeated(ids)
    if isinstance(dataset, MultiLabelDataset):
        labels = {i: dataset.annotations.target(i).tolist() for group in groups for i in group.tolist()}
    else:
        targets = class_indices(dataset)
        labels = {} if targets is None else {i: targets[i] for group in groups for i in group.tolist()}
    odd = [group for group in groups if any(labels.get(i) != labels.get(group[0]) for i in group.tolist())]
    names = [[os.fsdecode(paths[i]) for i in group.tolist()] for group in odd]
    return sorted(os.fsdecode(paths[group[0]]) for group in groups), [' = '.join(dict.fromkeys(part)) for part in names]


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _count(number: int | None) -> str:
    return 'an unknown number of' if number is None else f'{number:,}'


def _list(names: list[str]) -> str:
    return ', '.join(names[:SHOWN]) + (', ...' if len(names) > SHOWN else '')
