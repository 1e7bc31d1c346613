"""Everything the training loop needs: options, loaders, state, helpers."""

import logging
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import IO, Any, NoReturn

from torch import nn

from timm_mldecoder.checkpoint.files import SUMMARY, write_summary
from timm_mldecoder.checkpoint.state import TrainingState
from timm_mldecoder.distributed.layout import Layout
from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags.options import LoopOptions
from timm_mldecoder.loading.loader import EvalLoader, TrainLoader
from timm_mldecoder.modeling.classes import Classes
from timm_mldecoder.runtime.signals import Stopped, StopSignals
from timm_mldecoder.train.freeze import Freezer
from timm_mldecoder.train.trackers import Tracker

_logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What the training loop works with. Only `state`, the loaders' positions and `signals` change while it trains."""

    options: LoopOptions  # those of the loop, of train.py
    args: Namespace  # all options, as checkpoints store them
    world: World
    layout: Layout  # how the ranks hold the model
    state: TrainingState  # what a checkpoint holds
    train_loader: TrainLoader  # batches to train on
    eval_loader: EvalLoader | None  # validation split, None without one
    eval_model: nn.Module  # model as it is evaluated, without the wrapper that exchanges gradients
    eval_classes: Classes | None  # classes of a head with text queries in evaluation; None for those of training
    autocast: Callable[[], AbstractContextManager]
    epochs: int
    steps_per_epoch: int  # optimizer steps of an epoch that is trained from its beginning
    eval_metric: str  # metric that ranks checkpoints
    dist_bn: str  # how ranks share BatchNorm statistics; empty for not at all
    folder: Path | None  # folder of the run; None on all ranks but the first
    data_config: dict[str, Any]  # size, crop and normalization of evaluation images
    freezer: Freezer
    folder_lock: IO | None  # lock of the folder, held as long as the run lives
    trackers: list[Tracker]  # called with the metrics of each epoch
    signals: StopSignals = field(default_factory=StopSignals)

    def steps_done(self) -> int:
        """Return the number of optimizer steps since the start of training."""
        return self.state.epoch * self.steps_per_epoch + -(-self.state.batch // self.options.grad_accum_steps)

    def stopped_early(self) -> bool:
        """Return whether `--early-stop` has ended the training."""
        return self.state.early_stop is not None and self.state.early_stop.stopped

    def is_validated(self, epoch: int) -> bool:
        """Return whether an epoch is validated and saved: `--val-interval` leaves most of them out."""
        return not (epoch + 1) % self.options.val_interval or epoch + 1 >= self.epochs or self.is_milestone(epoch)

    def is_milestone(self, epoch: int) -> bool:
        """Return whether the checkpoint of an epoch is kept permanently."""
        return epoch + 1 in (self.options.save_epochs or ())

    def accumulation(self, batch: int) -> tuple[int, bool]:
        """Return how many batches the optimizer step of `batch` consists of, and whether it is the last of them.

        A stream may end before the length that it reports, which makes the last step a smaller one, or after it.
        """
        steps, first = self.options.grad_accum_steps, self.state.start.batch
        batches, number = len(self.train_loader) - first, batch - first
        left = batches - number // steps * steps
        size = min(steps, left) if left > 0 else steps
        return size, number == batches - 1 or (number + 1) % steps == 0 or self.train_loader.is_last(batch)

    def loss_scale(self, images: int) -> float:
        """Return the factor of the loss of a batch where batch sizes change."""
        ratio = images / (self.options.batch_size * (self.options.aug_splits or 1))
        options = self.options
        growth = options.naflex_loss_scale if options.naflex_loader else options.variable_batch_loss_scale
        return {'none': 1.0, 'sqrt': ratio**0.5, 'linear': ratio}[growth]

    def clip_parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients are clipped; adaptive clipping leaves the classifier out."""
        return list(self.state.task.get_clip_parameters(exclude_head='agc' in self.options.clip_mode))

    def learning_rate(self) -> float:
        """Return the mean learning rate of the parameter groups."""
        rates = [group['lr'] for group in self.state.optimizer.param_groups]
        return sum(rates) / len(rates)

    def step_schedule(self, metric: float | None) -> None:
        """Set the learning rate of the next epoch."""
        if self.state.schedule is not None:
            self.state.schedule.step(self.state.epoch, metric)

    def save_epoch(self, epoch: int, metric: float) -> None:
        """Save the end of an epoch, its row of the summary and its metrics; a collective call."""
        checkpoints = self.state.checkpoints
        self.layout.wait()
        is_best, dropped = checkpoints.rank(epoch, metric)

        def write(content: dict[str, Any]) -> None:
            checkpoints.save_epoch(epoch, content, is_best, dropped)
            if self.is_milestone(epoch):
                checkpoints.save_milestone(epoch + 1)

        self.layout.save(self._content(metric), write, (self.state.epoch, self.state.batch))
        if self.folder is None:
            return
        write_summary(self.folder / SUMMARY, self.state.rows)
        for track in self.trackers:
            track(self.state.rows[-1])

    def save_recovery(self) -> Path | None:
        """Save the position within the epoch, and return the file on the first rank; a collective call."""
        epoch, batch = self.state.epoch, self.state.batch
        checkpoints = self.state.checkpoints
        return self.layout.save(
            self._content(), lambda content: checkpoints.save_recovery(epoch, batch, content), (epoch, batch)
        )

    def stop(self, number: int) -> NoReturn:
        """Save the position and end the run, for a signal that one of the ranks received; a collective call."""
        saved = self.save_recovery() or self.layout.wait()
        if saved is not None:
            where = f'in epoch {self.state.epoch} after batch {self.state.batch}'
            _logger.warning(
                f'{Signals(number).name}: stopped {where}; the same command with --resume {saved} continues there'
            )
        raise Stopped(number)

    def close(self) -> None:
        """End the workers of the loaders, and release the folder."""
        if self.folder_lock is not None:
            self.folder_lock.close()
        self.train_loader.close()
        if self.eval_loader is not None:
            self.eval_loader.close()

    def _content(self, metric: float | None = None) -> dict[str, Any]:
        return self.state.collect(self.args, self.world, self.train_loader, self.data_config, metric)
