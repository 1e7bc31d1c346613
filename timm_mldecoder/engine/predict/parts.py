"""The output of a prediction: finished parts while it runs, one file in the end.

Part p holds the images [p * size, (p + 1) * size) of the source, whatever rank wrote it. A part is written completely
or not at all, so that a kill loses the parts under way, and the same command writes those that are missing.
"""

import csv
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from timm_mldecoder.engine.predict.sources import parquet_module
from timm_mldecoder.engine.runtime.files import write_atomically

SETUP = 'setup.json'
ERRORS = 'errors.csv'
FORMATS = ('.csv', '.jsonl', '.parquet')


class Label(NamedTuple):
    """A label of an image, and its probability."""

    index: int
    name: str
    score: float


class Prediction(NamedTuple):
    """What is known of one image.

    Attributes:
        image: Its name.
        labels: Its labels, the likeliest first; empty if none reaches its threshold.
        error: Why it could not be read; empty if it could.
        arrays: Its scores or features, by name.
    """

    image: str
    labels: Sequence[Label] = ()
    error: str = ''
    arrays: dict[str, np.ndarray] = {}


class Parts:
    """The parts of one output file.

    Args:
        out: The file that is written in the end; its suffix names the format.
        number: Number of images of the source.
        size: Images per part.
        setup: What the predictions depend on; parts of another setup are not continued.
        arrays: Files for scores and features, by the name of the array.

    Raises:
        ValueError: If the format is unknown, the file exists, or the parts there belong to another prediction.
    """

    def __init__(self, out: Path, number: int, size: int, setup: dict[str, Any], arrays: dict[str, Path]) -> None:
        if out.suffix.lower() not in FORMATS:
            raise ValueError(f'--out {out}: the format is the suffix, one of {", ".join(FORMATS)}')
        if out.suffix.lower() == '.parquet':
            parquet_module(f'--out {out}')
        self.out = out
        self.folder = out.with_name(f'{out.name}.parts')
        self.number = number
        self.size = size
        self.arrays = arrays
        self.count = -(-number // size)
        self.labels = 0  # in the output, once it is finished
        self.setup = {**setup, 'images': number, 'part_size': size, 'arrays': sorted(arrays)}

    def begin(self) -> None:
        """Create the folder of the parts; called on the first rank."""
        for path in (self.out, *self.arrays.values()):
            if path.exists():
                raise ValueError(f'{path} exists: remove it, or choose another name')
            if not path.parent.is_dir():
                raise ValueError(f'{path}: there is no folder {path.parent}')
        setup = self.folder / SETUP
        if setup.exists() and json.loads(setup.read_text()) != self.setup:
            raise ValueError(f'{self.folder} holds parts of another prediction: remove it, or choose another --out')
        self.folder.mkdir(exist_ok=True)
        write_atomically(setup, lambda file: file.write(json.dumps(self.setup).encode()))

    def missing(self) -> list[int]:
        """Return the parts that are still to be written."""
        done = {path.name for path in self.folder.glob('*.jsonl')}
        return [part for part in range(self.count) if f'{part:08d}.jsonl' not in done]

    def images(self, part: int) -> range:
        """Return the images of a part, by number."""
        return range(part * self.size, min((part + 1) * self.size, self.number))

    def write(self, part: int, predictions: Sequence[Prediction]) -> None:
        """Write a part."""
        readable = [prediction for prediction in predictions if not prediction.error]
        for name in self.arrays:
            stacked = np.stack([prediction.arrays[name] for prediction in readable]) if readable else np.zeros((0,))
            write_atomically(self.folder / f'{part:08d}.{name}.npy', lambda file, rows=stacked: np.save(file, rows))
        lines = [
            json.dumps([item.image, [tuple(label[1:]) for label in item.labels], item.error]) + '\n'
            for item in predictions
        ]
        write_atomically(self.folder / f'{part:08d}.jsonl', lambda file: file.write(''.join(lines).encode()))

    def finish(self) -> int:
        """Join the parts into the output files, write `errors.csv` beside them, and return the number of errors."""
        write = {'.csv': self._write_csv, '.jsonl': self._write_json_lines, '.parquet': self._write_parquet}
        write[self.out.suffix.lower()]()
        errors = []
        for image, labels, error in self._rows():
            self.labels += len(labels)
            errors += [(image, error)] if error else []
        if errors:
            write_csv(self.out.with_name(ERRORS), [('image', 'reason'), *errors])
        for name, path in self.arrays.items():
            self._join_arrays(name, path)
        shutil.rmtree(self.folder)
        return len(errors)

    def _rows(self) -> Iterator[tuple[str, list, str]]:
        """Yield image, labels and error of every image."""
        for part in range(self.count):
            with (self.folder / f'{part:08d}.jsonl').open(encoding='utf-8') as file:
                for line in file:
                    yield json.loads(line)

    def _flat(self) -> Iterator[tuple[str, str, float | None]]:
        """Yield a row per label; an image without labels has one row, with an empty label."""
        for image, labels, error in self._rows():
            if not error:
                for name, score in labels or [('', None)]:
                    yield utf8(image), name, score

    def _write_csv(self) -> None:
        rows = ((image, name, '' if score is None else f'{score:.6f}') for image, name, score in self._flat())
        write_csv(self.out, chain([('image', 'label', 'score')], rows))

    def _write_json_lines(self) -> None:
        def write(file: Any) -> None:
            for image, labels, error in self._rows():
                if not error:
                    found = [{'label': name, 'score': score} for name, score in labels]
                    file.write(
                        (json.dumps({'image': utf8(image), 'labels': found}, ensure_ascii=False) + '\n').encode()
                    )

        write_atomically(self.out, write)

    def _write_parquet(self) -> None:
        import pyarrow

        schema = pyarrow.schema(
            [('image', pyarrow.string()), ('label', pyarrow.string()), ('score', pyarrow.float32())]
        )
        parquet = parquet_module(f'--out {self.out}')

        def write(file: Any) -> None:
            with parquet.ParquetWriter(file, schema) as writer:
                rows = self._flat()
                while chunk := list(islice(rows, 65_536)):
                    columns = [
                        pyarrow.array(column, kind)
                        for column, kind in zip(zip(*chunk, strict=True), schema.types, strict=True)
                    ]
                    writer.write_table(pyarrow.table(columns, schema=schema))

        write_atomically(self.out, write)

    def _join_arrays(self, name: str, path: Path) -> None:
        """Write an `.npz` with the rows of all parts, and the names of their images."""
        parts = [np.load(self.folder / f'{part:08d}.{name}.npy', mmap_mode='r') for part in range(self.count)]
        parts = [part for part in parts if len(part)]
        shape = (sum(len(part) for part in parts), *(parts[0].shape[1:] if parts else ()))
        images = np.array([image for image, _, error in self._rows() if not error])
        extra = {'images': images, **({'classes': np.array(self.setup['classes'])} if name == 'scores' else {})}

        def write(file: Any) -> None:
            with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:
                with archive.open(f'{name}.npy', 'w', force_zip64=True) as member:
                    header = {'descr': '<f2', 'fortran_order': False, 'shape': shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    for part in parts:
                        member.write(np.ascontiguousarray(part, dtype='<f2').tobytes())
                for key, value in extra.items():
                    with archive.open(f'{key}.npy', 'w') as member:
                        np.save(member, value)

        write_atomically(path, write)


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    """Write CSV that spreadsheets take as text: fields that would be formulas begin with an apostrophe."""

    def write(file: Any) -> None:
        text = io.TextIOWrapper(file, encoding='utf-8', newline='')
        csv.writer(text).writerows([harmless(field) for field in row] for row in rows)
        text.flush()
        text.detach()

    write_atomically(path, write)


def harmless(field: Any) -> Any:
    """Return a field that UTF-8 can hold and no spreadsheet takes for a formula."""
    if not isinstance(field, str):
        return field
    return f"'{utf8(field)}" if field[:1] in ('=', '+', '-', '@', '\t', '\r') else utf8(field)


def utf8(name: Any) -> str:
    """Return a name as text that UTF-8 can hold: bytes of file names that are not UTF-8 become escapes."""
    return str(name).encode('utf-8', 'backslashreplace').decode()


def fingerprint(*values: Any) -> str:
    """Return a digest of values, for comparing the setups of two predictions."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]
