"""Build a training run from its options."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.layers import convert_splitbn_model
from timm.models import safe_model_name
from timm.task import TrainingTask
from timm.utils import random_seed
from torch import nn
from torch.utils.data import Dataset

from timm_mldecoder.checkpoint.early_stop import EarlyStop
from timm_mldecoder.checkpoint.files import LAST, LOCK, CheckpointFolder, checkpoints_in, lock
from timm_mldecoder.checkpoint.folders import folder_config, stored_folder
from timm_mldecoder.checkpoint.read import read_checkpoint
from timm_mldecoder.checkpoint.resume import resume
from timm_mldecoder.checkpoint.schema import RUN
from timm_mldecoder.checkpoint.state import RunningLoss, TrainingState
from timm_mldecoder.checkpoint.summary import SUMMARY, write_summary
from timm_mldecoder.checkpoint.write_sharded import ShardWriter
from timm_mldecoder.data.crops import image_sizes, lost_share
from timm_mldecoder.distributed.fsdp import is_sharded, shard_task, slices_of
from timm_mldecoder.distributed.losses import divide_loss
from timm_mldecoder.distributed.slices import create_sliced, rows_of_rank
from timm_mldecoder.distributed.world import World
from timm_mldecoder.evaluation.evaluate import create_autocast, widen
from timm_mldecoder.flags import Options
from timm_mldecoder.loading.checked import check_readable
from timm_mldecoder.loading.create_loaders import create_eval_loader, create_train_loader, model_dtype, resolve_config
from timm_mldecoder.loading.datasets import (
    Classes,
    check_classes,
    check_same_classes,
    create_split,
    image_mode,
    log_summary,
    read_classes,
    warn_about_overlap,
    with_classes,
)
from timm_mldecoder.loading.naflex import patch_format
from timm_mldecoder.loading.ranks import check_ranks, describe
from timm_mldecoder.modeling.classes import class_names_of, has_text_queries, other_classes
from timm_mldecoder.modeling.errors import check_loaded
from timm_mldecoder.modeling.load import create_train_model, script
from timm_mldecoder.runtime.files import choose_folder, create_folder
from timm_mldecoder.train.ema import choose_ema_warmup
from timm_mldecoder.train.freeze import Freezer, head_modules, head_parameters
from timm_mldecoder.train.loss import create_task
from timm_mldecoder.train.optim import (
    create_optimizer,
    create_scaler,
    create_schedule,
    learning_rate,
    scale_rates,
)
from timm_mldecoder.train.run import Run, prepare_distributed
from timm_mldecoder.train.trackers import create_trackers

_logger = logging.getLogger(__name__)

ARGS = 'args.yaml'
CUT = 0.05  # share of the area of images that an evaluation of several labels may lose without a warning
DEFAULT_OUTPUT = './output/train'


def build_run(options: Options, world: World) -> Run:
    """Build every part of a run, and resume it if requested."""
    ranks = f'{world.size} processes' if world.distributed else 'a single process'
    _logger.info(f'Training with {ranks} ({world.device}).')
    given = options
    options = options.replace(lr=learning_rate(options, world))

    # data, then the model: random draws begin with the model's initialization, as in timm's script
    train, validation = _create_splits(options, world)
    options = with_classes(options, train)
    model_config = _model_config(given)
    divided = is_sharded(options, world)
    random_seed(options.seed, 0 if divided else world.rank)
    if divided:
        slice_of = slices_of(options, world)
        model, slices = create_sliced(lambda: _create_model(options, train, model_config, check=False), slice_of)
        check_loaded(options, slices.values(), lambda tensor: rows_of_rank(tensor, *slice_of(model, '')))
    else:
        model = _create_model(options, train, model_config)
    rng_state = world.broadcast(torch.get_rng_state())  # ranks have drawn with seeds of their own
    num_classes = options.num_classes or model.num_classes
    check_classes(train, num_classes, given=given.num_classes is not None)
    config = resolve_config(options, model)
    patches = patch_format(options, model)
    if options.split_bn:
        model = convert_splitbn_model(model, options.aug_splits or 2)
    model.to(device=None if divided else world.device, dtype=model_dtype(options))
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    if options.sync_bn and world.distributed:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    train_loader = create_train_loader(
        options, train, config, world, num_classes=num_classes, rng_state=rng_state, patches=patches
    )
    if validation:
        check_readable(
            validation,
            options.data_dir,
            world,
            decode=options.check_images,
            policy=options.val_bad_image,
            remedy='--val-bad-image skip',
            mode=image_mode(options),
            workers=options.workers,
        )
    eval_config = {**config, 'crop_mode': options.crop_mode or config['crop_mode']}
    if options.task == 'multilabel' and validation and patches is None:
        lost = lost_share(image_sizes(validation), eval_config)
        if lost > CUT:
            _logger.warning(
                f'evaluation cuts {lost:.0%} of the area of the images off (the median), and objects with it that are '
                'labelled: --crop-mode squash --crop-pct 1 shows all of them'
            )
    eval_loader = validation and create_eval_loader(
        options,
        validation,
        widen(eval_config, options.tta),
        world,
        batch_size=options.validation_batch_size or options.batch_size,
        bad_image=options.val_bad_image,
        remedy='--val-bad-image skip',
        patches=patches,
        persistent_workers=options.persistent_workers,
    )

    # task and optimizer
    task = create_task(options, model, train, config, world)
    if divided:
        shard_task(task, slices, options, world, head_modules(model))
    part = head_modules(model)[0].part if divided and options.head_parallel else None
    if part is not None:
        task.criterion = divide_loss(task.criterion, part).to(world.device)
    eval_metric = options.eval_metric if eval_loader else 'loss'
    freezer = Freezer(model, options.freeze_backbone, options.unfreeze_epoch)
    if options.unfreeze_epoch is None:  # else the optimizer gets the backbone too, and skips it without gradients
        freezer.apply(0)
    optimizer = create_optimizer(options, task.get_trainable_module())
    if options.head_lr_scale != 1:
        scale_rates(optimizer, head_parameters(model), options.head_lr_scale)
    freezer.apply(0)
    decreasing = eval_metric == 'loss'
    steps = -(-len(train_loader) // options.grad_accum_steps)
    schedule, epochs = create_schedule(options, optimizer, steps, decreasing)
    epochs = min(epochs, options.stop_epoch or epochs)
    options = choose_ema_warmup(options, steps * epochs)
    eval_model = _wrap(options, task, world)

    # folder, state, resume
    folder, made = None, []
    if world.primary:
        named = safe_model_name(options.model), config['input_size'][-1]
        folder = choose_folder(options.output or DEFAULT_OUTPUT, options.experiment, *named)
        made = [path for path in (folder, *folder.parents) if not path.exists()]  # the innermost first
        create_folder(folder)
    written = yaml.safe_dump({name: value for name, value in options.to_dict().items() if name != 'config'})
    source = _resume_source(options, world, folder, written)
    sum_dtype = torch.float32 if world.device.type == 'mps' else torch.float64  # mps has no float64
    state = TrainingState(
        task=task,
        optimizer=optimizer,
        schedule=schedule,
        scaler=create_scaler(options, world.device),
        checkpoints=CheckpointFolder(folder or Path(), decreasing, options.checkpoint_hist, eval_metric),
        loss=RunningLoss(torch.zeros((), dtype=sum_dtype, device=world.device)),
        epoch=options.start_epoch or 0,
        early_stop=EarlyStop(options.early_stop) if options.early_stop else None,
        model_config=model_config,
        train_data=describe(train),
    )
    run = Run(
        options=options,
        world=world,
        state=state,
        train_loader=train_loader,
        eval_loader=eval_loader,
        eval_model=eval_model,
        eval_classes=_eval_classes(options, eval_model, validation),
        autocast=create_autocast(options, world.device),
        epochs=epochs,
        steps_per_epoch=steps,
        eval_metric=eval_metric,
        dist_bn='' if options.sync_bn else options.dist_bn,
        folder=folder,
        data_config=config,
        class_names=class_names_of(train),
        folder_lock=lock(folder) if folder else None,
        trackers=[],
        shards=ShardWriter(Path(world.broadcast(str(folder and folder.resolve()))), world) if divided else None,
        freezer=freezer,
        part=part,
    )
    try:
        _begin(run, source, written)
    except BaseException:
        _remove(made)
        run.close()
        raise
    return run


def _begin(run: Run, source: str, written: str) -> None:
    """Resume a run from `source`, if there is one, set its learning rate, start trackers, and write its options."""
    state, schedule = run.state, run.state.schedule
    resumed = bool(source) and resume(source, state, run.options, run.world, run.train_loader, run.folder)
    if schedule is not None and (resumed or state.epoch):
        if not resumed:
            run.step_schedule(metric=None)
        if run.steps_done():
            schedule.step_update(run.steps_done())
    if run.folder:
        run.trackers += create_trackers(run.options, run.folder)  # last: a run that is refused must not start one
        (run.folder / ARGS).write_text(written)
        if state.rows:
            write_summary(run.folder / SUMMARY, state.rows)


def _model_config(options: Options) -> dict[str, Any] | None:
    """Return the configuration of the folder that `--model` names; of a resumed run, that of its checkpoint.

    The folder may have moved since the run began.
    """
    if config := folder_config(options.model):
        return config
    path = Path(options.resume)
    if options.resume == 'auto' and options.experiment:
        path = Path(options.output or DEFAULT_OUTPUT) / options.experiment / LAST
    if not options.model.startswith('local-dir:') or not (options.resume and path.is_file()):
        return None
    return read_checkpoint(path).get(RUN, {}).get('model_config')


def _create_model(options: Options, train: Dataset, config: dict[str, Any] | None, check: bool = True) -> nn.Module:
    if folder_config(options.model) or not config:
        return create_train_model(options, train, check=check)
    with stored_folder(options.model, config) as name:  # weights come from the checkpoint
        return create_train_model(options.replace(model=name, pretrained=False), train, check=check)


def _create_splits(options: Options, world: World) -> tuple[Dataset, Dataset | None]:
    train = create_split(
        options,
        options.train_split,
        training=True,
        num_samples=options.train_num_samples,
        repeats=options.epoch_repeats,
        missing=options.missing_images,
    )
    log_summary(options.train_split, train, training=True)
    if not options.val_split:
        check_ranks(world, {options.train_split: train})
        return train, None
    validation = create_split(options, options.val_split, num_samples=options.val_num_samples)
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
    return train, validation


def _wrap(options: Options, task: TrainingTask, world: World) -> nn.Module:
    """Set up EMA weights, compilation and DistributedDataParallel, in this order; return the model to evaluate."""
    if task.has_ema():  # that of a divided model
        task.trainable_module_ema.use_warmup = options.model_ema_warmup
    elif options.model_ema:
        world.share(task.get_trainable_module())  # else EMA weights start from what each rank has drawn
        task.setup_ema(
            decay=options.model_ema_decay,
            use_warmup=options.model_ema_warmup,
            device='cpu' if options.model_ema_force_cpu else None,
        )
    if options.torchscript:
        trained = task.trainable_module = script(task.get_trainable_module())
        task.eval_model = getattr(trained, 'student', trained)  # what feature distillation trains with it is left out
    if options.torchcompile:
        task.compile(backend=options.torchcompile, mode=options.torchcompile_mode)
        task.compile_ema(backend=options.torchcompile, mode=options.torchcompile_mode)
    eval_model = task.get_eval_model()
    prepare_distributed(options, task, world)
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
    same = occupied and (folder / ARGS).exists() and (folder / ARGS).read_text() == written
    occupied, resumes = world.all_reduce_max(occupied, restarted and same)
    source = 'auto' if resumes else options.resume
    if occupied and not source:
        raise ValueError(
            f'{folder or options.experiment} holds the checkpoints of a run: continue it with --resume auto, choose '
            'another --experiment, or remove the folder'
        )
    return source
