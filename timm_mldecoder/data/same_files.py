"""Paths compared by the file they mean: `a`, `./a`, `b/../a` and links to it are one file."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

import numpy as np

from timm_mldecoder.data.annotations import Annotations
from timm_mldecoder.data.compact import Paths
from timm_mldecoder.data.text_files import normalize_path

_logger = logging.getLogger(__name__)

SHOWN = 3  # files per log line


_DRAWN = np.random.default_rng(0)  # of any seed: the numbers must only be without a pattern
_OF_BYTE = _DRAWN.integers(2**64, size=256, dtype=np.uint64)
_FACTOR = _DRAWN.integers(2**64, dtype=np.uint64) | np.uint64(1)  # odd numbers have an inverse modulo 2^64
_INVERSE = np.uint64(pow(int(_FACTOR), -1, 2**64))


def path_ids(paths: Paths) -> np.ndarray:
    """Number of each path, int64 [N]: the same for the same bytes and, but for chance (2^-64), different for others."""
    parts = [np.zeros(0, dtype=np.uint64)]
    for _, block in paths.blocks():
        data, offsets = block.arrays()
        parts.append(_segment_ids(_sums(data, _OF_BYTE), offsets[:-1], offsets[1:]))
    return np.concatenate(parts).view(np.int64)


def _sums(data: np.ndarray, of_byte: np.ndarray) -> np.ndarray:
    """Polynomial hashes modulo 2^64 of the beginnings of a buffer [B], uint64 [B + 1]."""
    sums = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(of_byte[data] * _powers(len(data), _FACTOR)[:-1], out=sums[1:])
    return sums


def _segment_ids(sums: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Hashes of parts of a buffer, by those of its beginnings, uint64 [N]."""
    return (sums[last] - sums[first]) * _powers(len(sums) - 1, _INVERSE)[first]


def _powers(highest: int, base: np.uint64) -> np.ndarray:
    """The powers of a number modulo 2^64 from 0 on."""
    return _powers_below(1 << highest.bit_length(), base)[: highest + 1]


@lru_cache(maxsize=8)
def _powers_below(count: int, base: np.uint64) -> np.ndarray:
    powers = np.full(count, base)
    powers[0] = 1
    return np.cumprod(powers, out=powers)


def file_ids(paths: Paths | np.ndarray | Sequence[bytes], root: str | os.PathLike) -> np.ndarray:
    """Number that files have in common exactly if they are one file, within this process, int64 [N].

    Each folder is resolved and listed once; only links among the files are resolved one by one.

    Args:
        paths: Path of each file, [N] bytes, relative to `root` or absolute. A file need not exist.
        root: Folder.
    """
    root = os.fsencode(root)
    of_byte = _OF_BYTE
    if any_case := ignores_case(root):
        of_byte = _OF_BYTE[np.frombuffer(bytes(range(256)).lower(), dtype=np.uint8)]
    folders: dict[int, tuple[np.uint64, bytes, set[bytes]]] = {}  # by the number of a spelling, see `resolve`
    packed = Paths.of(paths)
    ids = np.zeros(len(packed), dtype=np.uint64)

    def resolve(folder: bytes) -> tuple[np.uint64, bytes, set[bytes]]:
        """Number and name of the real folder, and the links in it."""
        real, links = _folder(os.path.join(root, folder))
        return np.uint64(hash(real.lower() if any_case else real) % 2**64), real, links

    def id_of(file: bytes) -> np.uint64:
        folder, slash, name = file.rpartition(b'/')
        alone = np.frombuffer(name, dtype=np.uint8)
        real = folder + slash
        number = np.array([hash(real.lower() if any_case else real) % 2**64], dtype=np.uint64)
        return (number * _FACTOR + _sums(alone, of_byte)[-1:])[0]

    for start, block in packed.blocks():
        data, offsets = block.arrays()
        first, last = offsets[:-1], offsets[1:]
        slashes = np.concatenate([[-1], np.flatnonzero(data == ord('/'))])
        cut = np.maximum(slashes[np.searchsorted(slashes, last) - 1] + 1, first)  # where the name begins
        sums = _sums(data, _OF_BYTE)
        spelled, rows, of_folder = np.unique(_segment_ids(sums, first, cut), return_index=True, return_inverse=True)
        for key, row in zip(spelled.tolist(), rows.tolist(), strict=True):
            if key not in folders:
                folders[key] = resolve(data[first[row] : cut[row]].tobytes())
        found = [folders[key] for key in spelled.tolist()]
        number = np.array([number for number, *_ in found], dtype=np.uint64)[of_folder]
        names = _segment_ids(_sums(data, of_byte) if any_case else sums, cut, last)
        ids[start : start + len(block)] = number * _FACTOR + names
        for index in [index for index, (*_, links) in enumerate(found) if links]:
            _, real, links = found[index]
            for row in np.flatnonzero(of_folder == index).tolist():
                name = data[cut[row] : last[row]].tobytes()
                if name in links:
                    ids[start + row] = id_of(os.path.realpath(real + name))
    return ids.view(np.int64)


def ignores_case(folder: bytes) -> bool:
    """Return whether the disk of a folder takes names in any case for one."""
    folder = os.path.realpath(folder)
    with suppress(OSError):
        return folder != folder.swapcase() and os.path.samefile(folder, folder.swapcase())
    return False


def _folder(path: bytes) -> tuple[bytes, set[bytes]]:
    links = set()
    with suppress(OSError), os.scandir(path or b'.') as entries:
        links = {entry.name for entry in entries if entry.is_symlink()}
    return os.path.join(os.path.realpath(path), b''), links


def repeated(ids: np.ndarray) -> list[np.ndarray]:
    """Groups of positions of one number, for the numbers that occur more than once, in the order of the first one."""
    if (np.diff(np.sort(ids)) != 0).all():
        return []
    order = np.argsort(ids, kind='stable')
    same = np.diff(ids[order]) == 0
    order = order[np.append(False, same) | np.append(same, False)]
    groups = np.split(order, np.flatnonzero(np.diff(ids[order])) + 1)
    return sorted(groups, key=lambda group: group[0])


def merge_same_files(annotations: Annotations, root: str | os.PathLike) -> Annotations:
    """Merge images that are one file: it has the labels of all; a warning names those that contradict each other."""
    groups = repeated(file_ids(annotations.paths, root))
    if not groups:
        annotations.distinct = True
        return annotations
    targets = [[tuple(annotations.target(index).tolist()) for index in group.tolist()] for group in groups]
    odd = [group for group, values in zip(groups, targets, strict=True) if len(set(values)) > 1]
    line = f'{root}: {len(groups):,} files are listed more than once, such as {_spellings(annotations, groups)}; merged'
    if odd:
        line += f'; {len(odd):,} of them with other labels, such as {_spellings(annotations, odd)}: all labels count'
    _logger.warning(line)

    first = np.arange(len(annotations))
    for group in groups:
        first[group] = group[0]
    kept = np.flatnonzero(first == np.arange(len(annotations)))
    image, label, value = annotations.entries()
    merged = Annotations(
        annotations.class_names,
        [normalize_path(os.fsdecode(path)) for path in annotations.paths[kept]],
        np.searchsorted(kept, first[image]),
        label,
        value,
        annotations.unlisted,
        annotations.instances,
    )
    merged.distinct = True
    return merged


def _spellings(annotations: Annotations, groups: Sequence[np.ndarray]) -> str:
    names = [dict.fromkeys(annotations.path(index) for index in group.tolist()) for group in groups[:SHOWN]]
    return ', '.join(' = '.join(spellings) for spellings in names)
