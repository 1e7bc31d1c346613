"""Files that are written whole or not at all, and CSV that spreadsheets take as text."""

import csv
import io
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
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


def choose_folder(output: str, experiment: str, *names: object) -> Path:
    """Return the folder of a run in `output`: `experiment`, or if that is empty the time and `names`."""
    time = datetime.now().strftime('%Y%m%d-%H%M%S')
    return Path(output) / (experiment or '-'.join(map(str, (time, *names))))


def create_folder(folder: Path) -> None:
    """Create the folder of a run; a ValueError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / '.writable').touch()
        (folder / '.writable').unlink()
    except OSError as error:
        raise ValueError(f'--output: cannot write to {folder}: {error.strerror}') from error


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    """Write CSV that spreadsheets take as text: formulas begin with an apostrophe."""

    def write(file: Any) -> None:
        text = io.TextIOWrapper(file, encoding='utf-8', newline='')
        csv.writer(text).writerows([harmless(field) for field in row] for row in rows)
        text.flush()
        text.detach()

    write_atomically(path, write)


def harmless(field: Any) -> Any:
    """Return a field that UTF-8 can hold and no spreadsheet runs as a formula, which has a letter or digit in it."""
    if not isinstance(field, str):
        return field
    formula = field[:1] in ('=', '+', '-', '@') and any(map(str.isalnum, field))
    return f"'{utf8(field)}" if formula or field[:1] in ('\t', '\r') else utf8(field)


def utf8(name: Any) -> str:
    """Return a name as text that UTF-8 can hold: bytes of file names that are not UTF-8 become escapes."""
    return str(name).encode('utf-8', 'backslashreplace').decode()
