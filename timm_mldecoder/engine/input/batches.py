"""Batches ready for the model: on the device, mixed, in its memory layout."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import Dataset

from timm_mldecoder.engine.input import randomness as streams
from timm_mldecoder.engine.input.images import BadImage, guard_evaluation
from timm_mldecoder.engine.input.resumable import Position, RestartableLoader


@dataclass(frozen=True)
class Placement:
    """What is left to do to a batch that comes out of a loader."""

    device: torch.device
    dtype: torch.dtype | None = None
    channels_last: bool = False
    prefetched: bool = True

    def __call__(self, images: Tensor, target: Tensor, mix: Mixup | None = None) -> tuple[Tensor, Tensor]:
        if not self.prefetched:
            images, target = images.to(self.device, self.dtype), target.to(self.device)
            if mix is not None:
                images, target = mix(images, target)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, target


class TrainLoader:
    """Epochs of training batches; every epoch's random streams start anew, see `streams`.

    Args:
        loader: What timm's `create_loader` returned.
        placement: What to do to its batches.
        mixing: Mixup/CutMix, either the collate function of `loader` or applied here.
        options: `seed`, `mixup_off_epoch`, `use_multi_epochs_loader` and `bad_image` are read.
        rank: Rank of this process.
    """

    def __init__(self, loader: Any, placement: Placement, mixing: Mixup | None, options: Namespace, rank: int) -> None:
        self._prefetcher = loader if isinstance(loader, PrefetchLoader) else None
        self._batches = RestartableLoader(loader.loader if self._prefetcher else loader, options.bad_image)
        if self._prefetcher:
            self._prefetcher.loader = self._batches
        self._placement = placement
        self._mixing = mixing
        self._seed, self._rank = options.seed, rank
        self._mixup_off_epoch = options.mixup_off_epoch
        self._starts_early = options.use_multi_epochs_loader
        self._started: tuple[int, streams.Streams] | None = None

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def dataset(self) -> Dataset:
        return self._batches.dataset

    def epoch(self, epoch: int, resume: Position | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from a position within it where one is given."""
        if self._started and self._started[0] == epoch:
            streams.restore(self._started[1])
        else:
            self._start(epoch, resume)
        self._started = None
        mix = self._mixing if self._prefetcher is None else None
        for images, target in self._prefetcher or self._batches:
            yield self._placement(images, target, mix)

    def epoch_ended(self, next_epoch: int) -> None:
        """Let the loader processes begin with the next epoch, where --use-multi-epochs-loader asks for it."""
        if self._starts_early:
            current = streams.capture()
            self._start(next_epoch, None)
            self._started = next_epoch, streams.capture()
            streams.restore(current)

    def position(self, batch: int) -> Position:
        """The position after `batch` batches of the epoch under way."""
        return self._batches.position(batch)

    def pop_images(self, batch: int) -> tuple[list[int], list[BadImage]]:
        """Which images a batch was made of, and those that could not be read; told once."""
        return self._batches.pop_images(batch)

    def _start(self, epoch: int, resume: Position | None) -> None:
        for part in (self.dataset, self._batches.batch_sampler, self._batches.sampler):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(epoch)
        if self._mixing is not None and self._mixup_off_epoch:
            self._mixing.mixup_enabled = epoch < self._mixup_off_epoch
        if resume:
            streams.restore(resume.start)
        elif epoch > 0:
            streams.start_epoch(self._seed, epoch, self._rank)
        self._batches.start(resume)


class EvalLoader:
    """Batches of evaluation images, in order.

    Args:
        loader: What timm's `create_loader` returned.
        placement: What to do to its batches.
        bad_image: What to do about images that cannot be read, one of `bad_images.POLICIES`.
    """

    def __init__(self, loader: Any, placement: Placement, bad_image: str) -> None:
        prefetcher = loader if isinstance(loader, PrefetchLoader) else None
        self._batches = guard_evaluation(loader.loader if prefetcher else loader, bad_image)
        if prefetcher:
            prefetcher.loader = self._batches
        self.loader = prefetcher or self._batches
        self._placement = placement

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, target in self.loader:
            yield self._placement(images, target)

    @property
    def bad_images(self) -> list[BadImage]:
        """The images that the last pass left out."""
        return getattr(self._batches, 'bad_images', [])
