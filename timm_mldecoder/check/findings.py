"""The kinds of mistakes that `check` finds, and what it knows of a split."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from timm_mldecoder.data import class_to_index
from timm_mldecoder.data.summary import shown_classes
from timm_mldecoder.loading.scan import ImageFacts

RARE = 5  # images of a class in the validation split, below which a threshold is noise
#: Kind of a finding -> what it means.
KINDS = {
    'unreadable': 'files that cannot be read',
    'contradiction': 'copies of one image with other labels',
    'leak': 'images of the validation split that are trained on',
    'duplicate': 'copies within a split',
    'near leak': 'images that look like one of the training split',
    'near duplicate': 'images that look alike within a split',
    'empty class': 'classes without a training image',
    'constant class': 'classes that every training image has',
    'rare class': f'classes with fewer than {RARE} validation images, whose scores and thresholds are noise',
    'class names': 'class names that look like a mistake',
    'rotated': 'images that EXIF data turns, which --exif-rotate applies',
    'cut off': 'images whose border evaluation cuts off',
}


class Finding(NamedTuple):
    """One mistake."""

    kind: str  # of KINDS
    files: tuple[str, ...]
    text: str
    images: tuple[tuple[str, int], ...] = ()  # split and position in its facts, to show


@dataclass
class Split:
    """A split that was read."""

    dataset: Any
    facts: list[ImageFacts]
    labels: list[tuple[int, ...]] | None  # classes of each image, None if they are not known
    class_names: list[str]

    def shown(self, position: int) -> str:
        """Labels of an image by name."""
        if self.labels is None:
            return ''
        names = [self.class_names[i] if i < len(self.class_names) else str(i) for i in self.labels[position]]
        return ', '.join(names) or 'no label'

    def counts(self) -> list[int]:
        """Number of images of each class."""
        counts = Counter(label for labels in self.labels or () for label in labels)
        return [counts[index] for index in range(max([*counts, len(self.class_names) - 1], default=-1) + 1)]


def labels_of(dataset: Any) -> list[tuple[int, ...]] | None:
    """Classes of each image, without reading an image; None where a dataset does not tell."""
    shown = shown_classes(dataset)
    if shown is None:
        return None
    label, ends = shown[1].tolist(), np.cumsum(np.bincount(shown[0], minlength=len(dataset))).tolist()
    return [tuple(label[first:last]) for first, last in zip([0, *ends], ends, strict=False)]


def make_split(dataset: Any, facts: Sequence[ImageFacts]) -> Split:
    """Join what was read with the labels of a dataset."""
    return Split(dataset, list(facts), labels_of(dataset), list(class_to_index(dataset) or ()))
