"""The object that a JSON file holds, its lists entry by entry: in bounded memory however long they are."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from timm_mldecoder.data.text_files import not_utf8, refuse_device

BLOCK = 1 << 20  # characters that are read at a time
_skip_blanks: Any = re.compile(r'[ \t\n\r]*').match
_decoder = json.JSONDecoder()


def read_object(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the keys of the object of a file, each with its value; a list as the iterator of its entries.

    Raises:
        ValueError: If the file is a device, not UTF-8 or not such JSON, or has a key twice.
    """
    refuse_device(path)
    keys = set()
    with path.open(newline='', encoding='utf-8-sig') as file:
        text = _Text(path, file)
        if text.next() == '[':
            raise ValueError(
                f'{path} is a list, not an object with the lists "classes" and "images" (--dataset json), or "images", '
                '"annotations" and "categories" (coco)'
            )
        for _ in text.items('{}'):
            key = text.value()
            if key in keys or not isinstance(key, str):
                raise text.error(f'{key!r} is not a key, or there twice')
            keys.add(key)
            text.take(':')
            if text.next() == '[':
                entries = (text.value() for _ in text.items('[]'))
                yield key, entries
                for _ in entries:
                    pass
            else:
                yield key, text.value()
        if text.next():
            raise text.error('extra data')


class _Text:
    """What is left of a file, of which a part is in memory."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._text, self._at = '', 0
        self._before = 0  # characters before those in memory

    def next(self) -> str:
        """Return the next character that is not blank, which is not taken; '' at the end."""
        while True:
            self._at = _skip_blanks(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ''

    def take(self, expected: str) -> str:
        """Take the next character, one of those expected."""
        found = self.next()
        if not found or found not in expected:
            raise self.error(f'expected {" or ".join(expected)}')
        self._at += 1
        return found

    def items(self, brackets: str) -> Iterator[None]:
        """Go through a list or an object; the one who iterates takes each item."""
        self.take(brackets[0])
        going = self.next() != brackets[1]
        if not going:
            self.take(brackets[1])
        while going:
            yield
            going = self.take(',' + brackets[1]) == ','

    def value(self) -> Any:
        """Take a value."""
        self.next()
        while True:
            problem = ''
            try:
                value, end = _decoder.raw_decode(self._text, self._at)
                if end + 2 < len(self._text):  # a number may go on behind what was read: `.5`, `e+3`
                    break
            except json.JSONDecodeError as error:
                problem, end = error.msg, error.pos
            except RecursionError:
                raise self.error('nested too deeply') from None
            if not self._read():
                if problem:
                    self._at = end
                    raise self.error(problem)
                break
        self._at = end
        return value

    def error(self, problem: str) -> ValueError:
        """Return the error that names the file and the position."""
        return ValueError(f'{self._path} is not JSON: {problem}, at character {self._before + self._at}')

    def _read(self) -> bool:
        """Read on; False at the end of the file."""
        left = self._text[self._at :]
        try:
            block = self._file.read(max(BLOCK, len(left)))
        except UnicodeDecodeError:
            raise not_utf8(self._path) from None
        if block:
            self._before += self._at
            self._text, self._at = left + block, 0
        return bool(block)
