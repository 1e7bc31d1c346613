"""One order of class folders and files in every process, and class names that are almost equal.

timm sorts the set of class names by a key that is equal for `A` and `a`, and for `1` and `01`: their order then depends
on the hash seed of the process.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm.data.readers import reader_image_folder, reader_image_in_tar, reader_image_tar

_logger = logging.getLogger(__name__)

_READERS: tuple[Any, ...] = (reader_image_folder, reader_image_in_tar, reader_image_tar)


def sort_key(name: str) -> tuple[list[str | int], str]:
    """Return timm's `natural_key` of a name, for digits such as ① too, and the name itself, which breaks ties."""
    return _natural(name), name


def _natural(name: str) -> list[str | int]:
    parts = re.split(r'(\d+)', name.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


@contextmanager
def one_order() -> Iterator[None]:
    """Let timm's readers of folders and tar files sort by `sort_key`."""
    own = [reader.natural_key for reader in _READERS]
    try:
        for reader in _READERS:
            reader.natural_key = sort_key
        yield
    finally:
        for reader, key in zip(_READERS, own, strict=True):
            reader.natural_key = key


def alike(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of names that differ only in case or in leading zeros."""
    groups: dict[tuple[str | int, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(_natural(name)), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def warn_about_case(class_names: Iterable[str], source: str | Path) -> None:
    """Warn of classes that differ only in case or in leading zeros: most often one class, spelled in two ways."""
    if groups := alike(class_names):
        shown = '; '.join(', '.join(map(repr, group)) for group in groups[:5]) + ('; ...' if len(groups) > 5 else '')
        _logger.warning(f'{source}: classes differ only in case or leading zeros: {shown}')
