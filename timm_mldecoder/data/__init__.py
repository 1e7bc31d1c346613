"""Datasets in the formats they are published in, beside timm's own."""

from pathlib import Path

import timm.data

from timm_mldecoder.data.annotations import Annotations, MultiLabelDataset
from timm_mldecoder.data.csv_list import read_csv

# name: reader of (root, split, class_map), giving the annotations of one split
FORMATS = {
    'csv': read_csv,
}
# Options of timm.data.create_dataset that only its streaming and downloading readers have a use for ...
_MEANINGLESS_HERE = {'search_split', 'batch_size', 'seed', 'repeats', 'is_training', 'trust_remote_code'}
# ... and those the user will be told about rather than see ignored.
_UNSUPPORTED_HERE = ('download', 'load_bytes', 'num_samples', 'input_key', 'target_key')

__all__ = ['FORMATS', 'Annotations', 'MultiLabelDataset', 'create_dataset']


def create_dataset(name: str, root: str | None = None, split: str = 'validation', is_training: bool = False, **kwargs):
    """`timm.data.create_dataset` with this package's multi-label formats added.

    Args:
        name: One of `FORMATS` for a `MultiLabelDataset`, anything else is passed to timm unchanged.
        root: Folder of the data.
        split: `train`, `validation`, or what else the format has; `val` is short for `validation`.
        is_training: Whether the images are to train on (timm's streaming readers shuffle then).
        **kwargs: Options of `timm.data.create_dataset`.

    Raises:
        ValueError: If the folder does not exist, the split is unknown, an annotation file is malformed, or an option
            has no meaning for the format.
    """
    if name not in FORMATS:
        return timm.data.create_dataset(name, root=root, split=split, is_training=is_training, **kwargs)

    refused = [option for option in _UNSUPPORTED_HERE if kwargs.pop(option, None)]
    if refused:
        raise ValueError(f'Dataset {name!r} has no option {refused}: its files are read from disk as they are.')
    if root is None or not Path(root).is_dir():
        raise ValueError(f'Dataset {name!r} needs the folder of its files; {str(root)!r} is not a folder.')
    split = {'val': 'validation'}.get(split, split)
    annotations = FORMATS[name](Path(root), split, kwargs.pop('class_map', None) or None)
    options = {key: value for key, value in kwargs.items() if key not in _MEANINGLESS_HERE and value is not None}
    return MultiLabelDataset(annotations, **options)
