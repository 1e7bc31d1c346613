"""Randomness by key: every draw is a function of the seed and of where in the run it happens.

An epoch's order is keyed by (seed, epoch), the draws of a sample by (seed, epoch, position in the order), those of a
mixed batch by (seed, epoch, first position), those of a training step by (seed, epoch, batch, rank). So a point of a
run is a few numbers, no RNG state is saved, and neither the number of workers nor a kill changes what is drawn.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

# First part of a key: what the draws are for.
ORDER, SAMPLE, BATCH, STEP, STREAM = range(5)


def key(*parts: int) -> int:
    """Return a 64-bit seed that depends on every part."""
    # a hash: numpy's SeedSequence takes ten times as long, which would show in the time per sample
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), 'little')


def seed_cpu(seed: int) -> None:
    """Seed the generators of python, numpy and torch on the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def seed_all(seed: int) -> None:
    """Seed the generators of python, numpy and torch on the CPU and, if there is one, the accelerator."""
    seed_cpu(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
    elif torch.accelerator.is_available():
        torch.manual_seed(seed)  # slower: it goes over every backend


class Draw(NamedTuple):
    """One sample of an epoch."""

    index: Any  # index of the sample in the dataset; with scheduled image sizes a pair of it and the size's number
    position: int  # position in the order of the epoch, over all ranks
    epoch: int  # index of the epoch
    seed: int  # seed of the run

    @property
    def image(self) -> int:
        """Index of the sample, without the number of a size."""
        return int(self.index[0] if isinstance(self.index, tuple) else self.index)


@dataclass(frozen=True)
class Order:
    """The order in which the samples of an epoch are visited by all ranks together.

    Rank r of R visits positions r, r + R, r + 2R, ... The first epoch of one rank has the order of timm's script for
    the same seed, and every epoch of several ranks that of torch's `DistributedSampler` with this seed. timm's script
    leaves the seed of that sampler at 0, so that its order on several ranks does not depend on `--seed`.
    """

    num_samples: int  # number of samples of the dataset
    seed: int  # seed of the run
    # state of torch's generator once the model is built, from which timm's script draws the first order
    rng_state: Tensor
    repeats: float = 0  # views of each sample per epoch, for repeated augmentation on several ranks; 0 for one view
    # probability of each sample, [num_samples], for draws with replacement; None visits each sample once
    weights: Tensor | None = None

    def indices(self, epoch: int, ranks: int) -> np.ndarray:
        """Return the sample of every position, int64 [a multiple of `ranks`]."""
        generator = torch.Generator()
        if self.weights is not None:
            generator.manual_seed(key(ORDER, self.seed, epoch))
            return self._pad(torch.multinomial(self.weights, self.num_samples, True, generator=generator), ranks)
        if ranks > 1:
            generator.manual_seed(self.seed + epoch)  # as DistributedSampler and RepeatAugSampler
        elif epoch == 0:
            generator.set_state(self.rng_state)
            torch.empty((), dtype=torch.int64).random_(generator=generator)  # DataLoader's seed of its workers
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_(generator=generator)))
        else:
            generator.manual_seed(key(ORDER, self.seed, epoch))
        order = torch.randperm(self.num_samples, generator=generator)
        return self._repeat(order, ranks) if self.repeats and ranks > 1 else self._pad(order, ranks)

    def length(self, ranks: int) -> int:
        """Return the number of positions that each rank visits."""
        if not (self.repeats and ranks > 1):
            return math.ceil(self.num_samples / ranks)
        rounded = self.num_samples // 256 * 256 if self.num_samples >= 256 else self.num_samples
        selected = rounded // ranks if self.num_samples >= 256 else math.ceil(rounded / ranks)
        return min(selected, math.ceil(self.num_samples * self.repeats / ranks))

    def _pad(self, order: Tensor, ranks: int) -> np.ndarray:
        return np.resize(order.numpy(), self.length(ranks) * ranks)

    def _repeat(self, order: Tensor, ranks: int) -> np.ndarray:
        views = np.arange(math.ceil(self.num_samples * self.repeats))
        repeated = order.numpy()[np.minimum(views // self.repeats, self.num_samples - 1).astype(np.int64)]
        return np.resize(repeated, self.length(ranks) * ranks)


@dataclass(frozen=True)
class EpochStart:
    """From where an epoch is trained: its beginning, or where a resumed run with another division continues."""

    position: int = 0  # first position of the order that is still to be visited
    batch: int = 0  # number of batches that count as trained before it
    order_ranks: int | None = None  # number of ranks that the order was drawn for; None for the present number
    end_position: int | None = None  # position at which the epoch ends; None for the last full batch


class _Slots(Sampler[int]):
    """The numbers 0, 1, 2, ... of the samples that one rank visits, continued when they are iterated again."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.first = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        first, self.first = self.first, self.first + self.length
        return iter(range(first, first + self.length))


class EpochBatches(Sampler[list[Draw]]):
    """The batches of an epoch on one rank, from any position of the epoch.

    Args:
        batch_size: Samples per batch and rank.
        pairs: Whether batches must have even sizes, as mixup needs.
        schedule: Options of timm's `ScheduledBatchSampler` for changing image and batch sizes, None for fixed sizes.

    Raises:
        ValueError: If not even one batch is full, or the schedule is invalid.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        pairs: bool = False,
        schedule: dict[str, Any] | None = None,
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.ranks = ranks
        self.scheduled = schedule is not None
        self._unit = 2 if pairs else 1
        self._slots = _Slots(order.length(ranks))
        if schedule is None:
            self._sampler: Any = BatchSampler(self._slots, batch_size, drop_last=True)
        else:
            self._sampler = ScheduledBatchSampler(self._slots, drop_last=True, **schedule)
        if not len(self._sampler):
            raise ValueError(
                f'--batch-size {batch_size} on {ranks} rank(s): the training split has only {order.num_samples} '
                'images, not one full batch; reduce the batch size'
            )
        self.begin(0)

    def begin(self, epoch: int, batch: int = 0, start: EpochStart | None = None) -> None:
        """Set what the next iteration yields: the batches of an epoch from number `batch` on."""
        self.epoch = epoch
        self.start = start or EpochStart()
        self._first = batch
        self._cells = self._divide(self.start)

    def __len__(self) -> int:
        """Number of batches of the epoch, those before the start included."""
        if self._cells is not None:
            return self.start.batch + len(self._cells)
        return len(self._sampler)

    def restart(self, start: EpochStart, batch: int) -> EpochStart | None:
        """Return where another number of ranks, or another batch size, continues an epoch after `batch` batches.

        None with scheduled image sizes, which fix the division into batches.

        Args:
            start: From where the epoch was trained; the batches set by `begin` may be those of the next one already.
            batch: Number of batches of the epoch that are trained.
        """
        if self.scheduled:
            return None
        images = self.batch_size * self.ranks
        cells = self._divide(start)
        if cells is None:
            return EpochStart(batch * images, 0, self.ranks, len(self._sampler) * images)
        position = int(cells[batch - start.batch - 1][-1]) if batch > start.batch else start.position
        return EpochStart(position, 0, start.order_ranks, start.end_position)

    def continued(self, start: EpochStart) -> EpochStart:
        """Return a start with the batches that the positions before it amount to in the present division."""
        return EpochStart(
            start.position, start.position // (self.batch_size * self.ranks), start.order_ranks, start.end_position
        )

    def _divide(self, start: EpochStart) -> np.ndarray | None:
        """Divide the rest of an epoch evenly; row t: the first position of each rank in batch t, the end, [T, R + 1].

        Every sample is in one batch, unless fewer than two per rank are left: BatchNorm cannot train on a single one.
        Sizes differ by one sample or pair at most. None for an epoch from its beginning.
        """
        if start.order_ranks is None or start.end_position is None:
            return None
        left = (start.end_position - start.position) // self._unit
        size, least = self.batch_size // self._unit, min(2, self.batch_size) // self._unit
        batches = min(math.ceil(left / (size * self.ranks)), left // (least * self.ranks))
        cells = np.arange(batches)[:, None] * self.ranks + np.arange(self.ranks + 1)
        return start.position + self._unit * (cells * left // max(batches * self.ranks, 1))

    def __iter__(self) -> Iterator[list[Draw]]:
        indices = self.order.indices(self.epoch, self.start.order_ranks or self.ranks)
        for number, positions in self._positions():
            if number < self._first:
                continue
            yield [self._draw(indices, position) for position in positions]

    def _positions(self) -> Iterator[tuple[int, list[Any]]]:
        """Yield the number of each batch and its positions, each with the number of its image size if those change."""
        if self._cells is not None:
            for number, bounds in enumerate(self._cells, self.start.batch):
                yield number, list(range(bounds[self.rank], bounds[self.rank + 1]))
            return
        self._slots.first = 0
        if self.scheduled:
            self._sampler.set_epoch(self.epoch)
        for number, slots in enumerate(self._sampler):
            if self.scheduled:
                yield number, [(slot * self.ranks + self.rank, size) for slot, size in slots]
            else:
                yield number, [slot * self.ranks + self.rank for slot in slots]

    def _draw(self, indices: np.ndarray, position: Any) -> Draw:
        position, *size = position if self.scheduled else (position,)
        index = int(indices[position % len(indices)])
        return Draw((index, *size) if size else index, int(position), self.epoch, self.order.seed)
