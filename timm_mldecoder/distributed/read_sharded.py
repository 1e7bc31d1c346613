"""Checkpoints of models that are sharded: an index file, and a folder of tensors beside it.

The index is an ordinary checkpoint (`last.pth.tar`) in which the sharded tensors have a shape and no values, and whose
entry `shards` names the folder, written by torch.distributed.checkpoint. An index is written once its folder is
complete. `model_best`, `last` and a numbered checkpoint of the same epoch share one folder.
"""

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.tensor import DTensor

SHARDS = 'shards'
PREFIX = SHARDS + '-'  # of the names of the folders
_METADATA = '.metadata'
# What torch's writer pickles into the metadata of tensors: building these executes no code of a file. For entries with
# BytesStorageMetadata, which tensors do not have, torch's reader would unpickle anything.
ALLOWED_GLOBALS = {
    ('torch.distributed.checkpoint.metadata', name)
    for name in ('Metadata', 'MetadataIndex', 'TensorStorageMetadata', 'TensorProperties', 'ChunkStorageMetadata',
                 'StorageMeta', '_MEM_FORMAT_ENCODING')
} | {
    ('torch.distributed.checkpoint.filesystem', '_StorageInfo'),
    ('torch', 'Size'), ('torch.serialization', '_get_layout'), ('pathlib', 'PosixPath'), ('pathlib', 'WindowsPath'),
    *(('pathlib._local', name) for name in ('PosixPath', 'WindowsPath')),  # as Python 3.13 names them
    *(('torch', name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}  # fmt: skip


class Leaf(NamedTuple):
    """A tensor in a checkpoint: the mapping that holds it, its key there, and its name in the folder of shards."""

    holder: dict
    key: Any
    name: str

    @property
    def tensor(self) -> Tensor:
        return self.holder[self.key]


def tensors_of(content: Mapping[str, Any]) -> Iterator[Leaf]:
    """Yield the tensors of the weights and of the optimizer state of a checkpoint."""
    state = content.get('optimizer', {}).get('state', {})
    holders = {'state_dict': content.get('state_dict', {}), 'state_dict_ema': content.get('state_dict_ema', {})}
    holders |= {f'optimizer.{index}': values for index, values in state.items()}
    for prefix, holder in holders.items():
        for key, value in holder.items():
            if isinstance(value, Tensor):
                yield Leaf(holder, key, f'{prefix}.{key}')


def split(content: dict[str, Any]) -> dict[str, Tensor]:
    """Take the sharded tensors out of a checkpoint, in place, and return them by name."""
    content['optimizer'] = {
        **content['optimizer'],
        'state': {index: dict(values) for index, values in content['optimizer']['state'].items()},
    }
    sharded = {}
    for leaf in list(tensors_of(content)):
        if isinstance(leaf.tensor, DTensor):
            sharded[leaf.name] = leaf.tensor.detach()
            leaf.holder[leaf.key] = torch.empty(leaf.tensor.shape, dtype=leaf.tensor.dtype, device='meta')
    return sharded


def fill(content: dict[str, Any], path: Path, empty_like: Callable[[Leaf], Tensor] | None = None) -> None:
    """Read the tensors of an index, in place, each rank those that it asks for.

    Args:
        empty_like: Returns the tensor to fill for a leaf; None reads whole tensors onto the CPU.

    Raises:
        ValueError: If the folder is missing or damaged, or does not have a tensor of the index.
    """
    folder = Path(path).parent / content.pop(SHARDS)
    missing = [leaf for leaf in tensors_of(content) if leaf.tensor.is_meta]
    for leaf in missing:
        leaf.holder[leaf.key] = empty_like(leaf) if empty_like else torch.empty_like(leaf.tensor, device='cpu')
    try:
        warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # a single process reads whole tensors
        dcp.load({leaf.name: leaf.tensor for leaf in missing}, storage_reader=Reader(folder), no_dist=True)
    except Exception as error:  # torch wraps whatever a damaged file makes it raise
        causes = getattr(error, 'failures', None)
        cause = next(iter(causes.values()))[0] if causes else error
        raise ValueError(
            f'{path}: shards: the folder {folder.name} is missing or damaged ({type(cause).__name__}: {cause!s:.100})'
        ) from error


def check_folder(path: Path, name: str) -> None:
    """Raise ValueError unless the folder of an index has every byte that its metadata names."""
    folder = Path(path).parent / name
    try:
        stored = Reader(folder).read_metadata().storage_data.values()
        ends = {info.relative_path: 0 for info in stored}
        for info in stored:
            ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
        short = [file for file, end in ends.items() if (folder / file).stat().st_size < end]
    except Exception as error:  # damaged bytes make the unpickler raise anything
        raise ValueError(f'{path}: shards: the folder {name} is missing or damaged ({error!s:.100})') from error
    if short:
        raise ValueError(f'{path}: {name}/{short[0]} is damaged: it is too short')


class Reader(FileSystemReader):
    """torch's reader, without the unpickler that executes what a file asks for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / _METADATA, 'rb') as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f'{_METADATA} holds a {type(metadata).__name__}')
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f'{_METADATA} holds {module}.{name}, which could execute code')
        return super().find_class(module, name)
