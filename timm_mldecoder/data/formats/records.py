"""Targets of Hugging Face datasets and WebDataset shards: names as labels, and columns that do not fit the task.

timm takes class indices. Here a target may also be a name, a list of names, or several names in one string, as in
`tag_string`: `1girl solo long_hair`.
"""

import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm.data
from timm.data.readers.targets import get_field, has_field

from timm_mldecoder.data.annotations import Annotations, MultiLabelDataset, cached_annotations
from timm_mldecoder.data.compact import TableBuilder, label_type
from timm_mldecoder.data.images import Reading
from timm_mldecoder.data.text_files import Names, normalize_name

_logger = logging.getLogger(__name__)

BLOCK_ROWS = 2**13

Target = int | str | list | None


def name_targets(dataset: Any, name: str, multilabel: bool, training_split: Callable[[], Any], separator: str) -> Any:
    """Let names be targets of a dataset of timm, and check that its targets fit the task.

    Args:
        dataset: timm's dataset of `name`, `hfds/...` or `wds/...`.
        name: Name of the dataset, for messages.
        multilabel: Whether an image has several classes.
        training_split: Makes the training split, whose names are the classes where no class map lists them.
        separator: Between the names in one string; empty for blanks.

    Returns:
        The dataset, or a `RowDataset` of its rows, whose names are annotations.

    Raises:
        ValueError: If the targets do not fit the task, or a name is not one of the classes.
    """
    reader = dataset.reader
    if reader.target_keys or reader.dense_target:
        return dataset
    streamed = not hasattr(reader, 'iter_targets')
    remap, reader.remap_class = reader.remap_class, False  # the targets as they are stored
    first = _first_of_shards(reader) if streamed else _example(reader)
    _check_task(name, reader, first, multilabel)
    if not _is_named(first):  # where a class map has no such index, it names the classes, and indices stay as they are
        reader.remap_class = remap and (not isinstance(first, int) or {first, str(first)} & {*reader.class_to_idx})
        return dataset
    split = NameSplit(multilabel, separator)
    names = _classes(reader)
    if streamed:
        if not names:
            raise ValueError(
                f'dataset {name!r}: the targets are names such as {first!r}: pass --class-map, the classes'
            )
        reader.class_to_idx, reader.numbers = names, Numbers(split, names)
        reader._lazy_init = partial(_begin, reader)
        return dataset
    classes = sorted(names, key=names.__getitem__)
    if not classes and reader.split != 'train':
        classes = _row_labels(name, training_split().reader, split, []).class_names
    return RowDataset(dataset, _row_labels(name, reader, split, classes))


class NameSplit:
    """The names of a target, normalized as in every reader."""

    def __init__(self, multilabel: bool, separator: str) -> None:
        self.multilabel, self.separator = multilabel, separator

    def __call__(self, target: Target) -> list[str]:
        if isinstance(target, str) and self.multilabel:
            target = target.split(self.separator or None)
            if not self.separator and any(part.endswith((',', ';')) for part in target):
                raise ValueError(
                    f'names such as {target[0]!r} end with a separator: pass --label-separator {target[0][-1]!r}'
                )
        parts = target if isinstance(target, (list, tuple)) else [] if target is None else [target]
        return [name for part in parts if (name := normalize_name(str(part)))]

    def checked(self, target: Target, where: str) -> list[str]:
        """The names, one alone if the task is not of several."""
        names = self(target)
        if len(names) != 1 and not self.multilabel:
            raise ValueError(f'{where}: expected one class, got {target!r}')
        return names


class Numbers:
    """The class indices of a target of names."""

    def __init__(self, split: NameSplit, classes: dict[str, int]) -> None:
        self._split, self._classes = split, classes

    def __call__(self, target: Target, where: str) -> int | list[int]:
        names = self._split.checked(target, where)
        if unknown := [name for name in names if name not in self._classes]:
            raise _unknown_label(unknown[0], where, self._classes)
        numbers = [self._classes[name] for name in names]
        return numbers if self._split.multilabel else numbers[0]


def _unknown_label(label: str, where: str, classes: Iterable[str]) -> ValueError:
    return ValueError(f'{where}: unknown label {label!r}; the classes are {", ".join([*classes][:5])}, ...')


def _row_labels(name: str, reader: Any, split: NameSplit, classes: list[str]) -> Annotations:
    """Annotations of the rows of a Hugging Face dataset; a path is the number of a row.

    Args:
        name: Name of the dataset, for messages.
        reader: timm's reader of it.
        split: Splits a target into names.
        classes: Class names; empty for the sorted names of the rows.
    """

    def build(folder: Path | None) -> Annotations:
        names, builder = Names(), TableBuilder(folder)
        column = reader.label_key.partition('/')[0]
        rows = reader.dataset.select_columns([column])
        for first in range(0, len(rows), BLOCK_ROWS):
            counts, label = [], []
            for row, value in enumerate(rows[first : first + BLOCK_ROWS][column], start=first):
                names.position = f'dataset {name!r}, split {reader.split}, row {row}'
                found = split.checked(get_field({column: value}, reader.label_key), names.position)
                counts.append(len(found))
                label += [names[text] for text in found]
            builder.add([str(row) for row in range(first, first + len(counts))], counts, label)
        class_names = classes or sorted(names.normalized)
        if unknown := names.unknown(class_names):
            raise _unknown_label(*unknown[0], class_names)
        table = builder.finish(label_type(len(class_names) - 1), names.order(class_names))
        return Annotations.from_table(class_names, table)

    files = [Path(part['filename']) for part in reader.dataset.cache_files]
    flags = [reader.split, len(reader), reader.label_key, split.multilabel, split.separator, classes]
    return cached_annotations(files[0].parent if files else Path(), 'rows', flags, files, build)


class RowDataset(MultiLabelDataset):
    """Rows of a Hugging Face dataset, whose labels are annotations and whose images are read from the rows.

    Args:
        dataset: timm's dataset of them.
        annotations: Their labels; a path is the number of a row.
    """

    has_files = False

    def __init__(self, dataset: Any, annotations: Annotations) -> None:
        settings = {name: getattr(dataset, name) for name in ('transform', 'target_transform', 'input_img_mode')}
        super().__init__(annotations, **settings)
        self.reader, self.load_bytes = dataset.reader, dataset.load_bytes
        self._images = self.reader.dataset.select_columns([self.reader.image_key])

    def _load(self, path: str) -> Any:
        image = self._images[int(path)][self.reader.image_key] or {}
        if not (image.get('bytes') or image.get('path')):
            raise OSError(f'row {path} has no image')
        content = image['bytes'] or Path(image['path']).read_bytes()
        if self.load_bytes:  # the transform decodes them (`--tf-preprocessing`)
            return content
        return self.reading.open(io.BytesIO(content), self.input_img_mode)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """File of image `index` as the row has it."""
        return self.reader.filename(int(self.annotations.path(index)), basename, absolute)


def read_by_rule(dataset: Any, reading: Reading, mode: str) -> None:
    """Let a stream of WebDataset read images by the rule of files; timm clips deep images and drops transparency."""
    dataset.reader.reading, dataset.reader.mode = reading, mode
    dataset.reader.input_img_mode = None
    dataset.reader._lazy_init = partial(_begin, dataset.reader)


def _begin(reader: Any) -> None:
    """Begin a stream: names become indices before timm's stages that decode and rename, images are converted after."""
    import webdataset

    type(reader)._lazy_init(reader)
    if hasattr(reader, 'numbers'):
        reader.ds.pipeline.insert(-2, webdataset.map(partial(_with_numbers, reader, reader.numbers)))
    if hasattr(reader, 'reading'):
        reader.ds.pipeline.append(webdataset.map(partial(_converted, reader.reading, reader.mode), handler=_skip))


def _skip(error: Exception) -> bool:
    _logger.warning(f'unreadable image left out: {error}')
    return True


def _converted(reading: Reading, mode: str, sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, 'image': reading.convert(sample['image'], mode)}


def _with_numbers(reader: Any, numbers: Numbers, sample: dict[str, Any]) -> dict[str, Any]:
    where, key = f'sample {sample.get("__key__")}', reader.target_key or reader.split_info.alt_label
    if not key:
        return {**sample, 'cls': str(numbers(sample['cls'].decode(), where)).encode()}
    meta = json.loads(sample['json'])
    return {**sample, 'json': json.dumps({**meta, key: numbers(get_field(meta, key), where)}).encode()}


def _check_task(name: str, reader: Any, first: Target, multilabel: bool) -> None:
    column = getattr(reader, 'label_key', None) or getattr(reader, 'target_key', None) or 'cls'
    if isinstance(first, (list, tuple)) and not multilabel:
        raise ValueError(
            f'dataset {name!r}: {column!r} has several classes per image, such as {first!r:.60}: pass --task multilabel'
        )
    if isinstance(first, int) and multilabel:
        raise ValueError(
            f'dataset {name!r}: {column!r} has one class per image, such as {first!r}: leave --task multilabel out, or '
            'pass --target-key, a column of several'
        )


def _is_named(target: Target) -> bool:
    parts: Sequence[Any] = target if isinstance(target, (list, tuple)) else [target]
    return any(isinstance(part, str) for part in parts)


def _classes(reader: Any) -> dict[str, int]:
    if reader.class_to_idx:
        return {normalize_name(str(label)): index for label, index in reader.class_to_idx.items()}
    info = getattr(reader, 'info', None)
    return {normalize_name(label): index for index, label in enumerate((info or {}).get('class_names') or ())}


def check_stream(reader: Any, name: str, multilabel: bool) -> None:
    """Check that the targets of a streamed Hugging Face dataset fit the task, by its features where it has them.

    Raises:
        ValueError: If they do not, or are names without a class map.
    """
    features = reader.builder.info.features
    if not features or reader.target_keys or reader.dense_target or not has_field(features, reader.target_key):
        return
    example = _of_type(features, reader.target_key)
    _check_task(name, reader, example, multilabel)
    if _is_named(example) and not reader.remap_class:
        raise ValueError(f'dataset {name!r}: {reader.target_key!r} has names: pass --class-map, or read it as hfds/')
    if isinstance(example, str) and multilabel:
        raise ValueError(f'dataset {name!r}: {reader.target_key!r} has names in one string: read it as hfds/')


def _example(reader: Any) -> Target:
    """A value of the type of the targets; of names the first one that is not empty."""
    value = _of_type(reader.dataset.features, reader.label_key)
    return next((target for target in reader.iter_targets() if target), value) if _is_named(value) else value


def _of_type(features: Any, key: str) -> Target:
    feature, depth = get_field(features, key), 0
    while hasattr(feature, 'feature'):
        feature, depth = feature.feature, depth + 1
    dtype = str(getattr(feature, 'dtype', ''))
    value: Target = 0 if hasattr(feature, 'names') or 'int' in dtype else '' if 'string' in dtype else None
    return [value] if depth else value


def _first_of_shards(reader: Any) -> Target:
    """The target of the first sample of a local shard; None where it cannot be read, which timm reports."""
    key = reader.target_key or reader.split_info.alt_label
    try:
        with tarfile.open(os.path.join(reader.root, reader.split_info.filenames[0])) as tar:
            suffix = '.json' if key else '.cls'
            member = next(member for member in tar if member.isfile() and member.name.endswith(suffix))
            file: Any = tar.extractfile(member)
            content = file.read().decode()
        if key:
            return get_field(json.loads(content), key)
        return int(content) if content.strip().lstrip('-').isdigit() else content
    except (OSError, tarfile.TarError, ValueError, KeyError, IndexError, TypeError, StopIteration):
        return None


def training_split(name: str, root: str | None, split: str, **options: Any) -> Any:
    """The split `train` of a dataset, or `split` where there is none."""
    for candidate in ('train', split):
        try:
            return timm.data.create_dataset(name, root=root, split=candidate, is_training=False, **options)
        except (ValueError, RuntimeError):
            if candidate == split:
                raise
    raise AssertionError('unreachable')
