"""Each flag of training changes what a run is built of, or what a run or an evaluation does."""

import functools
import json
import shlex
import sys
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType

import pytest
import timm
import torch
from image_folders import write_images
from multilabel_data import write_voc
from runs import MODEL, build, write_data
from timm.layers import is_fast_norm, set_fast_norm
from torch import nn
from torchvision.datasets import ImageFolder

from timm_mldecoder.data import summarize
from timm_mldecoder.flags import parse_train
from timm_mldecoder.loading import create_loaders
from timm_mldecoder.loading.datasets import create_split
from train import main as train_main
from validate import main as validate_main

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
        | --drop-block 0.1 | --train-split validation
    """,
    '--opt adamw': '--opt-betas 0.5 0.6 | --opt-eps 1e-3 | --opt-kwargs amsgrad=True | --layer-decay 0.5',
    '--opt adamw --layer-decay 0.5': '--layer-decay-min-scale 0.5 | --layer-decay-no-opt-scale 0.9',
    '--opt adamw --lr-base 0.1': '--lr-base-scale linear | --lr-base-size 64',
    '--sched step --decay-epochs 1 --epochs 6': '--decay-rate 0.5',
    '--sched rsqrt --epochs 9 --decay-epochs 4 --warmup-epochs 1': '--lr-decay-fn cosine | --lr-stable-timescale 2',
    '--sched cosine --epochs 6': '--lr-cycle-limit 3 | --lr-k-decay 2 | --lr-noise 0.1 0.9',
    '--sched cosine --epochs 6 --lr-cycle-limit 3': '--lr-cycle-decay 0.3 | --lr-cycle-mul 2',
    '--sched cosine --epochs 9 --lr-noise 0.1 0.9': '--lr-noise-pct 0.1 | --lr-noise-std 3',
    '--mixup 0.2 --cutmix 1': '--mixup-switch-prob 0.1 | --mixup-mode elem | --mixup-prob 0.5 | --mixup-off-epoch 1',
    '--cutout 0.5': '--cutout-place after | --cutout-prob 0.5',
    '--reprob 0.5': '--remode const | --recount 3',
    '--train-img-sizes 24 32': '--train-size-probs 1 3 | --train-batches-per-epoch 2',
    '--train-img-sizes 24 32 --train-size-schedule progressive': '--train-size-random-mix 1 | '
    '--train-size-schedule-spread 0.3',
    '-j 1': '--worker-seeding part',
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
    if id(value) in seen or type(value).__module__.startswith('timm_mldecoder.flags'):  # which name every flag
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


def test_a_run_saves_images_imports_modules_and_sets_norms(described, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'own_device.py').touch()
    data = write_data(tmp_path / 'data')
    flags = '--epochs 1 --save-images --fast-norm --no-resume-opt --device-modules own_device'
    try:
        train_main([str(data), *MODEL, *flags.split(), '--output', str(tmp_path), '--experiment', 'run'])
        assert is_fast_norm() and 'own_device' in sys.modules and list((tmp_path / 'run').glob('train-batch-*.jpg'))
        again = [
            build(data, tmp_path, '--epochs', '2', '--resume', 'auto', *flag) for flag in ([], ['--no-resume-opt'])
        ]
        assert [len(run.state.optimizer.state) > 0 for run in again] == [True, False]
    finally:
        set_fast_norm(False)  # timm's setting of the process; resumed runs take the flag of args.yaml


def test_flags_of_streams_reach_the_dataset(tmp_path, monkeypatch):
    seen = {}

    def create(name, root, split, **settings):
        seen[split] = [settings[name] for name in ('num_samples', 'repeats', 'trust_remote_code')]
        return ImageFolder(str(tmp_path / 'data' / split))

    data = write_data(tmp_path / 'data')
    monkeypatch.setattr('timm_mldecoder.loading.datasets.create_dataset', create)
    flags = '--train-num-samples 98 --val-num-samples 99 --epoch-repeats 3 --dataset-trust-remote-code'
    build(data, tmp_path, *flags.split()).close()
    assert seen == dict(train=[98, 3, True], validation=[99, 0, True])


def test_objects_of_voc_that_are_difficult_count_as_the_flag_says(tmp_path):
    write_voc(tmp_path)
    options = ['--dataset', 'voc2007', '--task', 'multilabel', '--num-classes', '20', '--voc-difficult']
    positives = [
        summarize(create_split(parse_train([str(tmp_path), *options, value]), 'train')).positives.sum()
        for value in ('positive', 'negative')
    ]
    assert positives[0] > positives[1]


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
    """Return a function from flags of validate.py to its result, the settings of its images and its log."""
    folder = tmp_path_factory.mktemp('evaluated')
    data = write_images(folder / 'data', train=0, validation=2)
    torch.manual_seed(0)
    torch.save(timm.create_model('resnet10t', num_classes=3).state_dict(), folder / 'weights.pth')

    def evaluate(monkeypatch, caplog, *flags):
        seen, compiled = {}, {}
        create = timm.data.create_transform

        def watched(*args, **settings):
            seen.update(settings, size=args[0][-1])
            return create(*args, **settings)

        monkeypatch.setattr(create_loaders, 'create_transform', watched)
        monkeypatch.setattr(torch, 'compile', lambda model, **settings: compiled.update(settings) or model)
        caplog.set_level('INFO')
        base = f'--model resnet10t.c3_in1k --num-classes 3 --device cpu -j 0 -b 1 --checkpoint {folder}/weights.pth'
        validate_main([str(data), *base.split(), '--results-file', str(folder / 'results'), *flags])
        return (folder / 'results').read_text(), seen, compiled, caplog.text.count('Test: [')

    return evaluate


def test_flags_of_an_evaluation(evaluated, monkeypatch, caplog):
    results, settings, compiled, lines = evaluated(monkeypatch, caplog)
    assert results.startswith('model,') and settings['size'] == 224 and not compiled
    caplog.clear()
    flags = '--results-format json --use-train-size --crop-border-pixels 3 --log-freq 1 --torchcompile eager '
    flags += '--torchcompile-mode reduce-overhead'
    results, changed, compiled, more = evaluated(monkeypatch, caplog, *flags.split())
    assert json.loads(results)[0]['img_size'] == changed['size'] == 176
    assert (settings['crop_border_pixels'], changed['crop_border_pixels']) == (None, 3) and more > lines
    assert compiled == dict(backend='eager', mode='reduce-overhead')
    assert evaluated(monkeypatch, caplog, '--aot-autograd')[2] == dict(backend='aot_eager')


def test_reparameterizable_layers_are_fused(evaluated, monkeypatch, caplog):
    seen = []
    monkeypatch.setattr('timm_mldecoder.validate.score.reparameterize_model', lambda model: seen.append(model) or model)
    evaluated(monkeypatch, caplog, '--reparam')
    assert len(seen) == 1
