"""From options to data sets and the loaders of their batches."""

import pickle
from argparse import Namespace
from typing import Any

import torch
from timm.data import FastCollateMixup, Mixup, MultiLabelTarget, create_loader, resolve_data_config
from torch import nn
from torch.utils.data import Dataset

from timm_mldecoder.data import MultiLabelDataset, create_dataset
from timm_mldecoder.engine.input import zero_shot
from timm_mldecoder.engine.input.batches import EvalLoader, Placement, TrainLoader
from timm_mldecoder.engine.input.dataset_checks import check_folder, check_image_mode, check_image_size
from timm_mldecoder.engine.input.images import strict
from timm_mldecoder.engine.runtime.distributed import World
from timm_mldecoder.engine.train.multilabel import change_transform


def data_config(
    options: Namespace, model: nn.Module, world: World, stored: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Input size, normalisation, interpolation and crop, from the options and what the model was trained with.

    Args:
        options: The options.
        model: The model, which knows what its pretrained weights were trained with.
        world: This process and the others.
        stored: What a checkpoint says about it, which goes before.
        **kwargs: For timm's `resolve_data_config`.

    Raises:
        ValueError: If the model takes images of another size only.
    """
    config = {**resolve_data_config(vars(options), model=model, verbose=world.primary, **kwargs), **(stored or {})}
    check_image_size(model, config['input_size'])
    return config


def create_split(options: Namespace, split: str, config: dict[str, Any], *, training: bool = False) -> Dataset:
    """One split of the data set that the options name.

    Raises:
        ValueError: If the data is not there.
    """
    channels = config['input_size'][0]
    mode = options.input_img_mode or ('RGB' if channels == 3 else 'L')
    check_folder(options.dataset, options.data_dir, split)
    check_image_mode(options.dataset, mode, channels)
    settings = dict(
        class_map=options.class_map,
        download=options.dataset_download,
        batch_size=options.batch_size,
        seed=options.seed,
        repeats=getattr(options, 'epoch_repeats', 0) if training else 0,
        input_img_mode=mode,
        input_key=options.input_key,
        target_key=options.target_key,
        target_format=_target_format(options),
        num_samples=_num_samples(options, training),
        trust_remote_code=options.dataset_trust_remote_code,
    )
    try:
        dataset = strict(
            create_dataset(options.dataset, root=options.data_dir, split=split, is_training=training, **settings)
        )
    except ImportError as error:
        raise ValueError(f'--dataset {options.dataset}: {error}; install that package') from error
    except (RuntimeError, AssertionError, OSError, pickle.UnpicklingError) as error:  # what timm's readers raise
        raise ValueError(f'{options.data_dir or options.dataset}: {error}') from error
    if isinstance(dataset, MultiLabelDataset):
        if options.task != 'multilabel':
            raise ValueError(f'--dataset {options.dataset} has any number of classes an image: pass --task multilabel')
    elif options.task == 'multilabel' and getattr(dataset, 'target_transform', None) is None:
        dataset.target_transform = MultiLabelTarget(options.num_classes, dense=options.target_format == 'multihot')
    zero_shot.select(options, dataset, training)
    return dataset


def create_mixing(options: Namespace) -> Mixup | None:
    """Mixup and CutMix, in the collate function where batches are prefetched; None where neither is on."""
    if not (options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None):
        return None
    return (Mixup if options.no_prefetcher else FastCollateMixup)(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        cutmix_minmax=options.cutmix_minmax,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=options.num_classes,
        multi_label=options.task == 'multilabel',
    )


def create_train_loader(
    options: Namespace, dataset: Dataset, config: dict[str, Any], placement: Placement, world: World
) -> TrainLoader:
    """The loader of the training split.

    Raises:
        ValueError: If not even one batch fits the data set.
    """
    mixing = create_mixing(options)
    interpolation = options.train_interpolation or config['interpolation']
    settings = dict(
        input_size=config['input_size'],
        is_training=True,
        batch_size=options.batch_size,
        collate_fn=mixing if placement.prefetched else None,
        no_aug=options.no_aug,
        re_prob=options.reprob,
        re_mode=options.remode,
        re_count=options.recount,
        re_split=options.resplit,
        train_crop_mode=None if options.train_crop_mode == 'squash' else options.train_crop_mode,
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        vflip=options.vflip,
        color_jitter=options.color_jitter,
        color_jitter_prob=options.color_jitter_prob,
        grayscale_prob=options.grayscale_prob,
        gaussian_blur_prob=options.gaussian_blur_prob,
        auto_augment=options.aa,
        num_aug_repeats=options.aug_repeats if world.distributed else 0,
        interpolation=config['interpolation'] if options.no_aug else interpolation,
        num_workers=options.workers,
        worker_seeding=options.worker_seeding,
        **_changing_sizes(options),
        **_common(options, config, placement, world),
    )
    try:
        loader = create_loader(dataset, **settings)
    except (AssertionError, KeyError) as error:  # timm asserts the names of policies and operations in --aa
        raise ValueError(f'--aa {options.aa}: {error}') from error
    change_transform(options, dataset, interpolation)
    if len(loader) == 0:
        raise ValueError(
            f'--batch-size {options.batch_size} on {world.size} process(es): the training split has only '
            f'{len(dataset)} images, not one full batch; make the batch smaller'
        )
    return TrainLoader(loader, placement, mixing, options, world.rank)


def create_eval_loader(
    options: Namespace,
    dataset: Dataset,
    config: dict[str, Any],
    placement: Placement,
    world: World,
    batch_size: int,
    **kwargs: Any,
) -> EvalLoader:
    """A loader of every image of a split, once; `kwargs` go to timm's `create_loader`."""
    streamed_across_ranks = world.distributed and ('tfds' in options.dataset or 'wds' in options.dataset)
    loader = create_loader(
        dataset,
        input_size=config['input_size'],
        is_training=False,
        batch_size=batch_size,
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        # fewer processes pad a streamed data set less, as timm does
        num_workers=min(2, options.workers) if streamed_across_ranks else options.workers,
        **_common(options, config, placement, world),
        **kwargs,
    )
    return EvalLoader(loader, placement, vars(options).get('val_bad_image', options.bad_image))


def _common(options: Namespace, config: dict[str, Any], placement: Placement, world: World) -> dict[str, Any]:
    return dict(
        mean=config['mean'],
        std=config['std'],
        pin_memory=options.pin_mem,
        img_dtype=placement.dtype or torch.float32,
        device=placement.device,
        distributed=world.distributed,
        use_prefetcher=placement.prefetched,
    )


def _changing_sizes(options: Namespace) -> dict[str, Any]:
    if not options.train_img_sizes:
        return {}
    return dict(
        input_size_choices=options.train_img_sizes,
        batch_size_choices=options.train_batch_sizes,
        batch_choice_weights=options.train_size_probs,
        batch_choice_seed=options.seed,
        batch_choice_schedule=options.train_size_schedule,
        batch_schedule_epochs=options.epochs,
        batch_schedule_spread=options.train_size_schedule_spread,
        batch_schedule_random_mix=options.train_size_random_mix,
        num_batches=options.train_batches_per_epoch,
    )


def _target_format(options: Namespace) -> str | None:
    """What timm's readers of records make of a multi-label target; those of files know no such option."""
    records = options.dataset.partition('/')[0].lower() in ('hfds', 'hfids', 'tfds', 'wds')
    return options.target_format if records and options.task == 'multilabel' else None


def _num_samples(options: Namespace, training: bool) -> int | None:
    name = 'num_samples' if hasattr(options, 'num_samples') else 'train_num_samples' if training else 'val_num_samples'
    return getattr(options, name)
