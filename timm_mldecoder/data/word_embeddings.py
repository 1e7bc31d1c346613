"""Files of label embeddings: tensors [C, E] with the names of the classes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from timm_mldecoder.data.text_files import normalize_name
from timm_mldecoder.head.vocabulary import check_embeddings
from timm_mldecoder.runtime.files import write_atomically


def read_word_embeddings(path: str | Path, class_names: Sequence[str] | None = None) -> tuple[Tensor, list[str] | None]:
    """Read label embeddings [C, E] and their class names.

    Args:
        path: `.safetensors` as `timm_mldecoder.data.embed` writes it; `.pt` or `.pth` with a tensor [C, E], or a
            dictionary of `embeddings` and `class_names`.
        class_names: The classes to pick, in this order; default: all, in the order of the file. For a file without
            names, the names of its rows.

    Returns:
        The embeddings, float [C, E], and the class names; None if neither the file nor the caller names them.

    Raises:
        ValueError: If the file cannot be read safely or holds something else, names are repeated, embeddings are not
            finite, or classes are missing from the file (all of them are listed).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'{path} is missing: expected a file of label embeddings')
    embeddings, names = (_read_safetensors if path.suffix == '.safetensors' else _read_torch)(path)
    try:
        check_embeddings(embeddings, embeddings.shape[-1] if embeddings.dim() else 0, names)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    if class_names is None:
        return embeddings, names
    if names is None:
        return embeddings, list(class_names)
    row = {normalize_name(name): index for index, name in enumerate(names)}
    missing = [name for name in class_names if normalize_name(name) not in row]
    if missing:
        raise ValueError(f'{path} has no embedding of {missing}; it has {len(names)} classes: {names[:3]} ...')
    return embeddings[[row[normalize_name(name)] for name in class_names]], list(class_names)


def write_word_embeddings(path: str | Path, embeddings: Tensor, class_names: Sequence[str], **about: str) -> None:
    """Write label embeddings [C, E] and their names; `about` is metadata on how they were made.

    Raises:
        ValueError: If names are repeated or embeddings are not finite.
        OSError: If the file cannot be written.
    """
    check_embeddings(embeddings, embeddings.shape[-1], class_names)
    metadata = {'class_names': json.dumps(list(class_names)), **about}
    write_tensors(Path(path), {'embeddings': embeddings.detach().float().contiguous()}, metadata)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; one that is there is replaced at the end.

    Raises:
        OSError: If the file cannot be written.
    """
    write_atomically(path, lambda file: file.write(save(dict(tensors), metadata=dict(metadata))))


def _read_safetensors(path: Path) -> tuple[Tensor, list[str] | None]:
    try:
        with safe_open(path, framework='pt') as file:
            metadata = file.metadata() or {}
            if 'embeddings' not in file.keys():  # noqa: SIM118 - not a mapping
                raise ValueError(f"{path} has no tensor 'embeddings', it has {sorted(file.keys())}")
            names = json.loads(metadata['class_names']) if 'class_names' in metadata else None
            return file.get_tensor('embeddings'), names
    except SafetensorError as error:
        raise ValueError(f'{path} is not a safetensors file: {error}') from error


def _read_torch(path: Path) -> tuple[Tensor, list[str] | None]:
    content = load_tensors(path)
    if isinstance(content, Tensor):
        return content.float(), None
    if isinstance(content, dict) and isinstance(content.get('embeddings'), Tensor):
        return content['embeddings'].float(), content.get('class_names')
    raise ValueError(f"{path}: expected a tensor or a dict with 'embeddings', got a {type(content).__name__}")


def load_tensors(path: Path):
    """Load a file of `torch.save` that holds only tensors and plain containers.

    Raises:
        ValueError: If it holds anything else, or is damaged.
    """
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises many types of exceptions on broken or unsafe bytes
        raise ValueError(
            f'{path} does not hold only tensors and plain containers ({type(error).__name__}); vectors in a text file '
            'are converted by timm-mldecoder embed --text-vectors'
        ) from error
