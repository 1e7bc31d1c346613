"""Values that no run could use, found before anything is built."""

import os
from argparse import Namespace

import timm
import torch
from timm.optim import get_optimizer_info, list_optimizers

_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_DTYPES = ('float32', 'float16', 'bfloat16')
_CHOICES = {  # options whose choices timm does not put into its parser
    'sched': ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'onecycle', 'none'),
    'train_crop_mode': (None, 'rrc', 'rkrc', 'rkrr', 'squash'),
    'crop_mode': (None, 'squash', 'border', 'center'),
    'remode': ('const', 'rand', 'pixel'),
    'interpolation': ('', *_INTERPOLATIONS),
    'train_interpolation': ('', 'random', *_INTERPOLATIONS),
    'clip_mode': ('norm', 'value', 'agc'),
    'mixup_mode': ('batch', 'pair', 'elem'),
    'dist_bn': ('broadcast', 'reduce', ''),
    'lr_base_scale': ('', 'linear', 'sqrt'),
    'worker_seeding': ('all', 'part'),
    'model_dtype': (None, *_DTYPES),
    'amp_dtype': _DTYPES[1:],
    'results_format': ('csv', 'json'),
    'torchcompile_mode': (None, 'default', 'lite', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs'),
}
_AT_LEAST = {
    'batch_size': 1,
    'validation_batch_size': 1,
    'num_classes': 1,
    'epochs': 1,
    'workers': 0,
    'log_interval': 1,
    'log_freq': 1,
    'val_interval': 1,
    'checkpoint_hist': 1,
    'seed': 0,
    'recovery_interval': 0,
    'stop_epoch': 1,
    'start_epoch': 0,
    'warmup_epochs': 0,
    'cooldown_epochs': 0,
    'img_size': 1,
    'in_chans': 1,
    'num_gpu': 1,
    'nonfinite_limit': 1,
    'aug_repeats': 0,
    'mixup': 0,
    'cutmix': 0,
    'smoothing': 0,
    'train_batches_per_epoch': 1,
    'sam': 0,
    'bias_lr_scale': 0,
}
_BELOW = {'smoothing': 1}
_RECORDS = ('hfds', 'hfids', 'tfds', 'wds')


def check_train(options: Namespace) -> None:
    """Raise a ValueError for options that train.py could not run with."""
    _check_values(options)
    optimizer = options.opt.lower().removeprefix('lookahead_')
    if optimizer not in list_optimizers():
        raise ValueError(f'--opt {options.opt}: no such optimizer; timm has {", ".join(list_optimizers())}')
    info = get_optimizer_info(optimizer)
    if options.opt_betas and info.has_betas and len(options.opt_betas) != info.num_betas:
        raise ValueError(f'--opt-betas {options.opt_betas}: --opt {options.opt} takes {info.num_betas} of them')
    if not _is_model(options.model):
        raise ValueError(_no_such_model(options.model))
    if options.bce_loss and options.loss not in (None, 'bce'):
        raise ValueError(f'--bce-loss contradicts --loss {options.loss}; give one of them')
    if options.mixup or options.cutmix or options.cutmix_minmax:
        sizes = options.train_batch_sizes or [options.batch_size]
        odd = [size for size in sizes if size % 2]
        if odd:
            raise ValueError(f'batch size {odd[0]}: mixup and CutMix pair images, the batch size must be even')
    for name in ('cutmix_minmax', 'scale', 'ratio'):
        values = getattr(options, name)
        if values is not None and len(values) != 2:
            raise ValueError(f'--{name.replace("_", "-")} takes the smallest and the largest, got {values}')
    if options.wandb_resume_id and not options.resume:
        raise ValueError(f'--wandb-resume-id {options.wandb_resume_id} needs --resume')
    if options.sched == 'plateau' and options.sched_on_updates:
        raise ValueError('--sched plateau follows the metric of an epoch; leave --sched-on-updates out')
    if options.tta > 1 and options.val_bad_image == 'skip':
        raise ValueError(f'--tta {options.tta} averages images by their order: it needs --val-bad-image abort')
    for flag, path in (
        ('--initial-checkpoint', options.initial_checkpoint),
        ('--pretrained-path', options.pretrained_path),
        ('--class-stats', options.class_stats),
    ):
        if path and not os.path.exists(path):
            raise ValueError(f'{flag} {path}: no such file')
    if options.pretrained_path and not options.pretrained:
        raise ValueError(
            f'--pretrained-path {options.pretrained_path} takes the place of the pretrained weights: add --pretrained'
        )
    if options.sam and options.grad_accum_steps > 1:
        raise ValueError(
            f'--sam takes the gradients of one batch twice; leave --grad-accum-steps {options.grad_accum_steps} out'
        )
    if options.sam and info.second_order:
        raise ValueError(f'--sam does not go with --opt {options.opt}, which wants gradients of gradients')
    _check_scale(options)
    if options.resume == 'auto' and not options.experiment:
        raise ValueError('--resume auto needs --experiment, the run to go on with')


def check_validate(options: Namespace) -> None:
    """Raise a ValueError for options that validate.py could not run with."""
    _check_values(options)
    if options.checkpoint and not os.path.exists(options.checkpoint):
        raise ValueError(f'--checkpoint {options.checkpoint}: no such file or folder')
    if options.real_labels and options.bad_image == 'skip':
        raise ValueError('--real-labels matches images by their order: it needs --bad-image abort')
    if options.real_labels and not os.path.isfile(options.real_labels):
        raise ValueError(f'--real-labels {options.real_labels}: no such file')
    for name in ('results_file', 'class_report', 'write_class_priors'):
        _check_writable(f'--{name.replace("_", "-")}', getattr(options, name))


def _check_writable(flag: str, path: str) -> None:
    """A file that is written at the end: it would be too late to find out then."""
    folder = os.path.dirname(path) or '.'
    if path and (os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK)):
        raise ValueError(f'{flag} {path}: no file can be written there')


def _check_values(options: Namespace) -> None:
    values = vars(options)
    for name, choices in _CHOICES.items():
        if name in values and values[name] not in choices:
            shown = ', '.join(repr(choice) for choice in choices if choice is not None)
            raise ValueError(f'--{name.replace("_", "-")} {values[name]!r} is not one of {shown}')
    for name, least in _AT_LEAST.items():
        if values.get(name) is not None and values[name] < least:
            raise ValueError(f'--{name.replace("_", "-")} {values[name]} is below {least}')
    for name, limit in _BELOW.items():
        if values.get(name) is not None and values[name] >= limit:
            raise ValueError(f'--{name.replace("_", "-")} {values[name]} is not below {limit}')
    if options.target_key and options.dataset.partition('/')[0].lower() not in _RECORDS:
        raise ValueError(
            f'--target-key {options.target_key}: only data sets of records have keys '
            f'(--dataset {"/..., ".join(_RECORDS)}/...)'
        )
    if options.torchcompile and options.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(
            f'--torchcompile {options.torchcompile}: no such backend; torch has '
            f'{", ".join(torch.compiler.list_backends())}'
        )
    channels = options.input_size[0] if options.input_size else options.in_chans or 3
    for name in ('mean', 'std'):
        if values[name] is not None and len(values[name]) not in (1, channels):
            raise ValueError(f'--{name} takes one value, or one for each of {channels} channels; got {values[name]}')
    if options.amp and options.model_dtype not in (None, 'float32'):
        raise ValueError(f'--amp needs float32 weights, --model-dtype is {options.model_dtype}; give one of them')
    if options.use_ml_decoder_head and 'ml_decoder' in options.model_kwargs:
        raise ValueError('--model-kwargs ml_decoder=... contradicts --use-ml-decoder-head 1; give one of them')
    if options.cosine_classifier is not None and options.cosine_classifier <= 0:
        raise ValueError(f'--cosine-classifier {options.cosine_classifier}: the scale must be above 0')
    if options.cosine_classifier and options.use_ml_decoder_head:
        raise ValueError(
            '--cosine-classifier is for models without an ML-Decoder head; with --use-ml-decoder-head 1 '
            f'pass --ml-decoder-kwargs classifier=cosine cosine_scale={options.cosine_classifier:g}'
        )
    if options.data and options.data != options.data_dir:
        raise ValueError(f'{options.data} contradicts --data-dir {options.data_dir}; give one of them')
    if not options.data_dir and options.dataset.partition('/')[0].lower() not in ('hfds', 'hfids'):
        raise ValueError('no data: give the folder of the data, as in "DIR" or --data-dir DIR')


def _check_scale(options: Namespace) -> None:
    """A head that scales its cosines and a loss that does so too would scale them twice."""
    scale = options.cosine_classifier or options.ml_decoder_kwargs.get('cosine_scale', 1)
    told = options.loss_kwargs
    if options.loss == 'aam' and scale != 1 and not (told.get('scaled_logits') and told.get('scale', 30) == scale):
        raise ValueError(
            f'the logits are {scale:g} times the cosine: --loss aam must be told, by --loss-kwargs '
            f'scale={scale:g} scaled_logits=True'
        )


def _is_model(name: str) -> bool:
    return ':' in name or timm.is_model(name.partition('.')[0].rpartition('/')[2])


def _no_such_model(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f'--model {name}: no such model' + (f'; did you mean {", ".join(close)}?' if close else ' in timm')
