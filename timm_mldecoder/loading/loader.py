"""From a dataset to batches on the device: collating, and the loaders of training and evaluation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.data import AugMixDataset, Mixup
from timm.data.loader import PrefetchLoader
from timm.data.naflex_loader import NaFlexPrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_mldecoder.data.images import image_path
from timm_mldecoder.loading.bad_images import BadImage, log_bad_image
from timm_mldecoder.loading.naflex import NaFlexBatches, PatchBatch
from timm_mldecoder.loading.randomness import (
    BATCH,
    SAMPLE,
    STREAM,
    Draw,
    EpochBatches,
    EpochStart,
    key,
    seed_all,
    seed_cpu,
)
from timm_mldecoder.loading.workers import shut_down
from timm_mldecoder.runtime.errors import RunFailed

Batch = Tensor | PatchBatch  # images [B, C, H, W], or their patches

REPLACEMENTS = 10  # as many in a row as timm tries: more are a fault of the disk, not of the files


class SplitDataset(AugMixDataset):
    """timm's dataset of several views per image, which also knows its files."""

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> Any:
        return self.dataset.filename(index, basename=basename, absolute=absolute)


@dataclass
class KeyedSamples(Dataset):
    """Samples with the draws of their position in the epoch, and the images that could not be read.

    Yields `(draw, sample, bad)`, with the index of the image that was read; the sample is None if neither the image nor
    one of its replacements can be read.
    """

    dataset: Any  # map-style, raises OSError for unreadable images
    replacements: int = 0  # number of following images to try in place of an unreadable one

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw | int) -> tuple[Draw | int, Any, list[BadImage]]:
        bad: list[BadImage] = []
        index = draw
        if isinstance(draw, Draw):  # evaluation has plain indices, and draws nothing
            seed_cpu(key(SAMPLE, draw.seed, draw.epoch, draw.position))
            index = draw.index
        first, *size = index if isinstance(index, tuple) else (index,)
        for number in range(first, first + self.replacements + 1):
            number %= len(self)
            index = (number, *size) if size else number
            try:
                sample = self.dataset[index]
                return draw._replace(index=index) if isinstance(draw, Draw) else draw, sample, bad
            except OSError as error:
                bad.append(BadImage(image_path(self.dataset, number), str(error)))
        return draw, None, bad


@dataclass
class KeyedCollate:
    """Collate the readable samples of a batch into `(batch, numbers, bad)`, mixed with the draws of that batch.

    `numbers` are the indices of the images in the dataset where they were drawn, else their positions within the batch.
    The batch is None if no sample is left, or if one is missing and `partial` is False.
    """

    collate: Callable  # timm's `FastCollateMixup` mixes too
    partial: bool  # whether a batch may have fewer samples than requested
    mixup_off_epoch: int = 0  # epoch from which batches are no longer mixed; 0 for never

    def __call__(self, samples: list[tuple[Draw | int, Any, list[BadImage]]]) -> tuple[Any, list[int], list[BadImage]]:
        bad = [image for *_, found in samples for image in found]
        positions = [position for position, (_, sample, _) in enumerate(samples) if sample is not None]
        if not positions or (len(positions) < len(samples) and not self.partial):
            return None, [], bad
        first = samples[0][0]
        if isinstance(first, Draw):
            seed_cpu(key(BATCH, first.seed, first.epoch, first.position))
            if hasattr(self.collate, 'mixup_enabled'):
                self.collate.mixup_enabled = not self.mixup_off_epoch or first.epoch < self.mixup_off_epoch
        batch = self.collate([samples[position][1] for position in positions])
        draws = [samples[position][0] for position in positions]
        images = [draw.image for draw in draws if isinstance(draw, Draw)]
        return batch, images if isinstance(first, Draw) else positions, bad


class Placement(NamedTuple):
    """Where batches go, and in which form."""

    device: torch.device
    dtype: torch.dtype | None = None  # dtype of images, None for float32
    channels_last: bool = False  # whether images take the channels-last memory layout
    prefetch: dict[str, Any] | None = None  # options of `prefetcher`; None if the transform normalises
    # timm's loader that normalises on the device, for images or for patches
    prefetcher: type[PrefetchLoader | NaFlexPrefetchLoader] = PrefetchLoader

    def wrap(self, batches: Any) -> Any:
        """Return an iterable of batches on the device, normalised where `prefetch` says so."""
        if self.prefetch is None:
            return batches
        return self.prefetcher(batches, device=self.device, img_dtype=self.dtype or torch.float32, **self.prefetch)

    def place(self, images: Batch, target: Tensor) -> tuple[Batch, Tensor]:
        """Move a batch that was not prefetched to the device, and make int8 targets float32 there."""
        target = target.to(self.device, torch.float32 if target.dtype == torch.int8 else None, non_blocking=True)
        if self.prefetch is not None:
            return images, target
        move: dict[str, Any] = dict(device=self.device, non_blocking=True)
        if isinstance(images, dict):
            moved = {name: part.to(**move) for name, part in images.items() if isinstance(part, Tensor)}
            images = {**images, **moved, 'patches': moved['patches'].to(self.dtype or torch.float32)}
        else:
            images = images.to(dtype=self.dtype, **move)
        return images, target

    def layout(self, images: Batch) -> Batch:
        if self.channels_last and isinstance(images, Tensor):
            return images.contiguous(memory_format=torch.channels_last)
        return images


class TrainLoader:
    """Epochs of training batches, from any position of an epoch.

    Args:
        dataset: Map-style dataset, or a stream.
        batches: Batches of each epoch; None for a stream.
        mix: Mixup and CutMix on the device; None if `collate` mixes, or nothing does.
        mixup_off_epoch: Epoch from which batches are no longer mixed; 0 for never.
        bad_image: 'skip' or 'abort' at unreadable images.
        stream: Options of `DataLoader` for a stream: `batch_size`, `drop_last`.
        **workers: Further options of `DataLoader`: number of workers, pinned memory, start method.
    """

    def __init__(
        self,
        dataset: Any,
        batches: EpochBatches | NaFlexBatches | None,
        collate: Callable,
        placement: Placement,
        *,
        mix: Mixup | None = None,
        mixup_off_epoch: int = 0,
        bad_image: str = 'skip',
        seed: int = 0,
        rank: int = 0,
        persistent_workers: bool = True,
        stream: dict[str, Any] | None = None,
        **workers: Any,
    ) -> None:
        self.dataset = dataset
        self.batches = batches
        self.bad_images: list[BadImage] = []  # of the epoch so far
        self._placement = placement
        self._mix = mix
        self._mixup_off_epoch = mixup_off_epoch
        self._bad_image = bad_image
        self._key = (seed, rank)
        self._position = (0, 0)  # epoch, first batch
        self._end: int | None = None  # number of batches of the epoch of a stream, once it is known
        self._drawn: dict[int, list[int]] = {}  # indices of the images of each batch, until they are read
        self._bad: dict[int, list[BadImage]] = {}  # those of the batches that are loaded and not yet yielded
        self._early: Iterator | None = None
        self._running: Iterator | None = None
        self._generator = torch.Generator()
        if batches is None:
            self._loader = DataLoader(dataset, collate_fn=collate, generator=self._generator, **stream or {}, **workers)
        else:
            self._loader = DataLoader(
                KeyedSamples(dataset, REPLACEMENTS if bad_image == 'skip' else 0),
                batch_sampler=batches,
                collate_fn=KeyedCollate(collate, partial=False, mixup_off_epoch=mixup_off_epoch),
                generator=self._generator,
                persistent_workers=persistent_workers and workers['num_workers'] > 0,
                **workers,
            )
        self._wrapped = placement.wrap(self)

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int, batch: int = 0, start: EpochStart | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the batches of an epoch from number `batch` on."""
        if self._early is None:
            self._begin(epoch, batch, start)
        if not batch:  # else those of the batches before are restored from a checkpoint
            self.bad_images = []
        mix = None if self._mixup_off_epoch and epoch >= self._mixup_off_epoch else self._mix
        for number, (images, target) in enumerate(self._wrapped, batch):
            self.bad_images += self._bad.pop(number, [])
            images, target = self._placement.place(images, target)
            if mix is not None:
                images, target = mix(images, target)
            yield self._placement.layout(images), target

    def prefetch_epoch(self, epoch: int) -> None:
        """Let the workers begin with the next epoch; `epoch` must be called for it next."""
        self._begin(epoch, 0, None)
        self._early = iter(self._loader)

    def image_indices(self, batch: int) -> list[int]:
        """Return the dataset indices of the images of a batch, once; empty for a stream."""
        return self._drawn.pop(batch, [])

    def is_last(self, batch: int) -> bool:
        """Return whether a batch that has been yielded is the last of the epoch; the length of a stream is a guess."""
        return batch + 1 == (len(self) if self.batches is not None else self._end)

    def close(self) -> None:
        """End the workers."""
        shut_down(self._early, self._running, self._loader._iterator)

    def _begin(self, epoch: int, batch: int, start: EpochStart | None) -> None:
        self._position, self._end = (epoch, batch), None
        if self.batches is None:
            self._generator.manual_seed(key(STREAM, epoch, *self._key) % 2**63)
            if hasattr(self.dataset, 'set_epoch'):
                self.dataset.set_epoch(epoch)
            if hasattr(getattr(self.dataset, 'reader', None), 'ds'):
                self.dataset.reader.ds = None  # timm builds it anew: its generators would go on from the last epoch
        else:
            self.batches.begin(epoch, batch, start)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yield collated batches, each after its own draws have been seeded for what follows on the device."""
        epoch, first = self._position
        iterator, self._early = self._early or iter(self._loader), None
        self._running = iterator
        stream = self.batches is None
        number = 0 if stream else first
        batch = self._load(iterator, number)
        while batch is not None:
            ahead = self._load(iterator, number + 1) if stream else None
            if stream and ahead is None:
                self._end = number + 1
            if not stream:
                batch = self._readable(number, *batch)
            if number >= first:  # a stream is read again up to the position
                seed_all(key(BATCH, *self._key, epoch, number))
                yield batch
            number += 1
            batch = ahead if stream else self._load(iterator, number)

    def _load(self, iterator: Iterator, number: int) -> Any:
        """Return the next collated batch, which draws by its number; None at the end."""
        seed_cpu(key(BATCH, *self._key, self._position[0], number))
        return next(iterator, None)

    def _readable(self, number: int, batch: Any, indices: list[int], bad: list[BadImage]) -> Any:
        if batch is None:
            path, reason = bad[-1]
            remedy = f'neither can the {REPLACEMENTS} before it'
            if self._bad_image == 'abort':
                remedy = '--bad-image skip trains without it'
            raise RunFailed(f'{path} cannot be read ({reason}); {remedy}')
        for image in bad:
            log_bad_image(image)
        self._drawn[number], self._bad[number] = indices, bad
        return batch


class EvalLoader:
    """Batches of every image of a split, in order.

    Args:
        dataset: Map-style dataset, or a stream.
        sampler: timm's `OrderedDistributedSampler` on several ranks, else None.
        bad_image: 'abort' or 'skip' at unreadable images.
        remedy: The flag that scores the other images, for the error message.
        **workers: Further options of `DataLoader`: batch size, number of workers, pinned memory, start method.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Any,
        collate: Callable,
        placement: Placement,
        *,
        bad_image: str = 'abort',
        remedy: str = '',
        persistent_workers: bool = True,
        **workers: Any,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler  # `timm.task.evaluation_sample_limit` reads it
        self.bad_images: list[BadImage] = []  # of the last pass
        self._placement = placement
        self._skip = bad_image == 'skip'
        self._remedy = remedy
        self._stream = isinstance(dataset, IterableDataset)
        if not self._stream:
            dataset, collate = KeyedSamples(dataset), KeyedCollate(collate, partial=True)
            workers['persistent_workers'] = persistent_workers and workers['num_workers'] > 0
        self._loader = DataLoader(dataset, sampler=sampler, collate_fn=collate, **workers)
        self._wrapped = placement.wrap(self)

    def __len__(self) -> int:
        return len(self._loader)

    def batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the batches on the device."""
        for images, target in self._wrapped:
            images, target = self._placement.place(images, target)
            yield self._placement.layout(images), target

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yield collated batches, without unreadable images and, if there were any, without distributed padding."""
        self.bad_images = []
        first = 0
        for batch in self._loader:
            if not self._stream:
                batch, positions, bad = batch
                if bad and not self._skip:
                    path, reason = bad[0]
                    raise RunFailed(f'{path} cannot be read ({reason}); {self._remedy} scores the other images')
                for image in bad:
                    log_bad_image(image)
                self.bad_images += bad
                if self.bad_images:
                    batch = self._without_padding(batch, [first + position for position in positions])
                first += len(positions) + len(bad)
            if batch is not None:
                yield batch

    def close(self) -> None:
        """End the workers."""
        shut_down(self._loader._iterator)

    def _without_padding(self, batch: Any, positions: list[int]) -> Any:
        """Cut the padding off, which evaluators otherwise find by counting the samples that arrive."""
        limit = getattr(self.sampler, 'num_valid_samples', None)
        valid = len(positions) if limit is None else sum(position < limit for position in positions)
        return tuple(_first(part, valid) for part in batch) if valid else None


def _first(part: Batch, number: int) -> Batch:
    """Return the first samples of images, targets or patches."""
    if isinstance(part, dict):
        return {name: value[:number] if isinstance(value, Tensor) else value for name, value in part.items()}
    return part[:number]
