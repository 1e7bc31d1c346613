"""Label graphs on disk: which classes are seen together, as a matrix [C, C] with the names of the classes."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from timm_mldecoder.data.word_embeddings import write_tensors


def write_label_graph(path: str | Path, adjacency: Tensor, class_names: Sequence[str], **about: str) -> None:
    """Write the adjacency M [C, C] and the class names; a file that is there is replaced at the end.

    Args:
        path: Safetensors file to write.
        adjacency: M[i, j]: images that show classes i and j, divided by the occurrences of class i.
        class_names: Name of each class.
        **about: What the matrix was made from, for the metadata.

    Raises:
        ValueError: If the folder of the file does not exist.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f'{path}: there is no folder {path.parent}')
    metadata = {'class_names': json.dumps(list(class_names)), **about}
    write_tensors(path, {'adjacency': adjacency.float().contiguous()}, metadata)


def read_label_graph(path: str | Path, class_names: Sequence[str] | None = None) -> tuple[Tensor, list[str]]:
    """Read the adjacency M [C, C] of a label graph and the names of its classes.

    Args:
        path: Safetensors file of `write_label_graph`.
        class_names: Order of the classes to return; the file's own order if not given.

    Raises:
        ValueError: If the file is missing or damaged, or its classes are not those of `class_names`.
    """
    if not Path(path).is_file():
        raise ValueError(f'there is no label graph {path}: make it with python -m timm_mldecoder.label_graph')
    try:
        with safe_open(path, framework='pt') as file:
            adjacency, names = file.get_tensor('adjacency'), json.loads((file.metadata() or {})['class_names'])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no label graph (tensor 'adjacency' with 'class_names'): {error!s:.200}") from error
    if not isinstance(names, list) or len(set(map(str, names))) != len(names):
        raise ValueError(f"{path}: metadata 'class_names' is not a list of distinct names")
    if adjacency.shape != (len(names), len(names)) or not adjacency.is_floating_point():
        raise ValueError(f'{path}: adjacency is {adjacency.dtype} {list(adjacency.shape)}, for {len(names)} classes')
    bad = (~adjacency.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f'{path}: adjacency is not finite in the rows of {[names[row] for row in bad]}')
    if class_names is None:
        return adjacency, names
    missing, unknown = [sorted(set(a) - set(b)) for a, b in ((class_names, names), (names, class_names))]
    if missing or unknown:
        raise ValueError(f'{path} does not hold the classes of the data: missing {missing}, unknown {unknown}')
    row = {name: index for index, name in enumerate(names)}
    order = torch.tensor([row[name] for name in class_names])
    return adjacency[order][:, order], list(class_names)
