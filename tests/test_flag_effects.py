"""Each flag of training changes what a run is built of: model, optimizer, schedule, loss, loaders or averages."""

import functools
import shlex
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType

import pytest
import torch
from runs import build, write_data
from torch import nn

from timm_mldecoder.flags import Options

#: Flags that must have an effect, by the flags that they need.
FLAGS = {
    '': """
        --vflip 0.5 | --hflip 0 | --color-jitter 0.1 | --color-jitter-prob 0.3
        | --gaussian-blur-prob 0.2 | --grayscale-prob 0.2 | --scale 0.5 1 | --ratio 1 1 | --train-interpolation bilinear
        | --interpolation nearest | --crop-pct 0.5 | --crop-mode border | --mean 0.1 0.1 0.1 | --std 0.3 0.3 0.3
        | --smoothing 0.3 | --validation-batch-size 3 | --drop 0.2 | --drop-path 0.2
        | --weight-decay 0.3 | --momentum 0.5 | --opt lamb | --sched step | --warmup-epochs 2 | --warmup-lr 1e-3
        | --cooldown-epochs 3 | --min-lr 1e-2 | --epochs 5 | --aa rand-m5 | --mixup 0.2 | --cutmix 1 | --reprob 0.3
        | --model-ema | --no-aug | --decode fast | --cutout 0.5 | --gp max | --head-init-bias 0.5 | --head-lr-scale 3
    """,
    '--opt adamw': '--opt-betas 0.5 0.6 | --opt-eps 1e-3 | --opt-kwargs amsgrad=True | --layer-decay 0.5',
    '--opt adamw --layer-decay 0.5': '--layer-decay-min-scale 0.5 | --layer-decay-no-opt-scale 0.9',
    '--opt adamw --lr-base 0.1': '--lr-base-scale linear | --lr-base-size 64',
    '--sched step --decay-epochs 1 --epochs 6': '--decay-rate 0.5',
    '--sched cosine --epochs 6': '--lr-cycle-limit 3 | --lr-k-decay 2 | --lr-noise 0.1 0.9',
    '--sched cosine --epochs 6 --lr-cycle-limit 3': '--lr-cycle-decay 0.3 | --lr-cycle-mul 2',
    '--sched cosine --epochs 9 --lr-noise 0.1 0.9': '--lr-noise-pct 0.1 | --lr-noise-std 3',
    '--mixup 0.2 --cutmix 1': '--mixup-switch-prob 0.1 | --mixup-mode elem | --mixup-prob 0.5 | --mixup-off-epoch 1',
    '--cutout 0.5': '--cutout-place after | --cutout-prob 0.5',
    '--reprob 0.5': '--remode const | --recount 3',
    '--model-ema': '--model-ema-decay 0.5 | --no-model-ema-warmup',
    '--loss bce': '--bce-pos-weight 3 | --bce-target-thresh 0.2 | --bce-sum',
    '--model test_efficientnet': '--bn-eps 0.1 | --bn-momentum 0.3',
}
CASES = [
    (needed, flag.strip()) for needed, flags in FLAGS.items() for flag in ' '.join(flags.split()).split('|') if flag
]
PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, range, Path)


def describe(value, seen: frozenset = frozenset()):
    """Return what an object is made of, without tensors' values and without the options."""
    if isinstance(value, PLAIN):
        return repr(value)
    if id(value) in seen or isinstance(value, Options):
        return type(value).__name__
    seen = seen | {id(value)}
    if isinstance(value, torch.Tensor):
        return list(value.shape), value.dtype, value.tolist() if value.numel() < 20 else None
    if isinstance(value, dict):
        return {str(key): describe(item, seen) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [describe(item, seen) for item in value]
    if isinstance(value, functools.partial):
        return describe([value.func, value.args, value.keywords], seen)
    if isinstance(value, (FunctionType, BuiltinFunctionType, MethodType, type)):
        return value.__qualname__
    if isinstance(value, nn.Module):
        kept = {name: item for name, item in vars(value).items() if not name.startswith('_')}
        kept |= dict(value.named_buffers(recurse=False))
        return repr(value), describe(kept, seen), [describe(child, seen) for child in value.children()]
    return type(value).__name__, describe(getattr(value, '__dict__', {}), seen)


@pytest.fixture(scope='module')
def described(tmp_path_factory):
    """Return a function from flags to the description of the run that they build; each is built once."""
    data = write_data(tmp_path_factory.mktemp('data'))

    @functools.cache
    def description(flags):
        torch.manual_seed(0)
        run = build(data, tmp_path_factory.mktemp('run'), *shlex.split(flags))
        groups = [
            {name: value for name, value in group.items() if name != 'params'}
            for group in run.state.optimizer.param_groups
        ]
        parts = [run.state.task, run.state.schedule, run.train_loader, run.eval_loader, run.epochs, run.steps_per_epoch]
        rates = run.state.schedule and [run.state.schedule._get_values(step, True) for step in range(run.epochs)]
        run.close()
        return describe([groups, parts, rates])

    return description


@pytest.mark.parametrize(('needed', 'flag'), CASES, ids=[flag for _, flag in CASES])
def test_the_flag_changes_the_run(described, needed, flag):
    assert described(f'{needed} {flag}') != described(needed)
