"""NUS-WIDE for zero-shot learning, as the reference repository of ML-Decoder distributes it.

    ROOT/data.csv                  path, labels, split: one row per image, labels as `[sky, clouds]`, split train or val
    ROOT/benchmark_81_v0.json      seen (925) and unseen (81) classes, see `class_split`
    ROOT/wordvec_array.pth         word vectors [300, C] of the classes
    ROOT/<path>                    the images

The classes are the distinct labels of the whole of `data.csv`, sorted; the columns of the word vectors are in the same
order. `python -m timm_mldecoder.data.embed ROOT OUT.safetensors --nus-wide` makes a file of both. The split with 81
classes of arXiv 2209.06585 is another distribution, see `json_list`.
"""

from pathlib import Path

from torch import Tensor

from timm_mldecoder.data.annotations import POSITIVE, Annotations, cached_annotations
from timm_mldecoder.data.text_files import normalize_name, read_rows
from timm_mldecoder.data.word_embeddings import load_tensors

SPLITS = {'train': 'train', 'validation': 'val'}


def read_nus_wide(root: Path, split: str) -> Annotations:
    """Read one split, with all classes, seen and unseen.

    Raises:
        ValueError: If the split is unknown, or `data.csv` is missing or malformed.
    """
    if split not in SPLITS:
        raise ValueError(f'NUS-WIDE has no split {split!r}, choose one of {sorted(SPLITS)}')

    def build(_: Path | None) -> Annotations:
        rows = _read_images(root)
        class_names = _class_names(rows)
        label_index = {name: index for index, name in enumerate(class_names)}
        chosen = [(path, labels) for path, labels, part in rows if part == SPLITS[split]]
        entries = [(image, label_index[name]) for image, (_, labels) in enumerate(chosen) for name in labels]
        image, label = zip(*entries, strict=True) if entries else ((), ())
        return Annotations(class_names, [path for path, _ in chosen], image, label, [POSITIVE] * len(entries))

    return cached_annotations(root, 'nuswide', [split], [root / 'data.csv'], build)


def read_word_vectors(root: Path) -> tuple[Tensor, list[str]]:
    """Label embeddings [C, 300] of `wordvec_array.pth`, and the names of the classes.

    Raises:
        ValueError: If a file is missing or malformed, or the numbers of classes differ.
    """
    images = _read_images(root)
    class_names = _class_names(images)
    path = root / 'wordvec_array.pth'
    if not path.is_file():
        raise ValueError(f'{path} is missing')
    vectors = load_tensors(path)
    if not isinstance(vectors, Tensor) or vectors.dim() != 2 or vectors.shape[1] != len(class_names):
        found = list(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        unlabelled = sum(not labels for _, labels, _ in images)
        hint = f'; the published code makes a class of the {unlabelled} images without labels' if unlabelled else ''
        expected = f'a tensor [width, {len(class_names)}], one column per class'
        raise ValueError(f'{path}: expected {expected}, got {found}{hint}')
    return vectors.T.float(), class_names


def _class_names(rows: list[tuple[str, list[str], str]]) -> list[str]:
    return sorted({name for _, labels, _ in rows for name in labels})


def _read_images(root: Path) -> list[tuple[str, list[str], str]]:
    """Path, labels and split of every image."""
    path = root / 'data.csv'
    if not path.is_file():
        raise ValueError(f'{path} is missing: unpack the NUS-WIDE archive of the ML-Decoder repository into {root}')
    rows = read_rows(path)
    _, header = next(rows, (1, []))
    if len(header) != 3:
        raise ValueError(f'{path}, line 1: expected the columns path, labels and split, got {header}')
    images = []
    for line, row in rows:
        if len(row) != 3 or row[2] not in SPLITS.values() or row[1][:1] + row[1][-1:] != '[]':
            raise ValueError(f'{path}, line {line}: expected a path, [labels] and train or val, got {row}')
        images.append((row[0], [normalize_name(name) for name in row[1][1:-1].split(',') if name.strip()], row[2]))
    return images
