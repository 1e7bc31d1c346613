"""Checks of options against each other, before anything is built."""

import importlib.util
import inspect
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import timm
import torch
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.loss.class_weights import CLASS_WEIGHT_METHOD_KINDS, load_class_weights
from timm.optim import list_optimizers
from timm.task import ClassificationEvaluator

from timm_mldecoder.data import TIMM_FOLDERS
from timm_mldecoder.data.partial import parse_partial
from timm_mldecoder.flags.data import ClassesOptions
from timm_mldecoder.flags.flag import Flag, show
from timm_mldecoder.flags.group import closest
from timm_mldecoder.flags.optimization import LOSS_NAMES, loss_name, optimizer_info
from timm_mldecoder.flags.options import Options, flags
from timm_mldecoder.flags.sharded import problems_of_sharded
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.losses import LOSSES
from timm_mldecoder.metrics import MultiLabelEvaluator, ZeroShotEvaluator

_POLICIES = {'rand': rand_augment_transform, 'augmix': augment_and_mix_transform}
_RECORDS = ('hfds', 'hfids', 'tfds', 'wds')
#: Arguments of the model that have a flag of their own.
_MODEL_ARGUMENTS = {
    'pretrained': '--pretrained',
    'num_classes': '--num-classes',
    'in_chans': '--in-chans',
    'global_pool': '--gp',
    'drop_rate': '--drop',
    'drop_path_rate': '--drop-path',
    'drop_block_rate': '--drop-block',
    'bn_momentum': '--bn-momentum',
    'bn_eps': '--bn-eps',
    'checkpoint_path': '--initial-checkpoint',
    'pretrained_cfg_overlay': '--pretrained-path',
}
#: Arguments of the head that have a flag of their own, or that the model sets (None).
_HEAD_ARGUMENTS = {
    'num_of_groups': '--num-of-groups',
    'decoder_embedding': '--decoder-embedding',
    'word_embeddings': '--word-embeddings',
    'random_queries': '--random-queries',
    'query_noise': '--query-noise',
    'query_cutout': '--query-cutout',
    'num_classes': '--num-classes',
    'initial_num_features': None,
    'class_names': None,
    'device': None,
    'dtype': None,
}
#: Options of images of one size, which say nothing of sequences of patches.
_NOT_WITH_PATCHES = (
    'channels_last', 'tta', 'report', 'test_pool', 'sampler', 'save_images', 'train_crop_mode', 'cutout', 'aug_repeats',
    'aug_splits', 'resplit', 'cutmix_minmax', 'mixup_mode', 'train_img_sizes', 'torchscript', 'tf_preprocessing',
)  # fmt: skip
_PACKAGES = {
    'log_wandb': ('wandb', "pip install 'timm-mldecoder[trackers]'"),
    'log_trackio': ('trackio', "pip install 'timm-mldecoder[trackers]'"),
    'log_tensorboard': ('tensorboard', "pip install 'timm-mldecoder[trackers]'"),
    'tf_preprocessing': ('tensorflow', 'pip install tensorflow'),
    'metrics_avg': ('sklearn', 'pip install scikit-learn'),
    'lr_find': ('matplotlib', 'pip install matplotlib'),
}


def scores_both(options: ClassesOptions) -> bool:
    """Whether an evaluation scores the unseen classes alone, and together with the seen ones."""
    return bool(options.class_split) and options.score_classes == 'all'


def check(options: Options) -> None:
    """Check every option against its row, and the options against each other.

    Raises:
        ValueError: For values that are not allowed, and options that contradict each other.
    """
    rows = flags(options.script)
    for name, row in rows.items():
        row.check(options[name], options.flag(name), options.data_dir)
    check_patches(options)
    of_script = _problems_of_train if options.script == 'train' else _problems_of_validate
    for problem in chain(
        _problems_of_overlay(options, rows),
        _problems_of_both(options, rows),
        _problems_of_size(options),
        of_script(options),
    ):
        raise ValueError(problem)


def check_patches(options: Options) -> None:
    """Check that the flags go with sequences of patches, which a checkpoint may bring.

    Raises:
        ValueError: For flags that are for images of one size.
    """
    rows = flags(options.script)
    for name in _NOT_WITH_PATCHES:
        if options.naflex_loader and name in rows and options[name] != rows[name].default:
            raise ValueError(f'{options.flag(name)} does not work with --naflex-loader; give one of them')


def check_task(options: Options) -> None:
    """Check that the flags of validate.py go with the task, which a checkpoint may bring.

    Raises:
        ValueError: For flags of the other task.
    """
    multilabel, single = ('write_thresholds', 'write_class_priors', 'class_report'), ('real_labels', 'metrics_avg')
    for name in single if options.task == 'multilabel' else multilabel:
        if options[name]:
            task = 'classification' if options.task == 'multilabel' else 'multilabel'
            raise ValueError(f'{options.flag(name)} is for --task {task}, the task is {options.task}')


def _problems_of_overlay(o: Options, rows: Mapping[str, Flag]) -> Iterator[str]:
    """What is wrong with entries of `--pretrained-cfg-overlay` that have a flag of their own; timm takes any."""
    for name, value in o.pretrained_cfg_overlay.items():
        row = rows.get(name)
        if row is None or name in _MODEL_ARGUMENTS:
            continue
        values = value if row.nargs and isinstance(value, (list, tuple)) else [value]
        label = f'--pretrained-cfg-overlay {name}:'
        if not all(_is_a(item, row.type) for item in values) or row.choices and value not in row.choices:
            allowed = ', '.join(filter(None, row.choices)) if row.choices else 'a number'
            yield f'{label} {value}: expects {allowed}, as {row.label}'
        row.check(values, label, None)


def _problems_of_both(o: Options, rows: Mapping[str, Flag]) -> Iterator[str]:
    if not o.data_dir and o.dataset.partition('/')[0].lower() not in ('hfds', 'hfids'):
        named = o.script == 'train' and o.resume == 'auto' and o.experiment
        run = f': --experiment {o.experiment} has no run to resume, whose dataset would be taken' if named else ''
        yield f'no dataset: give its folder, as DIR or --data-dir DIR{run}'
    for name in ('input_key', 'target_key'):
        if o[name] is not None and o.dataset.partition('/')[0].lower() not in _RECORDS:
            yield f'{o.flag(name)} {o[name]}: only datasets of records have keys: {"/, ".join(_RECORDS)}/'
    if o.gp == '' and not o.use_ml_decoder_head:
        yield "--gp '' leaves the features without pooling: choose from fast, avg, max, avgmax, catavgmax"
    try:
        torch.device(o.device)
    except RuntimeError:
        if 'device_modules' not in o.given:
            yield f'--device {o.device!r}: not a device of torch, such as cuda, cuda:0, mps or cpu'
    if o.torchcompile and o.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        yield f'--torchcompile {o.torchcompile}: choose from {", ".join(torch.compiler.list_backends())}'
    channels = o.input_size[0] if o.input_size else o.in_chans or 3
    for name in ('mean', 'std'):
        values = o[name]
        if values is not None and len(values) not in (1, channels):
            yield f'--{name} {show(values)}: give one value, or one for each of {channels} channels'
    if o.torchscript:
        if o.torchcompile or o.aot_autograd:
            yield '--torchscript contradicts --torchcompile and --aot-autograd; give one of them'
        if o.use_ml_decoder_head or o.model_kwargs.get('ml_decoder'):
            yield '--torchscript cannot compile an ML-Decoder head: use --torchcompile'
    if o.amp and o.model_dtype not in (None, 'float32'):
        yield f'--amp needs float32 weights, --model-dtype is {o.model_dtype}; give one of them'
    for name in o.model_kwargs:
        if _MODEL_ARGUMENTS.get(name, '').lstrip('-').replace('-', '_') in rows:
            yield f'--model-kwargs {name}={o.model_kwargs[name]}: use {_MODEL_ARGUMENTS[name]}'
    for name, (package, remedy) in _PACKAGES.items():
        if o[name] and importlib.util.find_spec(package) is None:
            yield f'{o.flag(name)} needs the package {package}: {remedy}'
    yield from _problems_of_heads(o)


def _problems_of_heads(o: Options) -> Iterator[str]:
    if o.use_ml_decoder_head and 'ml_decoder' in o.model_kwargs:
        yield '--model-kwargs ml_decoder=... contradicts --use-ml-decoder-head 1; give one of them'
    if o.cosine_classifier and o.use_ml_decoder_head:
        yield (
            '--cosine-classifier is for models without an ML-Decoder head; with --use-ml-decoder-head 1 '
            f'pass --ml-decoder-kwargs classifier=cosine cosine_scale={o.cosine_classifier:g}'
        )
    for name in ('num_of_groups', 'decoder_embedding'):
        if o[name] == 0:
            yield f'{o.flag(name)} 0: must be -1 or at least 1'
    if o.graph:
        if o.use_ml_decoder_head:
            yield f'--graph {o.graph} contradicts --use-ml-decoder-head 1; give one of them'
        if not o.word_embeddings and o.script == 'train':
            yield f'--graph {o.graph} needs --word-embeddings'
    yield from head_problems(o.ml_decoder_kwargs)


def head_problems(arguments: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the names and the types of `--ml-decoder-kwargs`."""
    known = inspect.signature(MLDecoder.__init__).parameters.keys() - _HEAD_ARGUMENTS.keys() - {'self'}
    hints = typing.get_type_hints(MLDecoder.__init__)
    for name, value in arguments.items():
        if _HEAD_ARGUMENTS.get(name):
            yield f'--ml-decoder-kwargs {name}={value}: use {_HEAD_ARGUMENTS[name]}'
        elif name not in known:
            yield f'--ml-decoder-kwargs {name}={value}: choose from {", ".join(sorted(known))}'
        elif not _is_a(value, hints.get(name, Any)):
            hint = hints[name]
            yield f'--ml-decoder-kwargs {name}={value}: expects {hint.__name__ if isinstance(hint, type) else hint}'


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation; true for annotations that are not plain types."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_is_a(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if isinstance(value, bool) and hint in (int, float):
        return False
    return not isinstance(hint, type) or isinstance(value, (int, float) if hint is float else hint)


def _problems_of_train(o: Options) -> Iterator[str]:
    name = o.opt.lower().removeprefix('lookahead_')
    if name not in list_optimizers():
        yield f'--opt {o.opt}: no such optimizer; choose from {", ".join(map(str, list_optimizers()))}'
    info = optimizer_info(o.opt)
    if o.opt_betas and info.has_betas and len(o.opt_betas) != info.num_betas:
        yield f'--opt-betas {show(o.opt_betas)}: --opt {o.opt} takes {info.num_betas} values'
    for flag in ('model', 'kd_model_name'):
        model = o[flag]
        if model and not (':' in model or timm.is_model(model.partition('.')[0].rpartition('/')[2])):
            yield f'{o.flag(flag)} {model}: no such model in timm{closest(model, timm.list_models())}'
    if o.sam and o.grad_accum_steps > 1:
        yield f'--sam uses the gradients of one batch twice: leave --grad-accum-steps {o.grad_accum_steps} out'
    if o.sam and info.second_order:
        yield f'--sam does not work with --opt {o.opt}, which uses second derivatives'
    if o.pretrained_path and not o.pretrained:
        yield f'--pretrained-path {o.pretrained_path} replaces the pretrained weights: add --pretrained'
    if o.resume == 'auto' and not o.experiment:
        yield '--resume auto needs --experiment, the run to resume'
    if o.resume not in ('', 'auto') and not os.path.isfile(o.resume):
        yield f'--resume {o.resume}: no such file'
    if 0 < o.lr_find < 10:
        yield f'--lr-find {o.lr_find}: must be 0 or at least 10'
    if o.lr_find and o.resume:
        yield f'--lr-find tests a run from its start: leave --resume {o.resume} out'
    if o.wandb_resume_id and not o.resume:
        yield f'--wandb-resume-id {o.wandb_resume_id} needs --resume'
    if o.sampler == 'balanced' and o.aug_repeats:
        yield f'--sampler balanced contradicts --aug-repeats {o.aug_repeats:g}; give one of them'
    if o.class_split and o.task != 'multilabel':
        yield f'--class-split {o.class_split} needs --task multilabel'
    if o.partial_labels:
        try:
            parse_partial(o.partial_labels)
        except ValueError as error:
            yield f'--partial-labels {error}'
    names = metric_names(o)
    if o.early_stop and o.eval_metric == 'loss':
        yield '--early-stop needs a metric in percent, not --eval-metric loss'
    if o.eval_metric not in names:
        yield f'--eval-metric {o.eval_metric}: choose from {", ".join(names)} for --task {o.task}'
    if o.parallel == 'fsdp':
        yield from problems_of_sharded(o)
    yield from _problems_of_images(o)
    yield from _problems_of_splits(o)
    yield from _problems_of_schedule(o, info)
    yield from _problems_of_loss(o)
    yield from _problems_of_distillation(o)
    for name in ('sync_bn', 'split_bn', 'freeze_backbone'):
        if o.torchscript and o[name]:
            yield f'--torchscript does not work with {o.flag(name)}; give one of them'


def metric_names(options: Options) -> tuple[str, ...]:
    """The metrics that `--eval-metric` can name."""
    if options.task == 'classification':
        return ClassificationEvaluator.metric_names
    return (ZeroShotEvaluator(1) if scores_both(options) else MultiLabelEvaluator()).metric_names


def default_metric(options: Options) -> str:
    """The metric that ranks the checkpoints of multi-label training."""
    if scores_both(options):
        return ZeroShotEvaluator.default_metric
    # partial annotation leaves many classes without a verified positive or negative
    return 'map_partial' if options.dataset == 'openimages' else MultiLabelEvaluator.default_metric


def _problems_of_images(o: Options) -> Iterator[str]:
    for name in ('cutmix_minmax', 'scale', 'ratio'):
        values = o[name]
        if values is not None and (len(values) != 2 or values[0] > values[1]):
            yield f'{o.flag(name)} {show(values)}: give the smallest and the largest value'
    sizes = o.train_batch_sizes or [o.batch_size]
    if (o.mixup or o.cutmix or o.cutmix_minmax) and not o.naflex_loader and any(size % 2 for size in sizes):
        yield f'--batch-size {show(sizes)}: mixup and CutMix pair images, so the batch size must be even'
    for name in ('train_batch_sizes', 'train_size_probs'):
        values = o[name]
        if o.train_img_sizes and values and len(values) != len(o.train_img_sizes):
            yield f'{o.flag(name)} {show(values)}: give one value per image size {show(o.train_img_sizes)}'
    if o.train_size_probs and not sum(o.train_size_probs):
        yield f'--train-size-probs {show(o.train_size_probs)}: one must be above 0'
    sizes, shares = o.naflex_patch_sizes, o.naflex_patch_size_probs
    if sizes and shares and (len(shares) != len(sizes) or not sum(shares)):
        yield f'--naflex-patch-size-probs {show(shares)}: give one per patch size {show(sizes)}, one of them above 0'
    if o.aa:
        build = next((build for name, build in _POLICIES.items() if o.aa.startswith(name)), auto_augment_transform)
        try:
            build(o.aa, dict(translate_const=100))
        except (AssertionError, KeyError, ValueError) as error:
            yield f'--aa {o.aa}: not a policy of timm.data.auto_augment: {error or type(error).__name__}'
    if o.train_img_sizes and not o.no_aug and (o.cutout or o.train_crop_mode == 'squash'):
        yield '--train-img-sizes does not work with --cutout and --train-crop-mode squash'


def _problems_of_splits(o: Options) -> Iterator[str]:
    if o.aug_splits == 1:
        yield '--aug-splits 1: must be 0 or at least 2'
    if loss_name(o, o.task) == 'jsd' and not o.aug_splits:
        yield f'{"--jsd-loss" if o.jsd_loss else "--loss jsd"} needs --aug-splits of at least 2'
    for name in ('no_aug', 'no_prefetcher', 'mixup', 'cutmix', 'cutmix_minmax', 'train_img_sizes'):
        if o.aug_splits and o[name]:
            yield f'--aug-splits {o.aug_splits} does not work with {o.flag(name)}; give one of them'
    if o.split_bn and not (o.aug_splits or o.resplit):
        yield '--split-bn needs --aug-splits or --resplit'
    if o.split_bn and o.sync_bn:
        yield '--split-bn contradicts --sync-bn; give one of them'
    sizes = o.train_batch_sizes or [o.batch_size]
    if o.split_bn and not o.aug_splits and any(size % 2 for size in sizes):
        yield f'--batch-size {show(sizes)}: --split-bn divides batches in two, so the batch size must be even'


def _problems_of_schedule(o: Options, info: Any) -> Iterator[str]:
    if o.sched == 'plateau' and o.sched_on_updates:
        yield '--sched plateau follows the metric of an epoch: leave --sched-on-updates out'
    if o.sched == 'onecycle':
        if not 0 < o.warmup_epochs < o.epochs:
            yield f'--sched onecycle needs --warmup-epochs above 0 and below --epochs {o.epochs}, got {o.warmup_epochs}'
        if not (info.has_momentum or info.has_betas):
            yield f'--sched onecycle needs an optimizer with momentum or betas, --opt is {o.opt}'
    if o.lr_noise and len(o.lr_noise) > 2:
        yield f'--lr-noise {show(o.lr_noise)}: give one or two values'


def _problems_of_loss(o: Options) -> Iterator[str]:
    loss = loss_name(o, o.task)
    if loss not in LOSS_NAMES and not re.fullmatch(r'[\w.]+:\w+', loss):
        yield f'--loss {loss}: choose from {", ".join(LOSS_NAMES)}, or a class of your own, package.module:Class'
    if o.bce_loss and o.loss not in (None, 'bce'):
        yield f'--bce-loss contradicts --loss {o.loss}; give one of them'
    if o.jsd_loss and (o.bce_loss or o.loss not in (None, 'jsd')):
        yield f'--jsd-loss contradicts {"--bce-loss" if o.bce_loss else f"--loss {o.loss}"}; give one of them'
    if loss in LOSSES and loss not in timm.loss.LOSS_TYPES and o.task != 'multilabel':
        yield f'--loss {loss} needs --task multilabel'
    if loss in timm.loss.LOSS_TYPES and loss not in timm.loss.MULTI_LABEL_LOSS_TYPES and o.task == 'multilabel':
        yield f'--loss {loss} needs --task classification'
    for kind, losses in (('pos_weight', ('bce', 'asl')), ('class_weight', ('ce', 'bce', 'asl'))):
        value, flag = o[f'loss_{kind}'], o.flag(f'loss_{kind}')
        if not value:
            continue
        if loss not in losses:
            yield f'{flag} {value}: needs --loss {" or ".join(losses)}, the loss is {loss}'
        methods = [method for method, use in CLASS_WEIGHT_METHOD_KINDS.items() if use == kind]
        if value not in methods and not os.path.isfile(value):
            try:
                load_class_weights(value)
            except ValueError:
                yield f'{flag} {value}: give a number, a list with commas, a file, or {" or ".join(methods)}'
    # a head that scales its cosines and a loss that does so too would scale them twice
    scale = o.cosine_classifier or o.ml_decoder_kwargs.get('cosine_scale', 1)
    kwargs = o.loss_kwargs
    if loss == 'aam' and scale != 1 and not (kwargs.get('scaled_logits') and kwargs.get('scale', 30) == scale):
        yield f'--loss aam: for a cosine scale of {scale:g} add --loss-kwargs scale={scale:g} scaled_logits=True'


def _problems_of_distillation(o: Options) -> Iterator[str]:
    if not (o.kd_model_name or o.kd_checkpoint):
        return
    teacher = f'--kd-model-name {o.kd_model_name}' if o.kd_model_name else f'--kd-checkpoint {o.kd_checkpoint}'
    if o.task == 'multilabel':
        yield f'{teacher}: distillation needs --task classification'
    for name in ('naflex_loader', 'random_queries', 'class_split'):
        if o[name]:
            yield f'{teacher} does not work with {o.flag(name)}; give one of them'
    if o.distill_loss_weight is None and (o.task_loss_weight or 0) > 1:
        yield (
            f'--task-loss-weight {o.task_loss_weight:g}: above 1 it leaves a negative weight to the distillation loss; '
            'add --distill-loss-weight'
        )
    if o.kd_distill_type == 'token' and o.torchscript:
        yield '--kd-distill-type token does not work with --torchscript, which has the mean of both classifiers only'


def _problems_of_size(o: Options) -> Iterator[str]:
    if o.in_chans is not None and o.input_size and o.in_chans != o.input_size[0]:
        yield f'--in-chans {o.in_chans} contradicts the first number of --input-size {" ".join(map(str, o.input_size))}'


def _problems_of_validate(o: Options) -> Iterator[str]:
    if o.real_labels and o.bad_image == 'skip':
        yield '--real-labels matches images by their order: it needs --bad-image abort'
    if o.tf_preprocessing:
        if o.no_prefetcher:
            yield '--tf-preprocessing does not work with --no-prefetcher; give one of them'
        if o.dataset not in TIMM_FOLDERS:
            yield f'--tf-preprocessing reads a folder or a tar file of images, not --dataset {o.dataset}'
        if o.input_size and o.input_size[1] != o.input_size[2] or o.tta in (5, 10):
            yield '--tf-preprocessing makes square images of the size of the model: leave --input-size and --tta out'
    if o.write_thresholds and not (o.checkpoint or o.model.startswith('local-dir:')):
        yield '--write-thresholds stores the thresholds in --checkpoint or the folder of --model local-dir:: give one'
    size = min(o.input_size[1:]) if o.input_size else o.img_size
    if o.crop_border_pixels and size and 2 * o.crop_border_pixels >= size:
        yield f'--crop-border-pixels {o.crop_border_pixels} leaves nothing of images of {size} pixels'
    if not (o.checkpoint or o.model.startswith('local-dir:')):  # which bring their task along
        check_task(o)
