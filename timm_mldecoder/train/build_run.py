"""Build a training run from its options."""

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from timm.layers import convert_splitbn_model
from timm.models import safe_model_name
from timm.scheduler.scheduler import Scheduler
from timm.utils import random_seed
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_mldecoder.checkpoint.files import LAST, LOCK, SUMMARY, CheckpointFolder, checkpoints_in, lock, write_summary
from timm_mldecoder.checkpoint.folders import folder_config, stored_folder
from timm_mldecoder.checkpoint.read import RUN, read_checkpoint
from timm_mldecoder.checkpoint.state import EarlyStop, RunningLoss, TrainingState, held_out_to_resume, resume
from timm_mldecoder.data.annotation_cache import cache_in
from timm_mldecoder.distributed.layout import Layout, create_layout
from timm_mldecoder.distributed.world import World
from timm_mldecoder.evaluation.evaluate import create_autocast, widen
from timm_mldecoder.flags import Options
from timm_mldecoder.flags.config import ARGS, DEFAULT_OUTPUT
from timm_mldecoder.loading.bad_images import check_readable
from timm_mldecoder.loading.compare_classes import check_classes, check_same_classes, number_of_classes
from timm_mldecoder.loading.create_loaders import (
    DataConfig,
    create_eval_loader,
    create_train_loader,
    model_dtype,
    resolve_config,
)
from timm_mldecoder.loading.datasets import create_split, image_mode, log_summary, warn_about_crop, warn_about_overlap
from timm_mldecoder.loading.loader import EvalLoader, TrainLoader
from timm_mldecoder.loading.naflex import PatchFormat, patch_format
from timm_mldecoder.loading.ranks import check_ranks, describe
from timm_mldecoder.modeling.classes import Classes, class_names_of, other_classes, read_classes
from timm_mldecoder.modeling.create import create_train_model, has_text_queries, script
from timm_mldecoder.models.classifier_model import classifiers_of
from timm_mldecoder.runtime.files import choose_folder, create_folder, write_atomically
from timm_mldecoder.train.freeze import Freezer, head_parameters
from timm_mldecoder.train.loss import create_task
from timm_mldecoder.train.optim import (
    choose_ema_warmup,
    create_optimizer,
    create_scaler,
    create_schedule,
    learning_rate,
    scale_rates,
    warn_of_rate,
)
from timm_mldecoder.train.run import Run
from timm_mldecoder.train.trackers import create_trackers

_logger = logging.getLogger(__name__)


class Data(NamedTuple):
    """The splits of a run."""

    train: Dataset
    validation: Dataset | None


class Model(NamedTuple):
    """The model as the ranks hold it, and what its creation decided."""

    module: Any  # timm model
    num_classes: int
    stored: dict[str, Any] | None  # configuration of the folder that `--model` names
    images: DataConfig  # size, crop and normalization of evaluation images
    patches: PatchFormat | None  # of `--naflex-loader`
    rng_state: Tensor  # of the first rank, once the model is created


class Loaders(NamedTuple):
    """Batches of both splits."""

    train: TrainLoader
    evaluation: EvalLoader | None


class Training(NamedTuple):
    """What changes the weights, and when."""

    task: Any  # timm's TrainingTask
    optimizer: torch.optim.Optimizer
    schedule: Scheduler | None
    freezer: Freezer
    epochs: int
    eval_metric: str  # metric that ranks checkpoints


def build_run(options: Options, world: World) -> Run:
    """Build every part of a run, and resume it if requested."""
    ranks = f'{world.size} processes' if world.distributed else 'a single process'
    _logger.info(f'Training with {ranks} ({world.device}).')
    given, layout = options, create_layout(options, world)
    options = options.replace(lr=learning_rate(options, world))

    # data, then the model: random draws begin with the model's initialization, as in timm's script
    known = held_out_to_resume(options, world, Path(options.output or DEFAULT_OUTPUT))
    data = _create_splits(options, world, known)
    options = options.replace(num_classes=options.num_classes or number_of_classes(data.train))
    model = _create_model(options, given, data, layout, world)
    loaders = _create_loaders(options, data, model, world)
    steps = -(-len(loaders.train) // options.grad_accum_steps)
    training = _create_training(options, data, model, loaders, steps, layout, world)
    options = options.replace(model_ema_warmup=choose_ema_warmup(options, steps * training.epochs))
    eval_model = _wrap(options, training.task, layout)

    # folder, state, resume
    folder, made = _create_folder(options, model, world)
    written = yaml.safe_dump(
        {name: value for name, value in options.with_data_path().to_dict().items() if name != 'config'}
    )
    source = _resume_source(options, world, folder, written)
    run = Run(
        options=options,
        args=options.with_data_path().to_namespace(),
        world=world,
        layout=layout,
        state=_create_state(options, data, model, training, folder, world),
        train_loader=loaders.train,
        eval_loader=loaders.evaluation,
        eval_model=eval_model,
        eval_classes=_eval_classes(options, eval_model, data.validation),
        autocast=create_autocast(options, world.device),
        epochs=training.epochs,
        steps_per_epoch=steps,
        eval_metric=training.eval_metric,
        dist_bn='' if options.sync_bn else options.dist_bn,
        folder=folder,
        data_config=model.images,
        folder_lock=lock(folder) if folder else None,
        trackers=[],
        freezer=training.freezer,
    )
    layout.open_folder(folder)
    try:
        _begin(run, options, source, written)
    except BaseException:
        _remove(made)
        run.close()
        raise
    return run


def _begin(run: Run, options: Options, source: str, written: str) -> None:
    """Resume a run from `source`, if there is one, set its learning rate, start trackers, and write its options."""
    state, schedule = run.state, run.state.schedule
    resumed = bool(source) and resume(source, state, options, run.world, run.layout, run.train_loader, run.folder)
    if schedule is not None and (resumed or state.epoch):
        if not resumed:
            run.step_schedule(metric=None)
        if run.steps_done():
            schedule.step_update(run.steps_done())
    if run.folder:
        run.trackers += create_trackers(
            options, run.folder, options.to_dict()
        )  # last: a run that is refused must not start one
        write_atomically(run.folder / ARGS, lambda file: file.write(written.encode()))  # a resumed run reads it
        if state.rows:
            write_summary(run.folder / SUMMARY, state.rows)


def _model_config(options: Options) -> dict[str, Any] | None:
    """Return the configuration of the folder that `--model` names; of a resumed run, that of its checkpoint.

    The folder may have moved since the run began.
    """
    if ':' not in options.model:
        return None
    if config := folder_config(options.model):
        return config
    path = Path(options.resume)
    if options.resume == 'auto' and options.experiment:
        path = Path(options.output or DEFAULT_OUTPUT) / options.experiment / LAST
    if not options.model.startswith('local-dir:') or not (options.resume and path.is_file()):
        return None
    return read_checkpoint(path).get(RUN, {}).get('model_config')


def _create_model(options: Options, given: Options, data: Data, layout: Layout, world: World) -> Model:
    """Create the model, and move it to the devices of the ranks; `given` are the options before the data was read."""
    stored = _model_config(given)
    random_seed(options.seed, world.rank)
    model: Any = layout.create(lambda weights: _create_module(options, data.train, stored, weights))
    rng_state = world.broadcast(torch.get_rng_state())  # ranks have drawn with seeds of their own
    num_classes = options.num_classes or model.num_classes
    check_classes(data.train, num_classes, given=given.num_classes is not None)
    images, patches = resolve_config(options, model, any_size=options.naflex_loader), patch_format(options, model)
    if options.split_bn:
        model = convert_splitbn_model(model, options.aug_splits or 2)
    model.to(dtype=model_dtype(options))
    layout.place(model, classifiers_of(model))
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    if options.sync_bn and world.distributed:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return Model(model, num_classes, stored, images, patches, rng_state)


def _create_module(options: Options, train: Dataset, stored: dict[str, Any] | None, weights: bool) -> nn.Module:
    """Create the model, or what it looks like without weights."""
    if not weights:
        options = options.replace(pretrained=False, pretrained_path=None, initial_checkpoint='')
    if not stored or folder_config(options.model):
        return create_train_model(options, train)
    with stored_folder(options.model, stored) as name:  # weights come from the checkpoint
        return create_train_model(options.replace(model=name, pretrained=False), train)


def _create_loaders(options: Options, data: Data, model: Model, world: World) -> Loaders:
    train = create_train_loader(
        options,
        data.train,
        model.images,
        world,
        num_classes=model.num_classes,
        rng_state=model.rng_state,
        patches=model.patches,
    )
    if data.validation is None:
        return Loaders(train, None)
    images = {**model.images, 'crop_mode': options.crop_mode or model.images['crop_mode']}
    with cache_in(options.cache_dir):
        check_readable(
            data.validation,
            options.data_dir,
            world,
            decode=options.check_images,
            policy=options.val_bad_image,
            remedy='--val-bad-image skip',
            mode=image_mode(options),
            workers=options.workers,
        )
    if options.task == 'multilabel' and model.patches is None:
        warn_about_crop(data.validation, images)
    evaluation = create_eval_loader(
        options,
        data.validation,
        widen(images, options.tta),
        world,
        batch_size=options.validation_batch_size or options.batch_size,
        bad_image=options.val_bad_image,
        remedy='--val-bad-image skip',
        patches=model.patches,
        persistent_workers=options.persistent_workers,
    )
    return Loaders(train, evaluation)


def _create_training(
    options: Options, data: Data, model: Model, loaders: Loaders, steps: int, layout: Layout, world: World
) -> Training:
    """Create task, optimizer and schedule, for epochs of so many optimizer steps."""
    task: Any = create_task(options, model.module, data.train, model.images, world)
    freezer = Freezer(model.module, options.freeze_backbone, options.unfreeze_epoch)
    if options.unfreeze_epoch is None:  # else the optimizer gets the backbone too, and skips it without gradients
        freezer.apply(0)
    optimizer = create_optimizer(options, task.get_trainable_module())
    head = head_parameters(model.module)
    if options.head_lr_scale != 1:
        scale_rates(optimizer, head, options.head_lr_scale)
        if options.head_lr_scale < 1 and any(isinstance(part, nn.Linear) for part in classifiers_of(model.module)):
            _logger.warning(
                f'--head-lr-scale {options.head_lr_scale:g} lowers the rate of a linear layer; the recipes have it for '
                'ML-Decoder: pass --head-lr-scale 1'
            )
    freezer.apply(0)
    if (options.pretrained or options.initial_checkpoint) and not options.resume:
        backbone = (parameter for parameter in model.module.parameters() if id(parameter) not in head)
        warn_of_rate(backbone, options.opt, optimizer.defaults['lr'])
    eval_metric = options.eval_metric if loaders.evaluation else 'loss'
    schedule, epochs = create_schedule(options, optimizer, steps, decreasing=eval_metric == 'loss')
    return Training(task, optimizer, schedule, freezer, min(epochs, options.stop_epoch or epochs), eval_metric)


def _create_folder(options: Options, model: Model, world: World) -> tuple[Path | None, list[Path]]:
    """Create the folder of the run; return it, and the folders that were not there, the innermost first."""
    if not world.primary:
        return None, []
    named = safe_model_name(options.model), model.images['input_size'][-1]
    folder = choose_folder(options.output or DEFAULT_OUTPUT, options.experiment, *named)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    create_folder(folder)
    return folder, made


def _create_state(
    options: Options, data: Data, model: Model, training: Training, folder: Path | None, world: World
) -> TrainingState:
    sum_dtype = torch.float32 if world.device.type == 'mps' else torch.float64  # mps has no float64
    metric = training.eval_metric
    return TrainingState(
        task=training.task,
        optimizer=training.optimizer,
        schedule=training.schedule,
        scaler=create_scaler(options, world.device),
        checkpoints=CheckpointFolder(folder or Path(), metric == 'loss', options.checkpoint_hist, metric),
        loss=RunningLoss(torch.zeros((), dtype=sum_dtype, device=world.device)),
        gradient_norm=RunningLoss(torch.zeros((), dtype=sum_dtype, device=world.device)),
        epoch=options.start_epoch or 0,
        early_stop=EarlyStop(options.early_stop) if options.early_stop else None,
        model_config=model.stored,
        class_names=class_names_of(data.train),
        train_data=describe(data.train),
        held_out=getattr(data.validation, 'held_out', None),
    )


def _create_splits(options: Options, world: World, known: Tensor | None = None) -> Data:
    train = create_split(
        options,
        options.train_split,
        training=True,
        num_samples=options.train_num_samples,
        repeats=options.epoch_repeats,
        missing=options.missing_images,
        known=known,
    )
    log_summary(options.train_split, train, training=True)
    if not options.val_split:
        check_ranks(world, {options.train_split: train})
        return Data(train, None)
    validation = create_split(
        options, options.val_split, num_samples=options.val_num_samples, missing=options.missing_images, known=known
    )
    log_summary(options.val_split, validation)
    check_ranks(world, {options.train_split: train, options.val_split: validation})
    if not options.class_split:
        check_same_classes(train, validation)
    warn_about_overlap(train, validation)
    crops = options.task == 'multilabel' and not options.no_aug and options.train_crop_mode is None
    if crops and options.scale[0] < 0.5:
        remedy = 'a larger --scale' if options.naflex_loader else '--train-crop-mode squash'
        smallest, largest = options.scale
        _logger.warning(f'--scale {smallest:g} {largest:g}: crops may cut labelled objects off; {remedy} keeps them')
    return Data(train, validation)


def _wrap(options: Options, task: Any, layout: Layout) -> nn.Module:
    """Set up EMA weights, compilation and the exchange of gradients, in this order; return the model to evaluate."""
    if options.model_ema:
        layout.setup_ema(task, options)
    if options.torchscript:
        trained = task.trainable_module = script(task.get_trainable_module())
        task.eval_model = getattr(trained, 'student', trained)  # what feature distillation trains with it is left out
    if options.torchcompile:
        task.compile(backend=options.torchcompile, mode=options.torchcompile_mode)
        task.compile_ema(backend=options.torchcompile, mode=options.torchcompile_mode)
    eval_model = task.get_eval_model()
    layout.wrap(task)
    return eval_model


def _eval_classes(options: Options, model: nn.Module, validation: Dataset | None) -> Classes | None:
    """Return the classes that evaluation scores instead of those of training."""
    if validation is None or not (options.class_split and has_text_queries(options)):
        return None
    classes = read_classes(options.word_embeddings, validation)
    with other_classes(model, classes):
        return classes  # a head that cannot take them raises its error now, not after an epoch


def _remove(folders: list[Path]) -> None:
    """Remove the folders that were made for a run that did not begin."""
    for folder in folders:
        (folder / LOCK).unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError:  # a tracker has written there
            return


def _resume_source(options: Options, world: World, folder: Path | None, written: str) -> str:
    """Return what to resume from; a collective call.

    A run that torchrun restarts resumes whatever `--resume` says. A run that was refused the folder is restarted too,
    but has not written its options there.

    Raises:
        ValueError: If the folder holds the checkpoints of another run.
    """
    occupied = folder is not None and bool(checkpoints_in(folder))
    restarted = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'
    same = folder is not None and (folder / ARGS).exists() and (folder / ARGS).read_text() == written
    some_occupied, resumes = world.all_reduce_max(occupied, restarted and occupied and same)
    source = 'auto' if resumes else options.resume
    if some_occupied and not source:
        raise ValueError(
            f'{folder or options.experiment} holds the checkpoints of a run: continue it with --resume auto, choose '
            'another --experiment, or remove the folder'
        )
    return source
