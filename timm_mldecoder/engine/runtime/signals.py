"""SIGTERM and SIGINT: finish the step, save, and end with the exit code that tells which of them came."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes on the Ctrl-C that the terminal sends to every process already: the same signal soon after the first
# is its echo, later it means "at once".
ECHO_SECONDS = 3.0

T = TypeVar('T')


class Stopped(SystemExit):
    """The end of a run that a signal asked for and that has saved its state; the exit code is 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopSignals:
    """Remembers the first SIGTERM or SIGINT while it is entered; a later one ends the process at once.

    Attributes:
        received: Number of the signal, 0 as long as there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> 'StopSignals':
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped):  # a launcher passes the signal on to whoever is not gone yet
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def until_stopped(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches up to the one during which a signal comes, at least one."""
        for batch in batches:
            yield batch
            if self.received:
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            name = signal.Signals(number).name
            # logging is not safe within a handler: the signal may have come in the middle of a log line
            os.write(2, f'\n{name}: stopping after this step; once more to stop at once\n'.encode())
        elif time.monotonic() - self._since > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def ignore() -> None:
    """Let nothing change the exit code of a process on its way out."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class DeafWorkerInit:
    """Start a loader process that leaves signals to its parent.

    Ctrl-C and most schedulers signal the whole process group; without its loader processes the parent could not finish
    the step. They end when it says so, or is no more.
    """

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self._init = init

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, 'sigwaitinfo'):  # all but macOS
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_obey_parent, daemon=True).start()
        if self._init is not None:
            self._init(worker)


def _obey_parent() -> None:
    """End this process at the SIGTERM of its parent, which waits for that; let those of others pass."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
