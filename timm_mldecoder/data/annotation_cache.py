"""Tables of annotations as memory-mapped files, built once and shared by every process that reads the dataset."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

_logger = logging.getLogger(__name__)

FOLDER = '.timm_mldecoder'
VERSION = 1  # of the layout of the tables
ARRAYS = {'paths', 'start', 'label', 'value'}  # of every table, see `annotations.make_table`
Table = dict[str, np.ndarray]


def load_or_build(
    root: Path, name: str, files: Sequence[Path], build: Callable[[], Table]
) -> tuple[Table, Path | None]:
    """Load a table from the cache of a dataset, or build it and store it there.

    The cache is a folder in `root` or, where that is read-only, in the user's cache folder. It is valid for as long as
    names, sizes and modification times of `files` stay the same. Of several processes one builds and the others wait.

    Args:
        root: Folder of the dataset.
        name: Name of the table among those of the dataset.
        files: Files that the table is made of.
        build: Makes the table: arrays by name.

    Returns:
        The table and the folder that it is mapped from; the folder is None if no place could be written to.
    """
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    version = f'{name}-{digest([VERSION, facts])}'
    places = cache_folders(root)
    for place in places:
        if table := load(place / version):
            return table, place / version
    table = None
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with _lock(place / f'{name}.lock'):
                if stored := load(place / version):
                    return stored, place / version
                try:
                    table = table or build()
                except OSError as error:  # must not pass for a cache folder that cannot be written
                    raise ValueError(str(error)) from error
                _store(place / version, name, table)
                return load(place / version) or table, place / version
    _logger.warning(f'cannot write a cache of {name}: neither {places[0]} nor {places[1]} is writable')
    return table or build(), None


def cache_folders(root: Path) -> list[Path]:
    """Folders for what is derived from a dataset, by preference: in it, and among the caches of the user."""
    root = root.parent if root.is_file() else root
    return [root / FOLDER, _user_cache() / digest(str(root.resolve()))]


def load(folder: Path) -> Table | None:
    """Memory-map the arrays of a table; None if the folder is missing or damaged."""
    try:
        table = {path.stem: np.load(path, mmap_mode='r') for path in folder.iterdir() if path.suffix == '.npy'}
    except (OSError, ValueError, EOFError):  # of numpy, on files that are damaged
        return None
    return table if table.keys() >= ARRAYS else None


def _store(folder: Path, name: str, table: Table) -> None:
    """Write a table under a temporary name, rename it, and remove what older versions or killed runs left."""
    stale = [path for path in folder.parent.iterdir() if path.name.startswith((f'{name}-', f'.{name}-'))]
    temporary = Path(tempfile.mkdtemp(prefix=f'.{name}-', dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp keeps other users out
        for key, array in table.items():
            with (temporary / f'{key}.npy').open('wb') as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        for path in stale:
            shutil.rmtree(path, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
