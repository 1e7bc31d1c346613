"""One probe from its options to its table."""

import logging
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import safe_model_name
from timm.utils import random_seed
from torch import nn
from torch.utils.data import IterableDataset

from timm_mldecoder.checkpoint.read import RUN, read_checkpoint, weights_of
from timm_mldecoder.data.images import Reading
from timm_mldecoder.distributed.world import World
from timm_mldecoder.evaluation.evaluate import create_autocast, create_evaluator
from timm_mldecoder.flags import Options
from timm_mldecoder.loading.compare_classes import check_classes, check_same_classes
from timm_mldecoder.loading.create_loaders import DataConfig, resolve_config, set_eval_transform, set_train_transform
from timm_mldecoder.loading.datasets import create_split, image_mode, log_summary, warn_about_crop, warn_about_overlap
from timm_mldecoder.loading.ranks import check_ranks
from timm_mldecoder.modeling.classes import class_names_of, read_classes
from timm_mldecoder.modeling.create import create_train_model, errors_naming_flags, training_words
from timm_mldecoder.modeling.load import load
from timm_mldecoder.models.factory import CLASSIFIERS
from timm_mldecoder.models.probe_model import build_probe, remove_head
from timm_mldecoder.probe import report
from timm_mldecoder.probe.cache import FeatureCache, data_digest, fill
from timm_mldecoder.probe.features import Backbone, ComputedFeatures, ImageBatches, Source
from timm_mldecoder.probe.options import AUGMENTATION, TEXT_HEADS, HeadSpec, ProbeOptions
from timm_mldecoder.probe.train import Choice, Run, Trainer, choose, further_runs
from timm_mldecoder.runtime.errors import advise_on_memory
from timm_mldecoder.runtime.files import choose_folder, create_folder
from timm_mldecoder.train.loss import create_train_loss

_logger = logging.getLogger(__name__)

STEPS = 400  # of the optimizer, at least, unless epochs are given

# Options of the model that a checkpoint of train.py brings, where it is the backbone.
_OF_BACKBONE = (
    'model',
    'model_kwargs',
    'in_chans',
    'input_img_mode',
    'channels_last',
    'background',
    'image_range',
    'exif_rotate',
)
# Options that choose images and targets: a cache is for one value of each.
_OF_DATA = (
    *('dataset', 'input_key', 'target_key', 'target_format', 'task', 'voc_difficult', 'coco_unannotated'),
    'score_classes',
)
_PATHS_OF_DATA = ('data_dir', 'class_map', 'class_split')


def probe(options: ProbeOptions, world: World) -> dict[str, Any] | None:
    """Train every head, print the table, and write the results; a collective call.

    Returns:
        The results on the first rank, else None.

    Raises:
        RunFailed: If the disk is full, or memory is.
    """
    folder = _new_folder(options.train) if world.primary else None
    random_seed(options.train.seed, 0)  # every rank needs the same backbone, also where its weights are random
    model, train, stored_config = _create_backbone(options.train)
    splits = _create_splits(options._replace(train=train), world)
    train = _with_steps(train, len(splits['train']), world, cached=bool(options.cache))
    options = options._replace(train=train)
    num_classes = _number_of_classes(train, splits['train'])
    config = resolve_config(train, model, stored=stored_config)
    if train.task == 'multilabel':
        warn_about_crop(splits['validation'], config)
    backbone = _freeze(model.to(world.device), train, config, world)
    words = training_words(train, splits['train']) if train.word_embeddings else {}
    classes = read_classes(train.word_embeddings, splits['validation']) if train.class_split and words else None
    seeds = range(options.tuning_seeds)
    trainer = Trainer(
        train,
        [Run(spec, rate, seed) for spec in options.heads for rate in options.rates for seed in seeds],
        partial(_build, model, num_classes, words),
        create_train_loss(train, splits['train']),
        partial(create_evaluator, train, splits['validation'], device=world.device),
        world,
    )
    with ExitStack() as closing:
        sources = _create_sources(options, splits, num_classes, backbone, config, world, closing)
        if folder is not None:
            create_folder(folder)  # a mistake found above leaves no folder
        score = {role: partial(trainer.score, source, len(splits[role])) for role, source in sources.items()}
        fit = partial(trainer.train, sources['train'], len(splits['train']))
        runs, choices = _search(options, trainer, fit, partial(score['validation'], classes=classes))
        test = _test(runs, choices, partial(score['test'], classes=classes), world) if options.test_split else None
    folder = Path(world.broadcast(str(folder)))
    files = {choice.spec.label: f'{_file_name(choice.spec.label)}.pth.tar' for choice in choices}
    for choice in choices:
        best = choice.best(train.eval_metric)
        if best.head is not None:
            report.write_checkpoint(
                folder / files[choice.spec.label],
                train,
                model,
                best,
                config=config,
                class_names=class_names_of(splits['train']),
                words=words if choice.spec.name in TEXT_HEADS else {},
                held_out=getattr(splits['validation'], 'held_out', None),
            )
    world.barrier()
    if not world.primary:
        return None
    results = report.collect(options, choices, runs, test, files, trainer.read_seconds)
    report.write(folder, results)
    return results


def _new_folder(options: Options) -> Path:
    """Return the folder of the results; a ValueError if a probe has written its own there."""
    folder = choose_folder(options.output, options.experiment, safe_model_name(options.model))
    if (folder / report.RESULTS).exists():
        raise ValueError(f'{folder} holds the results of a probe: choose another --experiment, or remove it')
    return folder


def _with_steps(options: Options, images: int, world: World, *, cached: bool) -> Options:
    """Return options with batch size and epochs for this number of training images, where they were not given.

    Attention heads need some hundred optimizer steps. Few images make small batches, 32 an epoch, but not below 16.
    """
    batch = options.batch_size
    if 'batch_size' not in options.given:
        batch = 2 ** int(math.log2(max(1, min(images, 128, max(16, images / 32)))))
        batch = max(1, batch // world.size)
    epochs = options.epochs
    if 'epochs' not in options.given:
        epochs = max(10, math.ceil(STEPS / max(1, images // (batch * world.size))))
    remedy = '' if cached or epochs == 10 else '; --cache FOLDER computes features once, not in every epoch'
    _logger.info(f'{images} training images: --batch-size {batch} --epochs {epochs}{remedy}')
    return options.replace(batch_size=batch, epochs=epochs)


def _number_of_classes(options: Options, dataset: Any) -> int:
    number = options.num_classes or len(class_names_of(dataset) or ())
    if not number:
        raise ValueError('the dataset does not report its classes: pass --num-classes')
    check_classes(dataset, number, given=True)
    return number


def _freeze(model: Any, options: Options, config: DataConfig, world: World) -> Backbone:
    """Return the model as a backbone, with BatchNorm folded into convolutions unless `--amp` rounds more than that."""
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    size = config['input_size']
    image = None if options.amp else torch.linspace(-2, 2, math.prod(size), device=world.device).view(1, *size)
    return Backbone(model, create_autocast(options, world.device), image)


def _search(
    options: ProbeOptions, trainer: Trainer, fit: Callable, score: Callable[[list[Run]], dict]
) -> tuple[list[Run], list[Choice]]:
    """Find the learning rate of each head, and train at it with the seeds that are left.

    Args:
        trainer: Has the runs of every head at every rate that was given.
        fit: Trains the runs of the trainer, and calls a function after each epoch.
        score: Returns the metrics of runs on the validation split.

    Returns:
        All runs, and the choice of each head.
    """
    runs, train = list(trainer.runs), options.train

    def log_scores(epoch: int) -> None:
        found = score(trainer.own)
        for run in trainer.own:
            run.metrics[epoch] = found[id(run)]
        _logger.info(f'Epoch {epoch}: {len(trainer.runs)} runs trained and scored')

    with advise_on_memory(train.batch_size, train.batch_size, 1):
        while trainer.runs:
            fit(log_scores)
            choices = choose(runs, train.eval_metric)
            trainer.begin(further_runs(choices, options.rates, options.further, options.tuning_seeds))
            for spec, rate in dict.fromkeys((run.spec.label, run.rate) for run in trainer.runs):
                _logger.info(f'{spec}: the best learning rate is at an end of the range, trying {rate:g}')
            runs += trainer.runs
        left = range(options.tuning_seeds, options.seeds)
        for choice in choices:
            choice.runs.extend(Run(choice.spec, choice.rate, seed) for seed in left)
        if left:
            trainer.begin([run for choice in choices for run in choice.runs[options.tuning_seeds :]])
            runs += trainer.runs
            fit(log_scores)
    return runs, choices


def _test(
    runs: list[Run], choices: list[Choice], score: Callable[[list[Run]], dict], world: World
) -> dict[int, dict[str, float] | None]:
    """Return the metrics of the chosen runs on the test split, by their index in `runs`; a collective call."""
    found = score([run for choice in choices for run in choice.runs])
    own = {index: found[id(run)] for index, run in enumerate(runs) if id(run) in found}
    return {index: metrics for part in world.all_gather(own) for index, metrics in part.items()}


def _create_backbone(options: Options) -> tuple[Any, Options, DataConfig]:
    """Create the model without a classifier; return it, the options that describe it, and its data configuration."""
    plain = options.replace(use_ml_decoder_head=0, word_embeddings='', class_split='', initial_checkpoint='')
    stored: DataConfig = {}
    content = read_checkpoint(options.initial_checkpoint) if options.initial_checkpoint else {}
    if RUN in content:
        loaded = load(options.initial_checkpoint, content=content)
        assert loaded.options is not None  # of a checkpoint
        if 'model' in options.given and options.model != loaded.options.model:
            raise ValueError(f'--model {options.model} contradicts --initial-checkpoint of {loaded.options.model}')
        changes = {name: getattr(loaded.options, name) for name in _OF_BACKBONE if name not in options.given}
        options = options.replace(**changes)
        given = {'input_size' if name == 'img_size' else name for name in options.given}
        stored = {name: value for name, value in loaded.data_config.items() if name not in given}
        model = loaded.model
    else:
        model = create_train_model(plain, None)
        if content:
            with errors_naming_flags(options):
                model.load_state_dict(weights_of(content))
    # the classifier is removed, so the options that build it must go too
    kept = {name: value for name, value in options.model_kwargs.items() if name not in CLASSIFIERS}
    with errors_naming_flags(options):
        return remove_head(model), options.replace(model_kwargs=kept), stored


def _create_splits(options: ProbeOptions, world: World) -> dict[str, Any]:
    train = options.train
    splits = {'train': create_split(train, train.train_split, training=True, missing=train.missing_images)}
    splits['validation'] = create_split(train, train.val_split, missing=train.missing_images)
    if options.test_split:
        splits['test'] = create_split(train, options.test_split, missing=train.missing_images)
    check_ranks(world, splits)
    for role, dataset in splits.items():
        if isinstance(dataset, IterableDataset):
            raise ValueError(f'--dataset {train.dataset} is a stream; a probe needs images in an order of its own')
        log_summary(role, dataset, training=role == 'train')
        if role != 'train':
            warn_about_overlap(splits['train'], dataset)
        if not train.class_split:
            check_same_classes(splits['train'], dataset)
    return splits


def _create_sources(
    options: ProbeOptions,
    splits: dict[str, Any],
    num_classes: int,
    backbone: Backbone,
    config: DataConfig,
    world: World,
    closing: ExitStack,
) -> dict[str, Source]:
    train, images = options.train, {}
    for role, dataset in splits.items():
        if role == 'train' and options.augment:
            dataset, _ = set_train_transform(train, dataset, config)
        else:
            set_eval_transform(train, dataset, config)
        bad = train.bad_image if role == 'train' else 'abort'
        images[role] = ImageBatches(train, dataset, config, world, bad)
        closing.callback(images[role].close)
    if not options.cache:
        return {role: ComputedFeatures(backbone, batches) for role, batches in images.items()}
    tokens, class_token = backbone(torch.zeros(1, *config['input_size'], device=world.device))
    shape = (tokens.shape[1] + (class_token is not None), tokens.shape[2])
    weights = backbone.digest()
    flags = {name: getattr(train, name) for name in _OF_DATA}
    flags |= {name: os.path.abspath(path) if (path := getattr(train, name)) else '' for name in _PATHS_OF_DATA}
    flags = {f'--{name.replace("_", "-")}': value for name, value in flags.items()}
    names = {'train': train.train_split, 'validation': train.val_split, 'test': options.test_split}
    caches: dict[str, Any] = {}
    for role, dataset in splits.items():
        augmented = role == 'train' and options.augment
        augmentation = {name: getattr(train, name) for name in (*AUGMENTATION, 'seed')} if augmented else None
        setup = {
            'model': [train.model, repr(sorted(train.model_kwargs.items()))],
            'precision': [train.amp and train.amp_dtype, train.fast_norm],
            'weights': weights,
            'transform': repr((sorted(config.items()), augmentation)),
            'data': data_digest(dataset),
            **flags,
            'split': names[role],
            '--input-img-mode': image_mode(train),
            '--num-classes': num_classes,
            '--background': str(Reading.of(train)),
        }
        caches[role] = FeatureCache(
            Path(options.cache) / role,
            setup,
            number=len(dataset),
            shape=shape,
            class_token=class_token is not None,
            views=options.views if augmented else 1,
            shard=options.shard,
            device=world.device,
        )
    pairs = [(caches[role], images[role]) for role in splits]
    fill(pairs, backbone, train.batch_size, train.seed, world)
    return caches


def _build(model: nn.Module, num_classes: int, words: dict[str, Any], spec: HeadSpec) -> nn.Module:
    """Build a head; one with text queries gets the label embeddings of the training classes."""
    options = {**(words if spec.name in TEXT_HEADS else {}), **spec.options}
    try:
        return build_probe(model, num_classes, spec.name, **options)
    except ValueError as error:
        raise ValueError(f'--heads {spec.label}: {error}') from error


def _file_name(label: str) -> str:
    return ''.join(letter if letter.isalnum() or letter in '._-=' else '_' for letter in label)
