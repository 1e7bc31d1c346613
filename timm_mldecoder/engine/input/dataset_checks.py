"""Mistakes in the data that would otherwise train or score the wrong thing in silence."""

import logging
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.dataset_factory import _EVAL_SYNONYM, _TRAIN_SYNONYM
from timm.data.readers.reader_image_folder import ReaderImageFolder

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


def check_image_mode(dataset: str, mode: str, channels: int) -> None:
    """Raise a ValueError where images come with other channels than the model takes; torchvision's have their own."""
    if dataset.lower().startswith('torch/'):
        return
    try:
        found = Image.getmodebands(mode)
    except KeyError as error:
        raise ValueError(f'--input-img-mode {mode}: Pillow has no such mode') from error
    if found != channels:
        raise ValueError(
            f'the model takes {channels} channels, images are read as {mode}, with {found}; pass another '
            '--in-chans or --input-img-mode (L has 1 channel, LA 2, RGB 3, RGBA and CMYK 4)'
        )


def check_image_size(model: Any, input_size: tuple[int, int, int]) -> None:
    """Raise a ValueError where images [C, H, W] have not the one size that a model is built for."""
    patches = getattr(model, 'patch_embed', None)
    size = getattr(patches, 'img_size', None)
    if getattr(patches, 'strict_img_size', False) and size and tuple(size) != tuple(input_size[1:]):
        raise ValueError(
            f'the model takes images of {size[0]} x {size[1]}, they have {input_size[1]} x '
            f'{input_size[2]}; pass --img-size {size[0]}, or --model-kwargs img_size={input_size[1]}'
        )


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
    if not classes:
        return
    empty = ', '.join(_folders_without_images(dataset))
    if len(classes) == num_classes:
        if empty:
            _logger.warning(f'No class, for want of images: {empty}')
        return
    message = f'the data has {len(classes)} classes, the model {num_classes}; pass --num-classes {len(classes)}'
    if empty:
        message += f', or put images into {empty}'
    if asked_for or len(classes) > num_classes or isinstance(dataset, MultiLabelDataset):
        raise ValueError(message)
    _logger.warning(message)


def check_same_classes(train: Any, validation: Any) -> None:
    """Raise a ValueError where two splits number their classes differently."""
    ours, theirs = class_to_index(train), class_to_index(validation)
    if ours is None or theirs is None or ours == theirs:
        return
    odd = sorted(set(ours) ^ set(theirs)) or sorted(name for name in ours if ours[name] != theirs[name])
    raise ValueError(
        f'the training and validation splits differ in their classes: {", ".join(odd[:5])}; the labels '
        f'would not mean the same (every class needs an image in both, or use --class-map)'
    )


def check_class_names(dataset: Any, trained: list[str] | None) -> None:
    """Raise a ValueError where a data set numbers its classes otherwise than the one that a model was trained on."""
    present = list(class_to_index(dataset) or ())
    if not trained or not present or present == trained:
        return
    index = next(
        (index for index, pair in enumerate(zip(present, trained, strict=False)) if pair[0] != pair[1]),
        min(len(present), len(trained)),
    )
    ours, theirs = (repr(names[index]) if index < len(names) else 'missing' for names in (present, trained))
    raise ValueError(
        f'class {index} of the data is {ours}, of the checkpoint {theirs}: labels would not mean the '
        'same; pass a file of the names in the order of the checkpoint as --class-map'
    )


def _folders_without_images(dataset: Any) -> list[str]:
    """The folders beside those of the classes that hold no image, and no folders either."""
    reader = getattr(dataset, 'reader', None)
    if not isinstance(reader, ReaderImageFolder):
        return []
    folders = (path for path in Path(reader.root).iterdir() if path.is_dir() and not path.name.startswith('.'))
    return sorted(
        path.name
        for path in folders
        if path.name not in reader.class_to_idx and not any(child.is_dir() for child in path.iterdir())
    )


def class_to_index(dataset: Any) -> dict[str, int] | None:
    """The class indices of a data set, None where it does not know them."""
    if isinstance(dataset, MultiLabelDataset):
        return {name: index for index, name in enumerate(dataset.class_names)}
    return getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
