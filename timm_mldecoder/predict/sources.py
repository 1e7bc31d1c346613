"""Where the images of a prediction come from: files, folders, tar shards, lists, and the datasets of this package."""

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from timm_mldecoder.data.formats.csv_list import DELIMITERS
from timm_mldecoder.data.images import Reading, find_images, is_image
from timm_mldecoder.data.missing_images import paths_on_disk
from timm_mldecoder.data.text_files import normalize_name, read_rows


class Files:
    """Image files under a folder; the names are their paths relative to it, with forward slashes."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = np.array([os.fsencode(name) for name in names])  # bytes, which workers share without copies

    def open(self, index: int) -> BinaryIO:
        return open(os.path.join(self.root, os.fsdecode(self.names[index])), 'rb')


class Shards:
    """Images in tar files, such as WebDataset shards; a name is `shard.tar/member`."""

    def __init__(self, paths: Sequence[Path]) -> None:
        entries = []
        for number, path in enumerate(paths):
            try:
                with tarfile.open(path, 'r:') as tar:
                    members = [member for member in tar if member.isfile() and is_image(member.name)]
            except (tarfile.TarError, OSError) as error:
                raise ValueError(f'{path} is not an uncompressed tar file: {error}') from error
            entries += [(number, member.offset_data, member.size, f'{path.name}/{member.name}') for member in members]
        self._paths = list(paths)
        self._places = np.array([entry[:3] for entry in entries], dtype=np.int64).reshape(-1, 3)
        self.names = np.array([os.fsencode(entry[3]) for entry in entries])

    def open(self, index: int) -> BinaryIO:
        number, offset, size = self._places[index].tolist()
        with open(self._paths[number], 'rb') as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


Source = Files | Shards  # images by number, each with a name that is unique within the source


@dataclass
class SourceDataset(Dataset):
    """The images of a source, converted to a PIL mode and transformed; an unreadable one is an OSError."""

    source: Source
    transform: Callable
    mode: str = 'RGB'
    reading: Reading = Reading()

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.read(index)), index

    def read(self, index: int) -> Image.Image:
        """Read an image in the mode of the model; an OSError if it cannot be read."""
        with self.source.open(index) as file:
            return self.reading.open(file, self.mode)

    def filename(self, index: int, absolute: bool = False) -> str:
        """Return the name of an image."""
        return os.fsdecode(self.source.names[index])


def open_source(path: Path, exclude: Sequence[Path] = (), path_column: str = '') -> Source:
    """Open what a path names: an image, a folder of images or of tar files, a tar file, or a CSV or Parquet list.

    Args:
        path: The path. Those of a list are relative to its folder.
        exclude: Folders to leave out, such as the output's. Hidden files and folders are left out too.
        path_column: Column of the paths in a list; if empty, `path`, else the first column.

    Raises:
        ValueError: If there is no image, or a list cannot be read.
    """
    lists = {'.csv': _read_csv, '.parquet': _read_parquet}
    if path.is_file() and path.suffix.lower() in lists:
        names = paths_on_disk(lists[path.suffix.lower()](path, path_column), path.parent)
        if len(set(names)) < len(names):
            raise ValueError(
                f'{path} lists {names[0]} and others more than once: every path must be unique, and --path-column '
                'names the column of paths'
            )
        source = Files(path.parent, names)
    elif path.is_file():
        source = Shards([path]) if path.suffix.lower() == '.tar' else Files(path.parent, [path.name])
    elif path.is_dir():
        shards = sorted(shard for shard in path.glob('*.tar') if not shard.name.endswith('.pth.tar'))  # a checkpoint
        source = Shards(shards) if shards else Files(path, find_images(path, exclude))
    else:
        raise ValueError(f'{path}: no such file or folder')
    if not len(source.names):
        raise ValueError(f'{path}: no images found (.png, .jpg, .webp, .tif and what else Pillow reads)')
    return source


def dataset_source(dataset: Any, root: Path) -> Source:
    """Return the images of a dataset, named by their paths relative to its root; a ValueError if they are no files."""
    if not hasattr(dataset, 'filenames'):
        raise ValueError(f'--dataset: {type(dataset).__name__} does not keep its images in files')
    root = root if root.is_dir() else root.parent
    return Files(root, [os.path.relpath(path, root) for path in dataset.filenames(absolute=True)])


def _read_csv(path: Path, path_column: str) -> list[str]:
    """Paths of a list, separated as tables are: of the column `path` or the one named, else of the first column."""
    wanted, first = normalize_name(path_column).lower() or 'path', {}
    _, start = next(read_rows(path), (1, ['']))
    excel = start[0].strip().lower().startswith('sep=')
    for delimiter in [','.join(start).strip()[4:5] or '\t'] if excel else DELIMITERS:
        first[delimiter] = next((row for _, row in read_rows(path, delimiter, int(excel))), [])
        header = [normalize_name(name).lower() for name in first[delimiter]]
        if wanted in header:
            column, titled = header.index(wanted), True
            break
    else:
        delimiter, column = max(first, key=lambda delimiter: len(first[delimiter])), 0
        if path_column:
            raise ValueError(f'{path}: no column {path_column!r}; the first line is {first[delimiter]}')
        # a title is no image: `file`, `Filename`
        titled = bool(first[delimiter]) and not is_image(first[delimiter][0].strip())
    rows = [row for _, row in read_rows(path, delimiter, int(excel))]
    return [row[column].strip() for row in rows[titled:] if len(row) > column and row[column].strip()]


def _read_parquet(path: Path, path_column: str) -> list[str]:
    table = parquet_module(str(path)).read_table(path)
    if path_column and path_column not in table.column_names:
        raise ValueError(f'{path}: no column {path_column!r}, of {table.column_names}')
    names = table.column(path_column or ('path' if 'path' in table.column_names else 0)).to_pylist()
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f'{path}: pass --path-column, the column of paths, of {table.column_names}')
    return names


def parquet_module(what: str) -> Any:
    """Return `pyarrow.parquet`; a ValueError if it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{what} needs pyarrow: pip install 'timm-mldecoder[data]'") from error
    return parquet
