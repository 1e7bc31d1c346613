"""Image files that the annotations list and the disk does not have, as after a partial download."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from timm_mldecoder.data.annotations import Annotations

_logger = logging.getLogger(__name__)

POLICIES = ('error', 'skip')
# what may be missing behind a path, or have another case
SUFFIXES_OF_LISTS = ('', '.jpg', '.png', '.jpeg', '.JPG', '.PNG', '.JPEG', '.webp', '.tif', '.bmp', '.lower', '.upper')


def find_missing(annotations: Annotations, root: str | Path) -> np.ndarray:
    """Indices of the images whose file is missing; each folder is listed once, which is faster than a look per file."""
    root, paths = os.fsencode(root), annotations.paths
    listings: dict[bytes, set[bytes]] = {}
    missing = []
    for first, block in paths.blocks():
        for index, path in enumerate(block.tolist(), start=first):
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


class Spelling(NamedTuple):
    """How the paths of a list differ from those of the files."""

    folder: str  # in front of the path
    suffix: str  # behind it; '.lower' and '.upper' change the case of the one that it has

    def __call__(self, path: str) -> str:
        path = path.replace('\\', '/')
        stem, dot, end = path.rpartition('.')
        if self.suffix == '.lower':
            return f'{self.folder}{stem}{dot}{end.lower()}'
        return (
            f'{self.folder}{stem}{dot}{end.upper()}' if self.suffix == '.upper' else f'{self.folder}{path}{self.suffix}'
        )


def _some(count: int) -> list[int]:
    """Positions that show how the paths of a list are written."""
    return np.linspace(0, max(count - 1, 0), min(8, count)).astype(int).tolist()


def _spelling_on_disk(some: Sequence[str], root: str | Path) -> Spelling | None:
    """Return the change that leads from paths of a list to files; None if there is none, or none is needed."""
    home = Path(root or '.')
    if not some or any((home / path).exists() for path in some):
        return None
    inner = (path.name for path in home.iterdir() if path.is_dir() and not path.name.startswith('.'))
    folders = ['', *sorted(f'{name}/' for name in inner)][:100]
    changes = [Spelling(folder, suffix) for folder in folders for suffix in SUFFIXES_OF_LISTS]
    fitting = {change(some[0]): change for change in changes if all((home / change(path)).is_file() for path in some)}
    if not fitting:
        return None
    if len(fitting) > 1:
        raise ValueError(f'{root or "."}: {some[0]} may be {" or ".join([*fitting][:3])}: write the path into the list')
    ((name, change),) = fitting.items()
    _logger.warning(f'{root or "."}: {some[0]} and the others are read as {name}')
    return change


def paths_on_disk(paths: Sequence[str], root: str | Path) -> Sequence[str]:
    """Return the paths that the files have, where a list writes them in another way.

    Lists name files without their folder or suffix, with the suffix in another case, or with the ``\\`` of Windows. One
    change must lead to all of some files, and is then made to all paths.

    Raises:
        ValueError: If several changes do, such as to pictures and to their masks.
    """
    change = _spelling_on_disk([paths[index] for index in _some(len(paths))], root)
    return paths if change is None else [change(path) for path in paths]


def with_paths_on_disk(annotations: Annotations, root: str | Path) -> Annotations:
    """Return annotations with the paths of `paths_on_disk`."""
    change = _spelling_on_disk([annotations.path(index) for index in _some(len(annotations))], root)
    return annotations if change is None else annotations.with_paths(change.__call__)


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
