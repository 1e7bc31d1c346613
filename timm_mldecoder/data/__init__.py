"""Datasets in the formats they are published in, beside those of timm."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import timm.data

from timm_mldecoder.data.annotations import Annotations, MultiLabelDataset
from timm_mldecoder.data.class_order import one_order, warn_about_case
from timm_mldecoder.data.formats import torchvision_sets
from timm_mldecoder.data.formats.class_folders import create_folder_dataset
from timm_mldecoder.data.formats.coco import read_coco
from timm_mldecoder.data.formats.csv_list import read_csv
from timm_mldecoder.data.formats.json_list import read_json
from timm_mldecoder.data.formats.nus_wide import read_nus_wide
from timm_mldecoder.data.formats.open_images import read_open_images
from timm_mldecoder.data.formats.records import check_stream, name_targets, training_split
from timm_mldecoder.data.formats.voc import read_voc
from timm_mldecoder.data.missing_images import apply_policy, with_paths_on_disk
from timm_mldecoder.data.same_files import merge_same_files
from timm_mldecoder.data.summary import DatasetSummary, class_to_index, cooccurrence, overlap, summarize

# name: reader of (root, split) that returns the annotations of one split, and the names of its options
FORMATS = {
    'coco': (read_coco, {'instances', 'unannotated'}),
    'coco2014': (partial(read_coco, year=2014), {'instances', 'unannotated'}),
    'coco2017': (partial(read_coco, year=2017), {'instances', 'unannotated'}),
    'voc2007': (partial(read_voc, year=2007), {'instances', 'difficult'}),
    'voc2012': (partial(read_voc, year=2012), {'instances', 'difficult'}),
    'openimages': (read_open_images, set()),
    'nuswide': (read_nus_wide, set()),
    'json': (read_json, {'instances'}),
    'csv': (read_csv, {'class_map', 'path_column', 'label_column', 'label_separator', 'split_column'}),
}
# Datasets of timm: an image folder or tar file, and the prefixes of its other readers.
TIMM_FOLDERS = ('', 'folder', 'imagefolder', 'image_folder', 'tar', 'imagetar', 'image_tar')
TIMM_PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
DATASET_OPTIONS = {'transform', 'target_transform', 'input_img_mode'}
# Options of timm.data.create_dataset that steer its streaming readers, without a meaning for files on disk.
STREAMING_OPTIONS = {'search_split', 'batch_size', 'seed', 'repeats', 'trust_remote_code'}

__all__ = [
    'FORMATS',
    'Annotations',
    'DatasetSummary',
    'MultiLabelDataset',
    'class_to_index',
    'cooccurrence',
    'create_dataset',
    'overlap',
    'summarize',
]


def create_dataset(
    name: str,
    root: str | None = None,
    split: str = 'validation',
    is_training: bool = False,
    missing: str | None = 'error',
    **kwargs,
):
    """`timm.data.create_dataset` with the multi-label formats of this package added.

    Args:
        name: One of `FORMATS` for a `MultiLabelDataset`, or `torch/stanford_cars`; timm's names are passed to timm.
        root: Folder of the dataset; for `csv`, `json` and `coco` also one file for all splits.
        split: `train`, `validation`, or another that the format has; `val` is short for `validation`.
        is_training: Whether the images are to train on (timm's streaming readers shuffle then).
        missing: For `FORMATS`, what to do about images that are not on disk: 'error' refuses them, 'skip' leaves them
            out with a warning, None does not check.
        **kwargs: Options of `timm.data.create_dataset`; those of a format (`instances`, `difficult`,
            `unannotated`, `class_map`, `split_column`).

    Raises:
        ValueError: If the name, the folder or the split does not exist, an annotation file is malformed, images are
            missing, or an option has no meaning for the format.
    """
    if name in torchvision_sets.CIFAR:
        return _create_cifar(name, root, split, is_training, **kwargs)
    if name == torchvision_sets.CARS:
        return torchvision_sets.create_stanford_cars(root, split, kwargs.get('download', False))
    if name not in FORMATS:
        return _create_timm_dataset(name, root, split, is_training, **kwargs)

    reader: Any
    reader, known = FORMATS[name]
    options = {option: value for option, value in kwargs.items() if value and option not in STREAMING_OPTIONS}
    refused = sorted(options.keys() - DATASET_OPTIONS - known)
    if refused:
        raise ValueError(f'dataset {name!r} has no option {refused}, it has {sorted(known)}')
    is_table = name in ('csv', 'json', 'coco') and root is not None and Path(root).is_file()
    if root is None or not (Path(root).is_dir() or is_table):
        found = 'not a folder' if root is not None and Path(root).exists() else 'not there'
        raise ValueError(f'dataset {name!r} needs the folder of its files; {str(root)!r} is {found}')
    split = {'val': 'validation'}.get(split, split)
    annotations = reader(Path(root), split, **{option: options.pop(option) for option in known & options.keys()})
    root = os.path.dirname(root) if is_table else root
    annotations = with_paths_on_disk(annotations, root)
    if missing is not None:
        annotations = apply_policy(annotations, root, missing)
    annotations = merge_same_files(annotations, root)
    return MultiLabelDataset(annotations, root, **options)


def _create_timm_dataset(name: str, root: str | None, split: str, is_training: bool, **kwargs):
    """A dataset of a folder, a tar file or one of timm's readers, with the classes in one order."""
    prefix, slash, _ = name.lower().partition('/')
    if prefix not in (TIMM_PREFIXES if slash else TIMM_FOLDERS):
        readers = ', '.join(f'{prefix}/...' for prefix in TIMM_PREFIXES)
        raise ValueError(f"unknown dataset {name!r}, choose one of {', '.join(FORMATS)}, '' (folder), {readers}")
    if name.endswith('/') and prefix != 'wds':  # WebDataset shards need no name
        raise ValueError(f'dataset {name!r} lacks a name after the slash')
    if not slash and root is not None:
        dataset = create_folder_dataset(root, split, **kwargs)
        if not kwargs.get('class_map'):
            warn_about_case(class_to_index(dataset) or (), f'{root}, {split}')
        return dataset
    separator = kwargs.pop('label_separator', '')
    with one_order():
        dataset = timm.data.create_dataset(name, root=root, split=split, is_training=is_training, **kwargs)
    if prefix == 'hfds':
        _check_columns(name, dataset.reader)
    several = kwargs.get('target_format') is not None
    if prefix == 'hfids':
        check_stream(dataset.reader, name, several)
    if prefix in ('hfds', 'wds'):
        return name_targets(dataset, name, several, lambda: training_split(name, root, split, **kwargs), separator)
    return dataset


def _check_columns(name: str, reader) -> None:
    """Raise a ValueError if a Hugging Face dataset lacks the columns of images or targets; timm fails at an image."""
    columns = [column for column in reader.dataset.column_names if column != reader.image_key]
    # timm's cast to images adds a column of None
    table = reader.dataset.data
    if len(table) and table.column(reader.image_key).null_count == len(table):
        raise ValueError(f'dataset {name!r} has no column {reader.image_key!r}: pass --input-key, one of {columns}')
    missing = [key for key in reader.target_keys or [reader.label_key] if key.partition('/')[0] not in columns]
    if missing:
        raise ValueError(f'dataset {name!r} has no column {missing}: pass --target-key, of {columns}')


def _create_cifar(name: str, root: str | None, split: str, is_training: bool, **kwargs):
    try:
        return timm.data.create_dataset(name, root=root or '', split=split, is_training=is_training, **kwargs)
    except (RuntimeError, OSError):  # torchvision does not say which file is missing or damaged
        if not kwargs.get('download'):
            torchvision_sets.check_cifar(name, root)
        raise
