"""What changes while a run trains: collected for a checkpoint, and restored from one."""

import logging
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_mldecoder.checkpoint.files import (
    NOTHING,
    SUMMARY,
    CheckpointFolder,
    find_checkpoint,
    newest,
    read_summary,
    set_aside,
    try_checkpoint,
)
from timm_mldecoder.checkpoint.read import RUN, VERSION
from timm_mldecoder.distributed.layout import Layout
from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags.data import DatasetOptions
from timm_mldecoder.flags.options import ResumeOptions
from timm_mldecoder.loading.bad_images import BadImage
from timm_mldecoder.loading.compare_classes import check_class_names
from timm_mldecoder.loading.loader import TrainLoader
from timm_mldecoder.loading.randomness import EpochBatches, EpochStart
from timm_mldecoder.runtime.errors import one_line

_logger = logging.getLogger(__name__)

SCALER = 'amp_scaler'  # timm's key
#: Options of the schedule, which a resumed run follows from its beginning to the present epoch.
SCHEDULE = ('epochs', 'sched', 'lr', 'min_lr', 'warmup_epochs', 'warmup_lr', 'cooldown_epochs', 'decay_epochs')

PERFECT = 1e-4  # this close to 1, there is nothing left to improve
SMOOTHING = 0.8  # share of a new best metric in the smoothed one


@dataclass
class EarlyStop:
    """Stop once the metric has not exceeded its smoothed best for some evaluations in a row, or is 1.

    Let m be the metric, rounded to 4 decimals, and 0 if it is NaN. If m is 1 to 1e-4, stop. If m is above the smoothed
    metric s (0 at the start), s becomes 0.8 m + 0.2 s and the count starts again. Otherwise, after warm-up, the
    evaluation counts, and `patience` such evaluations in a row stop the run.
    """

    patience: int = 5  # evaluations without an improvement that stop the run, at least 1
    smoothed: float = 0.0
    waited: int = 0
    stopped: bool = False  # whether the run is to stop

    def step(self, metric: float, warmed_up: bool = True) -> bool:
        """Take in the metric of one evaluation, in [0, 1], and return `stopped`."""
        metric = 0.0 if math.isnan(metric) else round(metric, 4)
        if metric > self.smoothed:
            self.smoothed = SMOOTHING * metric + (1 - SMOOTHING) * self.smoothed
            self.waited = 0
        elif warmed_up:
            self.waited += 1
        self.stopped = self.waited >= self.patience or abs(metric - 1) <= PERFECT
        return self.stopped

    def state_dict(self) -> dict[str, float | int]:
        """Return smoothed metric, count and result, for a checkpoint; the patience is an option."""
        return {'smoothed': self.smoothed, 'waited': self.waited, 'stopped': self.stopped}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.smoothed, self.waited = float(state['smoothed']), int(state['waited'])
        self.stopped = bool(state['stopped'])


@dataclass
class RunningLoss:
    """Sum of the loss over an epoch's samples, or of another value; on the device, so that no step waits for it."""

    total: Tensor
    samples: int = 0

    def add(self, loss: Tensor, samples: int) -> None:
        self.total += loss.detach().to(self.total.dtype) * samples
        self.samples += samples

    def reset(self) -> None:
        self.total.zero_()
        self.samples = 0

    def mean(self, world: World) -> Tensor:
        """Return the mean loss over the samples of all ranks, a scalar on the device; a collective call."""
        total, samples = world.all_reduce_sum(torch.stack([self.total, self.total.new_full((), self.samples)]))
        return total / samples.clamp(min=1)


@dataclass
class TrainingState:
    """The parts of a run that change while it trains, and its position."""

    task: Any  # timm's TrainingTask: model, EMA model, loss
    optimizer: torch.optim.Optimizer
    schedule: Scheduler | None  # learning-rate schedule; None for `--sched none`
    scaler: torch.amp.GradScaler  # loss scaler of float16, disabled where it is not needed
    checkpoints: CheckpointFolder  # ranking of the checkpoints, and the best metric
    loss: RunningLoss
    gradient_norm: RunningLoss  # of the steps of the epoch; empty unless `--clip-grad` computes it
    epoch: int = 0  # epoch under way, or the next one
    batch: int = 0  # batches of it that are trained
    start: EpochStart = field(default_factory=EpochStart)  # from where the epoch is trained
    skipped: int = 0  # optimizer steps skipped in a row because they were not finite
    # metrics of every epoch so far, the rows of `summary.csv`
    rows: list[dict[str, float]] = field(default_factory=list)
    class_names: list[str] | None = None  # in the order of the outputs, if the data has any
    model_config: dict[str, Any] | None = None  # of the folder that `--model` names, which may move
    early_stop: EarlyStop | None = None  # rule of `--early-stop`, None without it
    held_out: Tensor | None = None  # digests of the images that `--val-fraction` held out, see `data.hold_out`
    train_data: dict[str, Any] | None = None  # number of training images and digest, see `loading.ranks.describe`

    def begin_epoch(self, epoch: int) -> None:
        """Move to the beginning of an epoch."""
        self.epoch, self.batch, self.start = epoch, 0, EpochStart()
        self.loss.reset()
        self.gradient_norm.reset()

    def models(self) -> dict[str, nn.Module]:
        """Return the model, and the one with the EMA weights if there is one, by the key of their weights."""
        average = {'state_dict_ema': self.task.get_eval_model(ema=True)} if self.task.has_ema() else {}
        return {'state_dict': self.task.get_eval_model(), **average}

    def collect(
        self, args: Namespace, world: World, loader: TrainLoader, data_config: dict[str, Any],
        metric: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Return what a checkpoint holds, see `timm_mldecoder.checkpoint.read`; a collective call.

        `metric` is that of the epoch that ended, None within an epoch.
        """
        ranks = world.all_gather(self._rank_state(world, loader))
        within = loader.batches if self.batch else None  # at its beginning there is nothing to continue
        restart = within and within.restart(self.start, self.batch)
        run = dict(
            epoch=self.epoch,
            batch=self.batch,
            start=asdict(self.start),
            restart=restart and asdict(restart),
            skipped=self.skipped,
            gradient_norm=(self.gradient_norm.total.item(), self.gradient_norm.samples),
            rows=self.rows,
            schedule=_schedule_state(self.schedule),
            ranks=ranks,
            world_size=world.size,
            batch_size=args.batch_size,
            grad_accum_steps=args.grad_accum_steps,
            optimizer_generator=_generator_state(self.optimizer),
            early_stop=self.early_stop.state_dict() if self.early_stop else None,
            model_config=self.model_config,
            train_data=self.train_data,
            held_out=self.held_out,
            data_config=data_config,
        )
        content = {
            'epoch': self.epoch - 1 if metric is not None else self.epoch,
            'arch': args.model,
            'version': VERSION,
            'args': args,
            'optimizer': self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(),
            **(self.task.get_checkpoint_state(ema=True) if self.task.has_ema() else {}),
            'saver': self.checkpoints.state_dict(),
            RUN: run,
        }
        scaler = self.scaler.state_dict() if self.scaler.is_enabled() else None
        optional = {SCALER: scaler, 'class_names': self.class_names, 'metric': metric}
        return content | {name: value for name, value in optional.items() if value is not None}

    def _rank_state(self, world: World, loader: TrainLoader) -> dict[str, Any]:
        """Return what differs from rank to rank: running loss, unreadable images, and buffers such as BatchNorm's."""
        models = enumerate(self.models().values()) if world.distributed else ()  # raw weights, then EMA weights
        return dict(
            loss=self.loss.total.item(),
            samples=self.loss.samples,
            bad_images=[tuple(image) for image in loader.bad_images],
            buffers={bool(ema): _saved_buffers(model) for ema, model in models},
        )

    def restore(self, content: dict[str, Any], options: ResumeOptions, world: World, loader: TrainLoader) -> None:
        """Take over a checkpoint of this package or of timm.

        Raises:
            ValueError: If it holds another model or optimizer, or a position that cannot be resumed with the present
                number of ranks or batch size.
        """
        run = content.get(RUN, {})
        first_rates = [group['lr'] for group in self.optimizer.param_groups]
        self._restore_models(content)
        if not options.no_resume_opt:
            self._restore_optimizer(content, run.get('optimizer_generator'))
        self.begin_epoch(run['epoch'] if run else _next_epoch(content))
        self.skipped = run.get('skipped', 0)
        now = dict(world_size=world.size, batch_size=options.batch_size, grad_accum_steps=options.grad_accum_steps)
        changed = [f'{name} was {run[name]} and is {now[name]}' for name in now if run and run[name] != now[name]]
        if options.start_epoch is not None:
            self.begin_epoch(options.start_epoch)
        elif run.get('batch'):
            if other := self._other_data(run):
                raise ValueError(
                    f'{other}: within an epoch, images would be left out or trained on twice; restore the images, or '
                    'resume from a checkpoint of the end of an epoch'
                )
            self._restore_position(run, world, loader, changed)
        if changed and self.batch:
            changed.append('the rest of the epoch is divided into other batches')
        changed += [other] if (other := self._other_data(run)) else []
        before = vars(content['args']) if run else {}
        changed += [f'{name} was {before[name]} and is {getattr(options, name)}' for name in SCHEDULE
                    if name in before and before[name] != getattr(options, name)]  # fmt: skip
        if changed and world.primary:
            _logger.warning(f'resumed with a change: {"; ".join(changed)}')
        self.rows = [dict(row) for row in run.get('rows', []) if row['epoch'] < self.epoch]
        if self.early_stop and run.get('early_stop'):
            self.early_stop.load_state_dict(run['early_stop'])
        same_metric = self.checkpoints.same_metric(content.get('saver', {}))
        if isinstance(self.schedule, PlateauLRScheduler) and run.get('schedule') and same_metric:
            self.schedule.lr_scheduler.load_state_dict(run['schedule']['plateau'])
            self.schedule.restore_lr = run['schedule']['restore_lr']
        elif self.schedule is not None and self.epoch:
            self.schedule.step(self.epoch)
        elif self.schedule is not None:  # timm steps no schedule before the first epoch; tanh and noise would show it
            for group, rate in zip(self.optimizer.param_groups, first_rates, strict=True):
                group['lr'] = rate

    def _other_data(self, run: dict[str, Any]) -> str:
        """Return how the training images differ from those of a checkpoint; empty if they do not, or none are known."""
        then, now = run.get('train_data'), self.train_data
        if not then or not now or then == now:
            return ''
        if then['images'] != now['images']:
            return f'the checkpoint was written with {then["images"]:,} training images, the data has {now["images"]:,}'
        return f'the {now["images"]:,} training images have other names or labels than those of the checkpoint'

    def _restore_models(self, content: dict[str, Any]) -> None:
        weights = clean_state_dict(content.get('state_dict', content.get('model', content)))
        try:
            self.task.load_checkpoint_state(weights, content.get('task_state'))
            if self.task.has_ema():
                average = content.get('state_dict_ema')
                weights = clean_state_dict(average) if average else weights
                task_state = content.get('task_state_ema' if average else 'task_state')
                self.task.load_checkpoint_state(weights, task_state, ema=True)
        except (RuntimeError, AttributeError, TypeError) as error:  # torch names every key that does not fit
            raise ValueError(f'the checkpoint holds another model: {one_line(error, 300)}') from error

    def _restore_optimizer(self, content: dict[str, Any], generator: Tensor | None) -> None:
        if 'optimizer' in content:
            try:
                missing = sorted(self.optimizer.defaults.keys() - content['optimizer']['param_groups'][0].keys())
                if missing:
                    raise ValueError(f'its optimizer has no {", ".join(missing)}')
                self.optimizer.load_state_dict(content['optimizer'])
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise ValueError(
                    f'the checkpoint was saved with another optimizer than --opt ({one_line(error, 200)}): use the '
                    'same, or --no-resume-opt'
                ) from error
        if generator is not None:
            optimizer: Any = self.optimizer
            optimizer.generator = torch.Generator(self.loss.total.device).set_state(generator)
        if self.scaler.is_enabled() and SCALER in content:
            self.scaler.load_state_dict(content[SCALER])

    def _restore_position(self, run: dict[str, Any], world: World, loader: TrainLoader, changed: list[str]) -> None:
        """Move to a position within an epoch; the remaining samples may be divided differently now."""
        self.batch, self.start = run['batch'], EpochStart(**run['start'])
        if changed:
            if run['restart'] is None or not isinstance(loader.batches, EpochBatches) or loader.batches.scheduled:
                raise ValueError(
                    f'{"; ".join(changed)}: streams, --train-img-sizes and --naflex-loader cannot resume within an '
                    'epoch after that change; undo it, or use a checkpoint of the end of an epoch'
                )
            self.start = loader.batches.continued(EpochStart(**run['restart']))
            self.batch = self.start.batch
        ranks, own = run['ranks'], run['ranks'][world.rank % run['world_size']]
        if run['world_size'] == world.size:
            total, samples, bad = own['loss'], own['samples'], own['bad_images']
        else:  # the sums of all ranks go to the first
            total = sum(rank['loss'] for rank in ranks) if world.primary else 0.0
            samples = sum(rank['samples'] for rank in ranks) if world.primary else 0
            bad = [image for rank in ranks for image in rank['bad_images']] if world.primary else []
        self.loss.total.fill_(total)
        self.loss.samples = samples
        total, self.gradient_norm.samples = run.get('gradient_norm', (0.0, 0))  # the same on all ranks
        self.gradient_norm.total.fill_(total)
        loader.bad_images = [BadImage(*image) for image in bad]
        for ema, buffers in own['buffers'].items():
            unwrap_model(self.task.get_eval_model(ema=ema)).load_state_dict(buffers, strict=False)


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a state dict holds, on the CPU."""
    buffers = dict(unwrap_model(model).named_buffers())
    return {name: buffers[name].cpu() for name in unwrap_model(model).state_dict() if name in buffers}


def _generator_state(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Return the state of an optimizer's own generator: Adahessian has one, and leaves it out of its state dict."""
    generator = getattr(optimizer, 'generator', None)
    return generator.get_state() if isinstance(generator, torch.Generator) else None


def _next_epoch(content: dict[str, Any]) -> int:
    """Return the epoch that follows a checkpoint of timm's; 0 for bare weights."""
    return content['epoch'] + (content.get('version', 1) >= VERSION) if 'epoch' in content else 0


def _schedule_state(schedule: Scheduler | None) -> dict[str, Any] | None:
    """Return the state of the plateau schedule, which is not in timm's state dict; other schedules have none."""
    if not isinstance(schedule, PlateauLRScheduler):
        return None
    return dict(plateau=schedule.lr_scheduler.state_dict(), restore_lr=schedule.restore_lr)


def resume(
    source: str,
    state: TrainingState,
    options: ResumeOptions,
    world: World,
    layout: Layout,
    loader: TrainLoader,
    folder: Path | None,
) -> bool:
    """Resume from a checkpoint, or from the newest one of the run if the source is 'auto'; a collective call.

    `folder` is that of the run, None on all ranks but the first.

    Returns:
        Whether there was a checkpoint: 'auto' is a fresh start without one.

    Raises:
        ValueError: If the checkpoint does not load, or does not fit the run.
    """
    path, content = find_checkpoint(source, world, folder, whole=layout.reads_whole)
    if path is None:
        return False
    trained = content.get('class_names')
    if trained != state.class_names:
        check_class_names(loader.dataset, trained)
    try:
        layout.localize(content, path, state.models(), state.optimizer)
        state.restore(content, options, world, loader)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f'{path} does not have the entries of a checkpoint to resume from: {error!r}') from error
    except ValueError as error:
        raise ValueError(f'--resume {path}: {error}') from error
    world.barrier()  # every rank has read the file, which may be moved now
    if folder is not None:
        state.rows = state.rows or read_summary(path.parent / SUMMARY, before=state.epoch)
        if source != 'auto' or options.start_epoch is not None:
            same_run = path.parent.resolve() == folder.resolve()
            set_aside(folder, (state.epoch, state.batch) if same_run else NOTHING, whole=layout.reads_whole)
        state.checkpoints.load_state_dict(content.get('saver', {}), path.parent)
        if not state.batch and options.start_epoch is None:
            state.checkpoints.complete(path, state.epoch, options.save_epochs or ())
        _logger.info(f"Resumed from '{path}' at epoch {state.epoch}, batch {state.batch}")
    return True


def held_out_before(options: DatasetOptions, content: Mapping[str, Any]) -> Tensor | None:
    """Return the digests of the images that a run held out, if the options divide the data in the same way."""
    trained = vars(content['args']) if RUN in content else {}
    same = trained and all(getattr(options, name) == trained.get(name) for name in ('val_fraction', 'split_seed'))
    return content[RUN].get('held_out') if same else None


def held_out_to_resume(options: ResumeOptions, world: World, output: Path) -> Tensor | None:
    """Return the digests of the images that the run to resume held out, None without one; a collective call."""
    restarted = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'
    if not options.val_fraction or not (options.resume or restarted):
        return None
    known = None
    if world.primary:
        folder = output / options.experiment if options.experiment else None
        found = options.resume not in ('', 'auto') and Path(options.resume).is_file()
        content = try_checkpoint(Path(options.resume), False) if found else newest(folder, False)[1] if folder else {}
        known = held_out_before(options, content)
    return world.broadcast(known)
