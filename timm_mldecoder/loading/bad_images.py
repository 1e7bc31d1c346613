"""Images that cannot be read: found by loading them, remembered by `timm-mldecoder check`, reported by training.

They are named and counted. Training replaces them by the next readable one or ends; evaluation ends or leaves them out.
(timm logs the index of such an image and takes the next one, in evaluation too, where the score would then be over
other images than requested.) What has been checked is in a CSV file `checked.csv` in the folder `.timm_mldecoder` of
the dataset or, where that is read-only, in the user's cache folder: path, size, time of change and the reason why the
file cannot be read, empty if it can.
"""

import csv
import io
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from timm_mldecoder.data.annotation_cache import cache_folders
from timm_mldecoder.data.images import Reading, image_path
from timm_mldecoder.distributed.world import World
from timm_mldecoder.loading.scan import ImageFacts, scan, state_of
from timm_mldecoder.runtime.errors import RunFailed
from timm_mldecoder.runtime.files import write_atomically

_logger = logging.getLogger(__name__)

BAD_IMAGES = 'bad_images.csv'  # in the folder of a run
CHECKED = 'checked.csv'
Checked = dict[str, tuple[tuple[int, int], str]]  # by absolute path: size and time, and the reason


class BadImage(NamedTuple):
    """A file that cannot be read, and why."""

    path: str
    reason: str


def log_bad_image(image: BadImage) -> None:
    _logger.warning('unreadable image left out: %s (%s)', image.path, image.reason)


def record_bad_images(bad: list[BadImage], folder: Path) -> None:
    """Add images to the list in the folder of a run, each file once."""
    path = folder / BAD_IMAGES
    known = path.read_text(errors='surrogateescape') if path.exists() else 'path,reason'
    text = io.StringIO()
    csv.writer(text).writerows({**dict(csv.reader(io.StringIO(known))), **dict(bad)}.items())
    write_atomically(path, lambda file: file.write(text.getvalue().encode(errors='surrogateescape')))


def recall(root: str | None) -> Checked:
    """What is remembered of the files of a dataset; a damaged file is nothing."""
    for folder in cache_folders(Path(root or '')):
        try:
            with (folder / CHECKED).open(newline='', errors='surrogateescape') as file:
                return {path: ((int(size), int(time)), reason) for path, size, time, reason in csv.reader(file)}
        except (OSError, ValueError, csv.Error):
            continue
    return {}


def remember(root: str | None, facts: Iterable[ImageFacts]) -> Path | None:
    """Add files to what is remembered; return the file, None if no place can be written to."""
    known = recall(root)
    known |= {os.path.abspath(image.path): (state, image.reason) for image in facts if (state := state_of(image.path))}
    text = io.StringIO()
    csv.writer(text).writerows([path, *state, reason] for path, (state, reason) in known.items())
    content = text.getvalue().encode(errors='surrogateescape')
    for folder in cache_folders(Path(root or '')):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / CHECKED, lambda file: file.write(content))
            return folder / CHECKED
        except OSError:
            continue
    return None


def check_readable(
    dataset: Any, root: str | None, world: World, *, decode: bool, policy: str, remedy: str, mode: str, workers: int
) -> None:
    """Report images that cannot be read before the first epoch; a collective call.

    Args:
        dataset: Dataset of files, with its `reading`; others are not checked.
        decode: Whether to decode the images that are not known to be readable.
        policy: 'abort' to end the run at such images, 'skip' to warn.
        remedy: The flag that leaves such images out.
        mode: PIL mode of the images.

    Raises:
        RunFailed: If there are such images and the policy is 'abort'.
    """
    if not hasattr(dataset, 'filename') or not hasattr(dataset, '__getitem__'):
        return
    known = recall(root) if world.primary else {}
    known = world.broadcast({path: found for path, found in known.items() if decode or found[1]})
    if not known and not decode:
        return
    bad, unknown = [], []
    for index in range(world.rank, len(dataset), world.size):
        path = os.path.abspath(image_path(dataset, index))
        state, reason = known.get(path, (None, ''))
        if state is None or state != state_of(path):
            unknown.append(index)
        elif reason:
            bad.append(BadImage(path, reason))
    if decode:
        found = list(scan(dataset, getattr(dataset, 'reading', Reading()), mode, workers, unknown, hashes=False))
        bad += [BadImage(image.path, image.reason) for image in found if image.reason]
        if world.size == 1:
            remember(root, found)
    bad = [image for part in world.all_gather(bad) for image in part]
    if not bad:
        return
    line = f'{len(bad)} of {len(dataset)} images cannot be read, such as {bad[0].path} ({bad[0].reason})'
    if policy == 'abort':
        raise RunFailed(f'{line}; {remedy} leaves them out')
    if world.primary:
        _logger.warning(f'{line}; left out')
