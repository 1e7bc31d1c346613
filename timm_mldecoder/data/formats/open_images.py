"""Open Images (V4 to V7): image-level labels verified by people, most classes of an image not annotated.

As distributed:

    ROOT/*SPLIT-annotations-human-imagelabels.csv   columns ImageID, Source, LabelName and Confidence (1 or 0)
    ROOT/*class-descriptions.csv                    LabelName and display name, with or without a header
    ROOT/*classes-trainable.txt                     optional: the LabelNames to use, in order (9,605 in V6)
    ROOT/SPLIT/ImageID.jpg                          SPLIT is train, validation or test

The star stands for the version that some files are named by (`oidv6-`); V7 writes `val` for the validation split.
Without a list of trainable classes all described ones are used.

As distributed for the class-aware selective loss (CSL, arXiv 2110.10955):

    ROOT/data.csv               image path, present and absent LabelNames as two lists, ..., split (train, val, test)
    ROOT/mid_to_classes.pth     dictionary of LabelName and display name, in the order of the classes

A class is positive (1), verified to be absent (0), or, most often, not annotated (-1). The labels (57 million for
training) are read with pyarrow, several times as fast as Python's csv module reads. Without pyarrow the csv module is
used; both give the same table.
"""

import logging
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from timm_mldecoder.data.annotations import IGNORED, NEGATIVE, POSITIVE, Annotations, cached_annotations
from timm_mldecoder.data.compact import Paths, Table, make_table
from timm_mldecoder.data.text_files import normalize_name, read_names, read_rows
from timm_mldecoder.data.word_embeddings import load_tensors

_logger = logging.getLogger(__name__)

SPLITS = {'train': ['train'], 'validation': ['validation', 'val'], 'test': ['test']}
COLUMNS = ['ImageID', 'Source', 'LabelName', 'Confidence']
USED = ['ImageID', 'LabelName', 'Confidence']
MEANINGS = {'1': POSITIVE, '0': NEGATIVE, '1.0': POSITIVE, '0.0': NEGATIVE}
CSL_FILES = ('data.csv', 'mid_to_classes.pth')
SKIPPED, UNKNOWN = -1, -2  # class index of a label that is not trainable, or not described


def read_open_images(root: Path, split: str) -> Annotations:
    """Read one split of Open Images: the images with a verified label among the classes.

    Raises:
        ValueError: If the split is unknown, a file is missing or there are several, or a line is malformed or names an
            unknown label.
    """
    if split not in SPLITS:
        raise ValueError(f'Open Images has no split {split!r}, choose one of {sorted(SPLITS)}')
    if all((root / name).is_file() for name in CSL_FILES):
        return _read_csl(root, split)
    patterns = [f'*{name}-annotations-human-imagelabels.csv' for name in SPLITS[split]]
    path = _find(root, *patterns)
    descriptions_path = _find(root, '*class-descriptions.csv')
    trainable = _find_trainable(root)
    folder = next((name for name in SPLITS[split] if (root / name).is_dir()), split)

    def build(_: Path | None) -> Annotations:
        descriptions = read_descriptions(descriptions_path)
        labels = _read_classes(trainable, descriptions, descriptions_path)
        class_index = dict.fromkeys(descriptions, SKIPPED) | {label: index for index, label in enumerate(labels)}
        table = read_labels(path, class_index, folder)
        return Annotations.from_table([descriptions[label] for label in labels], table, IGNORED)

    files = [path, descriptions_path, *trainable]
    return cached_annotations(root, 'openimages', [split, folder], files, build)


def read_labels(path: Path, class_index: dict[str, int], folder: str) -> Table:
    """Table of a file of labels, see `compact`.

    Args:
        path: CSV file with `COLUMNS`.
        class_index: Class of every known LabelName; SKIPPED to leave it out.
        folder: Folder of the images.

    Raises:
        ValueError: If a line is malformed or names an unknown label.
    """
    columns: Any = _read_with_pyarrow(path, class_index, folder)
    # The csv module is also the one that names the line of a mistake.
    paths, image, label, value = columns or _read_with_csv(path, class_index, folder)
    if not len(label):
        raise ValueError(f'{path}: no label is one of the {len(class_index)} classes')
    return make_table(paths, image, label, value)


def _read_with_csv(path: Path, class_index: dict[str, int], folder: str) -> tuple[Sequence, array, array, array]:
    image_index: dict[str, int] = {}
    image, label, value = array('i'), array('i'), array('b')
    rows = read_rows(path)
    _, header = next(rows, (1, []))
    if header != COLUMNS:
        raise ValueError(f'{path}, line 1: expected the header {COLUMNS}, got {header}')
    for line, row in rows:
        name, confidence = row[2:] if len(row) == len(COLUMNS) else ('', '')
        if name not in class_index or confidence not in MEANINGS:
            raise ValueError(f'{path}, line {line}: expected a described label and a confidence of 0 or 1, got {row}')
        if class_index[name] == SKIPPED:
            continue
        image.append(image_index.setdefault(row[0], len(image_index)))
        label.append(class_index[name])
        value.append(MEANINGS[confidence])
    return [f'{folder}/{identifier}.jpg' for identifier in image_index], image, label, value


def _read_with_pyarrow(
    path: Path, class_index: dict[str, int], folder: str
) -> tuple[Paths, np.ndarray, np.ndarray, np.ndarray] | None:
    """The same as `_read_with_csv`, vectorized; None without pyarrow or if anything in the file is not as expected."""
    try:
        import pyarrow
        from pyarrow import compute
        from pyarrow import csv as arrow_csv
    except ImportError:
        _logger.info("reading Open Images without pyarrow is slow: pip install 'timm-mldecoder[data]'")
        return None
    if next(read_rows(path))[1] != COLUMNS:
        return None
    coded = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    types = {**dict.fromkeys(USED, coded), 'ImageID': pyarrow.string()}
    names, repeats, labels, values = [], [], [], []
    try:
        # block by block, so that the strings of all rows are never in memory together
        for block in arrow_csv.open_csv(
            path,
            read_options=arrow_csv.ReadOptions(block_size=1 << 23),
            convert_options=arrow_csv.ConvertOptions(column_types=types, include_columns=USED),
        ):
            # the rows of an image follow each other, so that few names are left to compare
            runs = compute.run_end_encode(block['ImageID'])
            names.append(runs.values)
            repeats.append(np.diff(np.from_dlpack(runs.run_ends), prepend=np.int32(0)))
            labels.append(_translate(block['LabelName'], class_index))
            values.append(_translate(block['Confidence'], MEANINGS))
    except pyarrow.ArrowException:
        return None
    if not names or any((part == UNKNOWN).any() for part in labels + values):
        return None
    # values in the order of their first occurrence, as in `_read_with_csv`
    images = pyarrow.concat_arrays(names).dictionary_encode()
    image, images = np.repeat(np.from_dlpack(images.indices), np.concatenate(repeats)), images.dictionary
    label, value = np.concatenate(labels), np.concatenate(values).astype(np.int8)
    kept = label != SKIPPED
    if not kept.all():
        image, label, value = image[kept], label[kept], value[kept]
    paths = Paths.of_arrow(compute.binary_join_element_wise(f'{folder}/', images, '.jpg', ''))
    used = np.zeros(len(paths), dtype=bool)
    used[image] = True
    if not used.all():  # images without any of the classes, and the order in which those with one come first
        first = np.full(len(paths), len(image))
        np.minimum.at(first, image, np.arange(len(image)))
        order = np.argsort(first, kind='stable')[: used.sum()]
        new = np.empty(len(paths), dtype=np.int32)
        new[order] = np.arange(len(order))
        paths, image = paths[order], new[image]
    return paths, image, label, value


def _translate(column: Any, meanings: dict[str, int]) -> np.ndarray:
    """Meaning of each row of a dictionary-encoded Arrow array, UNKNOWN if it has none."""
    found = [meanings.get(name, UNKNOWN) for name in column.dictionary.to_pylist()]
    # to_numpy would import pandas where that is installed
    return np.array(found, dtype=np.int32)[np.from_dlpack(column.indices)]


def _read_csl(root: Path, split: str) -> Annotations:
    path, names_path = (root / name for name in CSL_FILES)
    trainable = _find_trainable(root)

    def build(_: Path | None) -> Annotations:
        names = load_tensors(names_path)
        if not isinstance(names, dict) or not all(isinstance(text, str) for item in names.items() for text in item):
            raise ValueError(f'{names_path}: expected a dictionary of LabelName and display name')
        descriptions = _distinct({label: normalize_name(name.strip('\'" ')) for label, name in names.items()})
        labels = _read_classes(trainable, descriptions, names_path)
        table = _read_csl_labels(path, split, {label: index for index, label in enumerate(labels)})
        return Annotations.from_table([descriptions[label] for label in labels], table, IGNORED)

    return cached_annotations(root, 'openimages-csl', [split], [path, names_path, *trainable], build)


def _read_csl_labels(path: Path, split: str, class_index: dict[str, int]) -> Table:
    paths: list[str] = []
    image, label, value = array('i'), array('i'), array('b')
    skipped: Counter[str] = Counter()
    rows = read_rows(path)
    next(rows, None)  # the header
    for line, row in rows:
        bracketed = all(field[:1] + field[-1:] == '[]' for field in row[1:3])
        if len(row) < 4 or row[-1] not in ('train', 'val', 'test') or not bracketed:
            raise ValueError(f'{path}, line {line}: expected a path, two lists of labels and a split, got {row}')
        if row[-1] not in SPLITS[split]:
            continue
        for field, meaning in ((row[1], POSITIVE), (row[2], NEGATIVE)):
            for name in re.findall(r'[^\[\]\'",\s]+', field):
                if name not in class_index:
                    skipped[name] += 1
                    continue
                image.append(len(paths))
                label.append(class_index[name])
                value.append(meaning)
        paths.append(row[0])
    if not paths:
        raise ValueError(f'{path} has no image of split {split!r}')
    if skipped:
        _logger.info(f'{path}: left out {skipped.total()} labels of {len(skipped)} other classes')
    return make_table(paths, image, label, value)


def _find_trainable(root: Path) -> list[Path]:
    """The list of trainable classes, if there is one."""
    found = _find(root, '*classes-trainable.txt', optional=True)
    return [found] if found else []


def _read_classes(trainable: list[Path], descriptions: dict[str, str], source: Path) -> list[str]:
    """LabelNames of the classes."""
    labels = [label for path in trainable for label in read_names(path)] or list(descriptions)
    unknown = [label for label in labels if label not in descriptions]
    if unknown:
        raise ValueError(f'{trainable[0]}: no description in {source} for {unknown}')
    return labels


def read_descriptions(path: Path) -> dict[str, str]:
    """Class name of each LabelName: the display name, with the LabelName if several classes share the display name.

    Raises:
        ValueError: If a line does not hold two fields.
    """
    names = {}
    for line, row in read_rows(path):
        if len(row) != 2:
            raise ValueError(f'{path}, line {line}: expected a label and its name, got {row}')
        if row[0].startswith('/'):  # not the header
            names[row[0]] = normalize_name(row[1])
    return _distinct(names)


def _distinct(names: dict[str, str]) -> dict[str, str]:
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    return {label: f'{name} ({label})' if name in shared else name for label, name in names.items()}


def _find(root: Path, *patterns: str, optional: bool = False) -> Any:
    """The one file in a folder that fits one of the patterns."""
    found = sorted({path for pattern in patterns for path in root.glob(pattern)})
    if len(found) == 1:
        return found[0]
    if not found and optional:
        return None
    names = [path.name for path in found]
    raise ValueError(f'expected one file {" or ".join(patterns)} in {root}, found {names}')
