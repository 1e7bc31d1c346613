"""Learning rate range test: a short run in which the learning rate grows until the loss diverges."""

import logging
from collections.abc import Iterator
from math import inf, isfinite, log
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from timm_mldecoder.loading.loader import Batch
from timm_mldecoder.runtime.errors import advise_on_memory
from timm_mldecoder.runtime.files import write_csv
from timm_mldecoder.runtime.signals import Stopped
from timm_mldecoder.train.loop import step_optimizer, train_batch
from timm_mldecoder.train.nonfinite import Buffers
from timm_mldecoder.train.run import Run

_logger = logging.getLogger(__name__)

LOWEST, HIGHEST = 1e-7, 10.0
SMOOTHING = 0.9  # decay of the mean of the loss
DIVERGED = 4.0  # multiple of the lowest smoothed loss at which the test ends


class Point(NamedTuple):
    """One optimizer step of the test: learning rate, loss of its batches on all ranks, and mean of losses so far."""

    lr: float
    loss: float
    smoothed: float


def find_lr(run: Run) -> None:
    """Train for `--lr-find` steps, each with a larger learning rate, and write a table and a picture of the loss.

    The rates grow exponentially from 1e-7 to 10 (arXiv 1506.01186, section 3.3), times the scale of a parameter group.
    The test ends early once the smoothed loss is not finite, or is 4 times the lowest so far. No checkpoint is saved.

    Raises:
        ValueError: If the loss diverges within the first three steps.
    """
    options = run.options
    try:
        with run.signals, advise_on_memory(options.batch_size, options.batch_size, options.grad_accum_steps):
            points = _range_test(run)
    finally:
        run.close()
    if len(points) < 3:
        raise ValueError(f'--lr-find {options.lr_find}: the loss diverged after {len(points)} steps')
    if run.folder is not None:
        write_csv(run.folder / 'lr_find.csv', [Point._fields, *points])
        steepest, rising = steepest_descent(points), rise(points)
        draw(points, steepest, run.folder / 'lr_find.png')
        low, high = sorted((steepest, rising / 10))
        _logger.info(
            f'The loss falls fastest at a rate of {steepest:.2g} and rises from {rising:.2g} on: try --lr {low:.1g} to '
            f'{high:.1g} ({run.folder / "lr_find.png"})'
        )


def steepest_descent(points: list[Point]) -> float:
    """Return the learning rate at which the smoothed loss falls fastest per factor of the rate."""
    slopes = {
        point.lr: (after.smoothed - before.smoothed) / (log(after.lr) - log(before.lr))
        for before, point, after in zip(points, points[1:], points[2:], strict=False)
    }
    return min(slopes, key=slopes.__getitem__)


def rise(points: list[Point]) -> float:
    """Return the learning rate from which the smoothed loss is a tenth above its lowest value, or the last rate."""
    lowest = min(range(len(points)), key=lambda number: points[number].smoothed)
    above = (point.lr for point in points[lowest:] if point.smoothed > 1.1 * points[lowest].smoothed)
    return next(above, points[-1].lr)


def draw(points: list[Point], steepest: float, path: Path) -> None:
    """Draw the loss over the learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout='constrained')
    axis = figure.subplots()
    rates, losses, smoothed = zip(*points, strict=True)
    axis.plot(rates, losses, color='C0', alpha=0.3, label='loss')
    axis.plot(rates, smoothed, color='C0', label='smoothed')
    axis.axvline(steepest, color='C1', linestyle='--', label=f'steepest: {steepest:.2g}')
    axis.set(xscale='log', xlabel='learning rate', ylabel='training loss')
    axis.legend()
    figure.savefig(path)


def _range_test(run: Run) -> list[Point]:
    state, steps, accumulated = run.state, run.options.lr_find, run.options.grad_accum_steps
    model = state.task.get_trainable_module()
    groups = state.optimizer.param_groups
    run.freezer.train_mode(model, state.epoch)
    state.optimizer.zero_grad()
    buffers, batches = Buffers(model), _batches(run)
    points: list[Point] = []
    mean, lowest = 0.0, inf
    for step in range(steps):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / (steps - 1))
        for group in groups:
            group['lr'] = rate * group.get('lr_scale', 1.0)  # as timm's schedules do
        trained = [
            train_batch(run, *next(batches), accumulated, completes_step=number == accumulated - 1)
            for number in range(accumulated)
        ]

        # the loss of all ranks: they end together
        own = torch.stack([batch.loss for batch in trained]).mean()
        loss = (run.world.all_reduce_sum(own.to(state.loss.total)) / run.world.size).item()
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed = mean / (1 - SMOOTHING ** (step + 1))
        lowest = min(lowest, smoothed)
        if not isfinite(smoothed) or smoothed > DIVERGED * lowest:
            break
        points.append(Point(rate, loss, smoothed))
        if stop := step_optimizer(run, trained, buffers):
            raise Stopped(stop)
    return points


def _batches(run: Run) -> Iterator[tuple[Batch, Tensor]]:
    """Yield the training batches of one epoch after the other."""
    while True:
        yield from run.train_loader.epoch(run.state.epoch)
        run.state.begin_epoch(run.state.epoch + 1)
