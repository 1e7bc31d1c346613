"""Tables of annotations as memory-mapped files, built once and shared by every process that reads the dataset."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

import numpy as np

from timm_mldecoder.data.compact import Table

_logger = logging.getLogger(__name__)
_chosen: ContextVar[Path | None] = ContextVar('cache folder', default=None)

FOLDER = '.timm_mldecoder'
FULL = (errno.ENOSPC, getattr(errno, 'EDQUOT', errno.ENOSPC))
VERSION = 3  # of the tables: their layout, and which classes they have
# of every table, see `compact` and `cached_annotations`
ARRAYS = {'paths', 'offsets', 'start', 'label', 'value', 'classes', 'warnings', 'unlisted'}


def load_or_build(
    root: Path, name: str, files: Sequence[Path], build: Callable[[Path | None], Table]
) -> tuple[Table, Path | None]:
    """Load a table from the cache of a dataset, or build it and store it there.

    The cache is a folder in `root` or, where that is read-only, in the user's cache folder; see `cache_folders`. It is
    valid for as long as names, sizes and modification times of `files` stay the same. Of several processes one builds
    and the others wait. One that is killed leaves a folder of a temporary name, which the next one removes.

    Args:
        root: Folder of the dataset.
        name: Name of the table among those of the dataset.
        files: Files that the table is made of.
        build: Makes the table, arrays by name, some of which may be `NAME.npy` in the folder that it is given. None is
            given where no place can be written to.

    Returns:
        The table and the folder that it is mapped from; the folder is None if no place could be written to.
    """
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    version = f'{name}-{digest([VERSION, facts])}'
    places = cache_folders(root)
    for place in places:
        if table := load(place / version):
            return table, place / version
    for place in places:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            place.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lock(place / f'{name}.lock'))
            if stored := load(place / version):
                return stored, place / version
            temporary = stack.enter_context(_temporary(place, name))
            try:
                table = build(temporary)
            except OSError as error:  # must not pass for a cache folder that cannot be written
                if error.errno in FULL:
                    raise
                raise ValueError(str(error)) from error
            _store(temporary, table)
            shutil.rmtree(place / version, ignore_errors=True)  # a damaged one
            temporary.rename(place / version)
            _remove(place, f'{name}-', but=version)
            return load(place / version) or table, place / version
    shown = ' nor '.join(map(str, places))
    _logger.warning(
        f'cannot write a cache of {name}, in memory then: {"neither " * (len(places) > 1)}{shown} is writable'
    )
    return build(None), None


def cache_folders(root: Path) -> list[Path]:
    """Folders for what is derived from a dataset, by preference: in it, and among the caches of the user.

    Within `cache_in`, a folder of the dataset in the one that is given there, alone.
    """
    root = root.parent if root.is_file() else root
    own = digest(str(root.resolve()))
    if folder := _chosen.get():
        return [folder / own]
    return [root / FOLDER, _user_cache() / own]


@contextlib.contextmanager
def cache_in(folder: str | os.PathLike | None) -> Iterator[None]:
    """Keep what is derived from datasets in a folder of one's own; '' or None changes nothing."""
    token = _chosen.set(Path(folder) if folder else _chosen.get())
    try:
        yield
    finally:
        _chosen.reset(token)


def load(folder: Path) -> Table | None:
    """Memory-map the arrays of a table; None if the folder is missing or damaged."""
    try:
        table = {path.stem: np.load(path, mmap_mode='r') for path in folder.iterdir() if path.suffix == '.npy'}
    except (OSError, ValueError, EOFError):  # of numpy, on files that are damaged
        return None
    return table if table.keys() >= ARRAYS else None


@contextlib.contextmanager
def _temporary(place: Path, name: str) -> Iterator[Path]:
    """Make a folder for a new version, and remove what killed runs left of one."""
    _remove(place, f'.{name}-')
    temporary = Path(tempfile.mkdtemp(prefix=f'.{name}-', dir=place))
    try:
        temporary.chmod(0o755)  # mkdtemp keeps other users out
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove(place: Path, prefix: str, but: str = '') -> None:
    for path in place.iterdir():
        if path.name.startswith(prefix) and path.name != but:
            shutil.rmtree(path, ignore_errors=True)


def _store(folder: Path, table: Table) -> None:
    """Write the arrays of a table that are not mapped from the folder, and remove what else is there."""
    mapped = {key for key, array in table.items() if getattr(array, 'filename', None) == folder / f'{key}.npy'}
    for path in folder.iterdir():
        if path.stem not in mapped:
            path.unlink()
    for key in table.keys() - mapped:
        with (folder / f'{key}.npy').open('wb') as file:
            np.save(file, table[key], allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open('w') as file:
        # ImportError: Windows; OSError: network file systems without locks: several processes build the same table
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _user_cache() -> Path:
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_mldecoder'


def digest(content: object) -> str:
    """Short digest of content in JSON form."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
