"""Where a process runs: its device, and its place among the others."""

import importlib
import os
import re
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from timm.utils.distributed import init_distributed_device_so, is_distributed_env
from torch.distributed import PrefixStore, Store, register_rendezvous_handler, rendezvous
from torch.distributed.distributed_c10d import default_pg_timeout

_SLURM_PORTS = range(20_000, 30_000)
_OWN_KEYS = 'env-of-an-attempt'


@dataclass(frozen=True)
class World:
    """The device of this process, its rank and how many processes there are."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def distributed(self) -> bool:
        return self.size > 1

    @property
    def primary(self) -> bool:
        return self.rank == 0

    def highest(self, *values: torch.Tensor | int) -> list[int]:
        """The highest of each value on any process; a collective call, which waits for the device."""
        numbers = torch.stack([torch.as_tensor(value, dtype=torch.int32, device=self.device) for value in values])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
        return numbers.tolist()


@contextmanager
def join_world(options: Namespace) -> Iterator[World]:
    """Set up the device, and the process group where a launcher asks for one; leave the group at the end.

    Raises:
        ValueError: If the device is not there.
    """
    for module in getattr(options, 'device_modules', None) or ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f'--device-modules {module}: {error}') from error
    _check_device(options.device)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    if is_distributed_env():
        _complete_slurm_environment(os.environ)
    try:
        found = init_distributed_device_so(options.device, dist_url=f'{_OWN_KEYS}://')
    except torch.distributed.DistNetworkError as error:
        where = f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}'
        raise ValueError(
            f'the processes cannot meet at {where} ({error}); set MASTER_PORT, or --master-port of '
            f'torchrun, to a free port'
        ) from error
    world = World(torch.device(found['device']), found['global_rank'], found['local_rank'], found['world_size'])
    if world.distributed:
        os.register_at_fork(before=_let_threads_settle)
    try:
        yield world
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _meet(url: str, timeout: timedelta = default_pg_timeout, **options: Any) -> Iterator[tuple[Store, int, int]]:
    """What `env://` does, under keys of its own for each time that torchrun starts the processes.

    torchrun's store outlives them: restarted ones may find the addresses of those that are gone, and wait for them. The
    count of restarts tells them apart on one node; on several the nodes do not agree about it.
    """
    one_node = os.environ.get('GROUP_WORLD_SIZE', '1') == '1'
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if one_node else 'any'
    for store, rank, size in rendezvous('env://', timeout=timeout, **options):
        yield PrefixStore(f'attempt {attempt}', store), rank, size


register_rendezvous_handler(_OWN_KEYS, _meet)


def _let_threads_settle() -> None:
    """Wait a moment before a loader process is forked, for the threads that exchanged tensors just now to come to rest.

    One that registers itself with Python at that very moment, which it does without the global lock, holds a lock that
    nobody would ever release in the new process, and the run would wait for that process for good.
    """
    time.sleep(0.01)


def _check_device(name: str) -> None:
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f'--device {name}: {error}') from error
    backend = getattr(torch, kind, None)
    if kind != 'cpu' and not (hasattr(backend, 'is_available') and backend.is_available()):
        raise ValueError(f'--device {name}: there is no such device here; pass --device cpu to run on the CPU')


def _complete_slurm_environment(environment: dict[str, str]) -> None:
    """`srun` tells ranks but not where rank 0 listens: take the first node of the step and a port from the job's id."""
    if 'SLURM_PROCID' not in environment:
        return
    nodes = environment.get('SLURM_STEP_NODELIST') or environment.get('SLURM_JOB_NODELIST') or 'localhost'
    environment.setdefault('MASTER_ADDR', first_node(nodes))
    job = int(environment.get('SLURM_JOB_ID', 0))
    environment.setdefault('MASTER_PORT', str(_SLURM_PORTS[job % len(_SLURM_PORTS)]))


def first_node(nodes: str) -> str:
    """The first host of a Slurm node list, as in 'gpu[03-05,9]' -> 'gpu03'."""
    match = re.match(r'([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?', nodes)
    prefix, first, suffix = match.groups()
    return prefix + (first or '') + (suffix or '')
