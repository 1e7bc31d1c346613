"""With its own head, a model trains as in timm's script: same order, same losses, same learning rates.

Compared with the `summary.csv` of timm's own script, and with a plain loop of timm's parts that is written out below.
Nothing in these runs is drawn at random but the initial weights and the order of the first epoch: draws of augmentation
are keyed here (see `loading.randomness`) and depend on the life of workers in timm. What is drawn is compared part
by part: orders with the samplers of timm's script, mixed batches with timm's collate function and the same draws.
"""

import csv
import random
import shlex

import numpy as np
import pytest
import torch
from image_folders import write_images
from marks import few
from runs import call, summary
from timm import create_model
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import fast_collate
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, accuracy, dispatch_clip_grad, random_seed
from torch.utils.data import DataLoader, DistributedSampler

import train
from timm_mldecoder.flags import Options, parse_train
from timm_mldecoder.loading.loader import KeyedCollate, KeyedSamples
from timm_mldecoder.loading.randomness import BATCH, EpochBatches, Order, key

SMALL = '--num-classes 3 --device cpu --model test_resnet'
# What remains of augmentation without its draws.
UNDRAWN = '--hflip 0 --scale 1 1 --ratio 1 1 --color-jitter 0 --train-interpolation bilinear'
# Of timm's own script, library 1.0.31 with torch 2.15 on a CPU: `--num-classes 3 --device cpu --model resnet18
# --img-size 64 -j 1 --log-interval 1 --no-aug` and the flags given here, on `write_images(folder)`.
RECORDED = dict(
    flags='-b 12 --epochs 3 --opt sgd --lr 0.02 --warmup-epochs 0',
    first=dict(train_loss=0.94027, eval_loss=0.65646, eval_top1=73.333),
    rates=[0.02, 0.015, 0.005],
)

# in timm's script the plug-in reads it; --use-ml-decoder-head 1 is the same here
HEAD = '--model test_resnet --lr 0.002 --model-kwargs ml_decoder={"dropout":0.0,"decoder_embedding":64}'
TOKENS = '--model deit_tiny_distilled_patch16_224 --lr 0.02 --model-kwargs img_size=48 depth=2 embed_dim=48'
# the second view is grey, the third too: views that differ without a draw
VIEWS = f'{UNDRAWN} --jsd-loss --grayscale-prob 1 --aug-splits'
# Training and evaluation losses of every epoch of timm's own script, of September 2026, with library 1.0.31 and torch
# 2.15 on a CPU: `--num-classes 3 --device cpu --img-size 48 -j 1 -b 180 --epochs 4 --opt sgd --warmup-epochs 0
# --smoothing 0.1` and the flags given here, on `write_images(folder)`; GAP_TEACHER and HEAD_TEACHER are `local-dir:`
# folders of `write_teacher`. Nothing is drawn: one batch has all images.
LOSSES = {
    f'{HEAD} --no-aug --kd-model-name HEAD_TEACHER --distill-loss-weight 0.5 --kd-temperature 2': """
        3.25992 2.01417 1.99017 1.90341
        1.79861 1.70512 1.52897 1.47726
    """,
    f'{TOKENS} --no-aug --kd-model-name GAP_TEACHER --kd-distill-type token': """
        18.90836 13.82031 2.86460 1.91747
        1.20093 3.79945 4.86459 5.14847
    """,
    f'{HEAD} {VIEWS.replace(" --jsd-loss", "")} 2 --split-bn': """
        1.67695 1.10908 1.14688 1.16516
        1.12983 1.12292 1.13208 1.13100
    """,
}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def few_images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('few_images'), train=24, validation=6)


def run_process(flags, folder):
    """The rows of summary.csv of a run in a process of its own."""
    process = call('train.py', *flags, '--output', str(folder), '--experiment', 'run')
    assert process.returncode == 0, process.stderr[-3000:]
    return summary(folder / 'run')


def run_train(flags, folder):
    train.main([*flags, '--output', str(folder), '--experiment', 'run'])
    return list(csv.DictReader((folder / 'run' / 'summary.csv').open()))


# Vector instructions round differently, and BatchNorm over small batches amplifies it to more than the tolerance: the
# recorded runs are compared with the kernels that every x86 CPU has.
PLAIN_KERNELS = {'ATEN_CPU_CAPABILITY': 'default', 'ONEDNN_MAX_CPU_ISA': 'SSE41', 'MKL_CBWR': 'COMPATIBLE'}


@pytest.mark.slow
def test_a_run_follows_that_of_timms_script(images, few_images, tmp_path, monkeypatch):
    for name, value in PLAIN_KERNELS.items():  # read when a process imports torch
        monkeypatch.setenv(name, value)
    common = f'--num-classes 3 --device cpu --no-aug {RECORDED["flags"]}'
    # later epochs have an order of their own
    settings = f'--data-dir {images} --model resnet18 --img-size 64 -j 1 --stop-epoch 1'
    (row,) = run_process(shlex.split(f'{settings} {common}'), tmp_path)
    assert list(row) == ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
    for column in ('train_loss', 'eval_loss'):
        assert float(row[column]) == pytest.approx(RECORDED['first'][column], abs=3e-3), column
    # one image of 45 may be on the other side of the boundary on a CPU with other kernels
    assert float(row['eval_top1']) == pytest.approx(RECORDED['first']['eval_top1'], abs=100 / 45 + 1e-2)
    # the schedule of all epochs does not depend on model and data
    small = shlex.split(f'--data-dir {few_images} --model test_resnet --img-size 32 -j 0 {common}')
    rows = run_train(small, tmp_path / 'small')
    assert [float(row['lr']) for row in rows] == pytest.approx(RECORDED['rates'], rel=1e-9)


def write_teacher(folder, **head):
    torch.manual_seed(7)
    model = create_model('test_efficientnet', num_classes=3, **head)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of one batch of noise, so that outputs differ from image to image
    with torch.no_grad():
        model.train()(torch.rand(64, 3, 48, 48))
    save_for_hf(model, folder)
    return f'local-dir:{folder}'


@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp('teachers')
    return dict(
        GAP_TEACHER=write_teacher(folder / 'gap'),
        HEAD_TEACHER=write_teacher(folder / 'head', ml_decoder=dict(dropout=0.0, decoder_embedding=32)),
    )


@pytest.mark.parametrize('flags', LOSSES)
def test_losses_of_every_epoch_are_those_of_timms_script(images, teachers, tmp_path, flags):
    expected = [[float(loss) for loss in line.split()] for line in LOSSES[flags].strip().splitlines()]
    common = '--num-classes 3 --device cpu --img-size 48 -j 0 -b 180 --epochs 4 --opt sgd --warmup-epochs 0'
    given = [teachers.get(flag, flag) for flag in flags.split()]
    rows = run_train(['--data-dir', str(images), *common.split(), '--smoothing', '0.1', *given], tmp_path)
    for column, losses in zip(('train_loss', 'eval_loss'), expected, strict=True):
        assert [float(row[column]) for row in rows] == pytest.approx(losses, abs=3e-3), column


@pytest.mark.parametrize('samples', [1, 24, 255, 1000])
def test_the_first_order_of_one_rank_is_that_of_torchs_loader(samples):
    for seed in (0, 42):
        torch.manual_seed(seed)
        order = Order(samples, seed, torch.get_rng_state())
        loader = DataLoader(range(samples), batch_size=None, shuffle=True)
        assert list(order.indices(0, ranks=1)) == [int(index) for index in loader]


@pytest.mark.parametrize('samples', few([24, 7, 255, 1000], 1))
@pytest.mark.parametrize('repeats', [0, 1.5, 3])
def test_orders_of_several_ranks_are_those_of_timms_samplers_with_the_seed_of_the_run(samples, repeats):
    for ranks in (2, 3):
        order = Order(samples, 42, torch.get_rng_state(), repeats=repeats)
        for epoch in (0, 1, 5):
            indices = order.indices(epoch, ranks)
            for rank in range(ranks):
                settings = dict(num_replicas=ranks, rank=rank)
                if repeats:
                    sampler = RepeatAugSampler(range(samples), num_repeats=repeats, **settings)
                    sampler.set_epoch(42 + epoch)  # it has no seed of its own
                else:
                    sampler = DistributedSampler(range(samples), seed=42, **settings)
                    sampler.set_epoch(epoch)
                expected = list(map(int, sampler))
                assert list(indices[rank::ranks]) == expected
                assert order.length(ranks) == len(sampler)
                if len(expected) >= 2:
                    batches = EpochBatches(order, 2, rank, ranks)
                    batches.begin(epoch)
                    drawn = [draw.index for batch in batches for draw in batch]
                    assert drawn == expected[: len(expected) // 2 * 2]


MIXING = [
    dict(mixup_alpha=0.8),
    dict(cutmix_alpha=1.0, mode='elem'),
    dict(mixup_alpha=0.2, cutmix_alpha=1.0, switch_prob=0.4, prob=0.7, mode='pair'),
    dict(cutmix_minmax=(0.2, 0.8), mode='batch'),
    dict(mixup_alpha=0.2, cutmix_alpha=1.0, mode='elem', correct_lam=False),
]


class Images(torch.utils.data.Dataset):
    """Images of noise."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return np.random.RandomState(index).randint(0, 256, (3, 24, 24)).astype(np.uint8), index % 5


@pytest.mark.parametrize('settings', MIXING)
def test_mixed_batches_are_those_of_timm_with_the_same_draws(settings):
    settings = dict(num_classes=5, label_smoothing=0.1, **settings)
    samples = KeyedSamples(Images())
    batches = EpochBatches(Order(16, 42, torch.get_rng_state()), 4, pairs=True)
    collate = KeyedCollate(FastCollateMixup(**settings), partial=False, mixup_off_epoch=2)
    for epoch in (0, 1, 2):
        batches.begin(epoch)
        for draws in batches:
            (images, target), _, _ = collate([samples[draw] for draw in draws])
            plain = [Images()[draw.index] for draw in draws]
            seed = key(BATCH, 42, epoch, draws[0].position)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            timms = FastCollateMixup(**settings)
            timms.mixup_enabled = epoch < 2
            expected = timms(plain)
            assert torch.equal(images, expected[0]) and torch.equal(target, expected[1])
            is_mixed = not torch.equal(images, fast_collate(plain)[0])
            assert is_mixed == (epoch < 2) or 'prob' in settings


def plain_loop(options: Options):
    """One epoch of timm's parts, as its script puts them together, and the learning rate of every epoch."""
    device, values = torch.device('cpu'), options.to_namespace()
    random_seed(options.seed, 0)
    model = create_model(options.model, in_chans=3, num_classes=options.num_classes, bn_momentum=options.bn_momentum)
    if options.head_init_scale is not None:
        with torch.no_grad():
            model.get_classifier().weight.mul_(options.head_init_scale)
            model.get_classifier().bias.mul_(options.head_init_scale)
    if options.head_init_bias is not None:
        torch.nn.init.constant_(model.get_classifier().bias, options.head_init_bias)
    config = resolve_data_config(options.to_dict(), model=model)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)

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
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        color_jitter=options.color_jitter,
        interpolation=options.train_interpolation,
        no_aug=options.no_aug,
        **common,
    )
    eval_loader = create_loader(
        create_dataset('', options.data_dir, split='validation'),
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        **common,
    )

    bce = dict(target_threshold=options.bce_target_thresh, sum_classes=options.bce_sum)
    if options.bce_loss:
        criterion = BinaryCrossEntropy(smoothing=options.smoothing, **bce)
    else:
        criterion = LabelSmoothingCrossEntropy(options.smoothing) if options.smoothing else torch.nn.CrossEntropyLoss()

    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=values))
    ema = ModelEmaV3(model, decay=options.model_ema_decay) if options.model_ema else None
    steps = options.grad_accum_steps
    updates_per_epoch = (len(loader) + steps - 1) // steps
    schedule, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(options.to_namespace()), updates_per_epoch=updates_per_epoch
    )

    model.train()
    optimizer.zero_grad()
    total = count = updates = 0
    last_group = len(loader) % steps
    for index, (images, target) in enumerate(loader):
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
    few(
        [
            '--opt adamw --lr 1e-3 --warmup-epochs 1 --sched-on-updates --model-ema --model-ema-decay 0.9 --no-aug',
            '--opt sgd --lr 0.02 --grad-accum-steps 4 --clip-grad 0.5 --sched multistep --decay-milestones 1 '
            '--warmup-epochs 0 --no-aug',
            f'--opt rmsproptf --lr 1e-3 --bce-loss --bce-sum --sched step --decay-epochs 1 --warmup-epochs 0 {UNDRAWN}',
            '--opt lamb --lr 5e-3 --clip-grad 0.1 --clip-mode agc --channels-last --no-aug',
            f'--opt adamw --lr 1e-3 --no-prefetcher --smoothing 0 -j 2 {UNDRAWN}',
            '--opt lion --lr 1e-4 --bce-loss --bce-target-thresh 0.3 --sched tanh --no-aug -j 0',
            f'--opt sgd --lr-base 0.05 --head-init-scale 0.1 --head-init-bias -2 --model test_efficientnet '
            f'--bn-momentum 0.3 {UNDRAWN}',
            '--opt adamw --lr 1e-3 --model test_vit --layer-decay 0.7 --no-aug --sched wsd --decay-epochs 1 '
            '--warmup-epochs 1',
        ],
        4,
    ),
)
def test_a_plain_loop_of_timms_parts_gives_the_same(few_images, tmp_path, flags):
    common = f'--data-dir {few_images} {SMALL} --img-size 48 -b 12 --epochs 3 -j 1'
    if 'test_vit' in flags:
        common = common.replace('--img-size 48', '--img-size 160 -b 18')
    flags = f'{common} {flags}'.split()
    row, *_ = run_train([*flags, '--stop-epoch', '1'], tmp_path)

    options = parse_train(flags)
    if '--lr-base' in flags:
        options = options.replace(lr=options.lr_base * options.batch_size / 256)
    expected, rates = plain_loop(options)
    for column, value in expected.items():  # a step multiplies the rounding of float32
        assert float(row[column]) == pytest.approx(value, rel=1e-4), column
    assert float(row['lr']) == pytest.approx(rates[0], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', ['adafactor', 'adahessian', 'adan', 'lion', 'lookahead_adam', 'madgrad', 'mars', 'muon']
)
def test_an_optimizer_of_each_kind_of_state_steps_as_in_a_plain_loop_and_resumes(few_images, tmp_path, name):
    flags = shlex.split(
        f'--data-dir {few_images} {SMALL} --img-size 32 -b 36 --epochs 2 -j 0 --no-aug --opt {name} --lr 1e-3'
    )
    whole = run_train(flags, tmp_path / 'whole')
    run_train([*flags, '--stop-epoch', '1'], tmp_path / 'parts')
    assert run_train([*flags, '--resume', 'auto'], tmp_path / 'parts') == whole
    expected, _ = plain_loop(parse_train(flags))
    for column, value in expected.items():
        assert float(whole[0][column]) == pytest.approx(value, rel=1e-4), column


def test_every_epochs_learning_rate_is_a_plain_loops(few_images, tmp_path):
    flags = (
        f'--data-dir {few_images} {SMALL} --img-size 32 -b 24 --epochs 6 -j 0 --no-aug '
        '--opt sgd --lr 0.1 --sched cosine --sched-on-updates --warmup-epochs 2 --warmup-prefix --min-lr 1e-3 '
        '--cooldown-epochs 1 --lr-noise 0.3 0.9 --grad-accum-steps 2'
    ).split()
    rows = run_train(flags, tmp_path)
    _, rates = plain_loop(parse_train(flags))
    assert [float(row['lr']) for row in rows] == pytest.approx(rates, rel=1e-9)
    assert len(rates) == 9


@pytest.mark.parametrize(('flags', 'loss'), [('--bce-loss', 3.0), ('--loss bce', 2.0)])
def test_bce_without_smoothing_and_mixup_is_cross_entropy_as_in_timm_and_bce_by_its_name(
    few_images, tmp_path, flags, loss
):
    common = f'{few_images} {SMALL} --img-size 32 -b 36 --epochs 1 -j 0 --lr 1e-9 --smoothing 0'
    (row,) = run_train(f'{common} --head-init-scale 0 --head-init-bias 0 {flags}'.split(), tmp_path)
    assert float(row['train_loss']) == pytest.approx(np.log(loss), rel=1e-5)
