"""Learning rate, optimizer, schedule and loss scaler."""

import logging
import math

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import nn

from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import Options
from timm_mldecoder.train.one_cycle import OneCycleScheduler

_logger = logging.getLogger(__name__)


def learning_rate(options: Options, world: World) -> float:
    """Return `--lr`, or the learning rate that `--lr-base` gives for the images per optimizer step."""
    if options.lr:
        return options.lr
    images = options.batch_size * world.size * options.grad_accum_steps
    name = options.opt.lower()
    scale = options.lr_base_scale or ('sqrt' if 'ada' in name or 'lamb' in name else 'linear')
    ratio = images / options.lr_base_size
    lr = options.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)
    _logger.info(
        f'Learning rate ({lr}) calculated from base learning rate ({options.lr_base}) and effective global batch size '
        f'({images}) with {scale} scaling.'
    )
    return lr


def create_optimizer(options: Options, model: nn.Module) -> torch.optim.Optimizer:
    """Create timm's optimizer of the given name over the parameters of the model.

    Raises:
        ValueError: If the optimizer does not take the options, or needs a package that is missing.
    """
    optimizer = timm_optimizer(options, model)
    if options.bias_lr_scale != 1:
        biases = {id(parameter) for name, parameter in model.named_parameters() if name.endswith('bias')}
        scale_rates(optimizer, biases, options.bias_lr_scale)
    shown = {**optimizer.defaults, 'weight_decay': options.weight_decay}
    settings = ', '.join(f'{name}: {value}' for name, value in shown.items())
    _logger.info(f'Created {type(optimizer).__name__} ({options.opt}) optimizer: {settings}')
    return optimizer


def timm_optimizer(options: Options, model: nn.Module) -> torch.optim.Optimizer:
    """Create timm's optimizer without a log line; for arguments and errors see `create_optimizer`."""
    try:
        return create_optimizer_v2(model, **optimizer_kwargs(cfg=options), **options.opt_kwargs)
    except (TypeError, ImportError, AssertionError, ValueError) as error:
        given = ' '.join(f'{name}={value}' for name, value in options.opt_kwargs.items())
        raise ValueError(f'--opt {options.opt}{" --opt-kwargs " * bool(given)}{given}: {error}') from error


def scale_rates(optimizer: torch.optim.Optimizer, chosen: set[int], scale: float) -> None:
    """Give parameters, chosen by `id`, groups of their own, with a scale on top of that of layer decay."""
    groups = []
    for group in optimizer.param_groups:
        own = [parameter for parameter in group['params'] if id(parameter) in chosen]
        others = [parameter for parameter in group['params'] if id(parameter) not in chosen]
        groups += [{**group, 'params': others}] if others else []
        groups += [{**group, 'params': own, 'lr_scale': scale * group.get('lr_scale', 1.0)}] if own else []
    optimizer.param_groups[:] = groups


def create_schedule(
    options: Options, optimizer: torch.optim.Optimizer, steps_per_epoch: int, decreasing: bool
) -> tuple[Scheduler | None, int]:
    """Create the learning-rate schedule; the plateau schedule needs to know whether a lower metric is better.

    Returns:
        The schedule, None for `--sched none`, and the number of epochs that it takes.
    """
    if options.sched == 'onecycle':
        epochs, lr = options.epochs, optimizer.defaults['lr']
        schedule = OneCycleScheduler(
            optimizer,
            num_steps=epochs * steps_per_epoch,
            warmup_fraction=options.warmup_epochs / epochs,
            div_factor=lr / options.warmup_lr if options.warmup_lr else math.inf,
            final_div_factor=options.warmup_lr / options.min_lr if options.min_lr else math.inf,
        )
    else:
        schedule, epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(options, decreasing_metric=decreasing),
            updates_per_epoch=steps_per_epoch,
        )
    unit = 'epoch' if schedule is None or schedule.t_in_epochs else 'update'
    _logger.info(f'Scheduled epochs: {epochs}. LR stepped per {unit}.')
    return schedule, epochs


def create_scaler(options: Options, device: torch.device) -> torch.amp.GradScaler:
    """Create the loss scaler, enabled for float16 gradients on CUDA; bfloat16 and the CPU need none."""
    needed = options.amp and options.amp_dtype == 'float16' and device.type == 'cuda'
    return torch.amp.GradScaler(device.type, enabled=needed)
