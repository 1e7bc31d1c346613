"""MS-COCO as distributed, and files in its format as tools export them, for multi-label classification.

    ROOT/annotations/instances_{train,val}{2014,2017}.json      coco2014, coco2017
    ROOT/{train,val}{2014,2017}/*.jpg

    ROOT/{train,valid,test}/_annotations.coco.json              coco: the `LAYOUTS`, or one file for all splits
    ROOT/{train,valid,test}/*.jpg

The classes are the names of the categories in the order of the annotation file (80, without the unused ids). Objects of
every size, also crowds, count. Images without annotations show none of the classes; the published results leave them
out (82,081 images for training and 40,137 for validation in 2014), as `unannotated='drop'` does.
"""

import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from timm_mldecoder.data.annotations import POSITIVE, Annotations, cached_annotations
from timm_mldecoder.data.class_order import warn_about_case
from timm_mldecoder.data.json_entries import read_object
from timm_mldecoder.data.text_files import normalize_name, normalize_path, split_names

_logger = logging.getLogger(__name__)

UNANNOTATED = ('keep', 'drop')
SPLITS = {'train': 'train', 'validation': 'val'}
LAYOUTS = (  # where tools put the annotations of a split
    '{}/_annotations.coco.json', '{}/annotations.json', 'annotations/instances_{}.json', 'annotations/{}.json',
    'instances_{}.json', '{}.json',
)  # fmt: skip


def find_annotations(root: Path, split: str) -> Path:
    """Return the annotation file of a split in one of the `LAYOUTS`, or the one file of all splits, `root` or in it.

    Raises:
        ValueError: If there is none, or one file for all splits and another split than `train`.
    """
    names = split_names(split)
    inside = [*root.glob('*.json'), *root.glob('*/*.json')]
    there = {path.relative_to(root).as_posix().lower(): path for path in sorted(inside, reverse=True)}  # in any case
    wanted = [layout.format(name) for name in names for layout in LAYOUTS]
    tried = [there.get(name.lower(), root / name) for name in wanted]
    dated = [path for name in names for path in root.glob(f'annotations/instances_{name}20??.json')]  # COCO's own
    found = [path for path in tried if path.is_file()] or dated
    if found:
        return found[0]
    files = [root] if root.is_file() else sorted({*root.glob('*.json'), *root.glob('annotations/*.json')})
    if len(files) == 1 and split == 'train':
        return files[0]
    if len(files) == 1:
        raise ValueError(f'{files[0]} is one file for all splits: pass --val-fraction 0.2')
    shown = ', '.join(wanted[: len(LAYOUTS)])
    raise ValueError(
        f'{root} has no annotations of split {split!r} in COCO format; looked for {shown}. --val-fraction 0.2 holds a '
        'part of the training split out'
    )


def _find_images(path: Path, names: Sequence[str], first: str) -> Path:
    """Return the folder that the file names of an annotation file are relative to, by the first of them."""
    names = (*names, path.stem.removeprefix('instances_'))
    bases = [base for parent in (path.parent, path.parent.parent) for base in (parent, parent / 'images')]
    folders = [*bases, *(base / name for base in bases for name in names)]
    spellings = (first, first.replace('\\', '/'))  # the latter of Windows
    if found := next((folder for folder in folders for name in spellings if (folder / name).is_file()), None):
        return found
    raise ValueError(f'{path}: its first image, {first}, is in none of {", ".join(map(str, folders[:6]))}, ...')


def read_coco(
    root: Path, split: str, year: int | None = None, instances: bool = False, unannotated: str = 'keep'
) -> Annotations:
    """Read one split of COCO, or of files in its format.

    Args:
        root: Folder of the dataset; without a year, also one annotation file for all splits.
        split: One of `SPLITS`; without a year, any that has a file.
        year: 2014 or 2017; None for other files in this format.
        instances: Keep the number of objects per image and class.
        unannotated: What to do with images without annotations: 'keep' them as negatives of every class, or 'drop'.

    Raises:
        ValueError: If `unannotated` or the split is unknown, its file is missing or damaged, or an annotation refers to
            an image or a category that is not in the file.
    """
    if unannotated not in UNANNOTATED:
        raise ValueError(f'unannotated must be one of {UNANNOTATED}, got {unannotated!r}')
    if year is None:
        folder, path = '', find_annotations(root, split)
    elif split not in SPLITS:
        raise ValueError(f'COCO has no split {split!r} with labels, choose one of {sorted(SPLITS)}')
    else:
        folder = f'{SPLITS[split]}{year}'
        path = root / 'annotations' / f'instances_{folder}.json'
        if not path.is_file():
            raise ValueError(f'{path} is missing: unpack the annotations of COCO {year} into {root}')
    home = root if root.is_dir() else root.parent

    def build(_: Path | None) -> Annotations:
        return _read(home, path, folder, split_names(split), instances, unannotated)

    flags = [path.relative_to(home).as_posix(), folder, instances, unannotated]
    annotations = cached_annotations(home, 'coco', flags, [path], build)
    warn_about_case(annotations.class_names, path)
    return annotations


def _read(home: Path, path: Path, folder: str, names: Sequence[str], instances: bool, unannotated: str) -> Annotations:
    """Read an annotation file; images are in `folder` or, if that is empty, where the split's `names` lead to."""
    categories, parents, files, image_ids, category_ids, image, label = _read_entries(path)
    if not folder and files:
        folder = os.path.relpath(_find_images(path, names, next(iter(files.values()))), home)
    class_names = list(dict.fromkeys(categories.values()))
    _log_merged(categories, path)
    class_index = {name: index for index, name in enumerate(class_names)}
    label_index = {category: class_index[name] for category, name in categories.items()}
    shown = {categories[category] for category in category_ids if category in categories}
    if unlisted := sum(identifier not in image_ids for identifier in files):
        done = 'left out' if unannotated == 'drop' else 'kept, as negatives of every class'
        _logger.info(f'{path}: {unlisted:,} of {len(files):,} images have no annotation: {done}')
    kept = [identifier for identifier in files if unannotated == 'keep' or identifier in image_ids]
    image_index = {identifier: index for index, identifier in enumerate(kept)}
    images, labels = (
        np.array([index.get(identifier, -1) for identifier in ids], dtype=np.int32)[numbers]
        for index, ids, numbers in ((image_index, image_ids, image), (label_index, category_ids, label))
    )
    if len(unknown := np.flatnonzero((images < 0) | (labels < 0))):
        number = int(unknown[0])
        raise ValueError(
            f'{path}, annotations[{number}]: unknown image {[*image_ids][image[number]]!r} or category '
            f'{[*category_ids][label[number]]!r}'
        )
    annotations = Annotations(
        class_names,
        [normalize_path(f'{folder}/{files[identifier]}') for identifier in kept],
        images,
        labels,
        np.full(len(labels), POSITIVE, dtype=np.int8),
        instances=np.ones(len(labels), dtype=np.int32) if instances else None,
    )
    if empty := [name for name in class_names if name in parents and name not in shown]:
        annotations.warnings.append(
            f'{path}: {", ".join(map(repr, empty))} has no annotation and is the supercategory of others: it counts as '
            'a class with AP 0 unless it is removed from "categories"'
        )
    return annotations


class _Entries(NamedTuple):
    """What is used of a file; the annotations as two numbers each, those of the ids in the order of their first use."""

    categories: dict[Any, str]  # name of each id
    parents: set[str]  # names of the supercategories
    files: dict[Any, str]  # file name of each image id
    image_ids: dict[Any, int]  # number of each id in the annotations
    category_ids: dict[Any, int]
    image: array  # these numbers, [A]
    label: array


def _read_entries(path: Path) -> _Entries:
    found = _Entries({}, set(), {}, {}, {}, array('i'), array('i'))
    categories, parents, files, image_ids, category_ids, image, label = found
    missing = {'categories', 'images', 'annotations'}
    for key, entries in read_object(path):
        if key not in missing or not isinstance(entries, Iterator):
            continue
        missing.remove(key)
        try:
            for entry in entries:
                if key == 'annotations':
                    image.append(image_ids.setdefault(entry['image_id'], len(image_ids)))
                    label.append(category_ids.setdefault(entry['category_id'], len(category_ids)))
                elif key == 'images':
                    files[entry['id']] = entry['file_name']
                else:
                    categories[entry['id']] = normalize_name(entry['name'])
                    if entry.get('supercategory') not in (None, entry['name']):
                        parents.add(entry['supercategory'])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path} is not a complete COCO instances file: {error!r} in "{key}"') from error
    if missing:
        raise ValueError(f'{path} is not a complete COCO instances file: it has no list of {sorted(missing)}')
    return found


def _log_merged(categories: dict[int, str], path: Path) -> None:
    """Log the names that several categories share; these are one class."""
    ids: dict[str, list[int]] = {}
    for category, name in categories.items():
        ids.setdefault(name, []).append(category)
    for name, shared in ids.items():
        if len(shared) > 1:
            _logger.info(f'{path}: categories {", ".join(map(str, shared))} have the name {name!r}: they are one class')
