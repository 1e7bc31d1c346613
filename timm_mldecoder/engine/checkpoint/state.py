"""Everything that a resumed run needs, in one object."""

import logging
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from timm.models import clean_state_dict
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from timm_mldecoder.engine.checkpoint.files import CheckpointFolder
from timm_mldecoder.engine.input.images import BadImage
from timm_mldecoder.engine.input.resumable import Position

_logger = logging.getLogger(__name__)

SCALER = 'amp_scaler'  # timm's key
FORMAT = 2  # timm's: the epoch of a checkpoint is the one it ended
RankState = dict[str, Any]
RUN = 'timm_mldecoder'  # the key of what timm's layout has no place for


@dataclass
class RunningLoss:
    """The sum of the training loss over the samples of an epoch, kept on the device so that no step waits for it.

    Attributes:
        bad_images: Images of the epoch that others had to stand in for.
    """

    total: torch.Tensor
    samples: int = 0
    bad_images: list[BadImage] = field(default_factory=list)

    def add(self, loss: torch.Tensor, samples: int) -> None:
        self.total += loss.detach().to(self.total.dtype) * samples
        self.samples += samples

    def mean(self) -> torch.Tensor:
        """The mean loss of this process's samples, a scalar on the device."""
        return self.total / max(self.samples, 1)


@dataclass
class TrainingState:
    """The parts of a run that change while it trains, and where it is.

    Attributes:
        task: Model, averaged model, loss.
        optimizer: Its moments, and the learning rate of each group.
        schedule: The learning-rate schedule; None for `--sched none`.
        scaler: The loss scaler of float16, not enabled where there is no need for one.
        checkpoints: The history of checkpoints and the best metric.
        epoch: The epoch under way, or the next to begin.
        batch: Batches of it trained on.
        skipped: Updates left out in a row, up to now, because they were not finite.
        loss: Running loss of the epoch under way.
        rows: The metrics of every epoch so far, as `summary.csv` shows them.
        position: Where in the epoch each random stream stood; None at the start of an epoch.
    """

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    schedule: Scheduler | None
    scaler: torch.amp.GradScaler
    checkpoints: CheckpointFolder
    loss: RunningLoss
    epoch: int = 0
    batch: int = 0
    skipped: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    position: Position | None = None

    def start_epoch(self, epoch: int) -> None:
        """Stand at the start of an epoch."""
        self.epoch, self.batch, self.position = epoch, 0, None

    def state_dict(self, options: Namespace, ranks: list[RankState], metric: float | None = None) -> dict[str, Any]:
        """What a checkpoint holds: timm's keys, and one of ours.

        Args:
            options: The options of the run.
            ranks: What `rank_state` returned on each rank.
            metric: The metric of the epoch that ended, if one did.
        """
        content = {
            'epoch': self.epoch - 1 if self.position is None else self.epoch,
            'arch': options.model,
            'version': FORMAT,
            'args': options,
            'optimizer': self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(),
            **(self.task.get_checkpoint_state(ema=True) if self.task.has_ema() else {}),
            'saver': self.checkpoints.state_dict(),
            RUN: dict(
                epoch=self.epoch,
                batch=self.batch,
                skipped=self.skipped,
                rows=self.rows,
                schedule=_schedule_state(self.schedule),
                ranks=ranks,
                world_size=len(ranks),
                batch_size=options.batch_size,
                grad_accum_steps=options.grad_accum_steps,
                optimizer_stream=_optimizer_stream(self.optimizer),
            ),
        }
        if self.scaler.is_enabled():
            content[SCALER] = self.scaler.state_dict()
        if metric is not None:
            content['metric'] = metric
        return content

    def rank_state(self) -> RankState:
        """What differs from rank to rank: random streams, running loss, and buffers such as running statistics."""
        position = asdict(self.position) if self.position else None
        return dict(
            position=position,
            loss=self.loss.total.item(),
            samples=self.loss.samples,
            bad_images=[tuple(image) for image in self.loss.bad_images],
            buffers={
                ema: _saved_buffers(self.task.get_eval_model(ema=ema))
                for ema in (False, True)
                if dist.is_initialized() and (not ema or self.task.has_ema())
            },
        )

    def gather_ranks(self) -> list[RankState]:
        """`rank_state` of every rank; a collective call."""
        if not dist.is_initialized():
            return [self.rank_state()]
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, self.rank_state())
        return states

    def load_state_dict(self, content: dict[str, Any], options: Namespace, rank: int, world_size: int) -> None:
        """Take over a checkpoint, of this package or of timm.

        Raises:
            ValueError: If it holds another model, or a position within an epoch that cannot be taken up with the
                present number of processes or batch size.
        """
        run = content.get(RUN, {})
        self._load_models(content)
        if not options.no_resume_opt:
            self._load_optimizer(content, run.get('optimizer_stream'))
        self.epoch = run['epoch'] if run else _next_epoch(content)
        self.batch, self.skipped = run.get('batch', 0), run.get('skipped', 0)
        if options.start_epoch is not None:
            self.epoch, self.batch = options.start_epoch, 0
        self.rows = [dict(row) for row in run.get('rows', []) if row['epoch'] < self.epoch]
        changed = [
            f'{name} was {run[name]} and is {now}'
            for name, now in (
                ('world_size', world_size),
                ('batch_size', options.batch_size),
                ('grad_accum_steps', options.grad_accum_steps),
            )
            if run and run[name] != now
        ]
        if changed and self.batch:
            raise ValueError(
                f'{"; ".join(changed)}: a checkpoint within an epoch cannot be resumed so; use the same, '
                f'or a checkpoint of the end of an epoch'
            )
        if changed and rank == 0:
            _logger.warning('Resumed with a change: %s', '; '.join(changed))
        if self.batch:
            self._load_position(run, rank)
        same_metric = self.checkpoints.ranks_like(content.get('saver', {}))
        if _is_plateau(self.schedule) and run.get('schedule') and same_metric:
            self.schedule.lr_scheduler.load_state_dict(run['schedule']['plateau'])
            self.schedule.restore_lr = run['schedule']['restore_lr']
        elif self.schedule is not None:
            self.schedule.step(self.epoch)

    def _load_models(self, content: dict[str, Any]) -> None:
        weights = clean_state_dict(content.get('state_dict', content.get('model', content)))
        try:
            self.task.load_checkpoint_state(weights, content.get('task_state'))
            if self.task.has_ema():
                averaged = content.get('state_dict_ema')
                self.task.load_checkpoint_state(clean_state_dict(averaged) if averaged else weights, ema=True)
        except RuntimeError as error:  # torch names every key that does not fit
            raise ValueError(f'the checkpoint holds another model: {" ".join(str(error).split())[:300]}') from error

    def _load_optimizer(self, content: dict[str, Any], stream: torch.Tensor | None) -> None:
        if 'optimizer' in content:
            missing = sorted(self.optimizer.defaults.keys() - content['optimizer']['param_groups'][0].keys())
            if missing:
                raise ValueError(
                    f'the checkpoint was saved with another optimizer than --opt, one without '
                    f'{", ".join(missing)}; use the same, or --no-resume-opt'
                )
            self.optimizer.load_state_dict(content['optimizer'])
        if stream is not None:
            self.optimizer.generator = torch.Generator(self.loss.total.device).set_state(stream)
        if self.scaler.is_enabled() and SCALER in content:
            self.scaler.load_state_dict(content[SCALER])

    def _load_position(self, run: dict[str, Any], rank: int) -> None:
        own = run['ranks'][rank]
        self.position = Position(**own['position'])
        self.loss.total.fill_(own['loss'])
        self.loss.samples = own['samples']
        self.loss.bad_images = [BadImage(*image) for image in own['bad_images']]
        for ema, buffers in own['buffers'].items():
            unwrap_model(self.task.get_eval_model(ema=ema)).load_state_dict(buffers, strict=False)


def _saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a state dict holds, on the CPU."""
    buffers = dict(unwrap_model(model).named_buffers())
    return {name: buffers[name].cpu() for name in unwrap_model(model).state_dict() if name in buffers}


def _optimizer_stream(optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
    """Where an optimizer's own generator stands: Adahessian has one, and leaves it out of its state dict."""
    generator = getattr(optimizer, 'generator', None)
    return generator.get_state() if isinstance(generator, torch.Generator) else None


def _next_epoch(content: dict[str, Any]) -> int:
    """The epoch that follows a checkpoint of timm's; 0 for bare weights."""
    return content['epoch'] + (content.get('version', 1) >= FORMAT) if 'epoch' in content else 0


def _is_plateau(schedule: Scheduler | None) -> bool:
    return isinstance(schedule, PlateauLRScheduler)


def _schedule_state(schedule: Scheduler | None) -> dict[str, Any] | None:
    """The state of the one schedule that is no function of the epoch; timm's own state dict leaves its counters out."""
    if not _is_plateau(schedule):
        return None
    return dict(plateau=schedule.lr_scheduler.state_dict(), restore_lr=schedule.restore_lr)
