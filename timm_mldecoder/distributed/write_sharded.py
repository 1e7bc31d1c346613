"""Save and read checkpoints of a sharded model: each rank its shards."""

import secrets
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor

from timm_mldecoder.distributed.read_sharded import PREFIX, SHARDS, Leaf, check_folder, fill, split, tensors_of
from timm_mldecoder.distributed.world import World
from timm_mldecoder.runtime.files import sync_folder


class ShardWriter:
    """Writes the tensors of a checkpoint in the background, each rank its shards, and then the index.

    The shards are copied before training goes on. At most one checkpoint is being written; the next one waits.

    Args:
        folder: Folder of the run, on all ranks.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self._folder = folder
        self._world = world
        # its own: the background's messages must not mix with training's
        self._group: Any = dist.new_group(backend='gloo')
        self._written: Any = None  # a future
        self._commit: Callable[[], Any] | None = None

    def save(self, content: dict[str, Any], commit: Callable[[dict[str, Any]], Any], position: tuple[int, int]) -> None:
        """Begin to save a checkpoint; a collective call.

        Args:
            content: What the checkpoint holds; the sharded tensors are taken out of it.
            commit: Writes the index on the first rank, once the tensors of all ranks are on the disk.
            position: Epochs done and batches of the next, for the name of the folder.
        """
        self.wait()
        name = self._world.broadcast(f'{PREFIX}{position[0]}-{position[1]}-{secrets.token_hex(4)}')
        tensors = split(content)
        if self._world.device.type == 'cpu':  # else torch copies them to the host
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        index = deepcopy({**content, SHARDS: name}) if self._world.primary else {}
        self._commit = partial(self._complete, commit, index) if self._world.primary else None
        writer = FileSystemWriter(self._folder / name)
        self._written = dcp.async_save(tensors, storage_writer=writer, process_group=self._group)

    def poll(self) -> None:
        """Write the index if the tensors are on the disk by now."""
        if self._written is not None and self._written.done():
            self.wait()

    def wait(self) -> Any:
        """Wait for the checkpoint that is being written, and return what its `commit` returned.

        Raises:
            OSError: If the tensors could not be written.
        """
        written, commit = self._written, self._commit
        self._written = self._commit = None
        if written is None:
            return None
        try:
            written.result()
        except dcp.CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f'could not write the tensors of a checkpoint (rank {rank}): {cause}') from error
        return commit() if commit else None

    def _complete(self, commit: Callable[[dict[str, Any]], Any], index: dict[str, Any]) -> Any:
        """Write the index, unless this rank does not see what the others wrote: then older checkpoints must stay."""
        try:
            check_folder(self._folder / index[SHARDS], index[SHARDS])
        except ValueError as error:
            raise OSError(f'{error}; --output must be a folder that all ranks share') from error
        sync_folder(self._folder / index[SHARDS])
        return commit(index)


def localize(
    content: dict[str, Any], path: Path, models: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Turn the tensors of a checkpoint, in place, into the shards of this rank.

    Args:
        content: A whole checkpoint, or the index of a sharded one; other ranks may have written it.
        models: The sharded models by the key of their weights.
    """
    like: dict[str, Tensor] = {}
    for key, model in models.items():
        like |= {f'{key}.{name}': value for name, value in unwrap_model(model).state_dict().items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]

    def sharded(leaf: Leaf) -> DTensor | None:
        kind, _, index = leaf.name.partition('.')
        if kind == 'optimizer':
            index = int(index.partition('.')[0])
            found = parameters[index] if index < len(parameters) else None
        else:
            found = like.get(leaf.name)
        return found if isinstance(found, DTensor) and found.shape == leaf.tensor.shape else None

    def empty_like(leaf: Leaf) -> Tensor:
        found = sharded(leaf)
        if found is None:  # of another model, which restoring refuses
            return torch.empty_like(leaf.tensor, device='cpu')
        return torch.empty_like(found.detach(), dtype=leaf.tensor.dtype)

    if 'state_dict' not in content:
        raise ValueError('--parallel fsdp resumes from checkpoints of train.py, not from weights alone')
    if 'state_dict_ema' not in models:
        content.pop('state_dict_ema', None)
    if SHARDS in content:
        fill(content, path, empty_like)
    for leaf in list(tensors_of(content)):
        found = sharded(leaf)
        if found is not None and not isinstance(leaf.tensor, DTensor):
            # every rank has mapped the file, and reads its shards
            own = _shard_like(found, leaf.tensor).clone().to(found.device)
            leaf.holder[leaf.key] = DTensor.from_local(
                own, found.device_mesh, found.placements, run_check=False, shape=found.shape, stride=found.stride()
            )


def _shard_like(sharded: DTensor, whole: Tensor) -> Tensor:
    """Return a view of the rows of a whole tensor that this rank holds of a sharded one, as torch.chunk divides it."""
    for dim, placement in enumerate(sharded.placements):
        if placement.is_shard():
            parts, rank = whole.chunk(sharded.device_mesh.size(dim)), sharded.device_mesh.get_local_rank(dim)
            whole = parts[rank] if rank < len(parts) else whole[:0]
    return whole
