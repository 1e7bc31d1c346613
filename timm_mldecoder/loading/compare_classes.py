"""Do the classes of two splits, of a split and a model, or of a split and a checkpoint agree in number and order?"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset

from timm_mldecoder.data import MultiLabelDataset, class_to_index
from timm_mldecoder.data.class_order import alike
from timm_mldecoder.data.formats.class_folders import class_name
from timm_mldecoder.data.images import is_clutter

_logger = logging.getLogger(__name__)

HIDDEN = ('__MACOSX', '__pycache__', '@eaDir', 'lost+found')  # folders that systems leave behind
SEPARATORS = (',', '|', '/', '\t', ' ')  # of labels, elsewhere


def number_of_classes(dataset: Dataset) -> int | None:
    """Return the number of classes of a dataset, None if it does not report them."""
    return len(class_to_index(dataset) or ()) or None


def check_classes(dataset: Any, num_classes: int, given: bool) -> None:
    """Compare the number of classes of a dataset with the model's.

    One that the user has not `given`, such as a model's own 1000, may exceed the data's.

    Raises:
        ValueError: If the numbers differ.
    """
    classes = class_to_index(dataset)
    if not classes:
        return
    empty = ', '.join(_folders_without_images(dataset))
    if len(classes) == num_classes:
        if empty:
            _logger.warning(f'ignoring class folders without images: {empty}')
        return
    message = f'the data has {len(classes)} classes ({_shown(classes)}), the model {num_classes}'
    causes = [*likely_causes(list(classes)), *([f'no images are in {empty}'] if empty else [])]
    if causes:
        message += f': {"; ".join(causes)}'
    else:
        message += ': compare these names with those you expect; without --num-classes, train.py reads their number'
    if given or len(classes) > num_classes or isinstance(dataset, MultiLabelDataset):
        raise ValueError(message)
    _logger.warning(message)


def likely_causes(names: Sequence[str]) -> list[str]:
    """Return what class names tell about mistakes in the data: hidden folders, stray quotes, separators, case."""
    causes = []
    hidden = [name for name in names if name.startswith('.') or name in HIDDEN]
    if hidden:
        causes.append(f'{_shown(hidden)} is no class but a hidden folder: remove it')
    quoted = [name for name in names if '\n' in name or name.count('"') % 2]
    if quoted:
        causes.append(f'a stray quote in the file joins lines into the label {_shown(quoted[:1])}')
    for separator in SEPARATORS:
        parts = {name: [part.strip(' \'"[]') for part in name.split(separator)] for name in names if separator in name}
        joined = [name for name, split in parts.items() if len(split) > 1 and set(split) & ({*names} - {name})]
        if joined:
            causes.append(f'{_shown(joined[:1])} looks like several labels with {separator!r} between: separate by ;')
    if groups := alike(names):
        causes.append(f'names differ only in case or leading zeros: {_shown(groups[0])}')
    return causes


def check_same_classes(train: Any, validation: Any) -> None:
    """Number the classes of folders or tars for validation as in training; some may have no image there.

    Raises:
        ValueError: If two splits number their classes differently.
    """
    ours = class_to_index(train)
    if not isinstance(validation, MultiLabelDataset):
        use_classes_of(validation, list(ours or ()), 'in training')
    theirs = class_to_index(validation)
    if ours is None or theirs is None or ours == theirs:
        return
    odd = sorted(set(ours) ^ set(theirs)) or sorted(name for name in ours if ours[name] != theirs[name])
    raise ValueError(
        f'the training and validation splits differ in their classes ({", ".join(odd[:5])}), so their labels differ in '
        'meaning: give every class an image in both, or pass --class-map'
    )


def use_classes_of(dataset: Any, trained: Sequence[str], where: str = 'in the checkpoint') -> None:
    """Number the classes of a dataset as in `trained` if all of them are there: some may have no image here."""
    present = list(class_to_index(dataset) or ())
    if not present or not trained or present == list(trained):
        return
    needed = present
    if isinstance(dataset, MultiLabelDataset):
        needed = [present[index] for index in np.flatnonzero(dataset.annotations.class_counts()).tolist()]
    if not {*needed} <= {*trained}:
        return
    reader: Any = getattr(dataset, 'reader', None)
    numbers = {name: number for number, name in enumerate(trained)}
    if isinstance(dataset, MultiLabelDataset):
        dataset.annotations = dataset.annotations.with_classes(trained)
    elif isinstance(reader, ReaderImageFolder):
        reader.samples = [(path, numbers[present[target]]) for path, target in reader.samples]
        reader.class_to_idx = numbers
    elif hasattr(reader, 'class_name_to_idx'):  # of tar files
        reader.targets = np.array([numbers[present[target]] for target in reader.targets.tolist()])
        reader.class_to_idx = reader.class_name_to_idx = numbers
        reader.class_idx_to_name = dict(enumerate(trained))
    else:
        return
    _logger.info(f'classes are numbered as {where}')
    if without := _shown(name for name in trained if name not in present):
        text = f'the data has no {without}'
        if isinstance(dataset, MultiLabelDataset):
            text += ', which count as absent from every image, so that each prediction of them is wrong'
        _logger.warning(text)


def check_class_names(dataset: Any, trained: list[str] | None) -> None:
    """Raise ValueError if a dataset numbers its classes differently from the one that a checkpoint was trained on."""
    present = list(class_to_index(dataset) or ())
    if not trained or not present or present == trained:
        return
    differ = (index for index, pair in enumerate(zip(present, trained, strict=False)) if pair[0] != pair[1])
    index = next(differ, min(len(present), len(trained)))
    ours, theirs = (repr(names[index]) if index < len(names) else 'missing' for names in (present, trained))
    unknown = [name for name in present if name not in trained]
    remedy = 'pass the names in the order of the checkpoint, one per line, as --class-map'
    if unknown:
        remedy = f'the model was not trained on {_shown(unknown)}; leave these labels out, or train again with them'
    raise ValueError(
        f'class {index} is {ours} in the data and {theirs} in the checkpoint, so labels differ in meaning: {remedy}'
    )


def _folders_without_images(dataset: Any) -> list[str]:
    """Return the folders beside those of the classes that hold neither images nor folders."""
    reader = getattr(dataset, 'reader', None)
    if not isinstance(reader, ReaderImageFolder):
        return []
    folders = (path for path in Path(reader.root).iterdir() if path.is_dir() and not is_clutter(path.name))
    return sorted(
        path.name
        for path in folders
        if class_name(path.name) not in reader.class_to_idx and not any(child.is_dir() for child in path.iterdir())
    )


def _shown(names: Iterable[str]) -> str:
    names = [repr(name if len(name) <= 40 else f'{name[:40]}...') for name in names]
    return ', '.join(names[:10]) + (', ...' if len(names) > 10 else '')
