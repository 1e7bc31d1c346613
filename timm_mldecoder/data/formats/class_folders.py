"""A folder or tar file with one folder of images per class, as timm reads it, with this package's rule of images.

timm reads png, jpg and jpeg alone, takes hidden folders such as `.ipynb_checkpoints` for classes, and merges folders
of one name in different places into one class.
"""

import logging
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from timm.data import ImageDataset
from timm.data.dataset_factory import _search_split
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from timm_mldecoder.data.class_order import sort_key
from timm_mldecoder.data.images import SUFFIXES, find_images, is_image, log_ignored
from timm_mldecoder.data.text_files import SPLITS, normalize_name, split_name, split_names

_logger = logging.getLogger(__name__)


def split_folder(root: str, split: str) -> str:
    """Return the folder of a split as timm finds it, or else in any case (`Train`, `VAL`); the root without one."""
    found = _search_split(root, split)
    if found != root or not os.path.isdir(root):
        return found
    names = [name.lower() for name in split_names(split)]
    for path in sorted(Path(root).iterdir()):
        if path.name.lower() in names and path.is_dir():
            return os.path.join(root, path.name)
    return root


def class_name(folder: str) -> str:
    """Class of the images in a folder: its own name, normalized as in every reader."""
    name = PurePosixPath(folder).name
    return normalize_name(name) or name


def check_leaves(where: str | os.PathLike, folders: Iterable[str]) -> None:
    """Raise ValueError if two folders with images have one class name, in either Unicode form."""
    first: dict[str, str] = {}
    folders = sorted(folders)
    for depth in (0, 1):
        splits = {parts[depth] for folder in folders if len(parts := folder.split('/')) > depth + 1}
        if len(splits) > 1 and all(split_name(name) in SPLITS for name in splits):
            inner = os.path.join(where, folders[0].split('/')[0]) if depth else ''
            remedy = f'give {inner}' if depth else 'name the folder that has them, or --train-split and --val-split'
            if os.path.isfile(where):
                remedy = 'unpack it, or make a tar of each and pass --train-split train.tar --val-split validation.tar'
            raise ValueError(f'{where}: the folders {", ".join(sorted(splits))} are splits, not classes: {remedy}')
    for folder in folders:
        other = first.setdefault(class_name(folder), folder)
        if other != folder:
            raise ValueError(
                f'{where}: the folders {other} and {folder} are one class by their name {class_name(folder)!r}; '
                'rename them, such as church_indoor, or put the images into one folder'
            )


class ClassFolders(ReaderImageFolder):
    """timm's reader of class folders, over the images of `find_images`."""

    def __init__(self, root: str, class_map: Any = '') -> None:  # timm's own walk is not run
        self.root = root
        names = find_images(root)
        folders = [str(PurePosixPath(name).parent) if '/' in name else '' for name in names]
        check_leaves(root, set(folders))
        present = set(folders)
        if inner := sorted(folder for folder in present if str(PurePosixPath(folder).parent) in present - {'', '.'}):
            _logger.warning(
                f'{root}: {inner[0]} is a folder within a class, and a class of its own, as in timm; move its images '
                f'up if it is not ({len(inner)} such folders)'
            )
        labels = [class_name(folder) for folder in folders]
        if class_map:
            known = load_class_map(class_map, root)
            self.class_to_idx = {normalize_name(name): index for name, index in known.items()}
        else:
            ordered = sorted(set(labels), key=sort_key)
            self.class_to_idx = {label: index for index, label in enumerate(ordered)}
        samples = [
            (os.path.join(root, name), self.class_to_idx[label])
            for name, label in zip(names, labels, strict=True)
            if label in self.class_to_idx
        ]
        self.samples = sorted(samples, key=lambda sample: sort_key(sample[0]))
        if not self.samples:
            tars = sorted(path.name for path in Path(root).glob('*.tar'))
            remedy = f'; a tar of them is named by --train-split {tars[0]}' if tars else ''
            remedy = ': unpack it' if os.path.isfile(root) else remedy
            raise ValueError(
                f'{root}: no images in class folders (.png, .jpg, .webp, .tif and what else Pillow reads){remedy}'
            )


def create_folder_dataset(
    root: str | os.PathLike,
    split: str,
    class_map: Any = '',
    load_bytes: bool = False,
    search_split: bool = True,
    **options: Any,
) -> ImageDataset:
    """timm's dataset of a folder of class folders or a tar file; see `timm.data.create_dataset`."""
    root = os.fspath(root)
    if search_split and os.path.isdir(root):
        root = split_folder(root, split)
    is_tar = os.path.isfile(root) and root.lower().endswith('.tar')
    reader = (read_tar if is_tar else ClassFolders)(root, class_map or '')
    known = ('input_img_mode', 'transform', 'target_transform')
    settings = {name: options[name] for name in known if name in options}
    return ImageDataset(root, reader=reader, load_bytes=load_bytes, **settings)


def read_tar(root: str, class_map: Any = '') -> ReaderImageInTar:
    """timm's reader of tar files, with the rule of `is_image`."""
    timms = get_img_extensions()
    set_img_extensions(SUFFIXES)
    try:
        reader: Any = ReaderImageInTar(root, class_map=class_map)
    finally:
        set_img_extensions(timms)
    kept = np.array([is_image(sample[0].path) for sample in reader.samples], dtype=bool)
    log_ignored(root, [sample[0].path for sample in reader.samples[~kept]])
    if not kept.any():
        raise ValueError(f'{root}: no images in the tar files')
    names = {index: name for name, index in reader.class_name_to_idx.items()}
    reader.samples, reader.targets = reader.samples[kept], reader.targets[kept]
    if Path(root).is_file():
        check_leaves(root, {str(PurePosixPath(sample[0].path).parent) for sample in reader.samples})
    if not class_map:
        present = sorted({names[target] for target in reader.targets.tolist()}, key=sort_key)
        reader.class_name_to_idx = {name: index for index, name in enumerate(present)}
        reader.class_idx_to_name = dict(enumerate(present))
        reader.targets = np.array([reader.class_name_to_idx[names[target]] for target in reader.targets.tolist()])
    reader.class_to_idx = reader.class_name_to_idx  # the name of timm's other readers
    return reader
