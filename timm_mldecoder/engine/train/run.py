"""A training run: what the loop works with, and what it asks of it."""

import logging
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any, NoReturn

from torch import nn

from timm_mldecoder.engine.checkpoint.state import RUN, TrainingState
from timm_mldecoder.engine.input.batches import EvalLoader, TrainLoader
from timm_mldecoder.engine.input.dataset_checks import class_to_index
from timm_mldecoder.engine.input.zero_shot import Classes
from timm_mldecoder.engine.runtime import report
from timm_mldecoder.engine.runtime.distributed import World
from timm_mldecoder.engine.runtime.signals import Stopped, StopSignals

_logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What the loop works with; only `state` changes while it trains.

    Attributes:
        epochs: Epochs to train, where --stop-epoch does not end the run before.
        eval_model: The model as it is evaluated, free of the wrapper that exchanges gradients.
        eval_classes: What a head of word queries is asked for in evaluation, None for the same as in training.
        eval_metric: The metric that ranks checkpoints.
        dist_bn: How running statistics are shared between processes, empty for not at all.
        folder: Where results go; None on all but the first rank.
        data_config: Size, crop and normalisation of evaluation images; validate.py scores a checkpoint with the same.
    """

    options: Namespace
    world: World
    state: TrainingState
    train_loader: TrainLoader
    eval_loader: EvalLoader | None
    eval_model: nn.Module
    eval_classes: Classes | None
    autocast: Callable[[], AbstractContextManager]
    epochs: int
    eval_metric: str
    dist_bn: str
    folder: Path | None
    data_config: dict[str, Any]
    bar: report.ProgressBar
    trackers: list[Callable[[dict[str, float]], None]]
    signals: StopSignals = field(default_factory=StopSignals)

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.train_loader) // self.options.grad_accum_steps)

    def is_kept(self, epoch: int) -> bool:
        """Whether an epoch is scored and saved: not most of them where --val-interval says so."""
        return not (epoch + 1) % self.options.val_interval or epoch + 1 >= self.epochs or self.is_milestone(epoch)

    def is_milestone(self, epoch: int) -> bool:
        """Whether the checkpoint of an epoch is kept for good."""
        return epoch + 1 in (self.options.save_epochs or ())

    def updates_done(self) -> int:
        """Updates since the start of training."""
        return self.state.epoch * self.updates_per_epoch + -(-self.state.batch // self.options.grad_accum_steps)

    def accumulation(self, batch: int) -> tuple[int, bool]:
        """How many batches the update that `batch` belongs to is made of, and whether it is the last of them."""
        steps, batches = self.options.grad_accum_steps, len(self.train_loader)
        size = min(steps, batches - batch // steps * steps)
        return size, batch == batches - 1 or (batch + 1) % steps == 0

    def loss_scale(self, images: int) -> float:
        """What the loss is multiplied by where batch sizes change."""
        ratio = images / self.options.batch_size
        return {'none': 1.0, 'sqrt': ratio**0.5, 'linear': ratio}[self.options.variable_batch_loss_scale]

    def clip_parameters(self) -> list[nn.Parameter] | None:
        """The parameters whose gradients are clipped; AGC leaves the classifier out."""
        if self.options.clip_grad is None:
            return None
        return list(self.state.task.get_clip_parameters(exclude_head='agc' in self.options.clip_mode))

    def learning_rate(self) -> float:
        """The mean over the parameter groups."""
        rates = [group['lr'] for group in self.state.optimizer.param_groups]
        return sum(rates) / len(rates)

    def step_schedule(self, metric: float | None) -> None:
        """Set the learning rate of the epoch that comes next."""
        if self.state.schedule is not None:
            self.state.schedule.step(self.state.epoch, metric)

    def save_epoch(self, epoch: int, metric: float) -> None:
        """Save the end of an epoch, its row of the summary and its metrics; a collective call."""
        ranks = self.state.gather_ranks()
        if self.folder is None:
            return
        self.state.checkpoints.save_epoch(epoch, metric, lambda: self._content(ranks, metric))
        if self.is_milestone(epoch):
            self.state.checkpoints.save_milestone(epoch + 1)
        report.write_summary(self.folder / 'summary.csv', self.state.rows)
        for track in self.trackers:
            track(self.state.rows[-1])

    def save_recovery(self) -> Path | None:
        """Save the present position within the epoch, and return the file on the first rank; a collective call."""
        if self.state.position is None:  # it is set while the epoch is validated
            self.state.position = self.train_loader.position(self.state.batch)
        ranks = self.state.gather_ranks()
        saved = None
        if self.folder is not None:
            saved = self.state.checkpoints.save_recovery(
                self.state.epoch, self.state.batch, lambda: self._content(ranks)
            )
        self.state.position = None
        return saved

    def stop(self, number: int) -> NoReturn:
        """Save the present position and end the run, for a signal that came to one of the processes."""
        saved = self.save_recovery()
        if saved is not None:
            _logger.warning(
                f'{Signals(number).name}: stopped in epoch {self.state.epoch} after batch '
                f'{self.state.batch}; --resume {saved} goes on from there'
            )
        raise Stopped(number)

    def _content(self, ranks: list[dict[str, Any]], metric: float | None = None) -> dict[str, Any]:
        content = self.state.state_dict(self.options, ranks, metric)
        content[RUN]['data_config'] = self.data_config
        classes = class_to_index(self.train_loader.dataset)
        if classes:
            content['class_names'] = list(classes)
        return content
