"""Flags of the loss, the optimizer and the learning rate."""

from dataclasses import dataclass
from typing import Any

from timm.loss import LOSS_TYPES
from timm.optim import OptimInfo, get_optimizer_info

from timm_mldecoder.flags.flag import Need, given, train
from timm_mldecoder.flags.group import Group
from timm_mldecoder.losses import LOSSES

LOSS_NAMES = tuple(dict.fromkeys((*LOSS_TYPES, *LOSSES)))
_LAYER_DECAY, _NOISE, _WARMUP = given('layer_decay'), given('lr_noise'), given('warmup_epochs')


def with_loss(*names: str) -> Need:
    """Need one of several losses."""
    return Need(lambda options: loss_name(options, options.task) in names, f'--loss {" or ".join(names)}')


def with_sched(*names: str) -> Need:
    """Need one of several schedules."""
    return Need(lambda options: options.sched in names, f'--sched {" or ".join(names)}')


# fmt: off
SCHEDULED = Need(lambda o: o.sched != 'none', 'a schedule: --sched other than none')
CYCLES = with_sched('cosine', 'tanh', 'poly')
EPOCH_SCHEDULE = Need(lambda o: o.sched not in ('none', 'onecycle'), '--sched other than none and onecycle')
NO_LR = Need(lambda o: not o.lr, 'no --lr, which replaces it')
MOMENTUM = Need(lambda o: optimizer_info(o.opt).has_momentum, 'an optimizer with momentum')
EPSILON = Need(lambda o: optimizer_info(o.opt).has_eps, 'an optimizer with an epsilon')
BETAS = Need(lambda o: optimizer_info(o.opt).has_betas, 'an optimizer with betas')
CLASS_STATS = Need(lambda o: loss_name(o, o.task) == 'db' or bool(o.loss_pos_weight or o.loss_class_weight),
                   '--loss db, or a method in --loss-pos-weight or --loss-class-weight')


@dataclass(frozen=True)
class LossOptions(Group):
    """Loss."""

    loss: str | None = train(None, f'loss, one of {", ".join(LOSS_NAMES)}, or a class of your own, '
        'package.module:Class, with --loss-kwargs; if not given, ce for one class per image and bce for several. csl, '
        'aam, hill and splc need --task multilabel', metavar='NAME')
    bce_loss: bool = train(False, 'binary cross-entropy, the same as --loss bce')
    jsd_loss: bool = train(False, 'cross-entropy of the first view and Jensen-Shannon divergence of the views of '
        '--aug-splits, the same as --loss jsd')
    bce_sum: bool = train(False, 'sum the BCE over classes', needs=with_loss('bce'))
    bce_target_thresh: float | None = train(None, 'round mixed targets: above this to 1, others to 0', range='[0, 1]',
        needs=with_loss('bce'))
    bce_pos_weight: float | None = train(None, 'weight of the positive term of BCE', range='(0, inf)',
        needs=with_loss('bce'))
    loss_pos_weight: str | None = train(None, 'weight of positives (bce, asl): a number, a list with commas, a file, '
        'or the method neg_pos with --class-stats', metavar='W')
    loss_class_weight: str | None = train(None, 'weight of each class (ce, bce, asl): a number, a list with commas, a '
        'file, or a method with --class-stats: inv_freq or effective_num', metavar='W')
    loss_weight_power: float = train(1.0, 'exponent of weights computed from --class-stats', range='[0, inf)',
        needs=given('class_stats'))
    loss_weight_beta: float = train(0.999, 'beta of --loss-class-weight effective_num', range='[0, 1)',
        needs=given('loss_class_weight'))
    loss_weight_max: float | None = train(None, 'largest weight computed from --class-stats', range='(0, inf)',
        metavar='W', needs=given('loss_class_weight', 'loss_pos_weight'))
    class_stats: str = train('', 'JSON file with pos_counts and num_samples', path='file', needs=CLASS_STATS)
    class_priors: str = train('', 'CSV file of class priors', path='file', needs=with_loss('csl'))
    asl_gamma_pos: float = train(1.0, 'focusing parameter of positives', range='[0, inf)', needs=with_loss('asl'))
    asl_gamma_neg: float = train(4.0, 'focusing parameter of negatives', range='[0, inf)', needs=with_loss('asl'))
    asl_clip: float = train(0.05, 'margin of the probability of negatives', range='[0, 1)', needs=with_loss('asl'))
    asl_reduction: str = train('batchmean', 'sum over classes and mean over images, sum, or mean',
        choices=('batchmean', 'sum', 'mean'), needs=with_loss('asl'))
    twoway_tp: float = train(4.0, 'temperature of positives', range='(0, inf)', needs=with_loss('twoway'))
    twoway_tn: float = train(1.0, 'temperature of negatives', range='(0, inf)', needs=with_loss('twoway'))
    db_neg_scale: float = train(2.0, 'scale of the logits of negatives', range='(0, inf)', needs=with_loss('db'))
    db_init_bias: float = train(0.05, 'factor of the logit shift by class frequency', needs=with_loss('db'))
    db_focal_gamma: float = train(2.0, 'focusing parameter', range='[0, inf)', needs=with_loss('db'))
    poly_alpha: float | None = train(None, 'weight of positives of the poly loss', range='[0, 1]',
        needs=with_loss('poly'))
    poly_gamma: float = train(0.0, 'focusing parameter of the poly loss', range='[0, inf)', needs=with_loss('poly'))
    poly_epsilon: float = train(2.0, 'coefficient of the poly loss', needs=with_loss('poly'))
    loss_kwargs: dict[str, Any] = train({}, 'more arguments of the loss: asl_gamma_pos=0 (timm.loss), '
        'detach_focusing=True or mode=selective (timm_mldecoder.losses)')


def loss_name(options: LossOptions, task: str) -> str:
    """The loss of a training run."""
    if options.loss or options.jsd_loss:
        return options.loss or 'jsd'
    return 'bce' if options.bce_loss or task == 'multilabel' else 'ce'


DISTILLS = given('kd_model_name', 'kd_checkpoint')
LOGITS = Need(lambda o: DISTILLS.holds(o) and o.kd_distill_type != 'feature', 'a teacher, and --kd-distill-type other '
              'than feature')
FEATURES = Need(lambda o: DISTILLS.holds(o) and o.kd_distill_type == 'feature', 'a teacher, and --kd-distill-type '
                'feature')
TOKEN = Need(lambda o: DISTILLS.holds(o) and o.kd_distill_type == 'token', 'a teacher, and --kd-distill-type token')


@dataclass(frozen=True)
class DistillationOptions(Group):
    """Knowledge distillation."""

    kd_model_name: str | None = train(None, 'teacher: a timm model with its pretrained weights, also hf-hub:... or '
        'local-dir:FOLDER')
    kd_checkpoint: str = train('', 'teacher: a checkpoint of train.py, as it was trained; or a file of weights of '
        '--kd-model-name', path='file')
    kd_distill_type: str = train('logit', 'what the student learns from the teacher: logits, pooled features, or '
        'logits by the second classifier of a distilled model', choices=('logit', 'feature', 'token'), needs=DISTILLS)
    kd_loss_type: str = train('kl', 'loss of logits', choices=('kl',), needs=LOGITS)
    distill_loss_weight: float | None = train(None, 'weight of the distillation loss; if not given, 1 minus '
        '--task-loss-weight, or 1 without that', range='[0, inf)', metavar='W', needs=DISTILLS)
    task_loss_weight: float | None = train(None, 'weight of the classification loss; 1 if not given', range='[0, inf)',
        metavar='W', needs=DISTILLS)
    kd_temperature: float = train(4.0, 'temperature of the softmax of both', range='(0, inf)', metavar='T',
        needs=LOGITS)
    kd_student_feature_dim: int | None = train(None, 'width of the student features; that of the model if not given',
        range='[1, inf)', needs=FEATURES)
    kd_teacher_feature_dim: int | None = train(None, 'width of the teacher features; that of the model if not given',
        range='[1, inf)', needs=FEATURES)
    kd_token_distill_type: str = train('soft', 'token: learn the probabilities of the teacher, or its class',
        choices=('soft', 'hard'), needs=TOKEN)



@dataclass(frozen=True)
class OptimizerOptions(Group):
    """Optimizer."""

    opt: str = train('sgd', 'timm optimizer')
    opt_eps: float | None = train(None, 'epsilon of the optimizer', range='[0, inf)', needs=EPSILON)
    opt_betas: list[float] | None = train(None, 'betas of the optimizer', range='[0, 1)', needs=BETAS)
    momentum: float = train(0.9, 'momentum of the optimizer', range='[0, 1)', needs=MOMENTUM)
    weight_decay: float = train(2e-5, 'weight decay', range='[0, inf)')
    opt_kwargs: dict[str, Any] = train({}, 'more arguments of the optimizer')
    clip_grad: float | None = train(None, 'largest gradient, by --clip-mode', range='(0, inf)')
    clip_mode: str = train('norm', 'clip the norm, each value, or adaptively', choices=('norm', 'value', 'agc'),
        needs=given('clip_grad'))
    grad_accum_steps: int = train(1, 'batches per optimizer step', range='[0, 1048576]')
    sam: float = train(0.0, 'sharpness-aware minimization: radius rho; doubles the passes per step; 0: off',
        range='[0, inf)', metavar='RHO')
    layer_decay: float | None = train(None, 'factor of the learning rate from layer to layer', range='(0, 10]')
    layer_decay_min_scale: float = train(0, 'smallest factor of layer decay', range='[0, 1]', needs=_LAYER_DECAY)
    layer_decay_no_opt_scale: float | None = train(None, 'factor below which a layer is not trained', range='[0, 1]',
        needs=_LAYER_DECAY)
    bias_lr_scale: float = train(1.0, 'factor of the learning rate of biases', range='[0, inf)', needs=SCHEDULED)
    head_lr_scale: float = train(1.0, 'factor of the learning rate of the head', range='[0, inf)', needs=SCHEDULED)



@dataclass(frozen=True)
class ScheduleOptions(Group):
    """Learning rate and schedule."""

    sched: str = train('cosine', 'schedule of the learning rate',
        choices=('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'onecycle',
                 'none'))
    sched_on_updates: bool = train(False, 'change the learning rate after each optimizer step, not each epoch',
        needs=EPOCH_SCHEDULE)
    lr: float | None = train(None, 'learning rate; computed from --lr-base if not given', range='(0, inf)',
        metavar='LR')
    lr_find: int = train(0, 'learning rate range test in place of training: optimizer steps; 100 are usual, 0: off',
        range='[0, 1000000]', metavar='STEPS')
    lr_base: float = train(0.1, 'learning rate for --lr-base-size images per step', range='(0, inf)', metavar='LR',
        needs=NO_LR)
    lr_base_size: int = train(256, 'images per optimizer step that --lr-base is for', range='[1, inf)', needs=NO_LR)
    lr_base_scale: str = train('', 'growth of --lr-base with the images per step; if empty, by the optimizer',
        choices=('', 'linear', 'sqrt'), needs=NO_LR)
    epochs: int = train(300, 'number of epochs, without cooldown', range='[1, 1000000]')
    start_epoch: int | None = train(None, 'epoch to start at; overrides that of a resumed checkpoint', range='[0, inf)')
    stop_epoch: int | None = train(None, 'stop after N epochs, with the schedule unchanged', range='[1, inf)')
    early_stop: int | None = train(None, 'stop after N validations without improvement; 10 if N is not given',
        nargs='?', const=10, range='[1, inf)')
    warmup_epochs: int = train(5, 'epochs of warmup', range='[0, inf)', needs=SCHEDULED)
    warmup_lr: float = train(1e-5, 'learning rate at the start of warmup', range='[0, inf)', metavar='LR',
        needs=_WARMUP)
    warmup_prefix: bool = train(False, 'start the schedule after warmup',
        needs=(_WARMUP, with_sched('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant',
                                   'plateau')))
    cooldown_epochs: int = train(0, 'epochs at --min-lr after the schedule', range='[0, inf)', needs=CYCLES)
    min_lr: float = train(0, 'learning rate at the end of the schedule', range='[0, inf)', metavar='LR',
        needs=with_sched('cosine', 'tanh', 'poly', 'plateau', 'wsd', 'rsqrt', 'onecycle'))
    decay_milestones: list[int] = train([90, 180, 270], 'epochs of the steps', range='[1, inf)',
        needs=with_sched('multistep'))
    decay_epochs: float = train(90, 'epochs between steps; for wsd and rsqrt the length of the decay, as a share of '
        'the schedule if below 1; wsd and rsqrt: 0.2 if not given', range='(0, inf)',
        needs=with_sched('step', 'wsd', 'rsqrt'))
    decay_rate: float = train(0.1, 'factor of each step; power of poly', names='--decay-rate --dr', range='(0, inf)',
        needs=with_sched('step', 'multistep', 'plateau', 'poly'))
    patience_epochs: int = train(10, 'epochs without improvement before a step', range='[0, inf)',
        needs=with_sched('plateau'))
    lr_cycle_mul: float = train(1.0, 'factor of the length of each cycle', range='(0, inf)', needs=CYCLES)
    lr_cycle_decay: float = train(0.5, 'factor of the learning rate of each cycle', range='(0, inf)', needs=CYCLES)
    lr_cycle_limit: int = train(1, 'number of cycles', range='[1, inf)', needs=CYCLES)
    lr_k_decay: float = train(1.0, 'exponent k of k-decay', range='(0, inf)', needs=with_sched('cosine', 'poly'))
    lr_decay_fn: str | None = train(None, 'shape of the decay', choices=('linear', '1-sqrt', 'cosine', 'power', 'exp'),
        needs=with_sched('wsd', 'rsqrt'))
    lr_stable_timescale: float | None = train(None, 'timescale of the stable phase, in epochs', range='(0, inf)',
        needs=with_sched('rsqrt'))
    lr_noise: list[float] | None = train(None, 'start, or start and end, of learning-rate noise, as shares of the '
        'epochs', range='[0, inf)', needs=EPOCH_SCHEDULE)
    lr_noise_pct: float = train(0.67, 'largest noise, as a share of the learning rate', range='[0, inf)', needs=_NOISE)
    lr_noise_std: float = train(1.0, 'standard deviation of the noise', range='[0, inf)', needs=_NOISE)


def optimizer_info(name: str) -> OptimInfo:
    """What timm knows about an optimizer."""
    return get_optimizer_info(name.lower().removeprefix('lookahead_'))
