"""CSV files block by block into the compact form (see `compact`), in bounded memory where they are cached.

Large ones with pyarrow, or with the csv module where it is not installed. Both read plain files alone: one row per
image, one column of labels, no quotes or control characters within a field. The others, and those with a mistake, are
left to `csv_list.read_images`, which names the line.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from timm_mldecoder.data import annotations
from timm_mldecoder.data.compact import Paths, Table, TableBuilder, label_type
from timm_mldecoder.data.same_files import path_ids
from timm_mldecoder.data.text_files import Names, read_rows

BLOCK_BYTES, BLOCK_ROWS = 2**20, 2**15
# in the syntax that re and RE2 share; a path of these would be changed by `normalize_path`, or refused
ODD_FIELD = r'["\x00-\x08\x0a-\x1f\x7f]'
ODD_PATH = r'^$|^\s|\s$|//|\./|/\.|' + ODD_FIELD


class NotPlainError(Exception):
    """The file needs `csv_list.read_images`."""


class Block(NamedTuple):
    """Some rows; the labels of a row follow each other."""

    paths: Paths
    counts: np.ndarray  # labels of each row, [rows]
    label: np.ndarray  # [labels] numbers of names
    value: np.ndarray  # [labels]


class Columns(NamedTuple):
    """What is read of a file."""

    delimiter: str
    skip: int  # lines before the header
    header: list[str]
    path: int
    labels: Mapping[int, int]  # number of a column of names: value of its labels


def read_blocks(
    path: Path,
    columns: Columns,
    separator: str,
    classes: Callable[[set[str]], list[str]],
    folder: Path | None = None,
) -> tuple[list[str], Table]:
    """Read a plain file.

    Args:
        path: The file.
        columns: Its columns.
        separator: Between labels.
        classes: Makes the class names of the names that occur.
        folder: Where the arrays are written while they are read; None for memory.

    Returns:
        The class names and the table.

    Raises:
        NotPlainError: If the file is of another form, has a mistake, or a name is not one of the classes.
    """
    names, builder, ids = Names(), TableBuilder(folder), [np.zeros(0, np.int64)]
    large = path.stat().st_size >= annotations.CACHED  # to import pyarrow takes longer than to read a small file
    read = (large and _arrow_blocks(path, columns, separator, names)) or _csv_blocks(path, columns, separator, names)
    for block in read:
        ids.append(path_ids(block.paths))
        builder.add(*block)
    found = np.concatenate(ids)
    del ids
    found.sort()
    if not len(found) or (np.diff(found) == 0).any():
        raise NotPlainError
    del found
    class_names = classes(set(names.normalized))
    if names.unknown(class_names):
        raise NotPlainError
    table = builder.finish(label_type(len(class_names) - 1), names.order(class_names))
    if builder.contradictions:  # a label both given and ignored
        raise NotPlainError
    return class_names, table


def _block(paths: Paths, parts: list[tuple[np.ndarray, np.ndarray, int]]) -> Block:
    """Join the columns of labels, each of counts [rows], labels (-1 for an empty one) and the value of all."""
    rows, labels, values = [], [], []
    for counts, label, value in parts:
        kept = label >= 0
        rows.append(np.repeat(np.arange(len(paths)), counts)[kept])
        labels.append(label[kept])
        values.append(np.full(len(labels[-1]), value))
    row, label, value = np.concatenate(rows), np.concatenate(labels), np.concatenate(values)
    if len(parts) > 1:
        order = np.argsort(row, kind='stable')
        row, label, value = row[order], label[order], value[order]
    return Block(paths, np.bincount(row, minlength=len(paths)), label, value)


def _arrow_blocks(path: Path, columns: Columns, separator: str, names: Names) -> Iterator[Block] | None:
    """Blocks by pyarrow; None where it is not installed."""
    try:
        import pyarrow
        from pyarrow import compute, csv
    except ImportError:
        return None

    def is_odd(column: Any, pattern: str) -> bool:
        return compute.any(compute.match_substring_regex(column, pattern)).as_py()

    def parts(field: Any, value: int) -> tuple[np.ndarray, np.ndarray, int]:
        lists = compute.split_pattern(field, separator)
        coded = lists.flatten().dictionary_encode()
        numbers = np.array([names[text] for text in coded.dictionary.to_pylist()], dtype=np.int64)
        counts = np.from_dlpack(compute.list_value_length(lists))
        return counts, numbers[np.from_dlpack(coded.indices)], value

    def blocks() -> Iterator[Block]:
        used = [columns.header[number] for number in (columns.path, *columns.labels)]
        try:
            for batch in csv.open_csv(
                path,
                read_options=csv.ReadOptions(block_size=BLOCK_BYTES, skip_rows=columns.skip),
                parse_options=csv.ParseOptions(delimiter=columns.delimiter),
                convert_options=csv.ConvertOptions(
                    column_types=dict.fromkeys(used, pyarrow.string()), include_columns=used
                ),
            ):
                paths, *fields = batch.columns
                if is_odd(paths, ODD_PATH) or any(is_odd(field, ODD_FIELD) for field in fields):
                    raise NotPlainError
                if len(paths):
                    labels = [parts(field, value) for field, value in zip(fields, columns.labels.values(), strict=True)]
                    yield _block(Paths.of_arrow(paths), labels)
        except pyarrow.ArrowException as error:
            raise NotPlainError from error

    return blocks()


def _csv_blocks(path: Path, columns: Columns, separator: str, names: Names) -> Iterator[Block]:
    rows = (row for _, row in islice(read_rows(path, columns.delimiter, columns.skip), 1, None))
    odd_path, odd_field = re.compile(ODD_PATH).search, re.compile(ODD_FIELD).search
    try:
        while block := list(islice(rows, BLOCK_ROWS)):
            fields = list(zip(*block, strict=True))
            if len(fields) != len(columns.header) or any(map(odd_path, fields[columns.path])):
                raise NotPlainError
            parts = []
            for number, value in columns.labels.items():
                if any(map(odd_field, fields[number])):
                    raise NotPlainError
                lists = [field.split(separator) for field in fields[number]]
                label = np.array([names[text] for texts in lists for text in texts], dtype=np.int64)
                parts.append((np.array(list(map(len, lists))), label, value))
            yield _block(Paths.of([text.encode() for text in fields[columns.path]]), parts)
    except ValueError as error:  # rows of several lengths, or not CSV
        raise NotPlainError from error
