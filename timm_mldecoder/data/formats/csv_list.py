"""A plain CSV for one's own multi-label data.

    ROOT/train.csv, ROOT/validation.csv     one file a split, with a header: path, labels and optionally ignored
    ROOT/classes.txt                        optional: one class name a line, in the order of the model's outputs

`path` is relative to ROOT. `labels` are the classes in the image and `ignored` those nobody looked for, both separated
by semicolons and both possibly empty; every other class is absent. Without `classes.txt` (or `--class-map`) the
classes are the sorted labels of `train.csv`.
"""

import csv
from pathlib import Path

from timm_mldecoder.data.annotations import IGNORED, POSITIVE, Annotations
from timm_mldecoder.data.formats.names import read_names

SEPARATOR = ';'


def split_labels(field: str | None) -> list[str]:
    """Class names of one CSV field, without the blanks around them."""
    return [name.strip() for name in (field or '').split(SEPARATOR) if name.strip()]


def read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Line number and fields of every row.

    Raises:
        ValueError: If a column is missing from the header, or a row has no path.
    """
    with path.open(newline='', encoding='utf-8-sig') as file:
        reader = csv.DictReader(file)
        missing = {'path', 'labels'} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f'{path}, line 1: the header lacks {sorted(missing)}; it holds {reader.fieldnames}.')
        rows = [(reader.line_num, row) for row in reader]
    for line, row in rows:
        if not row['path'] or row['labels'] is None:
            raise ValueError(f'{path}, line {line}: expected a path and labels, got {row}.')
    return rows


def read_csv(root: Path, split: str, class_map: str | Path | None = None) -> Annotations:
    """Read `ROOT/<split>.csv`.

    Raises:
        ValueError: If the split is unknown, or a label is not one of the classes (naming file, line and label).
    """
    path = root / f'{split}.csv'
    if not path.is_file():
        found = sorted(file.stem for file in root.glob('*.csv'))
        raise ValueError(f'No {path} for split {split!r}; {root} holds the splits {found}.')
    rows = read_rows(path)

    names_file = Path(class_map) if class_map else root / 'classes.txt'
    if class_map or names_file.is_file():
        class_names, source = read_names(names_file), names_file
    else:
        source = root / 'train.csv'
        train_rows = rows if source == path else read_rows(source)
        class_names = sorted({name for _, row in train_rows for name in split_labels(row['labels'])})
    class_index = {name: index for index, name in enumerate(class_names)}

    image, label, value = [], [], []
    for position, (line, row) in enumerate(rows):
        for column, meaning in (('labels', POSITIVE), ('ignored', IGNORED)):
            for name in split_labels(row.get(column)):
                if name not in class_index:
                    raise ValueError(f'{path}, line {line}: unknown label {name!r}; the classes are those of {source}.')
                image.append(position)
                label.append(class_index[name])
                value.append(meaning)
    return Annotations(class_names, [row['path'] for _, row in rows], image, label, value)
