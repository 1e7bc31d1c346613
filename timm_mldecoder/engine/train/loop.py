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

from timm_mldecoder.engine.checkpoint.state import RunningLoss
from timm_mldecoder.engine.eval.evaluate import evaluate
from timm_mldecoder.engine.input import images as bad_images
from timm_mldecoder.engine.input.images import BadImage
from timm_mldecoder.engine.input.zero_shot import asked_for
from timm_mldecoder.engine.runtime import report
from timm_mldecoder.engine.runtime.memory import naming_batch_size
from timm_mldecoder.engine.train import nonfinite
from timm_mldecoder.engine.train.nonfinite import Buffers, TrainedBatch, spoilt_gradient, spoilt_loss
from timm_mldecoder.engine.train.run import Run
from timm_mldecoder.engine.train.sam import ascended

_logger = logging.getLogger(__name__)

Metrics = OrderedDict[str, float]


def fit(run: Run) -> None:
    """Train until the last epoch; validate and save after each."""
    with run.signals, naming_batch_size(run.options):
        _fit(run)

    best = run.state.checkpoints
    if run.world.primary:
        if best.best_metric is not None:
            _logger.info(f'*** Best metric: {best.best_metric} (epoch {best.best_epoch})')
        report.print_result(run.state.rows, run.eval_metric, best.decreasing)


def _fit(run: Run) -> None:
    state = run.state
    while state.epoch < run.epochs:
        epoch = state.epoch
        train_metrics = train_epoch(run)
        lr = run.learning_rate()

        # one set of running statistics for all processes
        if run.world.distributed and run.dist_bn:
            distribute_bn(state.task.get_eval_model(), run.world.size, run.dist_bn == 'reduce')

        if not run.is_kept(epoch):
            run.state.start_epoch(epoch + 1)
            run.step_schedule(metric=None)
            continue
        state.position = run.train_loader.position(state.batch)
        if epoch + 1 < run.epochs:
            run.train_loader.epoch_ended(epoch + 1)
        eval_metrics = validate(run) if run.eval_loader is not None else None

        # the state moves on to the next epoch before it is saved
        state.start_epoch(epoch + 1)
        metric = (eval_metrics if eval_metrics is not None else train_metrics)[run.eval_metric]
        run.step_schedule(metric)
        state.rows.append(report.summary_row(epoch, train_metrics, eval_metrics, lr))
        run.save_epoch(epoch, metric)


def train_epoch(run: Run) -> Metrics:
    """The rest of the epoch under way: all of it, unless it was resumed within."""
    state, options = run.state, run.options
    batches = run.train_loader.epoch(state.epoch, resume=state.position)
    if state.position is None:
        state.loss = RunningLoss(torch.zeros_like(state.loss.total))
    state.position = None

    state.task.get_trainable_module().train()
    state.optimizer.zero_grad()
    buffers = Buffers(state.task.get_trainable_module())
    trained: list[TrainedBatch] = []
    watch = report.Stopwatch()
    for images, target in batches:
        watch.batch_arrived()
        batch = state.batch
        state.batch += 1
        accumulated, completes_update = run.accumulation(batch)

        # forward and backward; gradients are exchanged once an update
        with nullcontext() if completes_update else state.task.no_sync():
            loss = backward(run, images, target, accumulated)
        if options.sam:
            with ascended(state.task.get_trainable_module(), options.sam):
                backward(run, images, target, accumulated)
        indices, bad = run.train_loader.pop_images(batch)
        state.loss.bad_images += bad
        bad_images.tell(bad)
        trained.append(TrainedBatch(loss, len(images), indices))
        watch.batch_done(len(images))
        if not completes_update:
            continue

        # update
        stop = update_parameters(run, trained, buffers)
        trained.clear()
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
            state.schedule.step_update(num_updates=run.updates_done())
        if stop:
            run.stop(stop)
        if options.recovery_interval and (update + 1) % options.recovery_interval == 0:
            run.save_recovery()

    if hasattr(state.optimizer, 'sync_lookahead'):
        state.optimizer.sync_lookahead()
    return _count_bad(run, state.loss.bad_images, OrderedDict(loss=_mean_over_ranks(state.loss.mean()).item()))


def backward(run: Run, images: Tensor, target: Tensor, accumulated: int) -> Tensor:
    """Gradients of one batch of the `accumulated` that an update is made of.

    Returns:
        The loss of the batch, a scalar, neither divided by `accumulated` nor scaled by the batch size.
    """
    state = run.state
    with run.autocast():
        loss = state.task(images, target)['loss']
    scaled = loss * run.loss_scale(len(images)) / accumulated

    state.scaler.scale(scaled).backward(create_graph=getattr(state.optimizer, 'is_second_order', False))
    return loss.detach()


def update_parameters(run: Run, trained: list[TrainedBatch], buffers: Buffers) -> int:
    """The optimizer's step; left out on all processes where the loss or a gradient of one of them is not finite.

    Args:
        run: The run.
        trained: The batches that the gradients are of.
        buffers: The buffers of the model as they were after the update before.

    Returns:
        The signal that one of the processes was sent, 0 for none.
    """
    state, options = run.state, run.options
    state.scaler.unscale_(state.optimizer)
    model = state.task.get_trainable_module()
    loss, gradient, stop = run.world.highest(spoilt_loss(trained), spoilt_gradient(model), run.signals.received)
    if loss or gradient:
        buffers.put_back()
        skip_update(run, trained, scale_too_large=state.scaler.is_enabled() and not loss)
    else:
        if options.clip_grad is not None:
            dispatch_clip_grad(run.clip_parameters(), value=options.clip_grad, mode=options.clip_mode)
        state.scaler.step(state.optimizer)
        state.task.update_ema(step=run.updates_done())
        buffers.keep()
        state.skipped = 0
        for batch in trained:
            state.loss.add(batch.loss, batch.images)
    state.scaler.update()
    state.optimizer.zero_grad()
    return stop


def skip_update(run: Run, trained: list[TrainedBatch], scale_too_large: bool) -> None:
    """Tell of an update that is left out, and end the run where that is asked for or goes on for too long.

    Args:
        run: The run.
        trained: The batches of the update.
        scale_too_large: Whether it is but the loss scaler finding its scale, as at the start of a float16 run.
    """
    state, options = run.state, run.options
    state.skipped += 1
    update = (state.batch - 1) // options.grad_accum_steps
    where = f'epoch {state.epoch}, update {update}'
    if run.world.primary:
        reason = 'the loss scale is too large and halved' if scale_too_large else 'loss or gradients are not finite'
        _logger.warning(f'Skipped {where}: {reason} ({state.skipped} in a row)')
    if not scale_too_large:
        position = dict(epoch=state.epoch, update=update)
        nonfinite.report(run.folder, position, trained, run.train_loader.dataset)
    limit = 1 if options.nonfinite == nonfinite.ABORT and not scale_too_large else options.nonfinite_limit
    nonfinite.check_limit(state.skipped, limit, where)


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
    tell = report.EvalReport(
        'Test (EMA)' if ema else 'Test',
        evaluator,
        len(run.eval_loader),
        run.options.log_interval,
        run.bar,
        run.world.primary,
    )
    model = run.state.task.get_eval_model(ema=True) if ema else run.eval_model
    with asked_for(model, run.eval_classes):
        metrics = evaluate(
            model,
            run.signals.until_stopped(run.eval_loader),
            evaluator,
            autocast=run.autocast,
            distributed=run.world.distributed,
            views=run.options.tta,
            on_batch=tell,
        )
    # stopped now, the run resumes with the validation, after all batches of the epoch
    (stop,) = run.world.highest(run.signals.received)
    if stop:
        run.stop(stop)
    return _count_bad(run, run.eval_loader.bad_images, metrics)


def _count_bad(run: Run, bad: list[BadImage], metrics: Metrics) -> Metrics:
    """Add the number of unreadable images, where there were any, and their names to the list of the run."""
    bad = bad_images.gather(bad)
    if bad:
        metrics['bad_images'] = len(bad)
        if run.folder is not None:
            bad_images.record(bad, run.folder)
    return metrics


def log_update(run: Run, update: int, loss: Tensor, watch: report.Stopwatch) -> None:
    """Log the loss of a batch and of the epoch so far, the means over all processes."""
    now, mean = _mean_over_ranks(torch.stack([loss.to(run.state.loss.total), run.state.loss.mean()])).tolist()
    if run.world.primary:
        run.bar.clear()
        _logger.info(
            report.train_line(
                run.state.epoch,
                update,
                run.updates_per_epoch,
                (now, mean),
                run.learning_rate(),
                watch,
                run.world.size,
                run.world.device,
            )
        )


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
