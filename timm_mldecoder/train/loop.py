"""The training loop, top to bottom: epochs, and the optimizer steps of one."""

import logging
import time
from collections import OrderedDict
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from timm.task import evaluation_sample_limit
from timm.utils import dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from tqdm import tqdm

from timm_mldecoder.checkpoint.files import summary_row
from timm_mldecoder.evaluation.evaluate import Metrics, evaluate, test_time_views
from timm_mldecoder.evaluation.predicted import PredictedClasses
from timm_mldecoder.loading.bad_images import BadImage, record_bad_images
from timm_mldecoder.loading.loader import Batch
from timm_mldecoder.loading.randomness import STEP, key, seed_all
from timm_mldecoder.modeling.classes import other_classes
from timm_mldecoder.runtime.errors import RunFailed, advise_on_memory
from timm_mldecoder.runtime.log import EvalLog, StepTimer, log_above, progress_bar, train_line
from timm_mldecoder.train import nonfinite
from timm_mldecoder.train.nonfinite import Buffers, TrainedBatch, nonfinite_gradient, nonfinite_loss
from timm_mldecoder.train.optim import perturbed
from timm_mldecoder.train.run import Run

_logger = logging.getLogger(__name__)


def fit(run: Run) -> None:
    """Train until the last epoch; validate and save after each."""
    options = run.options
    validation_batch_size = options.validation_batch_size or options.batch_size
    try:
        with run.signals, advise_on_memory(options.batch_size, validation_batch_size, options.grad_accum_steps):
            begin, first = time.perf_counter(), run.state.epoch
            while run.state.epoch < run.epochs and not run.stopped_early():
                start = time.perf_counter()
                fit_epoch(run)
                now, done = time.perf_counter(), run.state.epoch - first
                log_epoch(run, now - start, (now - begin) / done * (run.epochs - run.state.epoch))
            run.layout.wait()
    finally:
        run.close()

    checkpoints = run.state.checkpoints
    if run.world.primary and checkpoints.best_metric is not None:
        _logger.info(f'*** Best metric: {checkpoints.best_metric} (epoch {checkpoints.best_epoch})')


def log_epoch(run: Run, seconds: float, left: float) -> None:
    """Log what an epoch is ranked by, if it was validated, its seconds, and how long the epochs to come will take."""
    epoch, rows = run.state.epoch - 1, run.state.rows
    metric = ''
    if rows and rows[-1]['epoch'] == epoch:
        column = f'{"eval" if run.eval_loader is not None else "train"}_{run.eval_metric}'
        metric = f'{column}: {rows[-1][column]:.3f}  '
    if run.world.primary:
        _logger.info(f'Epoch: {epoch}  {metric}Time: {seconds:.1f}s  Left: {timedelta(seconds=round(left))}')


def fit_epoch(run: Run) -> None:
    """Train the epoch under way, validate and save it, and move to the next."""
    state, epoch = run.state, run.state.epoch
    train_metrics = train_epoch(run)
    lr = run.learning_rate()

    # share BatchNorm statistics between ranks
    share_batch_norm(run, ema=False)

    # validate
    if not run.is_validated(epoch):
        state.begin_epoch(epoch + 1)
        run.step_schedule(metric=None)
        return
    if run.options.use_multi_epochs_loader and epoch + 1 < run.epochs:
        run.train_loader.prefetch_epoch(epoch + 1)
    eval_metrics = validate(run) if run.eval_loader is not None else None

    # save, with the state already at the beginning of the next epoch
    state.begin_epoch(epoch + 1)
    metric = (eval_metrics if eval_metrics is not None else train_metrics)[run.eval_metric]
    run.step_schedule(metric)
    if state.early_stop and eval_metrics is not None:
        warmed_up = epoch >= run.options.warmup_epochs
        state.early_stop.step(metric / 100, warmed_up=warmed_up)
    state.rows.append(summary_row(epoch, train_metrics, eval_metrics, lr))
    run.save_epoch(epoch, metric)


def train_epoch(run: Run) -> Metrics:
    """Train the rest of the epoch under way: all of it, unless it was resumed within."""
    state, options, loader = run.state, run.options, run.train_loader
    if run.freezer.apply(state.epoch):
        run.layout.rewrap(state.task)
    model = state.task.get_trainable_module()
    run.freezer.train_mode(model, state.epoch)
    state.optimizer.zero_grad()
    buffers = Buffers(model)
    trained: list[TrainedBatch] = []
    timer = StepTimer()
    bar = progress_bar(f'Train: {state.epoch}', len(loader), run.world.primary)
    bar.update(state.batch)
    for images, target in loader.epoch(state.epoch, state.batch, state.start):
        timer.batch_arrived()
        batch = state.batch
        accumulated, completes_step = run.accumulation(batch)
        if not trained:
            run.layout.begin_step(model)

        # forward and backward
        trained.append(train_batch(run, images, target, accumulated, completes_step))
        loss = trained[-1].loss
        timer.batch_done(len(target))
        bar.update()
        if not completes_step:
            continue

        # optimizer step
        stop = step_optimizer(run, trained, buffers)
        trained.clear()
        if options.synchronize_step and run.world.device.type != 'cpu':
            torch.accelerator.synchronize(run.world.device)
        timer.step_done()

        # log
        step = batch // options.grad_accum_steps
        if step % options.log_interval == 0 or loader.is_last(batch):
            log_step(run, step, loss, timer, bar)
            if options.save_images and run.folder:
                save_images(images, run.folder / f'train-batch-{batch}.jpg')

        # update the learning rate
        if state.schedule is not None:
            state.schedule.step_update(num_updates=run.steps_done())

        # checkpoint
        run.layout.poll()
        if stop:
            run.stop(stop)
        if options.recovery_interval and (step + 1) % options.recovery_interval == 0:
            run.save_recovery()
    bar.close()

    if hasattr(state.optimizer, 'sync_lookahead'):
        state.optimizer.sync_lookahead()
    metrics = OrderedDict(loss=state.loss.mean(run.world).item())
    if (norm := state.gradient_norm).samples:
        metrics['grad_norm'] = norm.total.item() / norm.samples
    return record_bad(run, loader.bad_images, metrics)


def train_batch(run: Run, images: Batch, target: Tensor, accumulated: int, completes_step: bool) -> TrainedBatch:
    """Compute the gradients of the next batch, which are exchanged once per optimizer step."""
    state, options = run.state, run.options
    batch = state.batch
    state.batch += 1
    seed_all(key(STEP, options.seed, state.epoch, batch, run.world.rank))
    with nullcontext() if completes_step else state.task.no_sync():
        loss = backward(run, images, target, accumulated)
    if options.sam:
        with perturbed(state.task.get_trainable_module(), options.sam):
            backward(run, images, target, accumulated)
    return TrainedBatch(loss, len(target), run.train_loader.image_indices(batch))


def backward(run: Run, images: Batch, target: Tensor, accumulated: int) -> Tensor:
    """Compute the gradients of one of the `accumulated` batches of an optimizer step.

    Returns:
        The loss of the batch, a scalar, neither divided by `accumulated` nor scaled by the batch size.
    """
    state = run.state
    with run.autocast():
        loss = state.task(images, target)['loss']
    scaled = loss * run.loss_scale(len(target)) / accumulated
    state.scaler.scale(scaled).backward(create_graph=getattr(state.optimizer, 'is_second_order', False))
    return loss.detach()


def step_optimizer(run: Run, trained: list[TrainedBatch], buffers: Buffers) -> int:
    """Step the optimizer, unless the loss or a gradient on any rank is not finite: then all ranks skip the step.

    Returns:
        The signal that one of the ranks received, 0 for none.
    """
    state, options = run.state, run.options
    state.scaler.unscale_(state.optimizer)
    model = state.task.get_trainable_module()
    # the one wait for the device per step
    loss, gradient, stop = run.world.all_reduce_max(
        nonfinite_loss(trained), nonfinite_gradient(model), run.signals.received
    )
    if loss or gradient:
        buffers.restore()
        skip_step(run, trained, scale_too_large=state.scaler.is_enabled() and not loss)
    else:
        if options.clip_grad is not None:
            clip_gradients(run, options.clip_grad)
        state.optimizer.step()  # the scaler's own step would wait for the device to know what is known
        update_ema(run)
        buffers.save()
        state.skipped = 0
        for batch in trained:
            state.loss.add(batch.loss, batch.images)
    state.scaler.update()
    state.optimizer.zero_grad()
    return stop


def clip_gradients(run: Run, limit: float) -> None:
    """Clip the gradients as timm does, and keep their norm before it, which timm's function computes and drops."""
    parameters = run.clip_parameters()
    if run.options.clip_mode != 'norm':
        dispatch_clip_grad(parameters, limit, run.options.clip_mode)
        return
    run.state.gradient_norm.add(run.layout.whole(nn.utils.clip_grad_norm_(parameters, limit)), 1)


def update_ema(run: Run) -> None:
    """Update the EMA weights. Those in bfloat16 are rounded at random, by a generator of timm's that is keyed here."""
    task, step = run.state.task, run.steps_done()
    if task.has_ema():
        task.get_trainable_module(ema=True)._sr_generator.manual_seed(key(STEP, run.options.seed, step))
        task.update_ema(step=step)


def skip_step(run: Run, trained: list[TrainedBatch], scale_too_large: bool) -> None:
    """Report a skipped optimizer step, and end the run if requested or after too many in a row.

    With `scale_too_large` the loss scaler is only searching its scale, as at the start of a float16 run.
    """
    state, options = run.state, run.options
    state.skipped += 1
    step = (state.batch - 1) // options.grad_accum_steps
    where = f'epoch {state.epoch}, step {step}'
    if run.world.primary:
        reason = 'the loss scale is too large and is halved' if scale_too_large else 'loss or gradients are not finite'
        _logger.warning(f'skipped {where}: {reason} ({state.skipped} in a row)')
    if not scale_too_large:
        position = dict(epoch=state.epoch, step=step)
        nonfinite.report(run.folder, position, trained, run.train_loader.dataset, run.world)
    if state.skipped >= (1 if options.nonfinite == 'abort' and not scale_too_large else options.nonfinite_limit):
        run.layout.wait()
        raise RunFailed(
            f'{where}: loss or gradients not finite for {state.skipped} steps in a row (--nonfinite-limit); they '
            'changed no parameter. A lower --lr, --clip-grad or a longer warm-up may help'
        )


def validate(run: Run) -> Metrics:
    """Score the validation split: with the EMA weights if there are any, or with the better of both."""
    metrics = score(run, ema=False)
    if not run.state.task.has_ema():
        return metrics
    if run.options.model_ema_force_cpu:  # too slow to score there
        metrics['ema'] = 0  # so that readers of the checkpoint take the weights that it was ranked by
        return metrics
    share_batch_norm(run, ema=True)
    ema_metrics = score(run, ema=True)
    if not run.options.better_of_ema:
        return ema_metrics
    metrics['ema'], ema_metrics['ema'] = 0, 1
    return min(ema_metrics, metrics, key=lambda found: run.state.checkpoints.sort_key(found[run.eval_metric]))


def score(run: Run, ema: bool) -> Metrics:
    """Score the validation split with the raw or the EMA weights; a signal ends it, and the run, after a batch."""
    loader, options = run.eval_loader, run.options
    assert loader is not None
    model = run.state.task.get_eval_model(ema=True) if ema else run.eval_model
    evaluator = run.state.task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    measures = []
    if run.state.epoch + 1 >= run.epochs:
        names = None if run.eval_classes else run.state.class_names
        measures = [PredictedClasses(evaluator, names, evaluation_sample_limit(loader), run.world)]
    with other_classes(model, run.eval_classes):
        metrics = evaluate(
            model,
            loader,
            evaluator,
            run.world,
            autocast=run.autocast,
            log=EvalLog(
                'Test (EMA)' if ema else 'Test', evaluator, len(loader), options.log_interval, run.world.primary
            ),
            views=test_time_views(options.tta, run.data_config['input_size'][1:]),
            measures=[measure.update for measure in measures],
            until=lambda batches: run.layout.until_stopped(batches, run.signals),
        )
    # stopped now, the run resumes with the validation, after all batches of the epoch
    (stop,) = run.world.all_reduce_max(run.signals.received)
    if stop:
        run.stop(stop)
    for line in (line for measure in measures for line in measure.lines()):
        if run.world.primary:
            _logger.warning(line)
    return record_bad(run, loader.bad_images, metrics)


def share_batch_norm(run: Run, ema: bool) -> None:
    """Give all ranks the same BatchNorm statistics."""
    if run.world.distributed and run.dist_bn:
        task = run.state.task
        model = task.get_trainable_module(ema=True) if ema else task.get_eval_model()
        distribute_bn(model, run.world.size, run.dist_bn == 'reduce')


def record_bad(run: Run, bad: list[BadImage], metrics: Metrics) -> Metrics:
    """Add the number of unreadable images to the metrics, if there were any, and list them in the folder of the run."""
    found = list(dict.fromkeys(image for images in run.world.all_gather(bad) for image in images))
    if found:
        metrics['bad_images'] = len(found)
        if run.folder is not None:
            record_bad_images(found, run.folder)
    return metrics


def log_step(run: Run, step: int, loss: Tensor, timer: StepTimer, bar: tqdm) -> None:
    """Log the loss of the last batch and of the epoch so far, means over all ranks; a collective call."""
    now = run.world.all_reduce_sum(loss.to(run.state.loss.total)) / run.world.size
    norm = run.state.gradient_norm
    values = torch.stack([now, run.state.loss.mean(run.world), norm.total / max(norm.samples, 1)]).tolist()
    if run.world.primary:
        steps = -(-len(run.train_loader) // run.options.grad_accum_steps)
        line = train_line(
            run.state.epoch, step, steps, values, norm.samples > 0, run.learning_rate(), timer, run.world.device,
            run.world.size,
        )  # fmt: skip
        log_above(bar, line)


def save_images(images: Batch, path: Path) -> None:
    """Save a batch of training images as one picture."""
    from torchvision.utils import save_image

    save_image(images, path, padding=0, normalize=True)
