"""NUS-WIDE for zero-shot learning, as the reference repository of ML-Decoder distributes it.

    ROOT/data.csv                  path, labels, split: a row an image, labels as `[sky, clouds]`, split train or val
    ROOT/benchmark_81_v0.json      seen (925) and unseen (81) classes, see `class_split`
    ROOT/wordvec_array.pth         word vectors [300, C] of the classes
    ROOT/<path>                    the images

The classes are the distinct labels of the whole of `data.csv`, sorted; the columns of the word vectors are in the same
order; `python -m timm_mldecoder.data.embed ROOT OUT.safetensors --nus-wide` makes a file of both.
"""

import csv
from pathlib import Path

from torch import Tensor

from timm_mldecoder.data.annotations import POSITIVE, Annotations
from timm_mldecoder.data.word_embeddings import load_tensors

SPLITS = {'train': 'train', 'validation': 'val'}


def read_nus_wide(root: Path, split: str) -> Annotations:
    """Read one split, with all classes; `class_split` tells the seen from the unseen.

    Raises:
        ValueError: If the split is unknown, or `data.csv` is missing or malformed.
    """
    if split not in SPLITS:
        raise ValueError(f'NUS-WIDE has no split {split!r}, choose one of {sorted(SPLITS)}.')
    rows = _read_rows(root)
    class_names = sorted({name for _, labels, _ in rows for name in labels})
    label_index = {name: index for index, name in enumerate(class_names)}
    chosen = [(path, labels) for path, labels, part in rows if part == SPLITS[split]]
    entries = [(image, label_index[name]) for image, (_, labels) in enumerate(chosen) for name in labels]
    return Annotations(
        class_names,
        [path for path, _ in chosen],
        image=[image for image, _ in entries],
        label=[label for _, label in entries],
        value=[POSITIVE] * len(entries),
    )


def read_word_vectors(root: Path) -> tuple[Tensor, list[str]]:
    """Label embeddings [C, 300] of `wordvec_array.pth`, and the names of the classes.

    Raises:
        ValueError: If a file is missing or malformed, or they are of different numbers of classes.
    """
    class_names = sorted({name for _, labels, _ in _read_rows(root) for name in labels})
    path = root / 'wordvec_array.pth'
    if not path.is_file():
        raise ValueError(f'{path} is missing.')
    vectors = load_tensors(path)
    if not isinstance(vectors, Tensor) or vectors.dim() != 2 or vectors.shape[1] != len(class_names):
        found = list(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise ValueError(f'{path}: expected a tensor [width, {len(class_names)}], a column a class, got {found}.')
    return vectors.T.float(), class_names


def _read_rows(root: Path) -> list[tuple[str, list[str], str]]:
    """Path, labels and split of every image."""
    path = root / 'data.csv'
    if not path.is_file():
        raise ValueError(f'{path} is missing: NUS-WIDE is read as the reference repository distributes it.')
    rows = []
    with path.open(newline='', encoding='utf-8') as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if len(header) != 3:
            raise ValueError(f'{path}, line 1: expected the columns path, labels and split, got {header}.')
        for row in reader:
            if len(row) != 3 or row[2] not in SPLITS.values() or row[1][:1] + row[1][-1:] != '[]':
                where = f'{path}, line {reader.line_num}'
                raise ValueError(f'{where}: expected a path, [labels] and train or val, got {row}.')
            labels = [name.strip() for name in row[1][1:-1].split(',') if name.strip()]
            rows.append((row[0], labels, row[2]))
    return rows
