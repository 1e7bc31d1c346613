"""With its own head, a model trains here as in timm's script: same draws, same losses, same learning rates.

Held against the `summary.csv` of timm's own script, and against a plain loop of timm's parts written out below. Later
epochs draw anew (see `engine.streams`), so losses are compared for the first one, learning rates for all.
"""

import csv
import shlex

import pytest
import torch
from image_folders import write_images
from timm import create_model
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, accuracy, dispatch_clip_grad, random_seed

import train
from timm_mldecoder.engine.flags import parse_train

SMALL = '--num-classes 3 --device cpu --model test_resnet'
A2 = (
    '--opt lamb --lr 5e-3 --weight-decay 0.02 --sched cosine --warmup-epochs 0 --drop-path 0.05 '
    '--aa rand-m7-mstd0.5-inc1 --mixup 0.1 --cutmix 1.0 --bce-loss --bce-target-thresh 0.2 --smoothing 0 '
    '--train-interpolation bicubic'
)
# timm's script, library 1.0.31, torch 2.15, on a CPU: first row, and the learning rates of three epochs
TIMM_SUMMARIES = {
    'sgd': (
        '--opt sgd --lr 0.02 --warmup-epochs 0',
        dict(train_loss=0.9882925391197205, eval_loss=0.6480047504107157, eval_top1=73.33333333333333, eval_top5=100.0),
        [0.02, 0.015, 0.005000000000000003],
    ),
    'a2': (
        A2,
        dict(train_loss=0.693946627775828, eval_loss=1.0120922406514485, eval_top1=53.33333231608073, eval_top5=100.0),
        [0.005, 0.00375, 0.0012500000000000007],
    ),
}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def few_images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('few_images'), train=24, validation=6)


def run_train(flags, folder):
    train.main([*flags, '--output', str(folder), '--experiment', 'run'])
    return list(csv.DictReader((folder / 'run' / 'summary.csv').open()))


@pytest.mark.parametrize('name', TIMM_SUMMARIES)
def test_first_epoch_is_that_of_timms_script(images, tmp_path, name):
    flags, expected, _ = TIMM_SUMMARIES[name]
    common = (
        f'--data-dir {images} --num-classes 3 --device cpu --model resnet18 --img-size 64 -b 12 --epochs 3 -j 1 '
        f'--stop-epoch 1'
    )
    (row,) = run_train(f'{common} {flags}'.split(), tmp_path)
    assert list(row) == ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
    for column, value in expected.items():
        tolerance = 3e-3 if 'loss' in column else 1e-4
        assert float(row[column]) == pytest.approx(value, abs=tolerance), column


@pytest.mark.parametrize('name', TIMM_SUMMARIES)
def test_learning_rates_are_those_of_timms_script(few_images, tmp_path, name):
    flags, _, rates = TIMM_SUMMARIES[name]
    common = f'{few_images} {SMALL} --img-size 32 -b 36 --epochs 3 -j 0'
    rows = run_train(f'{common} {flags}'.split(), tmp_path)
    assert [float(row['lr']) for row in rows] == rates


def plain_loop(options):
    """One epoch of timm's parts, as its script puts them together, and the learning rate of every epoch."""
    device = torch.device('cpu')
    random_seed(options.seed, 0)
    model = create_model(
        options.model,
        in_chans=3,
        num_classes=options.num_classes,
        drop_rate=options.drop,
        drop_path_rate=options.drop_path,
        bn_momentum=options.bn_momentum,
    )
    if options.head_init_scale is not None:
        with torch.no_grad():
            model.get_classifier().weight.mul_(options.head_init_scale)
            model.get_classifier().bias.mul_(options.head_init_scale)
    if options.head_init_bias is not None:
        torch.nn.init.constant_(model.get_classifier().bias, options.head_init_bias)
    config = resolve_data_config(vars(options), model=model)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)

    mixes = options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None
    mixing = dict(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        cutmix_minmax=options.cutmix_minmax,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=options.num_classes,
    )
    prefetch = not options.no_prefetcher
    common = dict(
        input_size=config['input_size'],
        batch_size=options.batch_size,
        mean=config['mean'],
        std=config['std'],
        num_workers=options.workers,
        device=device,
        use_prefetcher=prefetch,
    )
    loader = create_loader(
        create_dataset('', options.data_dir, split='train', is_training=True),
        is_training=True,
        re_prob=options.reprob,
        re_mode=options.remode,
        scale=options.scale,
        ratio=options.ratio,
        color_jitter=options.color_jitter,
        auto_augment=options.aa,
        interpolation=options.train_interpolation,
        no_aug=options.no_aug,
        collate_fn=FastCollateMixup(**mixing) if mixes and prefetch else None,
        **common,
    )
    eval_loader = create_loader(
        create_dataset('', options.data_dir, split='validation'),
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        **common,
    )
    mix = Mixup(**mixing) if mixes and not prefetch else None

    bce = dict(target_threshold=options.bce_target_thresh, sum_classes=options.bce_sum)
    if options.bce_loss:
        criterion = BinaryCrossEntropy(smoothing=0.0 if mixes else options.smoothing, **bce)
    elif mixes:
        criterion = SoftTargetCrossEntropy()
    else:
        criterion = LabelSmoothingCrossEntropy(options.smoothing) if options.smoothing else torch.nn.CrossEntropyLoss()

    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=options))
    ema = ModelEmaV3(model, decay=options.model_ema_decay) if options.model_ema else None
    steps = options.grad_accum_steps
    updates_per_epoch = (len(loader) + steps - 1) // steps
    schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(options), updates_per_epoch=updates_per_epoch)

    model.train()
    optimizer.zero_grad()
    total = count = updates = 0
    last_group = len(loader) % steps
    for index, (images, target) in enumerate(loader):
        if mix is not None:
            images, target = mix(images, target)
        if options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        group = last_group if last_group and index >= len(loader) - last_group else steps
        loss = criterion(model(images), target)
        total, count = total + loss.item() * len(images), count + len(images)
        (loss / group).backward(create_graph=getattr(optimizer, 'is_second_order', False))
        if (index + 1) % steps and index != len(loader) - 1:
            continue
        if options.clip_grad is not None:
            parameters = list(model.parameters())
            dispatch_clip_grad(
                parameters[:-2] if options.clip_mode == 'agc' else parameters, options.clip_grad, options.clip_mode
            )
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        if ema is not None:
            ema.update(model, step=updates)
        schedule.step_update(updates)

    rate = sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)
    scored = ema.module if ema is not None else model
    scored.eval()
    with torch.inference_mode():
        outputs, targets = zip(*[(scored(images), target) for images, target in eval_loader], strict=True)
    output, target = torch.cat(outputs), torch.cat(targets)
    eval_loss = torch.nn.functional.cross_entropy(output, target).item()

    rates = [rate]
    for epoch in range(1, epochs):
        schedule.step(epoch)
        for update in range(1, updates_per_epoch + 1):
            schedule.step_update(epoch * updates_per_epoch + update)
        rates.append(sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups))
    return dict(train_loss=total / count, eval_loss=eval_loss, eval_top1=accuracy(output, target)[0].item()), rates


@pytest.mark.parametrize(
    'flags',
    [
        '--opt adamw --lr 1e-3 --warmup-epochs 1 --sched-on-updates --model-ema --model-ema-decay 0.9',
        '--opt sgd --lr 0.02 --grad-accum-steps 4 --clip-grad 0.5 --sched multistep --decay-milestones 1 '
        '--warmup-epochs 0',
        '--opt rmsproptf --lr 1e-3 --bce-loss --smoothing 0.1 --bce-sum --sched step --decay-epochs 1 '
        '--warmup-epochs 0',
        '--opt lamb --lr 5e-3 --reprob 0.5 --remode pixel --clip-grad 0.1 --clip-mode agc --channels-last',
        '--opt adamw --lr 1e-3 --reprob 0.5 --remode rand --no-prefetcher --smoothing 0 --drop 0.3',
        '--opt nadamw --lr 1e-3 --mixup 0.3 --mixup-mode elem --sched poly --drop-path 0.2 -j 2',
        '--opt adabelief --lr 1e-3 --cutmix 1 --mixup 0.2 --mixup-mode pair --mixup-prob 0.7 --bce-loss -j 0',
        '--opt lion --lr 1e-4 --cutmix-minmax 0.2 0.8 --no-prefetcher --bce-loss --bce-target-thresh 0.3 --sched tanh',
        (
            '--opt sgd --lr-base 0.05 --head-init-scale 0.1 --head-init-bias -2 --aa augmix-m5-w4-d2 '
            '--model test_efficientnet --bn-momentum 0.3'
        ),
        '--opt adamw --lr 1e-3 --model test_vit --layer-decay 0.7 --no-aug --sched wsd --decay-epochs 1 '
        '--warmup-epochs 1',
    ],
)
def test_a_plain_loop_of_timms_parts_gives_the_same(few_images, tmp_path, flags):
    common = f'--data-dir {few_images} {SMALL} --img-size 48 -b 12 --epochs 3 -j 1'
    if 'test_vit' in flags:
        common = common.replace('--img-size 48', '--img-size 160 -b 18')
    flags = f'{common} {flags}'.split()
    row, *_ = run_train([*flags, '--stop-epoch', '1'], tmp_path)

    options = parse_train(flags)
    if '--lr-base' in flags:
        options.lr = options.lr_base * options.batch_size / 256
    expected, rates = plain_loop(options)
    for column, value in expected.items():
        assert float(row[column]) == pytest.approx(value, rel=1e-4), column
    assert float(row['lr']) == pytest.approx(rates[0], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', [name for name in list_optimizers() if not name.startswith(('fused', 'bnb', 'kron'))]
)  # those need other packages
def test_every_optimizer_updates_as_in_a_plain_loop_and_resumes(few_images, tmp_path, name):
    flags = shlex.split(f'--data-dir {few_images} {SMALL} --img-size 32 -b 36 --epochs 2 -j 0 --opt {name} --lr 1e-3')
    whole = run_train(flags, tmp_path / 'whole')
    run_train([*flags, '--stop-epoch', '1'], tmp_path / 'parts')
    assert run_train([*flags, '--resume', 'auto'], tmp_path / 'parts') == whole
    expected, _ = plain_loop(parse_train(flags))
    for column, value in expected.items():
        assert float(whole[0][column]) == pytest.approx(value, rel=1e-4), column


def test_every_epochs_learning_rate_is_a_plain_loops(few_images, tmp_path):
    flags = (
        f'--data-dir {few_images} {SMALL} --img-size 32 -b 24 --epochs 6 -j 0 '
        '--opt sgd --lr 0.1 --sched cosine --sched-on-updates --warmup-epochs 2 --warmup-prefix --min-lr 1e-3 '
        '--cooldown-epochs 1 --lr-noise 0.3 0.9 --grad-accum-steps 2'
    ).split()
    rows = run_train(flags, tmp_path)
    _, rates = plain_loop(parse_train(flags))
    assert [float(row['lr']) for row in rows] == pytest.approx(rates, rel=1e-9)
    assert len(rates) == 9


def test_bce_without_smoothing_and_mixup_is_bce(few_images, tmp_path):
    """timm's older script falls back to softmax cross-entropy here, the published flags say BCE."""
    common = f'{few_images} {SMALL} --img-size 32 -b 36 --epochs 1 -j 0 --lr 1e-9'
    (row,) = run_train(f'{common} --bce-loss --smoothing 0 --head-init-scale 0 --head-init-bias 0'.split(), tmp_path)
    assert float(row['train_loss']) == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)  # log 3 for softmax
