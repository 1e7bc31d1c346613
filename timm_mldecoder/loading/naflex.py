"""Batches of patches for timm's NaFlex models: timm's wrapper, with the draws and the positions of `randomness`.

A batch is a dictionary: `patches` [B, N, P] (or [B, N, h, w, C] where patch sizes change), `patch_coord` [B, N, 2],
`patch_valid` [B, N], False at padding, and `seq_len`, N. How an epoch is divided into batches of several sequence
lengths is timm's own function of (seed, epoch, rank).
"""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from typing import Any, NamedTuple

from timm.data import NaFlexMixup, create_transform
from timm.data.naflex_dataset import NaFlexMapDatasetWrapper
from timm.data.scheduled_sampler import ScheduledTransformDataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags.options import EvalLoaderOptions, TrainLoaderOptions
from timm_mldecoder.loading.randomness import Draw, EpochStart
from timm_mldecoder.models.probe_model import ProbeModel

_logger = logging.getLogger(__name__)

PatchBatch = dict[str, Any]


class PatchFormat(NamedTuple):
    """How a model reads patches."""

    size: tuple[int, int]  # height and width of a patch in pixels
    channels_last: bool  # whether the channels of a pixel are next to each other in a patch


def patch_format(options: EvalLoaderOptions, model: Any) -> PatchFormat | None:
    """Return how the model reads patches, None without `--naflex-loader`.

    Raises:
        ValueError: If the model does not read patches, or not as the options say.
    """
    if not options.naflex_loader:
        return None
    embeds = getattr(model, 'embeds', None)  # of NaFlexVit; the other models with patches read channels first
    if not hasattr(model, 'get_patch_size') or not getattr(embeds, 'is_linear', True):
        raise ValueError(
            f'--naflex-loader: {options.model} does not read patches; use naflexvit_..., or a vit or eva model with '
            '--model-kwargs use_naflex=True'
        )
    if isinstance(model, ProbeModel):
        raise ValueError('--naflex-loader does not work with --model-kwargs probe_head=...: probes have no mask')
    channels_last = getattr(embeds, 'channels_last', False)
    if options.script == 'train' and options.naflex_patchify_channels_first == channels_last:
        raise ValueError(
            f'--naflex-patchify-channels-first: {options.model} reads patches with channels '
            f'{"last, leave the flag out" if channels_last else "first, add the flag"}'
        )
    if options.naflex_patch_sizes and not getattr(embeds, 'enable_patch_interpolator', False):
        raise ValueError('--naflex-patch-sizes needs --model-kwargs enable_patch_interpolator=True')
    return PatchFormat(tuple(model.get_patch_size()), channels_last)


class NaFlexBatches(Sampler[list[Draw]]):
    """The batches of an epoch on one rank, from any position of the epoch; the interface of `EpochBatches`."""

    scheduled = True

    def __init__(self, wrapper: NaFlexMapDatasetWrapper, seed: int) -> None:
        self._wrapper = wrapper
        self._sizes = {size: number for number, size in enumerate(wrapper.transforms)}
        self._seed = seed
        self.begin(0)

    def begin(self, epoch: int, batch: int = 0, start: EpochStart | None = None) -> None:
        """Set what the next iteration yields: the batches of an epoch from number `batch` on."""
        self._epoch, self._first = epoch, batch

    def restart(self, start: EpochStart, batch: int) -> None:
        """Return None: the sequence lengths fix the division into batches."""

    def __len__(self) -> int:
        return len(self._wrapper)

    def __iter__(self) -> Iterator[list[Draw]]:
        rank, ranks = self._wrapper.rank, self._wrapper.world_size
        visited = 0
        for number, (*size, indices) in enumerate(self._wrapper._prepare_epoch_batches(self._epoch)):
            positions = range(visited * ranks + rank, (visited + len(indices)) * ranks + rank, ranks)
            visited += len(indices)
            if number < self._first:
                continue
            seq_len, patch = size
            choice = self._sizes[seq_len, patch]
            yield [
                Draw((index, choice), position, self._epoch, self._seed)
                for index, position in zip(indices, positions, strict=True)
            ]


class NaFlexCollate:
    """Mix the images of a batch if requested, divide them into patches and pad them."""

    def __init__(self, wrapper: NaFlexMapDatasetWrapper, mixing: NaFlexMixup | None) -> None:
        self._patchify, self._pad = wrapper.patchifiers, wrapper.collate_fns
        self._mixing = mixing
        self.mixup_enabled = True  # else `mixing` only smooths labels

    def __call__(self, samples: list[tuple[tuple[Tensor, tuple[int, int]], Any]]) -> tuple[PatchBatch, Tensor]:
        images = [image for (image, _), _ in samples]
        targets: Any = [target for _, target in samples]
        seq_len, patch = samples[0][0][1]
        if self._mixing is not None:
            self._mixing.mixup_enabled = self.mixup_enabled
            images, targets = self._mixing(images, targets)
        return self._pad[seq_len](list(zip(map(self._patchify[patch], images), targets, strict=True)))


class _Sized(NamedTuple):
    """A transform that returns its size beside the image: sequence length and number of the patch size."""

    transform: Callable
    size: tuple[int, int]

    def __call__(self, image: Any) -> tuple[Tensor, tuple[int, int]]:
        return self.transform(image), self.size


def create_train_batches(
    options: TrainLoaderOptions,
    dataset: Dataset,
    patches: PatchFormat,
    world: World,
    *,
    augmentation: dict[str, Any],
    mixing: NaFlexMixup | None,
) -> tuple[Dataset, NaFlexBatches, NaFlexCollate]:
    """Return the parts of a training loader: dataset, batches, collate function.

    `augmentation` are options of timm's `create_transform`, for a dataset without a transform.

    Raises:
        ValueError: If the dataset is a stream.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(f'--naflex-loader does not work with the stream --dataset {options.dataset}')
    sizes, seq_lens = options.naflex_patch_sizes, options.naflex_train_seq_lens
    printed = io.StringIO()
    with redirect_stdout(printed):
        wrapper = NaFlexMapDatasetWrapper(
            dataset,
            patch_size=None if sizes else patches.size,
            patch_size_choices=sizes,
            patch_size_choice_probs=options.naflex_patch_size_probs,
            seq_lens=tuple(seq_lens),
            max_tokens_per_batch=options.batch_size * max(seq_lens),
            transform_factory=partial(create_transform, **augmentation, naflex=True),
            seed=options.seed,
            distributed=world.distributed,
            rank=world.rank,
            world_size=world.size,
            patchify_channels_last=patches.channels_last,
        )
    _logger.info(printed.getvalue().strip())
    transforms: Any = [_Sized(transform, size) for size, transform in wrapper.transforms.items() if transform]
    samples = ScheduledTransformDataset(dataset, transforms)
    return samples, NaFlexBatches(wrapper, options.seed), NaFlexCollate(wrapper, mixing)
