"""SIGTERM and SIGINT: finish the optimizer step, save, and exit with the code of the signal."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher repeats the Ctrl-C that the terminal has sent to every process already. The same signal within this time is
# that repetition; later it means "at once".
REPEAT_SECONDS = 3.0

T = TypeVar('T')


class Stopped(SystemExit):
    """End of a run that a signal requested and that has saved its state; the exit code is 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopSignals:
    """Context that records the first SIGTERM or SIGINT; a later one ends the process at once.

    Attributes:
        received: Number of the signal, 0 while there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> 'StopSignals':
        self._previous = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped):  # a launcher repeats the signal to ranks that are still exiting
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def until_stopped(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches up to the one during which a signal arrives, at least one."""
        for batch in batches:
            yield batch
            if self.received:
                return

    def _record(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            # logging is not safe in a handler: the signal may have arrived in the middle of a log line
            name = signal.Signals(number).name
            os.write(2, f'\n{name}: stopping after this step; repeat to stop at once\n'.encode())
        elif time.monotonic() - self._since > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextmanager
def ignored() -> Iterator[None]:
    """Ignore both signals for a while; processes started meanwhile inherit that."""
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore() -> None:
    """Ignore both signals.

    For a process that is exiting, so that nothing changes its exit code; and for data loader workers, because Ctrl-C
    and most schedulers signal the whole process group, and the parent needs its workers to finish the step. Workers end
    when the parent closes its loader or dies.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
