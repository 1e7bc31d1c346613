"""Image files that the annotations list and the disk does not have, as after a partial download."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from timm_mldecoder.data.annotations import Annotations

_logger = logging.getLogger(__name__)

POLICIES = ('error', 'skip')
SUFFIXES_OF_LISTS = tuple(f'.{suffix}' for suffix in ['jpg', 'png', 'jpeg', 'JPG', 'PNG', 'JPEG', 'webp', 'tif', 'bmp'])
CHUNK = 1 << 20  # paths that are Python objects at a time


def find_missing(annotations: Annotations, root: str | Path) -> np.ndarray:
    """Indices of the images whose file is missing; each folder is listed once, which is faster than a look per file."""
    root, paths = os.fsencode(root), annotations.paths
    listings: dict[bytes, set[bytes]] = {}
    missing = []
    for first in range(0, len(paths), CHUNK):
        for index, path in enumerate(paths[first : first + CHUNK].tolist(), start=first):
            parent, slash, name = path.rpartition(b'/')
            folder = parent + slash
            if folder not in listings:
                listings[folder] = set()
                with suppress(OSError):
                    listings[folder] |= set(os.listdir(os.path.join(root, folder)))
            if name not in listings[folder]:
                missing.append(index)
    # A file system that ignores case or Unicode forms finds files under names that it does not list.
    if missing and os.path.exists(os.path.join(root, paths[missing[0]])):
        missing = [index for index in missing if not os.path.exists(os.path.join(root, paths[index]))]
    return np.array(missing, dtype=np.int64)


def with_paths_on_disk(annotations: Annotations, root: str | Path) -> Annotations:
    """Return annotations with the paths that the files have, where a list writes them in another way.

    Lists name files without their folder or suffix, with the suffix in another case, or with the ``\\`` of Windows. One
    change must lead to all of some files, and is then made to all paths.
    """
    places = np.linspace(0, max(len(annotations) - 1, 0), min(8, len(annotations))).astype(int)
    some = [annotations.path(index) for index in places]
    home = Path(root or '.')
    if not some or any((home / path).exists() for path in some):
        return annotations
    inner = (path.name for path in home.iterdir() if path.is_dir() and not path.name.startswith('.'))
    folders = ['', *sorted(f'{name}/' for name in inner)]
    slashes = ('\\', '/') if any('\\' in path for path in some) else ('', '')
    for folder in folders[:100]:
        for suffix in ('', *SUFFIXES_OF_LISTS, str.lower, str.upper):

            def change(path: str, folder: str = folder, suffix: Any = suffix) -> str:
                path = path.replace(*slashes) if slashes[0] else path
                if callable(suffix):
                    stem, dot, end = path.rpartition('.')
                    path = f'{stem}{dot}{suffix(end)}'
                else:
                    path += suffix
                return folder + path

            if all((home / change(path)).is_file() for path in some):
                _logger.warning(f'{root or "."}: {some[0]} and the others are read as {change(some[0])}')
                return annotations.with_paths([change(annotations.path(index)) for index in range(len(annotations))])
    return annotations


def apply_policy(annotations: Annotations, root: str | Path, policy: str) -> Annotations:
    """Check once that the images are there.

    Args:
        annotations: Images and their labels.
        root: Folder that the paths of the images are relative to.
        policy: 'error' to refuse missing images, 'skip' to leave them out with a warning.

    Raises:
        ValueError: If images are missing and the policy is 'error', or none is left.
    """
    if policy not in POLICIES:
        raise ValueError(f'missing must be one of {POLICIES}, got {policy!r}')
    missing = find_missing(annotations, root)
    if not len(missing):
        return annotations
    names = ', '.join(annotations.path(index) for index in missing[:3])
    summary = f'{len(missing)} of {len(annotations)} images are missing in {root}: {names}'
    summary += ', ...' if len(missing) > 3 else ''
    if '\\' in annotations.path(missing[0]):
        raise ValueError(f'{summary}; they are written with the \\ of Windows: replace it by / in the list')
    if len(missing) == len(annotations):
        raise ValueError(f'{summary}; paths are relative to the folder of the list')
    if policy == 'error':
        raise ValueError(f'{summary}; --missing-images skip leaves them out')
    _logger.warning(f'{summary}; left out')
    return annotations.subset(np.setdiff1d(np.arange(len(annotations)), missing, assume_unique=True))
