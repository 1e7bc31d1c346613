"""What changes the weights: optimizer, learning rate and its schedule, loss scaler, SAM, warm-up of EMA weights."""

import logging
import math
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags.model import DeviceOptions, EmaOptions
from timm_mldecoder.flags.options import LoopOptions, UpdateOptions
from timm_mldecoder.train.nonfinite import Buffers

_logger = logging.getLogger(__name__)

# rate of Adam over the root mean square of weights: what is warned of, and at what recipes for own images were found
FAST, GENTLE = 0.05, 0.03


def learning_rate(options: UpdateOptions, world: World) -> float:
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


def create_optimizer(options: UpdateOptions, model: nn.Module) -> torch.optim.Optimizer:
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


def timm_optimizer(options: UpdateOptions, model: nn.Module) -> torch.optim.Optimizer:
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


def warn_of_rate(backbone: Iterable[Tensor], name: str, lr: float) -> None:
    """Warn of a rate that soon overwrites pretrained weights: Adam moves each by about the rate, whatever its size."""
    weights = [weight.detach() for weight in backbone if weight.ndim > 1 and weight.requires_grad]
    if 'adam' not in name.lower() or not weights:
        return
    size = statistics.median(weight.float().square().mean().sqrt().item() for weight in weights)
    if lr > FAST * size:
        _logger.warning(
            f'{name} at {lr:.1e} moves the pretrained weights, of about {size:.1e}, by {lr / size:.0%} in a step: '
            f'try --lr {GENTLE * size:.0e}'
        )


def create_schedule(
    options: LoopOptions, optimizer: torch.optim.Optimizer, steps_per_epoch: int, decreasing: bool
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
            optimizer, **scheduler_kwargs(options, decreasing_metric=decreasing), updates_per_epoch=steps_per_epoch
        )
    unit = 'epoch' if schedule is None or schedule.t_in_epochs else 'update'
    _logger.info(f'Scheduled epochs: {epochs}. LR stepped per {unit}.')
    return schedule, epochs


def create_scaler(options: DeviceOptions, device: torch.device) -> torch.amp.GradScaler:
    """Create the loss scaler, enabled for float16 gradients on CUDA; bfloat16 and the CPU need none."""
    needed = options.amp and options.amp_dtype == 'float16' and device.type == 'cuda'
    return torch.amp.GradScaler(device.type, enabled=needed)


HIGH_MOMENTUM, LOW_MOMENTUM = 0.95, 0.85


class OneCycleScheduler(Scheduler):
    """One cycle of learning rate and momentum (arXiv 1708.07120), with the values of torch's `OneCycleLR`.

    The learning rate rises by a cosine to its peak and falls by another to nearly zero, while the momentum (the first
    beta of Adam) falls and rises. Unlike torch's, the schedule is a function of the step alone, so that a resumed run
    needs nothing else, and `lr_scale` of layer decay applies.

    Args:
        optimizer: The optimizer; its learning rates are the peaks.
        num_steps: Optimizer steps of the whole run.
        warmup_fraction: Part of the run in which the learning rate rises, in (0, 1).
        div_factor: Peak over first learning rate.
        final_div_factor: First over last learning rate.

    Raises:
        ValueError: If the cycle is too short to rise and fall, or the optimizer has no momentum.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        num_steps: int,
        warmup_fraction: float = 0.2,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
    ) -> None:
        super().__init__(optimizer, 'lr', t_in_epochs=False)
        self._peak = warmup_fraction * num_steps - 1  # the step with the highest learning rate
        self._last = num_steps - 1
        if not 0 < self._peak < self._last:
            raise ValueError(
                f'--sched onecycle cannot rise and fall within {num_steps} steps and a warm-up fraction of '
                f'{warmup_fraction}: raise --epochs, or change --warmup-epochs'
            )
        if not {'betas', 'momentum'} & optimizer.defaults.keys():
            name = type(optimizer).__name__
            raise ValueError(f'--sched onecycle needs an optimizer with momentum or betas, not {name}')
        self._first_scale = 1 / div_factor
        self._last_scale = self._first_scale / final_div_factor
        self.step_update(0)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set learning rates and momenta for the step that follows `num_updates` others."""
        super().step_update(num_updates, metric)
        momentum = self._value(num_updates, HIGH_MOMENTUM, LOW_MOMENTUM, HIGH_MOMENTUM)
        for group in self.optimizer.param_groups:
            if 'betas' in group:
                group['betas'] = (momentum, *group['betas'][1:])
            else:
                group['momentum'] = momentum

    def _get_lr(self, t: int) -> list[float]:
        scale = self._value(t, self._first_scale, 1.0, self._last_scale)
        return [value * scale for value in self.base_values]

    def _value(self, t: int, first: float, peak: float, last: float) -> float:
        """Return a value that moves from `first` over `peak` to `last`, at step t."""
        t = min(t, self._last)  # timm's loops call step_update once past the end
        if t <= self._peak:
            return _anneal(first, peak, t / self._peak)
        return _anneal(peak, last, (t - self._peak) / (self._last - self._peak))


def _anneal(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


@contextmanager
def perturbed(model: nn.Module, rho: float) -> Iterator[None]:
    """Move the weights of a model by rho g / ||g||, g being their gradients, and restore them bit for bit.

    The gradients are consumed, to make room for those at the perturbed weights; the norm is over all of them, and the
    factor of a loss scaler cancels. If a gradient is not finite, neither are the perturbed weights nor the new
    gradients, and the step is skipped like any non-finite one. BatchNorm statistics are restored too: they belong to
    the weights that stay.

    Args:
        model: The model, its gradients those of all ranks.
        rho: Length of the move, in the units of the weights.
    """
    weights: list[Tensor] = [parameter for parameter in model.parameters() if parameter.grad is not None]
    before = [weight.detach().clone() for weight in weights]
    buffers = Buffers(model)
    with torch.no_grad():
        move = [weight.grad for weight in weights if weight.grad is not None]
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(move)))
        torch._foreach_mul_(move, rho / (length + 1e-12))  # no move where the gradient is 0
        torch._foreach_add_(weights, move)
    model.zero_grad()
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, before)
        buffers.restore()


SHARE = 0.1  # of the initial weights in the final EMA weights, above which they are not those of a trained model
_CHOICES = {'model_ema_decay', 'model_ema_warmup', 'better_of_ema'}


def choose_ema_warmup(options: EmaOptions, steps: int) -> bool:
    """Return whether the EMA decay of a run of `steps` optimizer steps has a warmup.

    Without warmup, decay ** steps of the initial weights are left in the end. Where that is much, a run that was given
    neither a decay, a warmup nor the better of both gets the warmup, and any other run that ranks by the EMA weights a
    warning.
    """
    share = options.model_ema_decay**steps
    if not options.model_ema or options.model_ema_warmup or options.better_of_ema or share <= SHARE:
        return options.model_ema_warmup
    numbers = (
        f'--model-ema-decay {options.model_ema_decay:g} leaves {share:.0%} of the initial weights in the EMA weights '
        f'after the {steps} optimizer steps of this run'
    )
    if not options.given & _CHOICES:
        _logger.warning(
            f'{numbers}: using --model-ema-warmup; --no-model-ema-warmup or a decay of your own prevents it'
        )
        return True
    if not options.model_ema_force_cpu:  # else epochs are ranked by the raw weights
        _logger.warning(
            f'{numbers}, which epochs are ranked by: pass --model-ema-warmup, --better-of-ema or a smaller decay'
        )
    return False
