"""The conditions under which flags have an effect."""

from timm.optim import OptimInfo, get_optimizer_info
from timm.utils.distributed import world_info_from_env

from timm_mldecoder.engine.flags.flag import Need
from timm_mldecoder.engine.flags.options import Options


def given(*names: str) -> Need:
    """Need one of several options to be set."""
    text = ' or '.join(f'--{name.replace("_", "-")}' for name in names)
    return Need(lambda options: any(getattr(options, name) for name in names), text)


def sched(*names: str) -> Need:
    """Need one of several schedules."""
    return Need(lambda options: options.sched in names, f'--sched {" or ".join(names)}')


def loss(*names: str) -> Need:
    """Need one of several losses."""
    return Need(lambda options: loss_name(options) in names, f'--loss {" or ".join(names)}')


def dataset(*kinds: str) -> Need:
    """Need a kind of dataset."""
    return Need(lambda options: options.dataset.lower().startswith(kinds), f'--dataset {"..., ".join(kinds)}...')


def loss_name(options: Options) -> str:
    """The loss of a training run."""
    return options.loss or ('bce' if options.bce_loss or options.task == 'multilabel' else 'ce')


def optimizer_info(options: Options) -> OptimInfo:
    """What timm knows about the optimizer of a training run."""
    return get_optimizer_info(options.opt.lower().removeprefix('lookahead_'))


# fmt: off
_STREAMED_KINDS = ('hfids/', 'tfds/', 'wds/')
STREAMED = dataset(*_STREAMED_KINDS)
NOT_STREAMED = Need(lambda o: not o.dataset.lower().startswith(_STREAMED_KINDS), 'a dataset that is not streamed')
DISTRIBUTED = Need(lambda o: world_info_from_env()[2] > 1, 'more than one process')
ON_ACCELERATOR = Need(lambda o: not o.device.startswith('cpu'), 'a device other than the CPU')
WORKERS = Need(lambda o: o.workers > 0, '--workers above 0')
VALIDATES = Need(lambda o: bool(o.val_split), 'a validation split: --val-split')
AUGMENTS = Need(lambda o: not o.no_aug, 'augmentation, which --no-aug turns off')
MIXES = given('mixup', 'cutmix', 'cutmix_minmax')
MIXES_BOTH = Need(lambda o: bool(o.mixup and (o.cutmix or o.cutmix_minmax)), 'both --mixup and --cutmix')
NO_AA = Need(lambda o: not o.aa, 'no --aa, which replaces color jitter')
MULTILABEL = Need(lambda o: o.task == 'multilabel', '--task multilabel')
USES_HEAD = Need(lambda o: bool(o.use_ml_decoder_head), '--use-ml-decoder-head 1')
NO_HEAD = Need(lambda o: not o.use_ml_decoder_head, '--use-ml-decoder-head 0')
BIAS = Need(lambda o: not o.cosine_classifier, 'a classifier with a bias, which --cosine-classifier does not have')
SCHEDULED = Need(lambda o: o.sched != 'none', 'a schedule: --sched other than none')
CYCLES = sched('cosine', 'tanh', 'poly')
EPOCH_SCHEDULE = Need(lambda o: o.sched not in ('none', 'onecycle'), '--sched other than none and onecycle')
NO_LR = Need(lambda o: not o.lr, 'no --lr, which replaces it')
MOMENTUM = Need(lambda o: optimizer_info(o).has_momentum, 'an optimizer with momentum')
EPSILON = Need(lambda o: optimizer_info(o).has_eps, 'an optimizer with an epsilon')
BETAS = Need(lambda o: optimizer_info(o).has_betas, 'an optimizer with betas')
CLASS_STATS = Need(lambda o: loss_name(o) == 'db' or bool(o.loss_pos_weight or o.loss_class_weight),
                   '--loss db, or a method in --loss-pos-weight or --loss-class-weight')
PROGRESSIVE = Need(lambda o: o.train_size_schedule == 'progressive', '--train-size-schedule progressive')
SKIPS = Need(lambda o: o.nonfinite == 'skip', '--nonfinite skip')
TEXT_QUERIES = Need(lambda o: bool(o.use_ml_decoder_head or o.graph), '--use-ml-decoder-head 1 or --graph')
NO_CHECKPOINT = Need(lambda o: not o.checkpoint, 'no --checkpoint, which replaces the pretrained weights')
NO_COMPILE = Need(lambda o: not o.torchcompile, 'no --torchcompile, which replaces it')
NO_INPUT_SIZE = Need(lambda o: not o.input_size, 'no --input-size, which replaces it')
NEVER = Need(lambda o: False, '--drop-path, its name in timm today')
# fmt: on
