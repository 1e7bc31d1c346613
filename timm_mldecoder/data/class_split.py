"""Seen and unseen classes: which ones a zero-shot model is trained on, and which it meets in evaluation only.

A split file is JSON with the names of the seen classes under `seen` (or `train class`, as NUS-WIDE's benchmark has it)
and of the unseen under `unseen` (`test class`). Where one is left out it is all the others.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from timm_mldecoder.data.annotations import POSITIVE, Annotations

KEYS = {'seen': ('seen', 'train class'), 'unseen': ('unseen', 'test class')}


@dataclass(frozen=True)
class ClassSplit:
    """Names of the seen and of the unseen classes of a data set, each in the order of the data set."""

    seen: list[str]
    unseen: list[str]

    @property
    def all(self) -> list[str]:
        """The seen classes, then the unseen."""
        return self.seen + self.unseen


def read_class_split(path: str | Path, class_names: Sequence[str]) -> ClassSplit:
    """Read a split of the classes of a data set; classes in neither part are left out of both.

    Raises:
        ValueError: If the file is missing or malformed, names a class twice, in both parts, or one that the data set
            does not have; all such names are listed.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f'{path} is no split of classes: {error}') from error
    parts = {part: _names(content, keys, path) for part, keys in KEYS.items()}
    if parts['seen'] is None and parts['unseen'] is None:
        raise ValueError(f'{path} is no split of classes: it has neither {KEYS["seen"]} nor {KEYS["unseen"]}')
    known, other = set(class_names), {'seen': 'unseen', 'unseen': 'seen'}
    for part, names in parts.items():
        if names is None:
            parts[part] = [name for name in class_names if name not in parts[other[part]]]
    every = parts['seen'] + parts['unseen']
    wrong = {
        'unknown': [name for name in every if name not in known],
        'named twice': [name for name, count in Counter(every).items() if count > 1],
    }
    if any(wrong.values()):
        lists = '; '.join(f'{what}: {", ".join(names)}' for what, names in wrong.items() if names)
        raise ValueError(f'{path} does not split the {len(known)} classes of the data set; {lists}')
    if not parts['seen'] or not parts['unseen']:
        raise ValueError(f'{path} leaves no class seen, or none unseen')
    order = {name: index for index, name in enumerate(class_names)}
    return ClassSplit(*(sorted(parts[part], key=order.__getitem__) for part in KEYS))


def _names(content: object, keys: Sequence[str], path: str | Path) -> list[str] | None:
    """The list under the first of `keys` that the file has."""
    if not isinstance(content, dict):
        raise ValueError(f'{path} is no split of classes: expected an object, got a {type(content).__name__}')
    names = next((content[key] for key in keys if key in content), None)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f'{path} is no split of classes: {keys} must be a list of names')
    return names


def select_classes(annotations: Annotations, class_names: Sequence[str], only_positive: bool = False) -> Annotations:
    """The same images with some of the classes, in the given order.

    Args:
        annotations: All images and classes.
        class_names: The classes to keep.
        only_positive: Drop images with none of them.

    Raises:
        ValueError: If the annotations do not have a class, or no image is left.
    """
    position = {name: index for index, name in enumerate(class_names)}
    missing = sorted(position.keys() - set(annotations.class_names))
    if missing:
        raise ValueError(f'the data set has no class {", ".join(missing)}')
    new_label = np.array([position.get(name, -1) for name in annotations.class_names])
    image, label, value = annotations.entries()
    label = new_label[label]
    kept = label >= 0
    image, label, value = image[kept], label[kept], value[kept]
    paths = [annotations.path(index) for index in range(len(annotations))]
    if only_positive:
        images = np.unique(image[value == POSITIVE])
        if not len(images):
            raise ValueError('no image has one of the classes to train on')
        paths = [paths[index] for index in images]
        kept = np.isin(image, images)
        image, label, value = np.searchsorted(images, image[kept]), label[kept], value[kept]
    return Annotations(list(class_names), paths, image, label, value, annotations.unlisted)
