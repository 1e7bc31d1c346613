"""MS-COCO as distributed, and files in its format as tools export them, for multi-label classification.

    ROOT/annotations/instances_{train,val}{2014,2017}.json      coco2014, coco2017
    ROOT/{train,val}{2014,2017}/*.jpg

    ROOT/{train,valid,test}/_annotations.coco.json              coco: the `LAYOUTS`, or one file for all splits
    ROOT/{train,valid,test}/*.jpg

The classes are the names of the categories in the order of the annotation file (80, without the unused ids). Objects of
every size, also crowds, count. Images without annotations show none of the classes; the published results leave them
out (82,081 images for training and 40,137 for validation in 2014), as `unannotated='drop'` does.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from timm_mldecoder.data.annotations import POSITIVE, Annotations, cached_annotations
from timm_mldecoder.data.text_files import normalize_name, normalize_path, split_names, warn_about_case

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
    return cached_annotations(home, 'coco', flags, [path], build)


def _read(home: Path, path: Path, folder: str, names: Sequence[str], instances: bool, unannotated: str) -> Annotations:
    """Read an annotation file; images are in `folder` or, if that is empty, where the split's `names` lead to."""
    try:
        content = json.loads(path.read_bytes())
        categories = {category['id']: normalize_name(category['name']) for category in content['categories']}
        parents = {c.get('supercategory') for c in content['categories'] if c.get('supercategory') != c['name']}
        files = {image['id']: image['file_name'] for image in content['images']}
        objects = [(entry['id'], entry['image_id'], entry['category_id']) for entry in content['annotations']]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path} is not a complete COCO instances file: {error!r}') from error

    if not folder and files:
        folder = os.path.relpath(_find_images(path, names, next(iter(files.values()))), home)
    class_names = list(dict.fromkeys(categories.values()))
    _log_merged(categories, path)
    warn_about_case(class_names, path)
    class_index = {name: index for index, name in enumerate(class_names)}
    label_index = {category: class_index[name] for category, name in categories.items()}
    for annotation, image, category in objects:
        if image not in files or category not in label_index:
            raise ValueError(f'{path}, annotation {annotation}: unknown image {image} or category {category}')
    shown = {categories[category] for _, _, category in objects}
    if empty := [name for name in class_names if name in parents and name not in shown]:
        _logger.warning(
            f'{path}: {", ".join(map(repr, empty))} has no annotation and is the supercategory of others: it counts as '
            'a class with AP 0 unless it is removed from "categories"'
        )
    annotated = {image for _, image, _ in objects}
    if len(annotated) < len(files):
        done = 'left out' if unannotated == 'drop' else 'kept, as negatives of every class'
        _logger.info(f'{path}: {len(files) - len(annotated):,} of {len(files):,} images have no annotation: {done}')
    kept = [image for image in files if unannotated == 'keep' or image in annotated]
    image_index = {image: index for index, image in enumerate(kept)}
    return Annotations(
        class_names,
        [normalize_path(f'{folder}/{files[image]}') for image in image_index],
        image=[image_index[image] for _, image, _ in objects],
        label=[label_index[category] for _, _, category in objects],
        value=[POSITIVE] * len(objects),
        instances=[1] * len(objects) if instances else None,
    )


def _log_merged(categories: dict[int, str], path: Path) -> None:
    """Log the names that several categories share; these are one class."""
    ids: dict[str, list[int]] = {}
    for category, name in categories.items():
        ids.setdefault(name, []).append(category)
    for name, shared in ids.items():
        if len(shared) > 1:
            _logger.info(f'{path}: categories {", ".join(map(str, shared))} have the name {name!r}: they are one class')
