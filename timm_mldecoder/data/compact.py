"""The compact form of annotations: paths as one buffer of bytes, class numbers image by image.

A table has these arrays; those of a cache are mapped from files:

    paths [bytes]       the paths of all images, one after the other
    offsets [N + 1]     those of image i are the bytes from offsets[i] up to offsets[i + 1]
    start [N + 1]       its labels are those from start[i] up to start[i + 1]
    label [A]           class numbers, of the smallest integer type
    value [A]           POSITIVE, NEGATIVE or IGNORED; one number, [], where all are the same
    instances [A]       number of objects, if the dataset has objects
"""

import logging
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

_logger = logging.getLogger(__name__)

Table = dict[str, np.ndarray]
Numbers = Sequence[int] | np.ndarray
POSITIVE, NEGATIVE, IGNORED = 1, 0, -1  # IGNORED: not annotated, or marked difficult
BLOCK = 1 << 18  # labels, or bytes of paths, that are in memory at a time


class Paths:
    """Paths as one buffer of bytes: a sequence of bytes without a Python object for each.

    Args:
        data: The bytes of all paths.
        offsets: Where each begins, and where the last one ends, [N + 1].
        chosen: Indices of some of the paths; None for all.
        change: Applied to each path.
    """

    def __init__(
        self,
        data: np.ndarray,
        offsets: np.ndarray,
        chosen: np.ndarray | None = None,
        change: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self._data, self._offsets, self._chosen, self._change = data, offsets, chosen, change

    @classmethod
    def of(cls, paths: 'Paths | Sequence[str | Path | bytes] | np.ndarray') -> 'Paths':
        """Pack a sequence of paths, or an array of bytes."""
        if isinstance(paths, Paths):
            return paths
        texts = paths.tolist() if isinstance(paths, np.ndarray) else [os.fsencode(path) for path in paths]
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum(list(map(len, texts)), out=offsets[1:])
        return cls(np.frombuffer(b''.join(texts), dtype=np.uint8), offsets)

    @classmethod
    def of_arrow(cls, strings: Any) -> 'Paths':
        """Take the strings of an Arrow array as they lie in memory."""
        _, offsets, data = strings.buffers()
        cuts = np.frombuffer(offsets, dtype=np.int32)[strings.offset : strings.offset + len(strings) + 1]
        return cls(np.frombuffer(data, dtype=np.uint8), cuts)

    def __len__(self) -> int:
        return len(self._offsets) - 1 if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice | np.ndarray) -> 'Paths': ...

    def __getitem__(self, index: Any) -> 'bytes | Paths':
        if isinstance(index, slice) and self._chosen is None:
            first, last, step = index.indices(len(self))
            if step == 1:
                return Paths(self._data, self._offsets[first : max(first, last) + 1], None, self._change)
        if isinstance(index, (slice, np.ndarray)):
            chosen = np.arange(len(self))[index] if self._chosen is None else self._chosen[index]
            return Paths(self._data, self._offsets, chosen, self._change)
        if not -len(self) <= index < len(self):
            raise IndexError(f'path {index} of {len(self)}')
        row = index % len(self) if self._chosen is None else int(self._chosen[index])
        path = self._data[self._offsets[row] : self._offsets[row + 1]].tobytes()
        return self._change(path) if self._change else path

    def __iter__(self) -> Iterator[bytes]:
        for _, block in self.blocks():
            yield from block.tolist()

    def tolist(self) -> list[bytes]:
        """Return the paths as Python objects."""
        data, offsets = self.arrays()
        content, cuts = data.tobytes(), offsets.tolist()
        return [content[first:last] for first, last in zip(cuts, cuts[1:], strict=False)]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of these paths alone, and their offsets from 0 on."""
        if self._change:
            return Paths.of([self._change(path) for path in self._unchanged().tolist()]).arrays()
        if self._chosen is None:
            first, last = int(self._offsets[0]), int(self._offsets[-1])
            return self._data[first:last], np.subtract(self._offsets, first)
        first, lengths = self._offsets[self._chosen], self._lengths()
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return self._data[np.repeat(first - offsets[:-1], lengths) + np.arange(offsets[-1])], offsets

    def blocks(self) -> Iterator[tuple[int, 'Paths']]:
        """Yield parts that fit in memory, each with the index of its first path."""
        step = max(1, BLOCK // 32)
        for first in range(0, len(self), step):
            yield first, self[first : first + step]

    @property
    def width(self) -> int:
        """Length of the longest path in bytes."""
        if self._change:
            return max((max(map(len, block.tolist())) for _, block in self.blocks()), default=0)
        return int(self._lengths().max(initial=0))

    def _unchanged(self) -> 'Paths':
        return Paths(self._data, self._offsets, self._chosen)

    def _lengths(self) -> np.ndarray:
        if self._chosen is None:
            return np.diff(self._offsets)
        return self._offsets[self._chosen + 1] - self._offsets[self._chosen]


class Growing:
    """An array [N] that grows block by block: a `.npy` file in a folder, or blocks in memory without one."""

    def __init__(self, folder: Path | None, name: str, dtype: Any) -> None:
        self.dtype, self._length = np.dtype(dtype), 0
        self._blocks: list[np.ndarray] = []
        self._path = folder / f'{name}.npy' if folder else None
        self._file: Any = self._path.open('wb') if self._path else None
        if self._file:
            self._write_header()

    def append(self, block: np.ndarray) -> None:
        """Add numbers to the end."""
        block = np.ascontiguousarray(block, dtype=self.dtype)
        self._length += len(block)
        if self._file:
            self._file.write(block.data)
        else:
            self._blocks.append(block)

    def finish(self) -> np.ndarray:
        """Return the array, mapped from its file if it has one."""
        if self._path is None:
            return np.concatenate([np.zeros(0, self.dtype), *self._blocks])
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return np.load(self._path, mmap_mode='r')

    def remove(self) -> None:
        """Remove the file, which was for a while."""
        self._blocks = []
        if self._path:
            self._file.close()
            self._path.unlink()

    def _write_header(self) -> None:
        # numpy leaves room in the header for the first axis to grow
        header = dict(descr=np.lib.format.dtype_to_descr(self.dtype), fortran_order=False, shape=(self._length,))
        np.lib.format.write_array_header_1_0(self._file, header)


def label_type(largest: int) -> np.dtype:
    """Return the type of class numbers up to `largest`."""
    return np.min_scalar_type(1 << max(1, largest).bit_length())


class TableBuilder:
    """Makes a table of blocks of images, whose classes may be numbered once all have been read.

    Args:
        folder: Where its files are written, so that one block is in memory at a time; None to build it in memory.
        counted: Whether the labels come with numbers of objects.
    """

    def __init__(self, folder: Path | None = None, counted: bool = False) -> None:
        self._folder = folder
        self._paths, self._offsets = Growing(folder, 'paths', np.uint8), Growing(folder, 'offsets', np.int64)
        self._offsets.append(np.zeros(1))
        self._end = 0
        types = dict(counts=np.int32, label=np.int32, value=np.int8) | (dict(instances=np.int32) if counted else {})
        self._read = {name: Growing(folder, f'read-{name}', dtype) for name, dtype in types.items()}
        self._values: set[int] = set()
        self.contradictions = 0  # labels of one image and class that were given with several values

    def add(
        self,
        paths: Paths | Sequence[str | Path | bytes],
        counts: Numbers,
        label: Numbers,
        value: Numbers | int = POSITIVE,
        instances: Numbers | None = None,
    ) -> None:
        """Add some images.

        Args:
            paths: Path of each image, [N].
            counts: Number of labels of each image, [N].
            label: Their numbers, [A], those of an image after each other.
            value: Their values, [A], or that of all.
            instances: Their numbers of objects, [A].
        """
        data, offsets = Paths.of(paths).arrays()
        self._paths.append(data)
        self._offsets.append(offsets[1:] + self._end)
        self._end += len(data)
        label = np.asarray(label, dtype=np.int32)
        value = np.broadcast_to(np.asarray(value, dtype=np.int8), label.shape)
        self._values.update(number for number in (POSITIVE, NEGATIVE, IGNORED) if (value == number).any())
        parts = dict(counts=counts, label=label, value=value, instances=instances)
        for name, growing in self._read.items():
            growing.append(np.asarray(parts[name]))

    def finish(self, dtype: Any, order: np.ndarray | None = None) -> Table:
        """Sort the labels of each image, one per class, and return the table.

        Args:
            dtype: Type of the class numbers.
            order: Class number of each number that was added; None if they are class numbers.
        """
        read = {name: growing.finish() for name, growing in self._read.items()}
        one_value = len(self._values) <= 1
        types = dict(label=dtype) | ({} if one_value else dict(value=np.int8))
        if 'instances' in read:
            types['instances'] = np.int32
        made = {name: Growing(self._folder, name, kind) for name, kind in types.items()}
        start = Growing(self._folder, 'start', np.int64)
        start.append(np.zeros(1))
        ends, total = np.cumsum(read['counts'], dtype=np.int64), 0
        cuts = np.unique([*np.searchsorted(ends, np.arange(BLOCK, int(ends[-1:].sum()), BLOCK)), len(ends)])
        for first, last in zip([0, *cuts.tolist()], cuts.tolist(), strict=False):
            part = slice(int(ends[first - 1]) if first else 0, int(ends[last - 1]) if last else 0)
            row = np.repeat(np.arange(last - first), read['counts'][first:last])
            label = read['label'][part] if order is None else order[read['label'][part]]
            counted = read['instances'][part] if 'instances' in read else None
            (row, *columns), contradictions, _ = _one_per_class(row, label, read['value'][part], counted)
            self.contradictions += contradictions
            for growing, column in zip(made.values(), [columns[0], *columns[1 + one_value :]], strict=True):
                growing.append(column)
            start.append(total + np.cumsum(np.bincount(row, minlength=last - first)))
            total += len(row)
            drop_pages(read)
        for growing in self._read.values():
            growing.remove()
        table = dict(paths=self._paths, offsets=self._offsets, start=start, **made)
        constant = {'value': np.array(next(iter(self._values), POSITIVE), dtype=np.int8)} if one_value else {}
        return {name: growing.finish() for name, growing in table.items()} | constant


def _one_per_class(
    row: Numbers, label: Numbers, value: Numbers, instances: Numbers | None, kind: str | None = None
) -> tuple[list[np.ndarray], int, int]:
    """Sort labels by image and class, one per image and class: the largest value counts, objects are added up.

    Args:
        row: Image of each label, below 2^29, [A].
        label: Their class numbers, below 2^32, [A].
        value: Their values, [A].
        instances: Their numbers of objects, [A]; None without objects.
        kind: How numpy sorts.

    Returns:
        The same columns; the number of labels of several values, and of those that are both present and absent.
    """
    label, value = np.asarray(label, dtype=np.int64), np.asarray(value, dtype=np.int64)
    key = (np.asarray(row, dtype=np.int64) << 34) | (label << 2) | (value + 1)
    counted = []
    if instances is None:
        key.sort(kind=kind)  # type: ignore[call-overload]
    else:
        order = np.argsort(key)
        key = key[order]
        first = np.flatnonzero(np.diff(key >> 2, prepend=-1))
        numbers = np.asarray(instances, dtype=np.int32)[order]
        counted = [np.add.reduceat(numbers, first) if len(key) else numbers]
    other = (np.diff(key >> 2) == 0) & (np.diff(key) != 0)
    both = other & ((key[:-1] & 3) == NEGATIVE + 1) & ((key[1:] & 3) == POSITIVE + 1)
    found = int(np.count_nonzero(other)), int(np.count_nonzero(both))
    if len(key):
        key = key[np.append(np.diff(key >> 2) != 0, True)]
    return [key >> 34, key >> 2 & 2**32 - 1, (key & 3) - 1, *counted], *found


def make_table(
    paths: Paths | Sequence[str | Path] | np.ndarray,
    image: Numbers,
    label: Numbers,
    value: Numbers,
    instances: Numbers | None = None,
) -> Table:
    """Sort annotations by image and class, one entry per image and class: the table, in memory."""
    data, offsets = Paths.of(paths).arrays()
    largest = int(np.max(label, initial=1))
    # a merge sort: fast where most of a file is in order, as it is in Open Images
    (row, label, value, *counted), _, both = _one_per_class(image, label, value, instances, kind='stable')
    if both:
        _logger.info(f'{both:,} labels are both present and absent in one image: they count as present')
    start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(offsets) - 1))])
    value = value.astype(np.int8)
    one_value = len(value) and (value == value[0]).all()
    table = dict(paths=data, offsets=offsets, start=start, label=label.astype(label_type(largest)))
    table['value'] = np.array(value[0]) if one_value else value
    return table | ({'instances': counted[0]} if counted else {})


def drop_pages(table: Table) -> None:
    """Let go of the memory of what was read of mapped arrays, which stays in the cache of the file system."""
    for array in table.values():
        mapped: Any = array.base
        if hasattr(mapped, 'madvise'):
            mapped.madvise(mmap.MADV_DONTNEED)
