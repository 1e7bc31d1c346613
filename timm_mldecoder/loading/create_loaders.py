"""From options to the loaders of training and evaluation."""

import logging
from typing import Any

import numpy as np
import torch
from timm.data import FastCollateMixup, Mixup, NaFlexMixup, create_transform, resolve_data_config
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_loader import NaFlexPrefetchLoader
from timm.data.scheduled_sampler import ScheduledTransformDataset
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate
from torchvision.transforms import Compose

from timm_mldecoder.data.annotations import MultiLabelDataset
from timm_mldecoder.data.fast_decode import decode_fast
from timm_mldecoder.data.summary import shown_blocks
from timm_mldecoder.data.transforms import Cutout, cut_out, squash
from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags.augmentation import AugmentationOptions
from timm_mldecoder.flags.data import ImageOptions
from timm_mldecoder.flags.model import DeviceOptions
from timm_mldecoder.flags.options import EvalLoaderOptions, TrainLoaderOptions
from timm_mldecoder.loading.datasets import STREAMS, dataset_kind
from timm_mldecoder.loading.loader import EvalLoader, Placement, SplitDataset, TrainLoader
from timm_mldecoder.loading.naflex import PatchFormat, create_train_batches
from timm_mldecoder.loading.randomness import EpochBatches, Order
from timm_mldecoder.loading.workers import worker_options
from timm_mldecoder.runtime.errors import is_out_of_memory, one_line

_logger = logging.getLogger(__name__)

DataConfig = dict[str, Any]  # timm's: input_size, mean, std, interpolation, crop_pct, crop_mode


def resolve_config(
    options: ImageOptions,
    model: nn.Module,
    stored: DataConfig | None = None,
    use_test_size: bool = False,
    any_size: bool = False,
) -> DataConfig:
    """Resolve input size, normalization, interpolation and crop; what a checkpoint has `stored` takes precedence.

    Images of `any_size`, as those of the NaFlex loader, are not compared with what the model takes.

    Raises:
        ValueError: If the model does not take images of this size.
    """
    config = resolve_data_config(vars(options), model=model, use_test_size=use_test_size)
    config = {**config, **(stored or {})}
    if not any_size:
        _check_image_size(model, config['input_size'])
    lines = ''.join(f'\n\t{name}: {value}' for name, value in config.items())
    _logger.info(f'Data processing configuration for current model + dataset:{lines}')
    return config


def mixes(options: AugmentationOptions) -> bool:
    """Return whether mixup or CutMix is on."""
    return bool(options.mixup or options.cutmix or options.cutmix_minmax)


def model_dtype(options: DeviceOptions) -> torch.dtype | None:
    """Return the dtype of weights and images, None for the default."""
    return getattr(torch, options.model_dtype) if options.model_dtype else None


def create_train_loader(
    options: TrainLoaderOptions,
    dataset: Any,
    config: DataConfig,
    world: World,
    *,
    num_classes: int,
    rng_state: Tensor,
    patches: PatchFormat | None = None,
) -> TrainLoader:
    """Create the loader of the training split, whose transform is set.

    `rng_state` is the state of torch's generator once the model is built, see `Order`.

    Raises:
        ValueError: If not even one batch fits the dataset, or an augmentation is unknown.
    """
    _shrink_targets(dataset)
    mixing: Any = _create_mixing(options, num_classes)
    batches = None
    collate = default_collate if options.no_prefetcher else fast_collate
    if patches is not None:
        augmentation = _augmentation(options, config)
        dataset, batches, collate = create_train_batches(
            options, dataset, patches, world, augmentation=augmentation, mixing=mixing
        )
        mixing = None  # `collate` mixes
    elif isinstance(dataset, IterableDataset):
        set_train_transform(options, dataset, config)
        dataset.set_loader_cfg(num_workers=options.workers)  # type: ignore[attr-defined]  # timm's
    else:
        weights = balanced_weights(dataset) if options.sampler == 'balanced' else None
        dataset, schedule = set_train_transform(options, dataset, config)
        order = Order(len(dataset), options.seed, rng_state, repeats=options.aug_repeats, weights=weights)
        pairs = mixing is not None or (options.split_bn and not options.aug_splits)
        batches = EpochBatches(order, options.batch_size, world.rank, world.size, pairs, schedule)
    return TrainLoader(
        dataset,
        batches,
        mixing if isinstance(mixing, FastCollateMixup) else collate,
        create_placement(options, config, world, patches, erase=None if options.no_aug else options),
        mix=None if isinstance(mixing, FastCollateMixup) else mixing,
        mixup_off_epoch=options.mixup_off_epoch,
        bad_image=options.bad_image,
        seed=options.seed,
        rank=world.rank,
        persistent_workers=options.persistent_workers,
        stream=dict(batch_size=options.batch_size, drop_last=True),
        **worker_options(world, options.workers, options.pin_mem, options.worker_seeding),
    )


def create_eval_loader(
    options: EvalLoaderOptions,
    dataset: Any,
    config: DataConfig,
    world: World,
    *,
    batch_size: int,
    bad_image: str,
    remedy: str,
    patches: PatchFormat | None = None,
    persistent_workers: bool = True,
    **crop: Any,
) -> EvalLoader:
    """Create a loader of every image of a split.

    See `EvalLoader` for `bad_image`, `remedy` and `persistent_workers`, `set_eval_transform` for `crop`.
    """
    set_eval_transform(options, dataset, config, patches=patches, **crop)
    _shrink_targets(dataset)
    stream = isinstance(dataset, IterableDataset)
    workers = options.workers
    if world.distributed and dataset_kind(options.dataset) in STREAMS:
        workers = min(2, workers)  # they pad the stream less, as in timm
    if stream:
        dataset.set_loader_cfg(num_workers=workers)
    sampler = OrderedDistributedSampler(dataset) if world.distributed and not stream else None
    collate = default_collate if options.no_prefetcher else fast_collate
    return EvalLoader(
        dataset,
        sampler,
        collate if patches is None else NaFlexCollator(options.naflex_max_seq_len),
        create_placement(options, config, world, patches),
        bad_image=bad_image,
        remedy=remedy,
        persistent_workers=persistent_workers,
        batch_size=batch_size,
        **worker_options(world, workers, options.pin_mem),
    )


def _shrink_targets(dataset: Any) -> None:
    """Let targets be int8 up to the device, where `Placement` makes them float32: a fourth of the bytes to collate."""
    if isinstance(dataset, MultiLabelDataset):
        dataset.target_dtype = np.int8


def set_eval_transform(
    options: EvalLoaderOptions,
    dataset: Any,
    config: DataConfig,
    crop_border_pixels: int | None = None,
    patches: PatchFormat | None = None,
    tf_preprocessing: bool = False,
) -> None:
    """Give a dataset the transform of evaluation; with `tf_preprocessing` TensorFlow's, of the bytes of files."""
    names = ('interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    form: dict[str, Any] = {name: config.get(name) for name in names}
    if patches is not None:
        form |= dict(naflex=True, patchify=True, max_seq_len=options.naflex_max_seq_len, patch_size=patches.size)
        form |= dict(patchify_channels_last=patches.channels_last)
    transform = create_transform(
        config['input_size'],
        use_prefetcher=not options.no_prefetcher,
        crop_border_pixels=crop_border_pixels,
        tf_preprocessing=tf_preprocessing,
        **form,
    )
    dataset.transform = decode_fast(transform) if options.decode == 'fast' else transform


def _create_mixing(options: TrainLoaderOptions, num_classes: int) -> Mixup | NaFlexMixup | None:
    """Create mixup and CutMix, in the collate function where batches are prefetched; None if both are off."""
    if not mixes(options):
        return None
    settings: dict[str, Any] = dict(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        label_smoothing=options.smoothing,
        num_classes=num_classes,
        multi_label=options.task == 'multilabel',
    )
    if options.naflex_loader:
        return NaFlexMixup(**settings)
    settings |= dict(cutmix_minmax=options.cutmix_minmax, mode=options.mixup_mode)
    return (Mixup if options.no_prefetcher else FastCollateMixup)(**settings)


def _augmentation(options: TrainLoaderOptions, config: DataConfig) -> dict[str, Any]:
    """Return the options of timm's `create_transform` for training."""
    same = ('no_aug', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob')
    return dict(
        is_training=True,
        **{name: getattr(options, name) for name in (*same, 'gaussian_blur_prob')},
        train_crop_mode=None if options.train_crop_mode == 'squash' else options.train_crop_mode,
        auto_augment=options.aa,
        interpolation=(not options.no_aug and options.train_interpolation) or config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        re_prob=options.reprob,
        re_mode=options.remode,
        re_count=options.recount,
        re_num_splits=_erasing_splits(options),
        use_prefetcher=not options.no_prefetcher,
        separate=options.aug_splits > 0,
    )


def set_train_transform(
    options: TrainLoaderOptions, dataset: Any, config: DataConfig
) -> tuple[Any, dict[str, Any] | None]:
    """Give a dataset its training transform; return it, wrapped for several views or sizes, and their schedule."""
    settings = _augmentation(options, config)
    interpolation = settings['interpolation']
    sizes = [(config['input_size'][0], size, size) for size in options.train_img_sizes or ()]
    try:
        transforms = [create_transform(size, **settings) for size in sizes or [config['input_size']]]
    except (AssertionError, KeyError) as error:  # timm asserts the names of policies and operations in --aa
        raise ValueError(f'--aa {options.aa}: {error}') from error
    if options.aug_splits:
        if isinstance(dataset, IterableDataset):
            raise ValueError(f'--aug-splits does not work with the stream --dataset {options.dataset}')
        dataset = SplitDataset(dataset, options.aug_splits)
        shared, *views = _separate(options, transforms[0], interpolation)
        dataset.transform = (decode_fast(shared) if options.decode == 'fast' else shared, *views)
        return dataset, None
    if options.train_crop_mode == 'squash' and not options.no_aug:
        transforms = [squash(transform, interpolation) for transform in transforms]
    if options.cutout and not options.no_aug:
        cutout = Cutout(options.cutout, options.cutout_prob)
        transforms = [cut_out(transform, cutout, options.cutout_place) for transform in transforms]
    if options.decode == 'fast':
        transforms = [decode_fast(transform) for transform in transforms]
    if not sizes:
        dataset.transform = transforms[0]
        return dataset, None
    if isinstance(dataset, IterableDataset):
        raise ValueError(f'--train-img-sizes does not work with the stream --dataset {options.dataset}')
    dataset.transform = None
    return ScheduledTransformDataset(dataset, transforms), dict(
        batch_sizes=options.train_batch_sizes or [options.batch_size] * len(sizes),
        choice_weights=options.train_size_probs,
        seed=options.seed,
        num_batches=options.train_batches_per_epoch,
        choice_schedule=options.train_size_schedule,
        schedule_epochs=options.epochs,
        schedule_spread=options.train_size_schedule_spread,
        schedule_random_mix=options.train_size_random_mix,
    )


def _separate(options: AugmentationOptions, transform: tuple[Compose, ...], interpolation: str) -> tuple[Compose, ...]:
    """Add squash-resize to the part of all views, and Cutout to that of the augmented ones."""
    shared, augmentation, final = transform
    if options.train_crop_mode == 'squash':
        shared = squash(shared, interpolation)
    if options.cutout:
        steps = [Cutout(options.cutout, options.cutout_prob), augmentation]
        augmentation = Compose(steps if options.cutout_place == 'before' else steps[::-1])
    return shared, augmentation, final


def _erasing_splits(options: AugmentationOptions) -> int:
    """Return the parts of a batch of which random erasing leaves the first alone; 0 to erase in all of it."""
    return (options.aug_splits or 2) if options.resplit else 0


def create_placement(
    options: EvalLoaderOptions,
    config: DataConfig,
    world: World,
    patches: PatchFormat | None = None,
    erase: AugmentationOptions | None = None,
) -> Placement:
    """Return how batches come to the device, with random erasing as `erase` describes it."""
    prefetch = None
    if not options.no_prefetcher:
        prefetch = dict(mean=config['mean'], std=config['std'], channels=config['input_size'][0])
        if erase:
            prefetch |= dict(re_prob=erase.reprob, re_mode=erase.remode, re_count=erase.recount)
            prefetch |= dict(re_num_splits=_erasing_splits(erase))
        if patches is not None:
            prefetch |= dict(patchify_channels_last=patches.channels_last)
    prefetcher = PrefetchLoader if patches is None else NaFlexPrefetchLoader
    return Placement(world.device, model_dtype(options), options.channels_last, prefetch, prefetcher)


def _check_image_size(model: Any, input_size: tuple[int, int, int]) -> None:
    """Raise ValueError if a model does not take images [C, H, W]: one of a size that is not its own is tried."""
    patches = getattr(model, 'patch_embed', None)
    size = getattr(patches, 'img_size', None)
    if getattr(patches, 'strict_img_size', False) and size and tuple(size) != tuple(input_size[1:]):
        raise ValueError(
            f'the model takes images of {size[0]} x {size[1]}, they have {input_size[1]} x {input_size[2]}: pass '
            f'--img-size {size[0]}, or --model-kwargs img_size={input_size[1]}'
        )
    if tuple(input_size) == tuple(model.pretrained_cfg.get('input_size', ())):
        return
    training, evaluating = model.training, [module for module in model.modules() if not module.training]
    weight = next(model.parameters())
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(torch.zeros(1, *input_size, device=weight.device, dtype=weight.dtype))
    except (AssertionError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        if weight.is_meta and isinstance(error, NotImplementedError):
            return
        raise ValueError(
            f'--img-size: the model does not take images of {input_size[1]} x {input_size[2]}: {one_line(error)}'
        ) from error
    finally:
        model.train(training)
        for module in evaluating:
            module.training = False


def balanced_weights(dataset: Any) -> Tensor:
    """Return weights of the samples by which each class is drawn equally often, [N], without reading an image.

    A sample of several classes has the sum of their weights; samples without a class count as one more class.

    Raises:
        ValueError: If the dataset does not report its labels.
    """
    blocks = shown_blocks(dataset)
    if blocks is None:
        raise ValueError('--sampler balanced: this dataset does not report its labels without reading images')
    counts = np.zeros(0, dtype=np.int64)
    for _, label in blocks:
        found = np.bincount(label, minlength=len(counts))
        counts = found + np.pad(counts, (0, len(found) - len(counts)))
    weights, of_class = np.zeros(len(dataset)), 1 / np.maximum(counts, 1)
    for image, label in shown_blocks(dataset) or ():
        if len(image):
            first, last = image[0], image[-1] + 1
            weights[first:last] += np.bincount(image - first, weights=of_class[label], minlength=last - first)
    without = weights == 0
    weights[without] = 1 / max(without.sum(), 1)
    return torch.from_numpy(weights)
