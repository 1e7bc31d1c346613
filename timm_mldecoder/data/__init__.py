"""Datasets in the formats they are published in, beside timm's own."""

from functools import partial
from pathlib import Path

import timm.data

from timm_mldecoder.data.annotations import Annotations, MultiLabelDataset
from timm_mldecoder.data.formats import torchvision_sets
from timm_mldecoder.data.formats.coco import read_coco
from timm_mldecoder.data.formats.csv_list import read_csv
from timm_mldecoder.data.formats.nus_wide import read_nus_wide
from timm_mldecoder.data.formats.open_images import read_open_images
from timm_mldecoder.data.formats.voc import read_voc

# name: reader of (root, split) that gives the annotations of one split
FORMATS = {
    'coco2014': partial(read_coco, year=2014),
    'coco2017': partial(read_coco, year=2017),
    'voc2007': partial(read_voc, year=2007),
    'voc2012': partial(read_voc, year=2012),
    'openimages': read_open_images,
    'nuswide': read_nus_wide,
    'csv': read_csv,
}
# Options of timm.data.create_dataset: how its streaming readers shuffle and batch, without a meaning for files on disk,
_MEANINGLESS = {'search_split', 'batch_size', 'seed', 'repeats', 'trust_remote_code'}
# those for the reader of one format,
_READER_OPTIONS = {'csv': {'class_map'}}
# and the rest, which it is better to refuse than to ignore.
_REFUSED = {'class_map', 'download', 'load_bytes', 'num_samples', 'input_key', 'target_key'}

__all__ = ['FORMATS', 'Annotations', 'MultiLabelDataset', 'create_dataset']


def create_dataset(name: str, root: str | None = None, split: str = 'validation', is_training: bool = False, **kwargs):
    """`timm.data.create_dataset` with this package's multi-label formats added.

    Args:
        name: One of `FORMATS` for a `MultiLabelDataset`, or `torch/stanford_cars`; anything else is passed to timm.
        root: Folder of the data.
        split: `train`, `validation`, or what else the format has; `val` is short for `validation`.
        is_training: Whether the images are to train on (timm's streaming readers shuffle then).
        **kwargs: Options of `timm.data.create_dataset`.

    Raises:
        ValueError: If the folder does not exist, the split is unknown, an annotation file is malformed, or an option
            has no meaning for the format.
    """
    if name in torchvision_sets.FILES and not kwargs.get('download'):
        torchvision_sets.check_files(name, root, split)
    if name == 'torch/stanford_cars':
        return torchvision_sets.create_stanford_cars(root, split)
    if name not in FORMATS:
        return timm.data.create_dataset(name, root=root, split=split, is_training=is_training, **kwargs)

    options = {option: value for option, value in kwargs.items() if value and option not in _MEANINGLESS}
    reader_options = {option: options.pop(option) for option in _READER_OPTIONS.get(name, ()) if option in options}
    refused = sorted(_REFUSED & options.keys())
    if refused:
        raise ValueError(f'Dataset {name!r} has no option {refused}: its files are read as they are distributed.')
    if root is None or not Path(root).is_dir():
        raise ValueError(f'Dataset {name!r} needs the folder of its files; {str(root)!r} is not a folder.')
    split = {'val': 'validation'}.get(split, split)
    return MultiLabelDataset(FORMATS[name](Path(root), split, **reader_options), root, **options)
