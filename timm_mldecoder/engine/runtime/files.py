"""Files that are written whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPORARY = '.tmp'


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Let `write` fill a file that replaces `path` only once all of it is on the disk.

    Raises:
        OSError: If any step fails; `path` is then unchanged.
    """
    temporary = path.with_name(f'.{path.name}{TEMPORARY}')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns a failed write into a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).partition('\n')[0]
        raise OSError(f'could not write {path}: {reason}; the file is unchanged') from error


def duplicate(source: Path, target: Path) -> None:
    """Give a complete file a second name: a hard link where the file system has them, else a copy."""
    temporary = target.with_name(f'.{target.name}{TEMPORARY}')
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # no hard links on this file system
        shutil.copy2(source, temporary)
    os.replace(temporary, target)


def sync_folder(folder: Path) -> None:
    """Write the entries of a folder to the disk, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
