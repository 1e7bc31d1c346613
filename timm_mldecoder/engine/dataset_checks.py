"""Mistakes in the data that would otherwise train or score the wrong thing in silence."""

import logging
from pathlib import Path
from typing import Any

from timm.data.dataset_factory import _EVAL_SYNONYM, _TRAIN_SYNONYM

from timm_mldecoder.data import FORMATS, MultiLabelDataset

_logger = logging.getLogger(__name__)


def check_folder(dataset: str, root: str | None, split: str) -> None:
    """Raise a ValueError where an image folder, or the split asked for, is not there.

    timm takes the root itself where it finds no folder of the split's name. That is right for a root that holds the
    classes, and scores the training images too for one that holds other splits.
    """
    if dataset.partition('/')[0] in FORMATS or '/' in dataset or root is None:
        return
    path = Path(root)
    if not path.exists():
        raise ValueError(f'{root}: no such folder or tar file')
    if path.is_file():
        return
    synonyms = next((names for names in (_TRAIN_SYNONYM, _EVAL_SYNONYM) if split in names), {})
    present = {folder.name for folder in path.iterdir() if folder.is_dir()}
    splits = present & {*_TRAIN_SYNONYM, *_EVAL_SYNONYM, 'test'}
    if splits and split not in present and not present & {*synonyms}:
        raise ValueError(f'{root} has no folder {split!r}; it has {", ".join(sorted(splits))}')


def check_classes(dataset: Any, num_classes: int, asked_for: bool) -> None:
    """Hold the classes of a folder data set against those of the model.

    Args:
        dataset: The data set.
        num_classes: Classes of the model.
        asked_for: Whether the user gave that number; a model's own 1000 may be more than the data has.

    Raises:
        ValueError: If the numbers differ.
    """
    classes = class_to_index(dataset)
    if not classes or len(classes) == num_classes:
        return
    message = f'the data has {len(classes)} classes, the model {num_classes}; pass --num-classes {len(classes)}'
    if asked_for or len(classes) > num_classes or isinstance(dataset, MultiLabelDataset):
        raise ValueError(message)
    _logger.warning(message)


def check_same_classes(train: Any, validation: Any) -> None:
    """Raise a ValueError where two splits number their classes differently."""
    ours, theirs = class_to_index(train), class_to_index(validation)
    if ours is None or theirs is None or ours == theirs:
        return
    odd = sorted(set(ours) ^ set(theirs)) or sorted(name for name in ours if ours[name] != theirs[name])
    raise ValueError(f'the training and validation splits differ in their classes: {", ".join(odd[:5])}; the labels '
                     f'would not mean the same (every class needs an image in both, or use --class-map)')


def class_to_index(dataset: Any) -> dict[str, int] | None:
    """The class indices of a data set, None where it does not know them."""
    if isinstance(dataset, MultiLabelDataset):
        return {name: index for index, name in enumerate(dataset.class_names)}
    return getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
