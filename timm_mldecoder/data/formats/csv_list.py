"""A CSV file per split, for one's own multi-label data.

    ROOT/train.csv, ROOT/validation.csv     with a header: path, labels and optionally ignored
    ROOT/classes.txt                        optional: one class name per line, in the order of the model's outputs

`path` is relative to ROOT. Columns may also be named by options, separated by semicolons or tabs, or be one column of 0
and 1 per class. `labels` are the classes in the image and `ignored` the classes that were not annotated, both separated
by semicolons and both possibly empty; every other class is absent. One file may hold all splits, with a column that
names that of each row. An image may have several rows, for instance one per label; their labels are merged. Without
`classes.txt` (or `--class-map`) the classes are the sorted labels, or columns of labels, of `train.csv`. Their
names are compared in Unicode form NFC.
"""

import ast
import csv
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from timm_mldecoder.data.annotations import IGNORED, NEGATIVE, POSITIVE, Annotations, cached_annotations
from timm_mldecoder.data.class_order import warn_about_case
from timm_mldecoder.data.formats.csv_blocks import Columns, NotPlainError, read_blocks
from timm_mldecoder.data.text_files import (
    check_field,
    normalize_name,
    normalize_path,
    read_names,
    read_rows,
    split_name,
    split_names,
)

_logger = logging.getLogger(__name__)

SEPARATOR = ';'
LIST = 'list'  # in place of a separator
EMPTY_CELLS = {'nan', 'NaN', '<NA>'}  # what pandas writes for them
DELIMITERS = (',', ';', '\t')
NUMBERED_SPLITS = {'0': 'train', '1': 'validation', '2': 'test'}  # of CelebA
ONE_HOT = {
    **dict.fromkeys(('0', '0.0', 'false', 'no'), NEGATIVE),
    **dict.fromkeys(('1', '1.0', 'true', 'yes'), POSITIVE),
    **dict.fromkeys(('-1', '-1.0'), IGNORED),
}


@dataclass(frozen=True)
class Table:
    """How the rows of a file are read: columns by number, and the lines before the header."""

    delimiter: str
    skip: int
    header: list[str]
    path: int
    columns: dict[int, int]  # number of a column of names: POSITIVE or IGNORED
    one_hot: dict[int, str]  # number of a column of 0, 1 and -1 (ignored): name of its class
    split: int | None = None  # number of the column of splits
    with_zero: set[int] = field(default_factory=set)  # the columns in which a 0 was read


def split_labels(field: str, separator: str = SEPARATOR) -> list[str]:
    """Class names of one CSV field."""
    if separator == LIST:
        try:
            names = [normalize_name(str(name)) for name in ast.literal_eval(field.strip() or '[]')]
            return [name for name in names if name]
        except (ValueError, SyntaxError, TypeError) as error:
            raise ValueError(f'{field!r} is not a list; --label-separator names what is between labels') from error
    return [name for part in field.split(separator) if (name := normalize_name(part))]


@cache
def _log_delimiter(path: Path, delimiter: str) -> None:
    """Log what separates the columns of a file, once: a file is opened several times in a run."""
    _logger.info(f'{path}: columns are separated by {delimiter!r}')


def _open_table(path: Path, path_column: str, label_column: str, split_column: str) -> Table:
    """Find delimiter and columns by the header, where names count without case and blanks."""
    rows = read_rows(path)
    _, best = next(rows, (1, []))
    skip, delimiters = 0, DELIMITERS
    if best and best[0].strip().lower().startswith('sep='):  # written by Excel
        skip, delimiters = 1, [','.join(best).strip()[4:5] or '\t']
    paths, labels = (
        (name or default).strip().lower() for name, default in ((path_column, 'path'), (label_column, 'labels'))
    )
    for delimiter in delimiters:
        _, header = next(read_rows(path, delimiter, skip), (1, []))
        best = max(best, header, key=len)
        names = [normalize_name(name).lower() for name in header]
        titled = [name for name in names if name]  # a spreadsheet saves empty columns too
        if names.count(paths) != 1 or names.count(labels) > 1 or len({*titled}) < len(titled):
            continue
        if delimiter != ',':
            _log_delimiter(path, delimiter)
        place = names.index(paths)
        wanted = split_column.strip().lower()
        split = names.index(wanted) if wanted and wanted in names else None
        if wanted and split is None:
            raise ValueError(f'{path}, line {skip + 1}: no column {split_column!r} for --split-column, of {header}')
        columns = {
            names.index(name): value for name, value in ((labels, POSITIVE), ('ignored', IGNORED)) if name in names
        }
        chosen = [normalize_name(name).lower() for name in label_column.split(',')]  # several are columns of 0 and 1
        one_hot = {}
        if labels not in names and (not label_column or len(chosen) > 1):
            others = {place, split, *columns}
            others |= {n for n, name in enumerate(names) if not name or name.startswith('unnamed: ')}  # pandas' index
            one_hot = {n: normalize_name(name) for n, name in enumerate(header) if n not in others}
        if label_column and one_hot:
            if unknown := {*chosen} - {*names}:
                raise ValueError(f'{path}, line {skip + 1}: --label-column: no column {min(unknown)!r}, of {header}')
            one_hot = {n: name for n, name in one_hot.items() if names[n] in chosen}
        if labels in names or one_hot:
            return Table(delimiter, skip, header, place, columns, one_hot, split)
    repeated = [name for name, count in Counter(normalize_name(name).lower() for name in best).items() if count > 1]
    found = f'{repeated} more than once' if any(repeated) else f'{best}, which may be a row without a header above it'
    raise ValueError(
        f'{path}, line {skip + 1}: the header must hold {paths} and {labels}, or {paths} and columns of 0 and 1, each '
        f'once, got {found}; --path-column and --label-column name others'
    )


def read_images(
    path: Path,
    path_column: str = '',
    label_column: str = '',
    label_separator: str = '',
    split_column: str = '',
    split: str = '',
    class_map: bool = False,
    training: bool = True,
) -> dict[str, dict[str, tuple[int, int]]]:
    """Labels of each image of a file: image path to class name to (POSITIVE or IGNORED, line number).

    Args:
        path: The file.
        path_column: Name of the column of paths, `path` if empty.
        label_column: Name of the column of labels, `labels` if empty; without one, columns of 0 and 1 are classes.
            Several names, with commas between, are some such columns.
        label_separator: Between labels, `;` if empty; `list` for lists such as `['a', 'b']`.
        split_column: Name of the column that has the split of each row; empty to read every row.
        split: Split to read, of that column.
        class_map: Whether a file lists the classes: then a label may be `nan`.
        training: Whether columns of 1 and -1 alone are refused; else they are warned of.

    Raises:
        ValueError: If the header lacks a column, a row has another number of fields or no path, a label is both given
            and ignored, a quote is not closed (naming file and line), or there is no row of the split.
    """
    table = _open_table(path, path_column, label_column, split_column)
    separator = label_separator or SEPARATOR
    images: dict[str, dict[str, tuple[int, int]]] = {}
    count = 0
    interned: dict[str, str] = {}  # one object per name, not one per row
    for line, row in _checked_rows(path, table, separator):
        if not _is_in(table, row, split):
            continue
        where = f'{path}, line {line}'
        file, positive = row[table.path].strip(), (POSITIVE, line)
        labels = images.setdefault(file, {})
        for name, value in _labels(table, row, separator, where):
            if not class_map and name in EMPTY_CELLS:
                raise ValueError(
                    f'{where}: the label {name!r} is how pandas writes an empty cell: leave the field empty, or list '
                    f'{name!r} in classes.txt if it is a class'
                )
            given = (value, line) if value != POSITIVE else positive
            if labels.setdefault(interned.setdefault(name, name), given)[0] != value:
                raise ValueError(
                    f'{where}: label {name!r} of {file} is both given and ignored (the other is in line '
                    f'{labels[name][1]})'
                )
        count += 1
    if not count:
        raise _no_rows(path, table, separator, split)
    if count > len(images):
        _logger.info(f'{path}: merged {count} rows into {len(images)} images')
    if table.one_hot:
        _check_zeros(path, table, images, training)
    elif not label_separator:
        _offer_separator(path, {name for labels in images.values() for name in labels})
    return images


def _no_rows(path: Path, table: Table, separator: str, split: str) -> ValueError:
    if table.split is None or not (rows := list(_checked_rows(path, table, separator))):
        return ValueError(f'{path}: a header and no rows, so no image')
    splits = Counter(_split_of(table, row) for _, row in rows)
    found = ', '.join(f'{name} ({number} rows)' for name, number in splits.most_common(8))
    column = table.header[table.split]
    return ValueError(f'{path}: no row of the split {split!r} in the column {column!r}, which has {found}')


def _split_of(table: Table, row: list[str]) -> str:
    """The split of a row: a name, a number as CelebA has it, or whether the row is for validation, as in fastai."""
    assert table.split is not None
    value, column = row[table.split].strip().lower(), table.header[table.split].strip().lower()
    if 'train' in column or 'test' in column:  # 1 in train_test_split is train
        return split_name(value)
    if 'val' in column and ONE_HOT.get(value, IGNORED) != IGNORED:
        return 'validation' if ONE_HOT[value] == POSITIVE else 'train'
    if value in NUMBERED_SPLITS and ('partition' in column or 'split' in column):  # others may be folds
        return NUMBERED_SPLITS[value]
    return split_name(value)


def _is_in(table: Table, row: list[str], split: str) -> bool:
    """Whether a row is of a split, by its name or by what the column has for it."""
    return table.split is None or split_name(split) in (_split_of(table, row), split_name(row[table.split]))


def _check_zeros(path: Path, table: Table, images: Mapping[str, Mapping[str, tuple[int, int]]], training: bool) -> None:
    """Look for -1 that means no: in the columns that have 1 and -1 alone."""
    found = {name: set[int]() for number, name in table.one_hot.items() if number not in table.with_zero}
    for labels in images.values():
        for name in found.keys() & labels.keys():
            found[name].add(labels[name][0])
    odd = sorted(name for name, values in found.items() if values == {POSITIVE, IGNORED})
    text = f'{path}: 1 and -1 and no 0 in {len(odd)} columns ({", ".join(odd[:5])}{", ..." if len(odd) > 5 else ""})'
    if odd and training and not table.with_zero:
        raise ValueError(
            f'{text}: -1 says that a label was not annotated. If it says no here, write 0; if not, give the classes as '
            'columns labels and ignored'
        )
    if odd:
        _logger.warning(f'{text}: -1 says that a label was not annotated; if it says no, write 0')


def _checked_rows(path: Path, table: Table, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows with their line numbers; a ValueError for one without path or split, or with too many or few fields."""
    rows = read_rows(path, table.delimiter, table.skip)
    next(rows)
    labelled = (n for n, value in table.columns.items() if value == POSITIVE)
    needed = max(table.path, table.split or 0, *labelled, *table.one_hot)
    for line, row in rows:
        if not any(field.strip() for field in row):
            continue  # a row of a spreadsheet without content
        where = f'{path}, line {line}'
        for number in (table.path, *table.columns):
            check_field(row[number] if number < len(row) else '', where)
        if len(row) > len(table.header):
            raise ValueError(
                f'{where}: {len(row)} fields under a header of {len(table.header)}: {row}; separate labels by '
                f'{separator!r} and quote fields that contain {table.delimiter!r}'
            )
        if len(row) <= needed or not row[table.path].strip():
            raise ValueError(f'{where}: expected a path and labels, got {row}')
        if table.split is not None and not split_name(row[table.split]):
            raise ValueError(f'{where}: no split in the column {table.header[table.split]!r}')
        yield line, row


def _labels(table: Table, row: list[str], separator: str, where: str) -> Iterator[tuple[str, int]]:
    for number, value in table.columns.items():
        try:
            names = split_labels(row[number] if number < len(row) else '', separator)
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from error
        for name in names:
            yield name, value
    for number, name in table.one_hot.items():
        value = ONE_HOT.get(row[number].strip().lower())
        if value is None:
            raise ValueError(
                f'{where}: expected 0, 1 or -1 (not annotated) in the column {name!r}, got {row[number]!r}; '
                '--label-column names the column of labels, or those of 0 and 1 with commas between'
            )
        if value == NEGATIVE:
            table.with_zero.add(number)
        else:
            yield name, value


def _offer_separator(path: Path, names: set[str]) -> None:
    """Raise ValueError if labels look like combinations of few names, joined by something else than the separator."""
    if names and all(name.startswith('[') and name.endswith(']') for name in names):
        raise ValueError(f'{path}: labels such as {max(names, key=len)!r} look like lists: pass --label-separator list')
    for separator in (',', '|'):
        joined = [name for name in names if separator in name]
        uses = Counter(part.strip() for name in names for part in name.split(separator))
        if len(joined) > 1 and all(uses[part.strip()] > 1 for name in joined for part in name.split(separator)):
            raise ValueError(
                f'{path}: labels such as {min(joined)!r} look like several classes: pass --label-separator '
                f"'{separator}', or '{SEPARATOR}' if each is one class"
            )


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


def has_rows(root: Path, split: str, split_column: str, path_column: str = '', label_column: str = '') -> bool:
    """Return whether a file of all splits has rows of a split."""
    path = _find_table(root, split, split_column)
    table = _open_table(path, path_column, label_column, split_column)
    return any(_is_in(table, row, split) for _, row in _checked_rows(path, table, SEPARATOR))


def _find_table(root: Path, split: str, split_column: str) -> Path:
    """The file that has the rows of a split: `root` itself, the only CSV file in it, or the one named as the split."""
    if root.is_file():
        if not split_column and split != 'train':
            raise ValueError(
                f'{root} is one file for all splits: pass --val-fraction 0.2, or --split-column NAME for the column '
                'that names the split of each row'
            )
        return root
    found = sorted(root.glob('*.csv'))
    if split_column:
        if len(found) != 1:
            names = [file.name for file in found]
            raise ValueError(f'--split-column {split_column}: give the file in place of {root}, which has {names}')
        return found[0]
    spelled = [root / f'{name}.csv' for name in split_names(split)]
    path = next((path for path in spelled if path.is_file()), root / f'{split}.csv')
    if not path.is_file():
        raise ValueError(
            f'{path} is missing, for split {split!r}; {root} holds the splits {[file.stem for file in found]}; a file '
            'of all splits is given in place of the folder, with --val-fraction or --split-column'
        )
    return path


def read_csv(
    root: Path, split: str, class_map: str | Path | None = None, split_column: str = '', **columns: str
) -> Annotations:
    """Read a split: `ROOT/SPLIT.csv` (`validation` is also `val.csv`), or its rows of one file for all splits.

    Args:
        root: Folder, or the file of all splits.
        split: Name of the split. All rows of a file without `split_column` are `train`.
        class_map: File of class names, in the order of the classes.
        split_column: Column of the file that names the split of each row.
        **columns: Further arguments of `read_images`.

    Raises:
        ValueError: If the split is unknown, a row is malformed, or a label is not one of the classes (naming file, line
            and label).
    """
    path = _find_table(root, split, split_column)
    source = Path(class_map) if class_map else path.parent / 'classes.txt'
    listed = bool(class_map) or source.is_file()
    if not listed:
        alone = split_column or root.is_file()
        trained = () if alone else (root / f'{name}.csv' for name in split_names('train'))
        source = next((file for file in trained if file.is_file()), path)

    def build(folder: Path | None) -> Annotations:
        plain = _read_plain(root, path, source, listed, split_column, columns, folder)
        return plain or _read_rows(root, path, source, listed, split, split_column, columns)

    flags = [path.name, str(source.absolute()), split, split_column, *sorted(columns.items())]
    annotations = cached_annotations(path.parent, 'csv', flags, [path, source], build)
    warn_about_case(annotations.class_names, source)
    return annotations


def _read_plain(
    root: Path,
    path: Path,
    source: Path,
    listed: bool,
    split_column: str,
    columns: Mapping[str, str],
    folder: Path | None,
) -> Annotations | None:
    """Read a file of the plain form, see `csv_blocks`; None for every other file."""
    table = _open_table(path, columns.get('path_column', ''), columns.get('label_column', ''), split_column)
    separator = columns.get('label_separator') or SEPARATOR
    if table.one_hot or table.split is not None or separator == LIST or '' in table.header:
        return None

    def classes(names: set[str]) -> list[str]:
        if not columns.get('label_separator'):
            _offer_separator(path, names)
        if not listed and names & EMPTY_CELLS:
            raise NotPlainError
        if listed:
            return read_names(source)
        return sorted(names) if source == path else read_csv(root, 'train', **columns).class_names

    try:
        plain = Columns(table.delimiter, table.skip, table.header, table.path, table.columns)
        return Annotations.from_table(*read_blocks(path, plain, separator, classes, folder))
    except NotPlainError:
        return None


def _read_rows(
    root: Path, path: Path, source: Path, listed: bool, split: str, split_column: str, columns: Mapping[str, str]
) -> Annotations:
    def read(file: Path, split: str) -> dict[str, dict[str, tuple[int, int]]]:
        training = split_name(split) == 'train'
        return read_images(file, split_column=split_column, split=split, class_map=listed, training=training, **columns)

    images = read(path, split)
    if listed:
        class_names = read_names(source)
    else:
        same = source == path and (not split_column or split_name(split) == 'train')
        try:
            train_images = images if same else read(source, 'train')
        except ValueError as error:
            if 'no row of the split' not in str(error):
                raise
            # splits of other names: all rows
            train_images = read_images(source, class_map=listed, training=True, **columns)
        table = _open_table(source, columns.get('path_column', ''), columns.get('label_column', ''), split_column)
        class_names = sorted({*table.one_hot.values(), *(name for labels in train_images.values() for name in labels)})
        if table.one_hot:
            _logger.info(f'{source}: columns of 0 and 1 are the classes: {", ".join(class_names)}')
    class_index = {name: index for index, name in enumerate(class_names)}

    image, label, values = [], [], []
    for index, labels in enumerate(images.values()):
        for name, (value, line) in labels.items():
            if name not in class_index:
                raise ValueError(f'{path}, line {line}: unknown label {name!r}; the classes are those of {source}')
            image.append(index)
            label.append(class_index[name])
            values.append(value)
    paths = [normalize_path(file) for file in images]
    if len(set(paths)) < len(paths):
        paths = list(images)  # `merge_same_files` names each spelling
    return Annotations(class_names, paths, image, label, values)
