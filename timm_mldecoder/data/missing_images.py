"""Image files that the annotations list and the disk does not have, as after a partial download."""

import logging
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from timm_mldecoder.data.annotations import Annotations

_logger = logging.getLogger(__name__)

POLICIES = ('error', 'skip')
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
    if policy == 'error':
        raise ValueError(f'{summary}; --missing-images skip leaves them out')
    if len(missing) == len(annotations):
        raise ValueError(f'{summary}; no image is left')
    _logger.warning(f'{summary}; left out')
    return annotations.subset(np.setdiff1d(np.arange(len(annotations)), missing, assume_unique=True))
