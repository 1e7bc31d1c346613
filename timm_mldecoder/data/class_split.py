"""Seen and unseen classes: those that a zero-shot model is trained on, and those it meets only in evaluation.

A split file is JSON with the names of the seen classes under `seen` (`train class` in the benchmark of NUS-WIDE) and of
the unseen ones under `unseen` (`test class`). If one is left out, it is all the other classes. In a file of the
benchmark, names that the dataset does not have are left out with a warning, as the authors' code does silently.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from timm_mldecoder.data.annotations import POSITIVE, Annotations
from timm_mldecoder.data.text_files import normalize_name

_logger = logging.getLogger(__name__)

KEYS = {'seen': ('seen', 'train class'), 'unseen': ('unseen', 'test class')}


@dataclass(frozen=True)
class ClassSplit:
    """Names of the seen and of the unseen classes of a dataset, each in the order of the dataset."""

    seen: list[str]
    unseen: list[str]

    @property
    def all(self) -> list[str]:
        """The seen classes, then the unseen ones."""
        return self.seen + self.unseen


def read_class_split(path: str | Path, class_names: Sequence[str]) -> ClassSplit:
    """Read a split of the classes of a dataset; classes in neither part are left out of both.

    Raises:
        ValueError: If the file is missing or malformed, or names a class twice, in both parts, or that is not in the
            dataset; all such names are listed. In a file of the benchmark only a class in both parts is an error.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not a class split: {error}') from error
    parts: dict[str, Any] = {part: _names(content, keys, path) for part, keys in KEYS.items()}
    if parts['seen'] is None and parts['unseen'] is None:
        raise ValueError(f'{path} is not a class split: it has neither {KEYS["seen"]} nor {KEYS["unseen"]}')
    known = set(class_names)
    if any(KEYS[part][1] in content for part in KEYS):
        missing = [name for names in parts.values() for name in names or () if name not in known]
        parts = {part: names and [n for n in dict.fromkeys(names) if n in known] for part, names in parts.items()}
        if missing:
            _logger.warning(f'{path}: ignoring {len(missing)} names that the dataset lacks: {", ".join(missing[:5])}')
    for part, other in (('seen', 'unseen'), ('unseen', 'seen')):
        if parts[part] is None:
            parts[part] = [name for name in class_names if name not in parts[other]]
    every = parts['seen'] + parts['unseen']
    wrong = {
        'unknown': [name for name in every if name not in known],
        'named twice': [name for name, count in Counter(every).items() if count > 1],
    }
    if any(wrong.values()):
        lists = '; '.join(f'{what}: {", ".join(names)}' for what, names in wrong.items() if names)
        raise ValueError(f'{path} does not split the {len(known)} classes of the dataset; {lists}')
    if not parts['seen'] or not parts['unseen']:
        raise ValueError(f'{path} has no seen or no unseen class')
    if absent := [name for name in class_names if name not in every]:
        shown = f'{", ".join(absent[:5])}{", ..." if len(absent) > 5 else ""}'
        _logger.warning(f'{path}: {len(absent)} classes of the dataset are in neither part, and left out: {shown}')
    order = {name: index for index, name in enumerate(class_names)}
    return ClassSplit(*(sorted(parts[part], key=order.__getitem__) for part in KEYS))


def _names(content: object, keys: Sequence[str], path: str | Path) -> list[str] | None:
    """The list under the first of `keys` that the file has."""
    if not isinstance(content, dict):
        raise ValueError(f'{path} is not a class split: expected an object, got a {type(content).__name__}')
    names = next((content[key] for key in keys if key in content), None)
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{path} is not a class split: {keys} must be a list of names')
    return [normalize_name(name) for name in names]


def select_classes(annotations: Annotations, class_names: Sequence[str], only_positive: bool = False) -> Annotations:
    """The same images with some of the classes, in the given order.

    Args:
        annotations: All images and classes.
        class_names: The classes to keep.
        only_positive: Drop images that show none of them.

    Raises:
        ValueError: If the annotations do not have a class, or no image is left.
    """
    position = {name: index for index, name in enumerate(class_names)}
    missing = sorted(position.keys() - set(annotations.class_names))
    if missing:
        raise ValueError(f'the dataset has no class {", ".join(missing)}')
    selected = annotations.with_classes(class_names)
    if only_positive:
        shown = (np.unique(image[value == POSITIVE]) for image, _, value in selected.blocks())
        images = np.concatenate([np.zeros(0, dtype=np.int64), *shown])
        if not len(images):
            raise ValueError(f'no image shows any of the {len(class_names)} classes {", ".join(class_names[:3])}, ...')
        selected = selected.subset(images)
    return selected
