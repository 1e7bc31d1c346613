"""The device and rank of this process, and the collective calls of a run."""

import importlib
import os
import re
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, is_distributed_env
from torch import Tensor, nn
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.distributed.tensor import DTensor

SLURM_PORTS = range(20_000, 30_000)
ATTEMPT_SCHEME = 'env-per-attempt'


@dataclass(frozen=True)
class World:
    """Device of this process, its rank, and the number of ranks."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def distributed(self) -> bool:
        return self.size > 1

    @property
    def primary(self) -> bool:
        return self.rank == 0

    def all_reduce_max(self, *values: torch.Tensor | int) -> list[int]:
        """Return the maximum of each value over all ranks; a collective call that waits for the device."""
        numbers = torch.stack([self._int32(value) for value in values])
        if self.distributed:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return numbers.tolist()

    def _int32(self, value: torch.Tensor | int) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.to(self.device, torch.int32)
        return torch.full((), value, dtype=torch.int32, device=self.device)  # a copy to the device would wait for it

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all ranks; a collective call."""
        if self.distributed:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """Return the object of every rank, in the order of ranks; a collective call."""
        values: list[Any] = [value]
        if self.distributed:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the object of rank 0; a collective call."""
        values = [value]
        if self.distributed:
            dist.broadcast_object_list(values)
        return values[0]

    def share(self, module: nn.Module) -> None:
        """Give the parameters and buffers of a module on every rank the values of rank 0; a collective call."""
        for tensor in module.state_dict().values() if self.distributed else ():
            dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: its shard, or all of an ordinary tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def join_world(device: str, device_modules: Sequence[str] = ()) -> Iterator[World]:
    """Set up the device and, under a launcher, the process group; destroy the group at the end.

    Args:
        device_modules: Python modules to import first, for devices that need them.

    Raises:
        ValueError: If the device is not available, or the ranks cannot connect.
    """
    for module in device_modules:
        try:
            importlib.import_module(module)
        except (ImportError, TypeError) as error:  # the latter for relative names
            raise ValueError(f'--device-modules {module}: {error}') from error
    check_device(device)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    if is_distributed_env():
        _complete_slurm_environment(os.environ)
    try:
        found = init_distributed_device_so(device, dist_url=f'{ATTEMPT_SCHEME}://')
    except dist.DistNetworkError as error:
        address = f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}'
        remedy = 'set MASTER_PORT, or --master-port of torchrun, to a free port'
        raise ValueError(f'the ranks cannot connect at {address} ({error}): {remedy}') from error
    try:
        yield World(torch.device(found['device']), found['global_rank'], found['world_size'])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def check_device(name: str) -> None:
    """Raise ValueError unless a device of this name is available."""
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f'--device {name!r}: {str(error).splitlines()[0]}') from error
    backend: Any = getattr(torch, kind, None)
    if kind != 'cpu' and not (hasattr(backend, 'is_available') and backend.is_available()):
        raise ValueError(f'--device {name}: no such device is available; pass --device cpu to run on the CPU')


def _rendezvous(
    url: str, timeout: timedelta = default_pg_timeout, **options: Any
) -> Iterator[tuple[dist.Store, int, int]]:
    """Do what `env://` does, under store keys of its own for each time that torchrun starts the ranks.

    torchrun's store outlives the ranks: restarted ones may find the addresses of dead ones and wait for them. The
    restart count tells the attempts apart on one node; several nodes do not agree on it.
    """
    one_node = os.environ.get('GROUP_WORLD_SIZE', '1') == '1'
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if one_node else 'any'
    for store, rank, size in dist.rendezvous('env://', timeout=timeout, **options):
        yield dist.PrefixStore(f'attempt {attempt}', store), rank, size


dist.register_rendezvous_handler(ATTEMPT_SCHEME, _rendezvous)


def _complete_slurm_environment(environment: MutableMapping[str, str]) -> None:
    """Set the address of rank 0, which `srun` does not: the first node of the step, and a port from the job's id."""
    if 'SLURM_PROCID' not in environment:
        return
    nodes = environment.get('SLURM_STEP_NODELIST') or environment.get('SLURM_JOB_NODELIST') or 'localhost'
    environment.setdefault('MASTER_ADDR', first_node(nodes))
    job = int(environment.get('SLURM_JOB_ID', 0))
    environment.setdefault('MASTER_PORT', str(SLURM_PORTS[job % len(SLURM_PORTS)]))


def first_node(nodes: str) -> str:
    """Return the first host of a Slurm node list: 'gpu[03-05,9]' gives 'gpu03'."""
    match = re.match(r'([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?', nodes)
    assert match is not None  # any text matches
    prefix, first, suffix = match.groups()
    return prefix + (first or '') + (suffix or '')
