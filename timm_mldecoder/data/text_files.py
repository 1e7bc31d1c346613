"""Text files as users write them: UTF-8 with or without a byte order mark, class names in Unicode form NFC."""

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_INVISIBLE = dict.fromkeys(map(ord, '\u200b\u2060\ufeff'))  # zero-width characters that no script needs
_CONTROL = re.compile(r'[\x00-\x08\x0a-\x1f\x7f]')

SPLITS = {
    'train': ('train', 'training'),
    'validation': ('validation', 'val', 'valid', 'dev', 'eval', 'evaluation'),
    'test': ('test', 'testing'),
}


def normalize_name(name: str) -> str:
    """A class name without surrounding blanks and zero-width characters, in NFC: both ways to encode an accent."""
    name = name if name.isascii() else unicodedata.normalize('NFC', name.translate(_INVISIBLE))
    return name.strip()


class Names(dict):
    """Numbers of names as they are written; the same for those that are normalized alike, -1 for an empty one.

    Names are numbered in the order of their first use. A reader sets `position`, where it reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.normalized: dict[str, int] = {}
        self.position: Any = None
        self._first_uses: list[Any] = []

    def __missing__(self, text: str) -> int:
        name = normalize_name(text)
        self[text] = self.normalized.setdefault(name, len(self.normalized)) if name else -1
        self._first_uses += [self.position] * (len(self.normalized) - len(self._first_uses))
        return self[text]

    def unknown(self, class_names: Sequence[str]) -> list[tuple[str, Any]]:
        """Return the names that are not among those of the classes, each with the position of its first use."""
        known = {*class_names}
        used = zip(self.normalized, self._first_uses, strict=True)
        return [(name, position) for name, position in used if name not in known]

    def order(self, class_names: Sequence[str]) -> np.ndarray:
        """Return the class number of each number; the names must be known."""
        place = {name: index for index, name in enumerate(class_names)}
        return np.array([place[name] for name in self.normalized], dtype=np.int64)


def normalize_path(path: str) -> str:
    """A path without the parts that mean nothing, as in `./a` and `a//b`, so that a file has one spelling."""
    if '//' not in path and './' not in path and '/.' not in path:
        return path
    return '/' * path.startswith('/') + '/'.join(part for part in path.split('/') if part not in ('', '.'))


def check_field(text: str, where: str) -> None:
    """Raise ValueError if a path or label has a line break, as after a stray quote, or another control character."""
    if found := _CONTROL.search(text):
        if found[0] in '\r\n':
            raise ValueError(f'{where}: a line break within a field ({text[:40]!r}): a quote is not closed')
        raise ValueError(f'{where}: the control character {found[0]!r} in {text[:40]!r}')


def read_text(path: Path) -> str:
    """Content of a text file.

    Raises:
        ValueError: If the file is a device, which may have no end, or not UTF-8 (naming file and line).
    """
    refuse_device(path)
    try:
        return path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError:
        raise not_utf8(path) from None


def refuse_device(path: Path) -> None:
    """Raise ValueError for a device, which may have no end."""
    if path.is_char_device() or path.is_block_device():
        raise ValueError(f'{path}: not a regular file')


def split_name(text: str) -> str:
    """Name of a split as people write it: `Val`, `valid` and `dev` are `validation`."""
    name = normalize_name(text).lower()
    return next((split for split, names in SPLITS.items() if name in names), name)


def split_names(split: str) -> tuple[str, ...]:
    """Names that files and folders of a split may have, the given one first."""
    return tuple(dict.fromkeys((split, *SPLITS.get(split_name(split), ()))))


def read_rows(path: Path, delimiter: str = ',', skip: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line and fields of every row of a CSV file; blank lines and the first `skip` are left out.

    Raises:
        ValueError: If the file is a device, or not UTF-8 or not CSV (naming file and line).
    """
    refuse_device(path)
    with path.open(newline='', encoding='utf-8-sig') as file:
        reader = csv.reader(file, delimiter=delimiter)
        line = 1
        try:
            for row in reader:
                if row and line > skip:
                    yield line, row
                line = reader.line_num + 1
        except UnicodeDecodeError:
            raise not_utf8(path) from None
        except csv.Error as error:
            raise ValueError(f'{path}, line {line}: {error}') from error


def read_names(path: Path) -> list[str]:
    """Distinct names of a text file, one per line.

    Raises:
        ValueError: If a name is repeated, or there is none.
    """
    names = [normalize_name(line) for line in read_text(path).splitlines() if line.strip()]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or not names:
        raise ValueError(f'{path}: expected one distinct name per line, got {len(names)} lines, repeated: {repeated}')
    return names


def not_utf8(path: Path) -> ValueError:
    """Return the error that names the first line of a file that is not UTF-8."""
    if path.suffix.lower() not in ('.csv', '.tsv', '.txt', '.json', '.yaml'):
        return ValueError(f'{path} is not a text file: save it as CSV with UTF-8')
    with path.open('rb') as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode('utf-8')
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return ValueError(f'{path}, line {number}: byte {byte:#04x} is not UTF-8; save the file as UTF-8')
    return ValueError(f'{path}: not UTF-8; save the file as UTF-8')
