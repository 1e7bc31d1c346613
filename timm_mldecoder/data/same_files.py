"""Paths compared by the file they mean: `a`, `./a`, `b/../a` and links to it are one file."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress

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
        parts.append(_segment_ids(data, offsets[:-1], offsets[1:], _OF_BYTE))
    return np.concatenate(parts).view(np.int64)


def _segment_ids(data: np.ndarray, first: np.ndarray, last: np.ndarray, of_byte: np.ndarray) -> np.ndarray:
    """Polynomial hashes modulo 2^64 of parts of a buffer, by sums over its beginning, uint64 [N]."""
    powers = np.full(len(data) + 1, _FACTOR)
    powers[0] = 1
    np.cumprod(powers, out=powers)
    sums = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(of_byte[data] * powers[:-1], out=sums[1:])
    inverse = np.full(len(data) + 1, _INVERSE)
    inverse[0] = 1
    np.cumprod(inverse, out=inverse)
    return (sums[last] - sums[first]) * inverse[first]


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
        return (number * _FACTOR + _segment_ids(alone, np.zeros(1, int), np.full(1, len(alone)), of_byte))[0]

    for start, block in packed.blocks():
        data, offsets = block.arrays()
        first, last = offsets[:-1], offsets[1:]
        slashes = np.concatenate([[-1], np.flatnonzero(data == ord('/'))])
        cut = np.maximum(slashes[np.searchsorted(slashes, last) - 1] + 1, first)  # where the name begins
        spelled = _segment_ids(data, first, cut, _OF_BYTE)
        runs = np.flatnonzero(np.append(True, np.diff(spelled) != 0))
        number = np.zeros(len(runs), dtype=np.uint64)
        linked = []
        for index, row in enumerate(runs.tolist()):
            key = int(spelled[row])
            if key not in folders:
                folders[key] = resolve(data[first[row] : cut[row]].tobytes())
            number[index], _, links = folders[key]
            if links:
                linked.append(index)
        ends = np.append(runs[1:], len(block))
        part = ids[start : start + len(block)]
        part[:] = np.repeat(number, ends - runs) * _FACTOR + _segment_ids(data, cut, last, of_byte)
        for index in linked:
            _, real, links = folders[int(spelled[runs[index]])]
            for row in range(int(runs[index]), int(ends[index])):
                name = data[cut[row] : last[row]].tobytes()
                if name in links:
                    part[row] = id_of(os.path.realpath(real + name))
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
    order = np.argsort(ids, kind='stable')
    same = np.diff(ids[order]) == 0
    order = order[np.append(False, same) | np.append(same, False)] if len(ids) else order
    groups = np.split(order, np.flatnonzero(np.diff(ids[order])) + 1) if len(order) else []
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
