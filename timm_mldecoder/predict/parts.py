"""The output of a prediction: finished parts while it runs, one file in the end.

Part p holds the images [p * size, (p + 1) * size) of the source, whatever rank wrote it. A part is written completely
or not at all, so that a kill loses the parts under way, and the same command writes those that are missing.
"""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from timm_mldecoder.modeling.load import Label
from timm_mldecoder.predict.sources import parquet_module
from timm_mldecoder.runtime.files import TEMPORARY, utf8, write_atomically, write_csv

SETUP = 'setup.json'
CHUNK = 65_536  # rows to write at a time
FORMATS = ('.csv', '.jsonl', '.parquet')


class Prediction(NamedTuple):
    """What is known of one image."""

    image: str
    labels: Sequence[Label] = ()  # its labels, the likeliest first; empty if none reaches its threshold
    error: str = ''  # why it could not be read; empty if it could
    arrays: dict[str, np.ndarray] = {}  # its scores or features, by name


@dataclass
class Parts:
    """The parts of one output file.

    Raises:
        ValueError: If the format is unknown, or two outputs are the same file.
    """

    out: Path  # the file that is written in the end; its suffix names the format
    number: int  # images of the source
    size: int  # images per part
    setup: dict[str, Any]  # what the predictions depend on; parts of another setup are not continued
    arrays: dict[str, Path]  # files for scores and features, by the name of the array
    labels: int = 0  # in the output, once it is finished

    def __post_init__(self) -> None:
        out = self.out
        if out.suffix.lower() not in FORMATS:
            raise ValueError(f'--out {out}: the format is the suffix, one of {", ".join(FORMATS)}')
        if out.suffix.lower() == '.parquet':
            parquet_module(f'--out {out}')
        self.errors = out.with_name(f'{out.name}.errors.csv')
        self.folder = out.with_name(f'{out.name}.parts')
        self._removed = out.with_name(f'.{self.folder.name}{TEMPORARY}')
        self.count = -(-self.number // self.size)
        setup = {**self.setup, 'images': self.number, 'part_size': self.size, 'arrays': sorted(self.arrays)}
        self.setup = json.loads(json.dumps(setup))  # as it is read back
        self._outputs = [out, self.errors, *self.arrays.values()]
        if len({path.resolve() for path in self._outputs}) < len(self._outputs):
            raise ValueError(f'{", ".join(map(str, self._outputs))}: each output needs a file of its own')

    def begin(self) -> None:
        """Create the folder of the parts; called on the first rank.

        Raises:
            ValueError: If an output exists, or the parts there belong to another prediction.
        """
        setup = self.folder / SETUP
        same = setup.exists() and json.loads(setup.read_text()) == self.setup
        # of a prediction that was killed while its parts were joined, some of the outputs exist
        joining = same and not self.missing()
        for path in self._outputs:
            if path.exists() and not joining:
                raise ValueError(f'{path} exists: remove it, or choose another name')
            if not path.parent.is_dir():
                raise ValueError(f'{path}: there is no folder {path.parent}')
        if setup.exists() and not same:
            raise ValueError(f'{self.folder} holds parts of another prediction: remove it, or choose another --out')
        if self._removed.exists():
            shutil.rmtree(self._removed)
        self.folder.mkdir(exist_ok=True)
        write_atomically(setup, lambda file: file.write(json.dumps(self.setup).encode()))

    def dtype(self, name: str) -> str:
        """Return the dtype of an array: scores are as they were computed if nothing else is requested."""
        half = name != 'scores' or self.setup.get('scores_dtype', 'float32') == 'float16'
        return '<f2' if half else '<f4'

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
            write_atomically(self.folder / f'{part:08d}.{name}.npy', partial(np.save, arr=stacked))
        lines = [
            json.dumps([item.image, [tuple(label[1:]) for label in item.labels], item.error]) + '\n'
            for item in predictions
        ]
        write_atomically(self.folder / f'{part:08d}.jsonl', lambda file: file.write(''.join(lines).encode()))

    def finish(self) -> int:
        """Join the parts into the output files, list the errors beside them, and return their number."""
        write = {'.csv': self._write_csv, '.jsonl': self._write_json_lines, '.parquet': self._write_parquet}
        write[self.out.suffix.lower()]()
        errors = []
        for image, labels, error in self._rows():
            self.labels += len(labels)
            errors += [(image, error)] if error else []
        if errors:
            write_csv(self.errors, [('image', 'reason'), *errors])
        for name, path in self.arrays.items():
            self._join_arrays(name, path)
        self.folder.rename(self._removed)  # the parts disappear at once: never some of them without their setup
        shutil.rmtree(self._removed)
        return len(errors)

    def _rows(self) -> Iterator[tuple[str, list, str]]:
        """Yield image, labels and error of every image."""
        for part in range(self.count):
            with (self.folder / f'{part:08d}.jsonl').open(encoding='utf-8') as file:
                for line in file:
                    image, labels, error = json.loads(line)
                    yield utf8(image), labels, error

    def _flat(self) -> Iterator[tuple[str, str, float | None]]:
        """Yield a row per label; an image without labels has one row, with an empty label."""
        for image, labels, error in self._rows():
            if not error:
                for name, score in labels or [('', None)]:
                    yield image, name, score

    def _write_csv(self) -> None:
        rows = ((image, name, '' if score is None else f'{score:.6f}') for image, name, score in self._flat())
        write_csv(self.out, chain([('image', 'label', 'score')], rows))

    def _write_json_lines(self) -> None:
        def write(file: Any) -> None:
            for image, labels, error in self._rows():
                if not error:
                    found = [{'label': name, 'score': score} for name, score in labels]
                    file.write((json.dumps({'image': image, 'labels': found}, ensure_ascii=False) + '\n').encode())

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
                while chunk := list(islice(rows, CHUNK)):
                    pairs = zip(zip(*chunk, strict=True), schema.types, strict=True)
                    writer.write_table(pyarrow.table([pyarrow.array(*pair) for pair in pairs], schema=schema))

        write_atomically(self.out, write)

    def _join_arrays(self, name: str, path: Path) -> None:
        """Write an `.npz` with the rows of all parts, and the names of their images."""
        parts = [np.load(self.folder / f'{part:08d}.{name}.npy', mmap_mode='r') for part in range(self.count)]
        parts = [part for part in parts if len(part)]
        shape = (sum(map(len, parts)), *(parts[0].shape[1:] if parts else ()))
        kind = f'<U{max((len(image) for image, _, error in self._rows() if not error), default=1)}'
        names = (image for image, _, error in self._rows() if not error)
        chunks = iter(lambda: list(islice(names, CHUNK)), [])
        arrays = {name: (self.dtype(name), shape, parts), 'images': (kind, shape[:1], chunks)}
        if name == 'scores':
            classes = np.array(self.setup['classes'])
            arrays['classes'] = (classes.dtype.str, classes.shape, [classes])

        def write(file: Any) -> None:
            with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:
                for key, (descr, shape, chunks) in arrays.items():
                    with archive.open(f'{key}.npy', 'w', force_zip64=True) as member:
                        header = {'descr': descr, 'fortran_order': False, 'shape': shape}
                        np.lib.format.write_array_header_1_0(member, header)
                        for chunk in chunks:
                            member.write(np.ascontiguousarray(chunk, descr).tobytes())

        write_atomically(path, write)


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """Return a digest of arrays, for comparing the setups of two predictions."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]
