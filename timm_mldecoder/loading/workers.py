"""Workers of a data loader: how they start, and how they end."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any

from timm.data.loader import _worker_init

from timm_mldecoder.distributed.world import World
from timm_mldecoder.runtime import signals


def worker_options(world: World, workers: int, pin_memory: bool, worker_seeding: str = 'all') -> dict[str, Any]:
    """Return the options of `DataLoader` about its workers."""
    return dict(
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=partial(init_worker, worker_seeding=worker_seeding),
        multiprocessing_context=_worker_server() if world.distributed and workers else None,
    )


def _worker_server() -> BaseContext:
    """Start the process that starts the workers of one of several ranks.

    A rank has running threads, such as gloo's, and must not be forked: one of them may hold a lock for good. The server
    ignores signals, as workers do: without it they would end before the rank has finished its step.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm_mldecoder.loading.create_loaders'])
    with signals.ignored():
        forkserver.ensure_running()
    return context


def init_worker(worker: int, worker_seeding: str = 'all') -> None:
    """Prepare a worker: signals are left to the parent; `worker_seeding` matters to streams alone."""
    signals.ignore()
    _worker_init(worker, worker_seeding)
    parent = multiprocessing.parent_process()
    if parent and parent.pid != os.getppid():  # a server started it, and torch watches whether that one lives
        threading.Thread(target=_exit_with, args=[parent], daemon=True).start()


def _exit_with(parent: multiprocessing.process.BaseProcess) -> None:
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def shut_down(*iterators: Any) -> None:
    """End the workers of loader iterators; they ignore the SIGTERM that python would end them with at its exit."""
    for iterator in iterators:
        if hasattr(iterator, '_shutdown_workers'):
            iterator._shutdown_workers()
