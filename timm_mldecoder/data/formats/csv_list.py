"""A CSV file per split, for one's own multi-label data.

    ROOT/train.csv, ROOT/validation.csv     with a header: path, labels and optionally ignored
    ROOT/classes.txt                        optional: one class name per line, in the order of the model's outputs

`path` is relative to ROOT. `labels` are the classes in the image and `ignored` the classes that were not annotated,
both separated by semicolons and both possibly empty; every other class is absent. An image may have several rows, for
instance one per label; their labels are merged. Without `classes.txt` (or `--class-map`) the classes are the sorted
labels of `train.csv`. Class names are compared in Unicode form NFC.
"""

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from timm_mldecoder.data.annotations import IGNORED, POSITIVE, Annotations
from timm_mldecoder.data.text_files import normalize_name, read_names, read_rows, warn_about_case

_logger = logging.getLogger(__name__)

SEPARATOR = ';'
COLUMNS = {'labels': POSITIVE, 'ignored': IGNORED}


def split_labels(field: str) -> list[str]:
    """Class names of one CSV field."""
    return [normalize_name(name) for name in field.split(SEPARATOR) if name.strip()]


def read_images(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Labels of each image of a file: image path to class name to (POSITIVE or IGNORED, line number).

    Raises:
        ValueError: If the header lacks a column, a row has another number of fields or no path, or a label is both
            given and ignored (naming file and line).
    """
    rows = read_rows(path)
    _, header = next(rows, (1, []))
    if not {'path', 'labels'} <= set(header) or len(set(header)) < len(header):
        raise ValueError(f'{path}, line 1: the header must hold path and labels, each once, got {header}')
    images: dict[str, dict[str, tuple[int, int]]] = {}
    count = 0
    for line, row in rows:
        if len(row) > len(header):
            raise ValueError(
                f'{path}, line {line}: {len(row)} fields under a header of {len(header)}: {row}; separate labels by '
                f'{SEPARATOR!r} and quote fields that contain commas'
            )
        fields = dict(zip(header, row, strict=False))
        if not fields.get('path') or 'labels' not in fields:
            raise ValueError(f'{path}, line {line}: expected a path and labels, got {row}')
        labels = images.setdefault(fields['path'], {})
        for column, value in COLUMNS.items():
            for name in split_labels(fields.get(column, '')):
                if labels.setdefault(name, (value, line))[0] != value:
                    raise ValueError(
                        f'{path}, line {line}: label {name!r} of {fields["path"]} is both given and ignored (the other '
                        f'is in line {labels[name][1]})'
                    )
        count += 1
    if count > len(images):
        _logger.info(f'{path}: merged {count} rows into {len(images)} images')
    return images


def write_csv(
    root: Path, class_names: Sequence[str], splits: Mapping[str, Iterable[tuple[np.ndarray, Iterable[str]]]]
) -> None:
    """Write splits of uint8 images and the names of their classes, and `classes.txt`."""
    root.mkdir(parents=True, exist_ok=True)
    (root / 'classes.txt').write_text('\n'.join(class_names) + '\n', encoding='utf-8')
    for split, images in splits.items():
        (root / split).mkdir(exist_ok=True)
        with (root / f'{split}.csv').open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(['path', 'labels'])
            for number, (image, labels) in enumerate(images):
                path = f'{split}/{number:05d}.png'
                Image.fromarray(image).save(root / path)
                writer.writerow([path, SEPARATOR.join(labels)])


def read_csv(root: Path, split: str, class_map: str | Path | None = None) -> Annotations:
    """Read `ROOT/SPLIT.csv`.

    Raises:
        ValueError: If the split is unknown, a row is malformed, or a label is not one of the classes (naming file, line
            and label).
    """
    path = root / f'{split}.csv'
    if not path.is_file():
        found = sorted(file.stem for file in root.glob('*.csv'))
        raise ValueError(f'{path} is missing, for split {split!r}; {root} holds the splits {found}')
    images = read_images(path)

    source = Path(class_map) if class_map else root / 'classes.txt'
    if class_map or source.is_file():
        class_names = read_names(source)
    else:
        source = root / 'train.csv'
        train_images = images if source == path else read_images(source)
        class_names = sorted(
            {name for labels in train_images.values() for name, (value, _) in labels.items() if value == POSITIVE}
        )
    warn_about_case(class_names, source)
    class_index = {name: index for index, name in enumerate(class_names)}

    image, label, values = [], [], []
    for index, labels in enumerate(images.values()):
        for name, (value, line) in labels.items():
            if name not in class_index:
                raise ValueError(f'{path}, line {line}: unknown label {name!r}; the classes are those of {source}')
            image.append(index)
            label.append(class_index[name])
            values.append(value)
    return Annotations(class_names, list(images), image, label, values)
