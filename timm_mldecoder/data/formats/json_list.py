"""JSON lists of images and labels, the format in which arXiv 2209.06585 distributes its splits.

    ROOT/train.json, ROOT/validation.json (or val.json)
        {"classes": [name, ...], "images": [[path, [name, ...]], ...]}
    ROOT/<path>     the images

The authors publish COCO, VOC, NUS-WIDE (81 classes) and Visual Genome (500 classes) in it. As in their code, the
classes are sorted by name, and a label occurs once per object. Every class that is not listed is absent.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from timm_mldecoder.data.annotations import Annotations, cached_annotations
from timm_mldecoder.data.class_order import warn_about_case
from timm_mldecoder.data.compact import TableBuilder, label_type
from timm_mldecoder.data.json_entries import read_object
from timm_mldecoder.data.text_files import Names, normalize_name, normalize_path, split_names

BLOCK_IMAGES = 2**13


def read_json(root: Path, split: str, instances: bool = False) -> Annotations:
    """Read `ROOT/SPLIT.json`, or the file of all splits.

    Args:
        root: Folder of the dataset.
        split: Name of the file; `validation` is also read from `val.json` and `valid.json`.
        instances: Keep the number of objects per image and class.

    Raises:
        ValueError: If the file is missing or malformed, or a label is not one of the classes (naming file and entry).
    """
    if root.is_file() and split != 'train':
        raise ValueError(f'{root} is one file for all splits: pass --val-fraction 0.2')
    candidates = [root] if root.is_file() else [root / f'{name}.json' for name in split_names(split)]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        found = sorted(file.stem for file in root.glob('*.json'))
        raise ValueError(f'{candidates[0]} is missing, for split {split!r}; {root} holds the splits {found}')

    def build(folder: Path | None) -> Annotations:
        return _read(path, instances, folder)

    annotations = cached_annotations(path.parent, 'json', [path.name, instances], [path], build)
    warn_about_case(annotations.class_names, path)
    return annotations


def _read(path: Path, instances: bool, folder: Path | None) -> Annotations:
    class_names, read = None, False
    names, builder = Names(), TableBuilder(folder, counted=instances)
    for key, entries in read_object(path):
        if key == 'classes' and isinstance(entries, Iterator):
            class_names = _class_names(path, list(entries))
        elif key == 'images' and isinstance(entries, Iterator):
            _add_images(path, entries, names, builder)
            read = True
    if class_names is None or not read:
        raise ValueError(f'{path}: expected an object with the lists "classes" and "images"')
    if unknown := names.unknown(class_names):
        name, (index, file) = unknown[0]
        raise ValueError(f'{path}, images[{index}] ({file}): not in "classes": {name!r}')
    return Annotations.from_table(
        class_names, builder.finish(label_type(len(class_names) - 1), names.order(class_names))
    )


def _class_names(path: Path, names: list[Any]) -> list[str]:
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{path}: "classes" must be a list of names')
    class_names = sorted(map(normalize_name, names))
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated:
        raise ValueError(f'{path}: repeated in "classes": {repeated}')
    return class_names


def _add_images(path: Path, entries: Iterator[Any], names: Names, builder: TableBuilder) -> None:
    numbered = enumerate(entries)
    while block := list(islice(numbered, BLOCK_IMAGES)):
        paths, counts = [], []
        label: list[int] = []
        for index, entry in block:
            match entry:
                case [str(file), [*labels]] if file and all(isinstance(name, str) for name in labels):
                    names.position = index, file
                    numbers = [names[name] for name in labels]
                case _:
                    numbers = [-1]
            if -1 in numbers:  # or an empty name
                raise ValueError(f'{path}, images[{index}]: expected [path, [label, ...]], got {entry!r:.200}')
            paths.append(normalize_path(file))
            counts.append(len(numbers))
            label += numbers
        builder.add(paths, counts, label, instances=np.ones(len(label)))
