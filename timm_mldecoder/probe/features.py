"""Features of a frozen backbone: from lists of draws to batches of tokens, which every rank gets whole."""

import copy
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags.options import EvalLoaderOptions
from timm_mldecoder.loading.bad_images import log_bad_image
from timm_mldecoder.loading.create_loaders import DataConfig, create_placement
from timm_mldecoder.loading.loader import REPLACEMENTS, KeyedCollate, KeyedSamples
from timm_mldecoder.loading.randomness import ORDER, Draw, key
from timm_mldecoder.loading.workers import shut_down, worker_options
from timm_mldecoder.models.fusion import NORMS, fuse_batch_norm
from timm_mldecoder.runtime.errors import RunFailed

_logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Features of some images.

    Attributes:
        tokens: Image tokens [B, N, F], float32, or float16 as a cache yields them.
        class_token: Class token [B, F] of the same type, None for a backbone without one.
        target: Class indices [B], or multi-label targets [B, C].
    """

    tokens: Tensor
    class_token: Tensor | None
    target: Tensor


class Backbone:
    """A frozen model without a head.

    Args:
        model: The model; its parameters need no gradients from now on.
        image: An image [1, C, H, W], to compute features by a copy in which BatchNorm is folded into the convolutions.
    """

    def __init__(self, model: Any, autocast: Callable[[], AbstractContextManager], image: Tensor | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self._autocast = autocast
        self._computed = self.model if image is None else _folded(self.model, image)

    @torch.no_grad()  # features of inference mode could not be trained on
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return tokens [B, N, F] and the class token [B, F] of images, float32."""
        with self._autocast():
            tokens, class_token = self._computed.read_tokens(images)
        return tokens.float(), None if class_token is None else class_token.float()

    def digest(self) -> str:
        """Return a digest of the weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def _folded(model: Any, image: Tensor) -> Any:
    """A copy with BatchNorm folded into convolutions; the model where there is none to fold, or not exactly enough."""
    if not any(isinstance(module, NORMS) for module in model.modules()):
        return model
    folded = copy.deepcopy(model)
    try:
        return folded if fuse_batch_norm(folded, image, tolerance=1e-4) else model
    except ValueError as error:
        _logger.info(f'features with BatchNorm as it is: {error}')
        return model


class _Groups(Sampler[list[Draw]]):
    """The batches of the next pass."""

    groups: Sequence[list[Draw]] = ()

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[list[Draw]]:
        return iter(self.groups)


class ImageBatches:
    """Batches of given images of a split, on the device.

    Args:
        bad_image: 'skip' or 'abort' at unreadable images; the next image takes the place of one that is skipped.
    """

    def __init__(
        self, options: EvalLoaderOptions, dataset: Dataset, config: DataConfig, world: World, bad_image: str
    ) -> None:
        self._groups = _Groups()
        self._loader = DataLoader(
            KeyedSamples(dataset, REPLACEMENTS if bad_image == 'skip' else 0),
            batch_sampler=self._groups,
            collate_fn=KeyedCollate(default_collate if options.no_prefetcher else fast_collate, partial=False),
            persistent_workers=options.workers > 0,
            **worker_options(world, options.workers, options.pin_mem),
        )
        self._placement = create_placement(options, config, world)
        self._wrapped = self._placement.wrap(self)

    def close(self) -> None:
        """End the workers."""
        shut_down(self._loader._iterator)

    def __call__(self, groups: Sequence[list[Draw]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and targets of each group."""
        self._groups.groups = groups
        if not groups:  # timm's prefetcher needs a batch
            return
        for images, target in self._wrapped:
            images, target = self._placement.place(images, target)
            images = self._placement.layout(images)
            assert isinstance(images, Tensor)  # not patches
            yield images, target

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch, _, bad in self._loader:
            if batch is None:
                raise RunFailed(f'{bad[-1].path} cannot be read ({bad[-1].reason}); remove it from the split')
            for image in bad:
                log_bad_image(image)
            yield batch


class Source(Protocol):
    """Features of one split."""

    def read(self, groups: Sequence[list[Draw]]) -> Iterable[Batch]:
        """Yield the features of each group."""
        ...


class ComputedFeatures:
    """Features computed anew in each pass."""

    def __init__(self, backbone: Backbone, images: ImageBatches) -> None:
        self._backbone = backbone
        self._images = images

    def read(self, groups: Sequence[list[Draw]]) -> Iterator[Batch]:
        """Yield the features of each group."""
        for images, target in self._images(groups):
            yield Batch(*self._backbone(images), target)


def read_together(source: Source, groups: Sequence[list[Draw]], world: World) -> Iterator[Batch]:
    """Yield the float32 features of each group on every rank, of which each rank reads a part; a collective call."""
    padded = [group + group[-1:] * (-len(group) % world.size) for group in groups]
    own = source.read([group[world.rank :: world.size] for group in padded])
    for group, batch in zip(groups, own, strict=True):
        gathered: Any = (part if part is None else _gather(part, world)[: len(group)] for part in batch)
        tokens, class_token, target = gathered
        yield Batch(tokens.float(), None if class_token is None else class_token.float(), target)


def _gather(part: Tensor, world: World) -> Tensor:
    """Return the rows of all ranks, in the order in which they were divided."""
    if not world.distributed:
        return part
    parts = [torch.empty_like(part) for _ in range(world.size)]
    dist.all_gather(parts, part.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def training_groups(number: int, batch_size: int, seed: int, epoch: int) -> list[list[Draw]]:
    """Return the batches of an epoch of `number` images, in an order that the seed and the epoch determine.

    The last images of the order that make no full batch are left out.
    """
    order = torch.randperm(number, generator=torch.Generator().manual_seed(key(ORDER, seed, epoch) % 2**63)).tolist()
    draws = [Draw(index, position, epoch, seed) for position, index in enumerate(order)]
    return [draws[first : first + batch_size] for first in range(0, number - batch_size + 1, batch_size)]


def scoring_groups(number: int, batch_size: int) -> list[list[Draw]]:
    """Return the batches of all images of a split, in order."""
    draws = [Draw(index, index, 0, 0) for index in range(number)]
    return [draws[first : first + batch_size] for first in range(0, number, batch_size)]
