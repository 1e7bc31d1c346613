"""Options that change nothing in the combination they are given in: each is said once, none is silently ignored."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Container, Iterator

from timm.optim import OptimInfo, get_optimizer_info

_Condition = Callable[[Namespace, int], bool]
#: Rows of (options, when they have an effect, what that takes).
Needs = list[tuple[tuple[str, ...], _Condition, str]]


def _loss(*names: str) -> _Condition:
    def uses(options: Namespace, world_size: int) -> bool:
        default = 'bce' if options.bce_loss or options.task == 'multilabel' else 'ce'
        return (options.loss or default) in names

    return uses


def _sched(*names: str) -> _Condition:
    return lambda options, world_size: options.sched in names


def _given(*names: str) -> _Condition:
    return lambda options, world_size: any(getattr(options, name) for name in names)


def _dataset(*kinds: str) -> _Condition:
    return lambda options, world_size: options.dataset.lower().startswith(kinds)


def _optimizer(options: Namespace) -> OptimInfo:
    return get_optimizer_info(options.opt.lower().removeprefix('lookahead_'))


def _distributed(options: Namespace, world_size: int) -> bool:
    return world_size > 1


def _on_accelerator(options: Namespace, world_size: int) -> bool:
    return not options.device.startswith('cpu')


def _augments(options: Namespace, world_size: int) -> bool:
    return not options.no_aug


_mixes = _given('mixup', 'cutmix', 'cutmix_minmax')
_CYCLES = ('cosine', 'tanh', 'poly')
_STREAMED = ('hfids/', 'tfds/', 'wds/')

#: What validate.py shares.
_SHARED: Needs = [
    (('target_format', 'multilabel_threshold'), lambda o, _: o.task == 'multilabel', '--task multilabel'),
    (('dataset_download',), _dataset('torch/', 'hfids/', 'tfds/'), 'a torch/, hfids/ or tfds/ data set'),
    (('dataset_trust_remote_code',), _dataset('hfds/', 'hfids/'), 'a Hugging Face data set'),
    (('amp_dtype',), _given('amp'), '--amp'),
    (('torchcompile_mode',), _given('torchcompile'), '--torchcompile'),
    (('pin_mem',), _on_accelerator, 'a device other than the CPU'),
    (
        ('num_of_groups', 'decoder_embedding', 'ml_decoder_kwargs', 'word_embeddings'),
        _given('use_ml_decoder_head'),
        '--use-ml-decoder-head 1',
    ),
    (('score_classes',), _given('class_split'), '--class-split'),
    (
        ('bad_image', 'val_bad_image'),
        lambda o, _: not o.dataset.lower().startswith(_STREAMED),
        'a data set that is not streamed',
    ),
    (('gp',), lambda o, _: not o.use_ml_decoder_head, '--use-ml-decoder-head 0: an ML-Decoder head does not pool'),
]

TRAIN_NEEDS: Needs = [
    *_SHARED,
    (('aug_repeats', 'sync_bn', 'no_ddp_bb', 'dist_bn'), _distributed, 'more than one process'),
    (
        (
            'scale',
            'ratio',
            'hflip',
            'vflip',
            'color_jitter',
            'color_jitter_prob',
            'grayscale_prob',
            'gaussian_blur_prob',
            'aa',
            'reprob',
            'train_crop_mode',
            'train_interpolation',
        ),
        _augments,
        'augmentation, which --no-aug turns off',
    ),
    (('color_jitter_prob',), lambda o, _: not o.aa, 'no --aa, which replaces colour jitter'),
    (('remode', 'recount', 'resplit'), _given('reprob'), '--reprob'),
    (('mixup_prob', 'mixup_mode', 'mixup_off_epoch'), _mixes, '--mixup or --cutmix'),
    (('mixup_switch_prob',), lambda o, _: bool(o.mixup and (o.cutmix or o.cutmix_minmax)), 'both --mixup and --cutmix'),
    (('drop_connect',), lambda o, _: False, "--drop-path, timm's present name of it"),
    (
        ('drop',),
        lambda o, _: not o.use_ml_decoder_head,
        '--use-ml-decoder-head 0: the dropout of an ML-Decoder head is --ml-decoder-kwargs dropout=P',
    ),
    (('bce_sum', 'bce_target_thresh', 'bce_pos_weight'), _loss('bce'), '--bce-loss'),
    (('loss_pos_weight', 'loss_class_weight'), _loss('bce', 'asl'), '--loss bce or asl'),
    (('loss_weight_power',), _given('class_stats'), '--class-stats'),
    (
        ('class_stats',),
        lambda o, w: _loss('db')(o, w) or bool(o.loss_pos_weight or o.loss_class_weight),
        '--loss db, or a method in --loss-pos-weight or --loss-class-weight',
    ),
    (('poly_gamma', 'poly_epsilon'), _loss('poly'), '--loss poly'),
    (('cutout', 'cutout_prob'), _augments, 'augmentation, which --no-aug turns off'),
    (('cutout_prob',), _given('cutout'), '--cutout'),
    (('class_priors',), _loss('csl'), '--loss csl'),
    (('crop_mode',), _given('val_split'), 'a validation split'),
    (('clip_mode',), _given('clip_grad'), '--clip-grad'),
    (('layer_decay_min_scale', 'layer_decay_no_opt_scale'), _given('layer_decay'), '--layer-decay'),
    (('momentum',), lambda o, _: _optimizer(o).has_momentum, 'an optimizer with momentum'),
    (('opt_eps',), lambda o, _: _optimizer(o).has_eps, 'an optimizer with an epsilon'),
    (('opt_betas',), lambda o, _: _optimizer(o).has_betas, 'an optimizer with betas'),
    (('bias_lr_scale',), lambda o, _: o.sched != 'none', 'a schedule, which applies it'),
    (
        ('head_init_scale', 'head_init_bias'),
        lambda o, _: not o.cosine_classifier,
        'a classifier with a bias and a length, which --cosine-classifier has not',
    ),
    (('lr_base', 'lr_base_size', 'lr_base_scale'), lambda o, _: not o.lr, 'no --lr, which replaces it'),
    (('lr_noise',), lambda o, _: o.sched not in ('none', 'onecycle'), 'a schedule other than none and onecycle'),
    (('warmup_epochs',), lambda o, _: o.sched != 'none', 'a schedule'),
    (
        ('sched_on_updates',),
        lambda o, _: o.sched not in ('none', 'onecycle'),
        'a schedule that can step with epochs, not none or onecycle',
    ),
    (('lr_noise_pct', 'lr_noise_std'), _given('lr_noise'), '--lr-noise'),
    (('warmup_lr', 'warmup_prefix'), _given('warmup_epochs'), '--warmup-epochs'),
    (('warmup_prefix',), lambda o, _: o.sched != 'onecycle', 'another schedule than onecycle'),
    (
        ('lr_cycle_mul', 'lr_cycle_decay', 'lr_cycle_limit', 'cooldown_epochs'),
        _sched(*_CYCLES),
        '--sched cosine, tanh or poly',
    ),
    (('lr_k_decay',), _sched('cosine', 'poly'), '--sched cosine or poly'),
    (('lr_decay_fn',), _sched('wsd', 'rsqrt'), '--sched wsd or rsqrt'),
    (('lr_stable_timescale',), _sched('rsqrt'), '--sched rsqrt'),
    (('decay_milestones',), _sched('multistep'), '--sched multistep'),
    (('decay_epochs',), _sched('step', 'wsd', 'rsqrt'), '--sched step, wsd or rsqrt'),
    (('decay_rate',), _sched('step', 'multistep', 'plateau', 'poly'), '--sched step, multistep, plateau or poly'),
    (('patience_epochs',), _sched('plateau'), '--sched plateau'),
    (('min_lr',), _sched(*_CYCLES, 'plateau', 'wsd', 'rsqrt', 'onecycle'), 'a schedule with a lower bound'),
    (('epoch_repeats', 'train_num_samples', 'val_num_samples'), _dataset(*_STREAMED), 'a streamed data set'),
    (
        (
            'train_batch_sizes',
            'train_size_probs',
            'train_size_schedule',
            'train_size_schedule_spread',
            'train_size_random_mix',
            'train_batches_per_epoch',
            'variable_batch_loss_scale',
        ),
        _given('train_img_sizes'),
        '--train-img-sizes',
    ),
    (
        ('train_size_schedule_spread', 'train_size_random_mix'),
        lambda o, _: o.train_size_schedule == 'progressive',
        '--train-size-schedule progressive',
    ),
    (('use_multi_epochs_loader', 'worker_seeding'), lambda o, _: o.workers > 0, 'loader processes (-j above 0)'),
    (
        ('model_ema_decay', 'model_ema_warmup', 'model_ema_force_cpu', 'better_of_ema'),
        _given('model_ema'),
        '--model-ema',
    ),
    (('synchronize_step',), _on_accelerator, 'a device other than the CPU'),
    (('random_queries', 'query_noise'), _given('word_embeddings'), '--word-embeddings'),
    (('nonfinite_limit',), lambda o, _: o.nonfinite == 'skip', '--nonfinite skip'),
    (('no_resume_opt',), _given('resume'), '--resume'),
    (
        ('eval_metric', 'val_num_samples', 'validation_batch_size', 'tta', 'val_bad_image'),
        _given('val_split'),
        'a validation split',
    ),
    (('wandb_project', 'wandb_tags', 'wandb_resume_id'), _given('log_wandb'), '--log-wandb'),
]


VALIDATE_NEEDS: Needs = [
    *_SHARED,
    (('use_ema',), _given('checkpoint'), '--checkpoint'),
    (('pretrained',), lambda o, _: not o.checkpoint, 'no --checkpoint, which replaces the pretrained weights'),
    (('num_samples',), _dataset(*_STREAMED), 'a streamed data set'),
    (('results_format',), _given('results_file'), '--results-file'),
    (('aot_autograd',), lambda o, _: not o.torchcompile, 'no --torchcompile, which replaces it'),
    (('img_size',), lambda o, _: not o.input_size, 'no --input-size, which replaces it'),
]


def without_effect(
    needs: Needs, options: Namespace, given: Container[str], parser: ArgumentParser, world_size: int
) -> Iterator[str]:
    """One sentence for each option that the user gave another value than its default and that yet changes nothing."""
    flags = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    said = set()
    for names, has_effect, what in needs:
        for name in names:
            if name in said or name not in given or name not in flags:
                continue
            value = getattr(options, name)
            if value != parser.get_default(name) and not has_effect(options, world_size):
                said.add(name)
                yield f'{flags[name]} {value} needs {what}'
