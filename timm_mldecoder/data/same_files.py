"""Paths compared by the file they mean: `a`, `./a`, `b/../a` and links to it are one file."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from timm_mldecoder.data.annotations import Annotations
from timm_mldecoder.data.text_files import normalize_path

_logger = logging.getLogger(__name__)

SHOWN = 3  # files per log line
CHUNK = 1 << 20  # paths that are Python objects at a time


def file_ids(paths: np.ndarray | Sequence[bytes], root: str | os.PathLike) -> np.ndarray:
    """Number that files have in common exactly if they are one file, within this process, int64 [N].

    Each folder is resolved and listed once; only links among the files are resolved one by one.

    Args:
        paths: Path of each file, [N] bytes, relative to `root` or absolute. A file need not exist.
        root: Folder.
    """
    root = os.fsencode(root)
    any_case = ignores_case(root)
    folders: dict[bytes, tuple[bytes, set[bytes]]] = {}  # as spelled, with a slash: its real path, and the links in it
    ids = np.zeros(len(paths), dtype=np.int64)
    for first in range(0, len(paths), CHUNK):
        chunk = paths[first : first + CHUNK]
        for index, path in enumerate(chunk.tolist() if isinstance(chunk, np.ndarray) else chunk, start=first):
            cut = path.rfind(b'/') + 1
            folder, name = path[:cut], path[cut:]
            if folder not in folders:
                folders[folder] = _folder(os.path.join(root, folder))
            real, links = folders[folder]
            file = os.path.realpath(real + name) if name in links else real + name
            ids[index] = hash(file.lower() if any_case else file)
    return ids


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
    return Annotations(
        annotations.class_names,
        [normalize_path(os.fsdecode(path)) for path in annotations.paths[kept].tolist()],
        np.searchsorted(kept, first[image]),
        label,
        value,
        annotations.unlisted,
        annotations.instances,
    )


def _spellings(annotations: Annotations, groups: Sequence[np.ndarray]) -> str:
    names = [dict.fromkeys(annotations.path(index) for index in group.tolist()) for group in groups[:SHOWN]]
    return ', '.join(' = '.join(spellings) for spellings in names)
