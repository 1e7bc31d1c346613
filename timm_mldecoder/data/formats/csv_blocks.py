"""CSV files block by block into the arrays of `annotations.make_table`, in less memory than their size.

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
from timm_mldecoder.data.annotation_cache import Table
from timm_mldecoder.data.annotations import POSITIVE
from timm_mldecoder.data.formats.open_images import fixed_width
from timm_mldecoder.data.text_files import normalize_name, read_rows

BLOCK_BYTES, BLOCK_ROWS = 2**21, 2**15
# in the syntax that re and RE2 share; a path of these would be changed by `normalize_path`, or refused
ODD_FIELD = r'["\x00-\x08\x0a-\x1f\x7f]'
ODD_PATH = r'^$|^\s|\s$|//|\./|/\.|' + ODD_FIELD


class NotPlainError(Exception):
    """The file needs `csv_list.read_images`."""


class Block(NamedTuple):
    """Some rows; the labels of a row follow each other."""

    paths: np.ndarray  # [rows] bytes
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


class _Names(dict):
    """Numbers of names as they are written; the same for those that are normalized alike, -1 for an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.normalized: dict[str, int] = {}

    def __missing__(self, text: str) -> int:
        name = normalize_name(text)
        self[text] = self.normalized.setdefault(name, len(self.normalized)) if name else -1
        return self[text]


def read_blocks(
    path: Path, columns: Columns, separator: str, classes: Callable[[set[str], set[str]], list[str]]
) -> tuple[list[str], Table]:
    """Read a plain file.

    Args:
        path: The file.
        columns: Its columns.
        separator: Between labels.
        classes: Makes the class names of the names that occur, and of those that occur as positive labels.

    Returns:
        The class names and the table.

    Raises:
        NotPlainError: If the file is of another form, has a mistake, or a name is not one of the classes.
    """
    names, blocks, hashes, given = _Names(), [], [], set()
    large = path.stat().st_size >= annotations.CACHED  # to import pyarrow takes longer than to read a small file
    read = (large and _arrow_blocks(path, columns, separator, names)) or _csv_blocks(path, columns, separator, names)
    for block in read:
        hashes.append(np.fromiter(map(hash, block.paths.tolist()), np.int64, len(block.paths)))
        given.update(np.flatnonzero(np.bincount(block.label[block.value == POSITIVE])).tolist())
        label = block.label.astype(np.min_scalar_type(len(names.normalized)))
        blocks.append(block._replace(label=label, value=block.value.astype(np.int8)))
    if not blocks or _repeats(np.concatenate(hashes)):
        raise NotPlainError
    del hashes
    class_names = classes(set(names.normalized), {name for name, code in names.normalized.items() if code in given})
    place = {name: index for index, name in enumerate(class_names)}
    if not names.normalized.keys() <= place.keys():
        raise NotPlainError
    order = np.array([place[name] for name in names.normalized], dtype=np.int64)
    small = np.min_scalar_type(max(1, len(class_names)))
    blocks = [_sorted(block, order, small) for block in blocks]
    counts = np.concatenate([block.counts for block in blocks])
    return class_names, {
        'paths': np.concatenate([block.paths for block in blocks]),
        'start': np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        'label': np.concatenate([block.label for block in blocks]),
        'value': np.concatenate([block.value for block in blocks]),
    }


def _repeats(numbers: np.ndarray) -> bool:
    numbers.sort()
    return bool((np.diff(numbers) == 0).any())


def _sorted(block: Block, order: np.ndarray, dtype: np.dtype) -> Block:
    """Number labels by `order`, sort those of a row, and leave out repeated ones."""
    row = np.repeat(np.arange(len(block.counts)), block.counts)
    key = row << 34 | (order[block.label] if len(order) else block.label.astype(np.int64)) << 2 | (block.value + 1)
    key.sort()
    new = np.diff(key >> 2, prepend=-1) != 0
    if (np.diff(key) != 0)[~new[1:]].any():  # a label both given and ignored
        raise NotPlainError
    key = key[new]
    counts = np.bincount(key >> 34, minlength=len(block.counts)).astype(np.int32)
    return Block(block.paths, counts, (key >> 2 & 2**32 - 1).astype(dtype), ((key & 3) - 1).astype(np.int8))


def _block(paths: np.ndarray, parts: list[tuple[np.ndarray, np.ndarray, int]]) -> Block:
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


def _arrow_blocks(path: Path, columns: Columns, separator: str, names: _Names) -> Iterator[Block] | None:
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
                    yield _block(fixed_width(paths, b'', b''), labels)
        except pyarrow.ArrowException as error:
            raise NotPlainError from error

    return blocks()


def _csv_blocks(path: Path, columns: Columns, separator: str, names: _Names) -> Iterator[Block]:
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
            yield _block(np.array([text.encode() for text in fields[columns.path]], dtype=np.bytes_), parts)
    except ValueError as error:  # rows of several lengths, or not CSV
        raise NotPlainError from error
