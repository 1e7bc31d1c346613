"""The training loop, top to bottom: epochs, and the updates of one."""

import logging
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from timm.task import evaluation_sample_limit
from timm.utils import dispatch_clip_grad, distribute_bn
from torch import Tensor

from timm_mldecoder.engine import report
from timm_mldecoder.engine.evaluate import evaluate
from timm_mldecoder.engine.run import Run
from timm_mldecoder.engine.state import RunningLoss
from timm_mldecoder.engine.zero_shot import asked_for

_logger = logging.getLogger(__name__)

Metrics = OrderedDict[str, float]


def fit(run: Run) -> None:
    """Train until the last epoch; validate and save after each."""
    options, state = run.options, run.state
    while state.epoch < run.epochs:
        epoch = state.epoch
        train_metrics = train_epoch(run)
        lr = run.learning_rate()

        # one set of running statistics for all processes
        if run.world.distributed and run.dist_bn:
            distribute_bn(state.task.get_eval_model(), run.world.size, run.dist_bn == 'reduce')

        # most epochs are neither scored nor saved where --val-interval says so
        state.epoch, state.batch, state.position = epoch + 1, 0, None
        last = state.epoch == run.epochs
        if state.epoch % options.val_interval and not last:
            run.step_schedule(metric=None)
            continue
        run.train_loader.epoch_ended(state.epoch)
        eval_metrics = validate(run) if run.eval_loader is not None else None

        # the state moves on to the next epoch before it is saved
        metric = (eval_metrics if eval_metrics is not None else train_metrics)[run.eval_metric]
        run.step_schedule(metric)
        state.rows.append(report.summary_row(epoch, train_metrics, eval_metrics, lr))
        run.save_epoch(epoch, metric)

    if run.world.primary:
        best = state.checkpoints
        if best.best_metric is not None:
            _logger.info(f'*** Best metric: {best.best_metric} (epoch {best.best_epoch})')
        report.print_result(state.rows, run.eval_metric, best.decreasing)


def train_epoch(run: Run) -> Metrics:
    """The rest of the epoch under way: all of it, unless it was resumed within."""
    state, options = run.state, run.options
    batches = run.train_loader.epoch(state.epoch, resume=state.position)
    if state.position is None:
        state.loss = RunningLoss(torch.zeros_like(state.loss.total))
    state.position = None

    state.task.get_trainable_module().train()
    state.optimizer.zero_grad()
    watch = report.Stopwatch()
    for images, target in batches:
        watch.batch_arrived()
        batch = state.batch
        state.batch += 1
        accumulated, completes_update = run.accumulation(batch)

        # forward and backward; gradients are exchanged once an update
        with nullcontext() if completes_update else state.task.no_sync():
            loss = forward_backward(run, images, target, accumulated, completes_update)
        state.loss.add(loss, len(images))
        watch.batch_done(len(images))
        if not completes_update:
            continue

        # update
        state.optimizer.zero_grad()
        updates = run.updates_done()
        state.task.update_ema(step=updates)
        if options.synchronize_step and run.world.device.type != 'cpu':
            torch.accelerator.synchronize(run.world.device)
        watch.update_done()

        # tell
        update = batch // options.grad_accum_steps
        run.bar.show(f'Train: {state.epoch}', update + 1, run.updates_per_epoch)
        if update % options.log_interval == 0 or state.batch == len(run.train_loader):
            log_update(run, update, loss, watch)
            if options.save_images and run.folder:
                save_images(images, run.folder / f'train-batch-{batch}.jpg')

        # move on, and keep what would be lost
        if state.schedule is not None:
            state.schedule.step_update(num_updates=updates)
        if options.recovery_interval and (update + 1) % options.recovery_interval == 0:
            run.save_recovery()

    if hasattr(state.optimizer, 'sync_lookahead'):
        state.optimizer.sync_lookahead()
    return OrderedDict(loss=_mean_over_ranks(state.loss.mean()).item())


def forward_backward(run: Run, images: Tensor, target: Tensor, accumulated: int, completes_update: bool) -> Tensor:
    """Gradients of one batch and, where it completes an update, the optimizer's step.

    Returns:
        The loss of the batch, a scalar, neither divided by `accumulated` nor scaled by the batch size.
    """
    state, options = run.state, run.options
    with run.autocast():
        loss = state.task(images, target)['loss']
    scaled = loss * run.loss_scale(len(images)) / accumulated

    second_order = getattr(state.optimizer, 'is_second_order', False)
    if state.scaler is not None:
        state.scaler(scaled, state.optimizer, clip_grad=options.clip_grad, clip_mode=options.clip_mode,
                     parameters=run.clip_parameters(), create_graph=second_order, need_update=completes_update)
        return loss.detach()
    scaled.backward(create_graph=second_order)
    if completes_update:
        if options.clip_grad is not None:
            dispatch_clip_grad(run.clip_parameters(), value=options.clip_grad, mode=options.clip_mode)
        state.optimizer.step()
    return loss.detach()


def validate(run: Run) -> Metrics:
    """The metrics of the validation split: of the averaged weights where there are any, or of the better of the two."""
    metrics = _validate(run, ema=False)
    if run.state.task.has_ema() and not run.options.model_ema_force_cpu:
        if run.world.distributed and run.dist_bn:
            distribute_bn(run.state.task.get_trainable_module(ema=True), run.world.size, run.dist_bn == 'reduce')
        averaged = _validate(run, ema=True)
        if not run.options.better_of_ema:
            return averaged
        metrics['ema'], averaged['ema'] = 0, 1
        metrics = min(averaged, metrics, key=lambda scored: run.state.checkpoints.sort_key(scored[run.eval_metric]))
    return metrics


def _validate(run: Run, ema: bool) -> Metrics:
    evaluator = run.state.task.create_evaluator(max_samples=evaluation_sample_limit(run.eval_loader.loader))
    tell = report.EvalReport('Test (EMA)' if ema else 'Test', evaluator, len(run.eval_loader), run.options.log_interval,
                             run.bar, run.world.primary)
    model = run.state.task.get_eval_model(ema=True) if ema else run.eval_model
    with asked_for(model, run.eval_classes):
        return evaluate(model, run.eval_loader, evaluator, autocast=run.autocast, distributed=run.world.distributed,
                        views=run.options.tta, on_batch=tell)


def log_update(run: Run, update: int, loss: Tensor, watch: report.Stopwatch) -> None:
    """Log the loss of a batch and of the epoch so far, the means over all processes."""
    now, mean = _mean_over_ranks(torch.stack([loss.to(run.state.loss.total), run.state.loss.mean()])).tolist()
    if run.world.primary:
        run.bar.clear()
        _logger.info(report.train_line(run.state.epoch, update, run.updates_per_epoch, (now, mean), run.learning_rate(),
                                       watch, run.world.size, run.world.device))


def save_images(images: Tensor, path: Path) -> None:
    """Save a batch of training images as one picture."""
    from torchvision.utils import save_image

    save_image(images, path, padding=0, normalize=True)


def _mean_over_ranks(values: Tensor) -> Tensor:
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
