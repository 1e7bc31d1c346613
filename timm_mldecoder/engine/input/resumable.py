"""A loader that can stop after any batch and go on at the next one, in another process, draw for draw.

timm builds the loader; its torch `DataLoader` is wired anew here so that
  - the order of samples is drawn as before, and the batches already trained on are skipped unread,
  - every loader process sends its random streams along with each batch, and can be given them back,
  - empty batches keep the turns of the loader processes: batch k is always made by process k mod their number,
  - loader processes live for one epoch: its streams start alike in an old process and in a new one.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from timm_mldecoder.engine.input import images as bad_images
from timm_mldecoder.engine.input import randomness as streams
from timm_mldecoder.engine.input.images import BadImage, CollateGood, Guarded
from timm_mldecoder.engine.input.randomness import Streams
from timm_mldecoder.engine.runtime.signals import DeafWorkerInit

_logger = logging.getLogger(__name__)


@dataclass
class Position:
    """Where in an epoch one rank is, as kept in a checkpoint.

    Attributes:
        batch: Batches trained on.
        start: Streams at the beginning of the epoch; the order of samples is drawn from them.
        now: Streams after the last step.
        before: Streams that the next batch was fetched with, where that happened ahead of the last step.
        workers: Streams of each loader process after its last batch before this position.
        num_workers: Loader processes.
    """

    batch: int
    start: Streams
    now: Streams
    before: Streams | None = None
    workers: dict[int, Streams] = field(default_factory=dict)
    num_workers: int = 0


class RestartableLoader:
    """The torch loader of training epochs, able to tell its position and to start from one.

    Args:
        loader: The loader to wire anew.
        bad_image: What to do about images that cannot be read, one of `bad_images.POLICIES`.
    """

    def __init__(self, loader: DataLoader, bad_image: str = bad_images.SKIP) -> None:
        self.dataset, self.sampler, self.batch_sampler = loader.dataset, loader.sampler, loader.batch_sampler
        self.num_workers = loader.num_workers
        self._streamed = isinstance(loader.dataset, IterableDataset)
        self._order = _Order(loader.batch_sampler, loader.num_workers)
        self._worker_init = _WorkerInit(DeafWorkerInit(loader.worker_init_fn))
        self._bad_image = bad_image
        self._met: dict[int, list[BadImage]] = {}
        if self._streamed:
            dataset, collate = loader.dataset, loader.collate_fn
            batches = dict(batch_size=loader.batch_size, drop_last=loader.drop_last)
        else:
            dataset = Guarded(loader.dataset, bad_images.STAND_INS if bad_image == bad_images.SKIP else 0)
            collate = CollateGood(loader.collate_fn, fewer=False)
            batches = dict(batch_sampler=self._order)
        self._loader = DataLoader(
            dataset,
            num_workers=loader.num_workers,
            collate_fn=_CollateAndTell(collate),
            pin_memory=loader.pin_memory,
            worker_init_fn=self._worker_init,
            **batches,
        )
        self._iterator: Iterator | None = None
        self._resume: Position | None = None
        self._fetched_ahead = False

    def __len__(self) -> int:
        return len(self._loader)

    def start(self, resume: Position | None = None) -> None:
        """Start the loader processes of an epoch, at a position within it where one is given.

        The streams of this process must be those of the start of the epoch.
        """
        if resume and resume.num_workers != self.num_workers:
            _logger.warning(
                f'-j was {resume.num_workers} and is {self.num_workers}: the rest of the epoch keeps its '
                f'order, its augmentation is drawn anew'
            )
            resume.workers = {}
        self._resume = resume
        self._start = streams.capture()
        self._fetched_with: dict[int, Streams] = {}
        self._sent: dict[int, Streams | None] = {}
        if resume:
            self._sent = {batch: resume.workers.get(worker) for batch, worker in self._turns(resume.batch)}
        self._worker_init.streams = resume.workers if resume and not self._streamed else {}
        self._order.skip = resume.batch if resume else 0
        self._order.on_skipped = self._restore_streams
        self._order.drawn.clear()
        self._met.clear()
        self._iterator = iter(self._loader)

    def position(self, batch: int) -> Position:
        """The position after `batch` batches of this epoch, called once the last of them has been trained on."""
        workers = {worker: self._sent[last] for last, worker in self._turns(batch) if self._sent.get(last)}
        before = self._fetched_with.get(batch)
        return Position(batch, self._start, streams.capture(), before, workers, self.num_workers)

    def pop_images(self, batch: int) -> tuple[list[int], list[BadImage]]:
        """Which images a batch was made of, by index, and those that others stand in for; told once."""
        indices = self._order.drawn.pop(batch, [])
        # batches of changing sizes are made of pairs
        return [int(index[0] if isinstance(index, tuple) else index) for index in indices], self._met.pop(batch, [])

    def __iter__(self) -> Iterator[Any]:
        if self._iterator is None:
            self.start()
        iterator, self._iterator = self._iterator, None
        first = self._resume.batch if self._resume else 0
        if first and self._streamed:  # a stream has no order to skip in: read it again
            for batch in range(first):
                self._sent[batch] = next(iterator)[1]
            self._restore_streams()

        for batch in range(first, len(self) + 1):
            self._note_streams(batch, first)
            item = next((item for item in iterator if item is not None), None)
            if item is None:
                break
            samples, self._sent[batch] = item
            yield samples if self._streamed else self._readable(batch, *samples)
        self._catch_up()

    def _readable(self, number: int, batch: Any, places: list[int], bad: list[BadImage]) -> Any:
        if batch is None:
            raise bad_images.cannot_go_on(bad, self._bad_image)
        if bad:
            self._met[number] = bad
        return batch

    def _note_streams(self, batch: int, first: int) -> None:
        """Before a batch is fetched: keep the streams it is fetched with, for the last few batches only."""
        if self._resume and batch == first:
            self._fetched_with[batch] = self._resume.before or self._resume.now
            return
        self._catch_up()
        self._fetched_with[batch] = streams.capture()
        self._fetched_with.pop(batch - 3, None)
        self._sent.pop(batch - self.num_workers - 3, None)

    def _restore_streams(self) -> None:
        streams.restore(self._resume.before or self._resume.now)
        self._fetched_ahead = self._resume.before is not None

    def _catch_up(self) -> None:
        """Once the first batch is here again, which had been fetched ahead of a step: go on from after that step."""
        if self._fetched_ahead:
            streams.restore(self._resume.now)
            self._fetched_ahead = False

    def _turns(self, batch: int) -> list[tuple[int, int]]:
        """(batch, worker) of the last batch that each loader process made before `batch`."""
        return [(last, last % self.num_workers) for last in range(max(0, batch - self.num_workers), batch)]


class _Order:
    """The batches of sample indices of an epoch, without the first `skip` of them."""

    def __init__(self, batches: Any, num_workers: int) -> None:
        self._batches = batches
        self._num_workers = num_workers
        self.skip = 0
        self.drawn: dict[int, list] = {}  # by batch, until they are asked for
        self.on_skipped: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list]:
        batches = iter(self._batches)
        if self.skip:
            for _ in range(self.skip):
                next(batches, None)
            self.on_skipped()
            yield from [[]] * (self.skip % self._num_workers if self._num_workers else 0)
        for number, indices in enumerate(batches, self.skip):
            self.drawn[number] = indices
            yield indices


class _CollateAndTell:
    """Collate a batch and, in a loader process, send the streams it left behind."""

    def __init__(self, collate: Callable) -> None:
        self.collate = collate

    def __call__(self, samples: list) -> tuple[Any, Streams | None] | None:
        if not samples:
            return None
        batch = self.collate(samples)
        return batch, streams.capture(accelerator=False) if get_worker_info() else None


class _WorkerInit:
    """Start a loader process as timm does, or with the streams it had at a position."""

    def __init__(self, init: Callable[[int], None]) -> None:
        self._init = init
        self.streams: dict[int, Streams] = {}

    def __call__(self, worker: int) -> None:
        self._init(worker)
        if worker in self.streams:
            streams.restore(self.streams[worker])
