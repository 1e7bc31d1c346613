"""Label embeddings on disk: tensors [C, E] with the names of the classes."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from timm_mldecoder.head.vocabulary import check_embeddings


def read_word_embeddings(path: str | Path, class_names: Sequence[str] | None = None) -> tuple[Tensor, list[str] | None]:
    """Label embeddings [C, E] of a file, and the class names it gives them.

    Args:
        path: `.safetensors` as `timm_mldecoder.data.embed` writes it; `.pt` or `.pth` with a tensor [C, E], or a
            dictionary of `embeddings` and `class_names`.
        class_names: the classes to pick, in this order; all in the order of the file if not given. To a file without
            names these are the names.

    Raises:
        ValueError: the file cannot be read safely, or holds something else; repeated names or embeddings that are not
            finite; names that the file lacks, all of them listed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'there is no file of label embeddings {path}')
    embeddings, names = READERS.get(path.suffix, _read_torch)(path)
    try:
        check_embeddings(embeddings, embeddings.shape[-1] if embeddings.dim() else 0, names)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    if class_names is None:
        return embeddings, names
    if names is None:
        return embeddings, list(class_names)
    row = {name: index for index, name in enumerate(names)}
    missing = [name for name in class_names if name not in row]
    if missing:
        raise ValueError(f'{path} has no embedding of {missing}; it has {len(names)} classes, {names[0]!r} and so on')
    return embeddings[[row[name] for name in class_names]], list(class_names)


def write_word_embeddings(path: str | Path, embeddings: Tensor, class_names: Sequence[str], **about: str) -> None:
    """Write label embeddings [C, E] and their names; `about` says what made them.

    Raises:
        ValueError: names or embeddings that no reader would take.
    """
    check_embeddings(embeddings, embeddings.shape[-1], class_names)
    metadata = {'class_names': json.dumps(list(class_names)), **about}
    save_file({'embeddings': embeddings.detach().float().contiguous()}, path, metadata=metadata)


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
    raise ValueError(f"{path} holds a {type(content).__name__}, and not a tensor or a dict with 'embeddings'")


def load_tensors(path: Path):
    """What a file of `torch.save` holds, if it is tensors and plain containers.

    Raises:
        ValueError: there is more in it, or it is something else.
    """
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises what the broken or unsafe bytes happen to lead to
        raise ValueError(f'{path} cannot be read as tensors and plain containers only: {error!s:.300}') from error


READERS = {'.safetensors': _read_safetensors}
