"""Putting a training run together from its options."""

import logging
import os
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import safe_model_name
from timm.utils import random_seed
from torch import nn

from timm_mldecoder.engine.checkpoint.files import CheckpointFolder, checkpoints_in
from timm_mldecoder.engine.checkpoint.resume import resume
from timm_mldecoder.engine.checkpoint.state import RunningLoss, TrainingState
from timm_mldecoder.engine.input import loaders, zero_shot
from timm_mldecoder.engine.input.batches import EvalLoader, Placement, TrainLoader
from timm_mldecoder.engine.input.dataset_checks import check_classes, check_same_classes
from timm_mldecoder.engine.runtime.distributed import World
from timm_mldecoder.engine.runtime.report import ProgressBar, write_summary
from timm_mldecoder.engine.runtime.trackers import create_trackers
from timm_mldecoder.engine.train import build
from timm_mldecoder.engine.train.run import Run

_logger = logging.getLogger(__name__)

OPTIONS_FILE = 'args.yaml'


def set_up(options: Namespace, world: World) -> Run:
    """Build every part of a run, in the order in which timm's script draws random numbers, and resume it if asked to.

    Raises:
        ValueError: For whatever the user got wrong.
    """
    if world.primary:
        processes = f'{world.size} processes' if world.distributed else 'a single process'
        _logger.info(f'Training with {processes} ({world.device}).')
    as_given = dict(vars(options))
    random_seed(options.seed, world.rank)

    # the model, then its data
    model = build.create_model(options, world)
    config = loaders.data_config(options, model, world)
    build.resolve_learning_rate(options, world)
    placement = Placement(
        world.device, build.model_dtype(options), options.channels_last, prefetched=not options.no_prefetcher
    )
    train_loader, eval_loader = _create_loaders(options, config, placement, world, as_given['num_classes'] is not None)

    # task and optimizer; averaged weights are copied before the model is compiled, and that is done before DDP wraps it
    task = build.create_task(options, model, train_loader.dataset, world)
    eval_metric = _check_metric(options.eval_metric, task) if eval_loader else 'loss'
    optimizer = build.create_optimizer(options, task.get_trainable_module(), world)
    if options.model_ema:
        task.setup_ema(
            decay=options.model_ema_decay,
            use_warmup=options.model_ema_warmup,
            device='cpu' if options.model_ema_force_cpu else None,
        )
    if options.torchcompile:
        task.compile(backend=options.torchcompile, mode=options.torchcompile_mode)
        task.compile_ema(backend=options.torchcompile, mode=options.torchcompile_mode)
    eval_model = task.get_eval_model()
    if world.distributed:
        on_device = None if world.device.type == 'cpu' else [world.device]
        buffers = dict(broadcast_buffers=False) if options.no_ddp_bb else {}
        task.prepare_distributed(device_ids=on_device, **buffers)

    updates = -(-len(train_loader) // options.grad_accum_steps)
    decreasing = eval_metric == 'loss'
    schedule, epochs = build.create_schedule(options, optimizer, updates, decreasing, world)

    # where it stands, and where it goes
    folder = _create_folder(options, config) if world.primary else None
    written = _options_text({**as_given, 'lr': options.lr})
    occupied = folder is not None and bool(checkpoints_in(folder))
    occupied, goes_on = world.highest(occupied, occupied and _started_again(folder, written))
    source = 'auto' if goes_on else options.resume
    if occupied and not source:
        raise ValueError(
            f'{folder or options.experiment} holds the checkpoints of a run; go on with it by '
            f'--resume auto, choose another --experiment, or remove the folder'
        )
    state = TrainingState(
        task=task,
        optimizer=optimizer,
        schedule=schedule,
        scaler=build.create_scaler(options, world.device),
        checkpoints=CheckpointFolder(folder or Path(), decreasing, options.checkpoint_hist, eval_metric),
        loss=RunningLoss(torch.zeros((), dtype=_sum_dtype(world.device), device=world.device)),
        epoch=options.start_epoch or 0,
    )
    run = Run(
        options=options,
        world=world,
        state=state,
        train_loader=train_loader,
        eval_loader=eval_loader,
        eval_model=eval_model,
        eval_classes=_eval_classes(options, eval_model, eval_loader),
        autocast=build.create_autocast(options, world.device),
        epochs=min(epochs, options.stop_epoch or epochs),
        eval_metric=eval_metric,
        dist_bn='' if options.sync_bn else options.dist_bn,
        folder=folder,
        data_config=config,
        bar=ProgressBar(enabled=world.primary),
        trackers=create_trackers(options, folder) if folder else [],
    )
    resumed = bool(source) and resume(run, source)
    if not resumed and schedule is not None and state.epoch:
        run.step_schedule(metric=None)
        schedule.step_update(run.updates_done())
    if folder:
        (folder / OPTIONS_FILE).write_text(written)
        if state.rows:
            write_summary(folder / 'summary.csv', state.rows)
    return run


def _create_loaders(
    options: Namespace, config: dict[str, Any], placement: Placement, world: World, classes_given: bool
) -> tuple[TrainLoader, EvalLoader | None]:
    train = loaders.create_split(options, options.train_split, config, training=True)
    check_classes(train, options.num_classes, classes_given)
    validation = loaders.create_split(options, options.val_split, config) if options.val_split else None
    if validation is not None and not options.class_split:
        check_same_classes(train, validation)
    train_loader = loaders.create_train_loader(options, train, config, placement, world)
    if validation is None:
        return train_loader, None
    batch_size = options.validation_batch_size or options.batch_size
    return train_loader, loaders.create_eval_loader(
        options, validation, config, placement, world, batch_size, crop_mode=options.crop_mode
    )


def _eval_classes(options: Namespace, model: nn.Module, loader: EvalLoader | None) -> zero_shot.Classes | None:
    """The classes that evaluation asks for in place of those of training."""
    if loader is None or not (options.class_split and zero_shot.has_words(options)):
        return None
    classes = zero_shot.read_classes(options, loader.loader.dataset)
    with zero_shot.asked_for(model, classes):
        return classes  # a head that cannot be asked for them says so now, not after an epoch


def _check_metric(name: str, task: Any) -> str:
    names = task.create_evaluator().metric_names
    if name not in names:
        raise ValueError(f'--eval-metric {name}: this task has {", ".join(names)}')
    return name


def _create_folder(options: Namespace, config: dict[str, Any]) -> Path:
    name = options.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(options.model), str(config['input_size'][-1])]
    )
    folder = Path(options.output or './output/train') / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / '.writable').touch()
        (folder / '.writable').unlink()
    except OSError as error:
        raise ValueError(f'--output: cannot write to {folder}: {error.strerror}') from error
    return folder


def _started_again(folder: Path, written: str) -> bool:
    """Whether torchrun started this very run again: with something saved it goes on then, whatever `--resume` says.

    A run that was refused the folder is started again, too, but has not written its options there.
    """
    again = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'
    path = folder / OPTIONS_FILE
    return again and path.exists() and path.read_text() == written


def _options_text(options: dict[str, Any]) -> str:
    """Options as `--config` reads them again."""
    return yaml.safe_dump({name: value for name, value in options.items() if name != 'config'})


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == 'mps' else torch.float64  # mps has no float64
