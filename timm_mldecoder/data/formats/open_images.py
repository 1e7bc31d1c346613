"""Open Images (V4 to V7) as distributed: image-level labels verified by people, most classes not annotated.

    ROOT/*SPLIT-annotations-human-imagelabels.csv   columns ImageID, Source, LabelName and Confidence (1 or 0)
    ROOT/*class-descriptions.csv                    LabelName and display name, with or without a header
    ROOT/*classes-trainable.txt                     optional: the LabelNames to use, in order (9,605 in V6)
    ROOT/SPLIT/ImageID.jpg                          SPLIT is train, validation or test

The star stands for the version some files are named by (`oidv6-`). Without a list of trainable classes all described
ones are used. A class is positive (1), verified to be absent (0), or, most often, not annotated: -1.
"""

import csv
import logging
from array import array
from collections import Counter
from pathlib import Path

from timm_mldecoder.data.annotations import IGNORED, NEGATIVE, POSITIVE, Annotations
from timm_mldecoder.data.formats.names import read_names

_logger = logging.getLogger(__name__)

SPLITS = ('train', 'validation', 'test')
COLUMNS = ['ImageID', 'Source', 'LabelName', 'Confidence']
MEANINGS = {'1': POSITIVE, '0': NEGATIVE, '1.0': POSITIVE, '0.0': NEGATIVE}


def read_open_images(root: Path, split: str) -> Annotations:
    """Read one split of Open Images: the images with a verified label among the classes.

    Raises:
        ValueError: If the split is unknown, a file is missing or there are several, or a line is malformed or names an
            unknown label.
    """
    if split not in SPLITS:
        raise ValueError(f'Open Images has no split {split!r}, choose one of {sorted(SPLITS)}.')
    descriptions_path = _find(root, '*class-descriptions.csv')
    descriptions = read_descriptions(descriptions_path)
    trainable = _find(root, '*classes-trainable.txt', optional=True)
    labels = read_names(trainable) if trainable else list(descriptions)
    unknown = [label for label in labels if label not in descriptions]
    if unknown:
        raise ValueError(f'{trainable}: no description in {descriptions_path} for {unknown}.')
    label_index = {label: index for index, label in enumerate(labels)}

    image_index: dict[str, int] = {}
    image, label, value = array('i'), array('i'), array('b')  # tens of millions of entries
    skipped = 0
    path = _find(root, f'*{split}-annotations-human-imagelabels.csv')
    with path.open(newline='', encoding='utf-8') as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if header != COLUMNS:
            raise ValueError(f'{path}, line 1: expected the header {COLUMNS}, got {header}.')
        for row in reader:
            name, confidence = row[2:] if len(row) == len(COLUMNS) else (None, None)
            if name not in descriptions or confidence not in MEANINGS:
                raise ValueError(
                    f'{path}, line {reader.line_num}: expected a label of {descriptions_path.name} and a confidence of '
                    f'0 or 1, got {row}.'
                )
            if name not in label_index:
                skipped += 1
                continue
            image.append(image_index.setdefault(row[0], len(image_index)))
            label.append(label_index[name])
            value.append(MEANINGS[confidence])
    if skipped:
        _logger.info(f'{path.name}: left {skipped} labels out that are not in {trainable.name}.')
    paths = [f'{split}/{identifier}.jpg' for identifier in image_index]
    return Annotations([descriptions[name] for name in labels], paths, image, label, value, unlisted=IGNORED)


def read_descriptions(path: Path) -> dict[str, str]:
    """Class name of each LabelName: the display name, with the LabelName where several share it.

    Raises:
        ValueError: If a line does not hold two fields.
    """
    names = {}
    with path.open(newline='', encoding='utf-8') as file:
        reader = csv.reader(file)
        for row in reader:
            if len(row) != 2:
                raise ValueError(f'{path}, line {reader.line_num}: expected a label and its name, got {row}.')
            if row[0].startswith('/'):  # not so the header
                names[row[0]] = row[1]
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    return {label: f'{name} ({label})' if name in shared else name for label, name in names.items()}


def _find(root: Path, pattern: str, optional: bool = False) -> Path | None:
    """The one file in a folder that fits a pattern."""
    found = sorted(root.glob(pattern))
    if len(found) == 1:
        return found[0]
    if not found and optional:
        return None
    raise ValueError(f'Expected one file {pattern} in {root}, found {[path.name for path in found]}.')
