"""From options to the parts of a run: model, loss, task, optimizer, schedule."""

import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.loss import create_classification_loss
from timm.loss.class_weights import load_class_stats, resolve_class_weights
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_mldecoder.checkpoints.published import read_checkpoint
from timm_mldecoder.engine.flags.zero_shot import scores_both
from timm_mldecoder.engine.input import zero_shot
from timm_mldecoder.engine.runtime.distributed import World
from timm_mldecoder.engine.train import multilabel
from timm_mldecoder.engine.train.one_cycle import create_one_cycle
from timm_mldecoder.losses import RandomQueryLoss
from timm_mldecoder.models.cosine import add_cosine_classifier

_logger = logging.getLogger(__name__)

_TASKS = {'classification': ClassificationTask, 'multilabel': multilabel.MultiLabelTask}


def head_options(options: Namespace, words: dict[str, Any]) -> dict[str, Any]:
    """The argument of `timm.create_model` that asks for an ML-Decoder head, of word queries if there are any.

    Empty where the options ask for no head.
    """
    if not options.use_ml_decoder_head:
        return {}
    return {
        'ml_decoder': dict(
            num_of_groups=options.num_of_groups,
            decoder_embedding=options.decoder_embedding,
            **{**words, **options.ml_decoder_kwargs},
        )
    }


def create_model(options: Namespace, world: World) -> nn.Module:
    """The model on its device; `options.num_classes` is filled in where it was not given."""
    if options.fast_norm:
        set_fast_norm()
    overlay = {}
    if options.pretrained_path:  # num_classes -1: adapt the head, whatever the file holds
        overlay = dict(pretrained_cfg_overlay=dict(file=options.pretrained_path, num_classes=-1))
    settings = dict(
        pretrained=options.pretrained,
        in_chans=image_channels(options),
        num_classes=options.num_classes,
        drop_rate=options.drop,
        drop_path_rate=options.drop_path,
        drop_block_rate=options.drop_block,
        global_pool=None if options.use_ml_decoder_head else options.gp,
        bn_momentum=options.bn_momentum,
        bn_eps=options.bn_eps,
        **overlay,
        **head_options(options, zero_shot.training_head(options)),
        **options.model_kwargs,
    )
    with refusing(options):
        model = timm.create_model(options.model, **settings)
        if options.cosine_classifier:
            add_cosine_classifier(model, options.cosine_classifier)
        if options.initial_checkpoint:
            load_checkpoint(model, options.initial_checkpoint)
        if options.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
    options.num_classes = options.num_classes or model.num_classes
    if not options.cosine_classifier:
        _scale_head(model, options.head_init_scale, options.head_init_bias)
    if world.primary:
        count = sum(parameter.numel() for parameter in model.parameters())
        _logger.info(f'Model {timm.models.safe_model_name(options.model)} created, param count:{count}')

    model.to(device=world.device, dtype=model_dtype(options))
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    if options.sync_bn and world.distributed:
        model = convert_sync_batchnorm(model)
    return model


@contextmanager
def refusing(options: Namespace) -> Iterator[None]:
    """Turn what timm raises while it creates a model, for options the model does not take, into the user's mistake.

    Raises:
        ValueError: In place of errors about arguments, about weights that are not there, or that do not fit.
    """
    try:
        yield
    except (TypeError, AssertionError) as error:  # an argument that the model does not have, or a value of it
        raise ValueError(f'--model {options.model}: {error or type(error).__name__}') from error
    except (RuntimeError, OSError) as error:  # a file does not load or does not fit, or there are no weights
        raise _refusal(options, error) from error


def _refusal(options: Namespace, error: Exception) -> Exception:
    """What to raise for weights that do not serve: an error that names the file of the user's, if it is one."""
    names = ('initial_checkpoint', 'pretrained_path')
    files = {f'--{name.replace("_", "-")}': path for name in names if (path := vars(options).get(name))}
    for flag, path in files.items():
        try:
            read_checkpoint(path)
        except ValueError as reason:
            return ValueError(f'{flag}: {reason}')
    if files:
        return ValueError(f'{", ".join(f"{flag} {path}" for flag, path in files.items())}: {error}')
    return ValueError(f'--model {options.model}: {error}') if isinstance(error, RuntimeError) else error


def image_channels(options: Namespace) -> int:
    if options.in_chans is not None:
        return options.in_chans
    return options.input_size[0] if options.input_size is not None else 3


def model_dtype(options: Namespace) -> torch.dtype | None:
    """The dtype of weights and images, None for the default."""
    return getattr(torch, options.model_dtype) if options.model_dtype else None


@torch.no_grad()
def _scale_head(model: nn.Module, scale: float | None, bias: float | None) -> None:
    found = model.get_classifier()
    for classifier in found if isinstance(found, tuple) else (found,):  # distilled models have two
        if scale is not None:
            classifier.weight.mul_(scale)
            classifier.bias.mul_(scale)
        if bias is not None:
            classifier.bias.fill_(bias)


def create_task(options: Namespace, model: nn.Module, dataset: Dataset, world: World) -> TrainingTask:
    """The model with the loss that the options and the labels of the training data ask for, as one timm task."""
    settings = {}
    if options.task == 'multilabel':
        num_seen = len(dataset.class_names) if scores_both(options) else None
        settings = dict(threshold=options.multilabel_threshold, num_seen=num_seen)
    loss = create_loss(options, dataset)
    return _TASKS[options.task](
        model=model,
        criterion=RandomQueryLoss(loss) if options.random_queries else loss,
        device=world.device,
        dtype=model_dtype(options),
        verbose=world.primary,
        **settings,
    )


def create_loss(options: Namespace, dataset: Dataset) -> nn.Module:
    """The training loss. Unlike timm's older script, `--bce-loss` holds without smoothing and mixup too."""
    if options.task == 'multilabel':
        own = multilabel.create_own_loss(options, dataset)
        if own is not None:
            return own
    soft_targets = options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None
    try:
        stats = load_class_stats(options.class_stats)
    except (ValueError, TypeError) as error:  # no JSON, or no numbers
        raise ValueError(f'--class-stats {options.class_stats}: {error}') from error
    loss = options.loss or ('bce' if options.bce_loss else None)
    settings = dict(
        loss_type=loss,
        multi_label=options.task == 'multilabel',
        smoothing=options.smoothing,
        soft_targets=soft_targets,
        class_weight=_loss_weights(options, 'class_weight', stats),
        pos_weight=_loss_weights(options, 'pos_weight', stats),
    )
    if loss == 'bce' or loss is None and options.task == 'multilabel':
        settings.update(bce_target_thresh=options.bce_target_thresh, bce_sum=options.bce_sum)
        settings['pos_weight'] = options.bce_pos_weight if settings['pos_weight'] is None else settings['pos_weight']
    if loss == 'poly':
        settings.update(poly_gamma=options.poly_gamma, poly_epsilon=options.poly_epsilon)
    if loss == 'db' and stats is not None:
        settings.update(class_counts=stats[0], num_samples=stats[1])
    try:
        return create_classification_loss(**{**settings, **options.loss_kwargs})
    except TypeError as error:  # a name in --loss-kwargs that the loss does not have
        raise ValueError(f'--loss-kwargs {options.loss_kwargs}: {error}') from error


def _loss_weights(options: Namespace, kind: str, stats: tuple[Tensor, int] | None) -> Tensor | float | None:
    value = getattr(options, f'loss_{kind}')
    try:
        return resolve_class_weights(value, kind=kind, class_stats=stats, power=options.loss_weight_power)
    except ValueError as error:
        raise ValueError(f'--loss-{kind.replace("_", "-")} {value}: {error}') from error


def resolve_learning_rate(options: Namespace, world: World) -> None:
    """Compute `options.lr` from the base rate and the images an update, where it was not given."""
    if options.lr:
        return
    images = options.batch_size * world.size * options.grad_accum_steps
    name = options.opt.lower()
    scale = options.lr_base_scale or ('sqrt' if 'ada' in name or 'lamb' in name else 'linear')
    ratio = images / options.lr_base_size
    options.lr = options.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)
    if world.primary:
        _logger.info(
            f'Learning rate ({options.lr}) calculated from base learning rate ({options.lr_base}) '
            f'and effective global batch size ({images}) with {scale} scaling.'
        )


def create_optimizer(options: Namespace, model: nn.Module, world: World) -> torch.optim.Optimizer:
    """timm's optimizer of that name over the parameters of the model."""
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=options), **options.opt_kwargs)
    except (TypeError, ImportError, AssertionError) as error:  # an argument it does not have; what it needs missing
        raise ValueError(f'--opt {options.opt}: {error}') from error
    if options.bias_lr_scale != 1:
        _scale_bias_rates(optimizer, model, options.bias_lr_scale)
    if world.primary:
        shown = {**optimizer.defaults, 'weight_decay': options.weight_decay}
        settings = ', '.join(f'{name}: {value}' for name, value in shown.items())
        _logger.info(f'Created {type(optimizer).__name__} ({options.opt}) optimizer: {settings}')
    return optimizer


def _scale_bias_rates(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float) -> None:
    """Give biases groups of their own, with the learning-rate scale that timm's schedules heed."""
    biases = {id(parameter) for name, parameter in model.named_parameters() if name.endswith('bias')}
    groups = []
    for group in optimizer.param_groups:
        own = [parameter for parameter in group['params'] if id(parameter) in biases]
        others = [parameter for parameter in group['params'] if id(parameter) not in biases]
        groups += [{**group, 'params': others}] if others else []
        groups += [{**group, 'params': own, 'lr_scale': scale * group.get('lr_scale', 1.0)}] if own else []
    optimizer.param_groups[:] = groups


def create_schedule(
    options: Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int, decreasing: bool, world: World
) -> tuple[Scheduler | None, int]:
    """The learning-rate schedule, and the number of epochs it takes."""
    if options.sched == 'onecycle':
        schedule, epochs = create_one_cycle(options, optimizer, updates_per_epoch), options.epochs
    else:
        schedule, epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(options, decreasing_metric=decreasing), updates_per_epoch=updates_per_epoch
        )
    if world.primary:
        each = 'epoch' if schedule is None or schedule.t_in_epochs else 'update'
        _logger.info(f'Scheduled epochs: {epochs}. LR stepped per {each}.')
    return schedule, epochs


def create_autocast(options: Namespace, device: torch.device) -> Callable[[], AbstractContextManager]:
    """The context that forward passes run in."""
    if not options.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, options.amp_dtype))


def create_scaler(options: Namespace, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler, in effect where gradients are float16 on CUDA; bfloat16 and the CPU need none."""
    needed = options.amp and options.amp_dtype == 'float16' and device.type == 'cuda'
    return torch.amp.GradScaler(device.type, enabled=needed)
