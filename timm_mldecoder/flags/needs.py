"""The conditions under which flags have an effect."""

from timm.optim import OptimInfo, get_optimizer_info
from timm.utils.distributed import world_info_from_env

from timm_mldecoder.flags.flag import Need
from timm_mldecoder.flags.options import Options


def given(*names: str) -> Need:
    """Need one of several options to be set."""
    text = ' or '.join(f'--{name.replace("_", "-")}' for name in names)
    return Need(lambda options: any(options[name] for name in names), text)


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
    if options.loss or options.jsd_loss:
        return options.loss or 'jsd'
    return 'bce' if options.bce_loss or options.task == 'multilabel' else 'ce'


def optimizer_info(options: Options) -> OptimInfo:
    """What timm knows about the optimizer of a training run."""
    return get_optimizer_info(options.opt.lower().removeprefix('lookahead_'))


# fmt: off
DISTRIBUTED = Need(lambda o: world_info_from_env()[2] > 1, 'more than one rank')
ON_ACCELERATOR = Need(lambda o: not o.device.startswith('cpu'), 'a device other than the CPU')
VALIDATES = Need(lambda o: bool(o.val_split), 'a validation split: --val-split')
NO_HEAD = Need(lambda o: not o.use_ml_decoder_head, '--use-ml-decoder-head 0')
# fmt: on
