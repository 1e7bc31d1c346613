"""Several views per image: batches and loss are timm's, and all draws are functions of the position in the run."""

import copy
import json
import os
import shlex
import signal

import pytest
import torch
from marks import few
from runs import BATCHES, assert_same_run, build, call, fit_until_stopped, last, summary, train, write_data
from timm.data import AugMixDataset, ImageDataset, create_transform
from timm.data.loader import fast_collate
from torch.nn import functional as F

import validate
from timm_mldecoder.flags import parse_train
from timm_mldecoder.loading.create_loaders import set_train_transform
from timm_mldecoder.loading.randomness import SAMPLE, key, seed_cpu
from timm_mldecoder.train.loop import fit

VIEWS, SIZE, RATE = 3, 4, 0.02
SPLITS = shlex.split(f'--aug-splits {VIEWS} --jsd-loss')
PLAIN = shlex.split(f"""
    --epochs 1 --opt momentum --momentum 0 --lr {RATE} --weight-decay 0 --sched none --val-split=
""")
HEAD = shlex.split('--use-ml-decoder-head 1 --decoder-embedding 32 --ml-decoder-kwargs dropout=0')
#: A run in which everything changes that a resumed run needs.
MOVING = [*SPLITS, *shlex.split("""
    --epochs 3 --opt adamw --lr 1e-2 --warmup-epochs 0 --model-ema --model-ema-decay 0.8 --split-bn
    --reprob 0.5 --resplit --aa augmix-m5-w2 --drop 0.1
""")]  # fmt: skip


def images_of(run, epoch=0):
    return [images for images, _ in run.train_loader.epoch(epoch)]


def plain_loss(logits, target, smoothing):
    """Cross-entropy of the first view, and the mean divergence of all views from their mean (arXiv 1912.02781)."""
    views = logits.double().softmax(1).reshape(VIEWS, SIZE, -1)
    mixture = views.mean(0)
    divergence = (views * (views / mixture).log()).sum(2).mean()
    return F.cross_entropy(logits[:SIZE].double(), target[:SIZE], label_smoothing=smoothing) + 12 * divergence


@pytest.mark.parametrize('smoothing', few([0.1, 0.0], 1))
@pytest.mark.parametrize(
    'flags', [['--jsd-loss'], ['--loss', 'jsd'], ['--jsd-loss', *HEAD]], ids=['flag', 'name', 'head']
)
def test_steps_are_those_of_a_plain_loop(data, tmp_path, flags, smoothing):
    run = build(data, tmp_path, *PLAIN, '--aug-splits', str(VIEWS), *flags, '--smoothing', str(smoothing))
    model = run.state.task.get_trainable_module()
    reference, batches, states, losses = copy.deepcopy(model).train(), [], [], []

    def record(_, inputs):
        batches.append([tensor.clone() for tensor in inputs])
        states.append(copy.deepcopy(model.state_dict()))

    run.state.task.register_forward_pre_hook(record)
    fit(run)
    states.append(model.state_dict())

    assert len(batches) == BATCHES
    # each from the run's own state: a ReLU at its kink would make much of a difference in the last bit
    for (images, target), before, after in zip(batches, states, states[1:], strict=False):
        assert len(images) == VIEWS * SIZE and torch.equal(target, target[:SIZE].repeat(VIEWS))
        reference.load_state_dict(before)
        reference.zero_grad()
        loss = plain_loss(reference(images), target, smoothing)
        losses.append(loss.item())
        loss.backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= RATE * parameter.grad
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-5 * RATE)
    assert float(summary(tmp_path / 'run')[0]['train_loss']) == pytest.approx(sum(losses) / BATCHES, rel=1e-5)


def test_each_view_has_a_batch_norm_of_its_own(data, tmp_path):
    run = build(data, tmp_path, *PLAIN, *SPLITS, '--smoothing', '0')
    plain = run.state.task.get_trainable_module().train()
    images, target = next(iter(run.train_loader.epoch(0)))
    run.close()
    run = build(data, tmp_path / 'split', *PLAIN, *SPLITS, '--smoothing', '0', '--split-bn')
    model = run.state.task.get_trainable_module().train()
    assert torch.equal(images, next(iter(run.train_loader.epoch(0)))[0])
    run.close()
    copies = [copy.deepcopy(plain) for _ in range(VIEWS)]
    logits = torch.cat([one(view) for one, view in zip(copies, images.split(SIZE), strict=True)])
    loss = run.state.task(images, target)['loss']
    torch.testing.assert_close(loss.double(), plain_loss(logits, target, 0.0), rtol=1e-4, atol=1e-6)
    norms = {name: norm for name, norm in model.named_modules() if hasattr(norm, 'aux_bn')}
    assert norms
    for name, norm in norms.items():
        for one, own in zip(copies, [norm, *norm.aux_bn], strict=True):
            torch.testing.assert_close(own.running_mean, one.get_submodule(name).running_mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.eval()(images), copies[0].eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('workers', [0, 1])
def test_batches_are_those_of_timms_dataset_and_collate(data, tmp_path, workers):
    run = build(data, tmp_path, *PLAIN, *SPLITS, '--aa', 'rand-m9-mstd0.5', '-j', str(workers))
    batches = [images.clone() for images in images_of(run, epoch=1)]
    run.train_loader.batches.begin(1)
    mean, std = (torch.tensor(run.data_config[name]).view(1, 3, 1, 1) for name in ('mean', 'std'))
    dataset = AugMixDataset(ImageDataset(str(data / 'train')), VIEWS)
    dataset.transform = create_transform(
        (3, 32, 32), is_training=True, use_prefetcher=True, separate=True, auto_augment='rand-m9-mstd0.5',
        color_jitter=0.4, interpolation='random', mean=run.data_config['mean'], std=run.data_config['std'],
    )  # fmt: skip
    for images, draws in zip(batches, run.train_loader.batches, strict=True):
        samples = []
        for draw in draws:
            seed_cpu(key(SAMPLE, draw.seed, draw.epoch, draw.position))
            samples.append(dataset[draw.index])
        expected = fast_collate(samples)[0].float().sub(mean * 255).div(std * 255)
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
        first, *others = images.split(SIZE)
        assert not any(torch.equal(first, view) for view in others) and not torch.equal(*others)
    run.close()


def test_erasing_and_cutout_spare_the_first_view(data, tmp_path):
    def views(*flags):
        run = build(data, tmp_path, *PLAIN, *SPLITS, '--color-jitter', '0', '--train-crop-mode', 'squash', *flags)
        images = torch.cat([torch.stack(images.split(SIZE), 1) for images in images_of(run)])
        run.close()
        return images

    shared = views('--hflip', '0', '--train-interpolation', 'bilinear')
    assert torch.equal(shared[:, :1].expand_as(shared), shared)
    for flags in ('--reprob 1 --remode const --resplit', '--cutout 0.5', '--cutout 0.5 --cutout-place after'):
        changed = views('--hflip', '0', '--train-interpolation', 'bilinear', *flags.split())
        assert torch.equal(changed[:, 0], shared[:, 0])
        assert all((changed[:, view] != shared[:, view]).flatten(1).any(1).all() for view in range(1, VIEWS))
    erased = views('--hflip', '0', '--train-interpolation', 'bilinear', '--reprob', '1', '--remode', 'const')
    assert (erased[:, 0] != shared[:, 0]).flatten(1).any(1).all(), 'without --resplit all views'


def test_workers_change_nothing(data, tmp_path):
    assert_same_run(*(train(data, tmp_path / workers, *MOVING, '-j', workers) for workers in ('0', '2')))


def test_a_run_that_is_stopped_within_an_epoch_resumes_to_the_last_bit(data, tmp_path):
    whole = train(data, tmp_path / 'whole', *MOVING)
    run = build(data, tmp_path, *MOVING)
    passes = iter(range(1, 1000))

    def stop(module, _):
        if module.training and next(passes) == BATCHES + 2:
            os.kill(os.getpid(), signal.SIGTERM)

    run.state.task.get_trainable_module().register_forward_pre_hook(stop)
    assert fit_until_stopped(run) == 143
    assert_same_run(train(data, tmp_path, *MOVING, '--resume', 'auto'), whole)


@pytest.mark.parametrize('flags', few(['', '--no-use-ema'], 1))
def test_a_checkpoint_with_split_batch_norm_is_scored_as_in_training(data, tmp_path, capsys, flags):
    folder = train(data, tmp_path, *MOVING, '--epochs', '2', *(['--no-model-ema'] if flags else []))
    assert any('.aux_bn.' in name for name in last(folder)['state_dict'])
    capsys.readouterr()
    validate.main(
        [str(data), '-j', '0', '--device', 'cpu', '--checkpoint', str(folder / 'last.pth.tar'), *flags.split()]
    )
    scored = json.loads(capsys.readouterr().out.split('--result\n')[1])
    assert scored['top1'] == pytest.approx(float(summary(folder)[-1]['eval_top1']), abs=1e-4)


def test_halves_of_a_batch_have_batch_norms_of_their_own_with_resplit(data, tmp_path):
    run = build(data, tmp_path, *PLAIN, '--split-bn', '--resplit', '--reprob', '1')
    model = run.state.task.get_trainable_module()
    fit(run)
    norms = [norm for norm in model.modules() if hasattr(norm, 'aux_bn')]
    assert norms and all(len(norm.aux_bn) == 1 for norm in norms)
    assert not any(torch.equal(norm.running_mean, norm.aux_bn[0].running_mean) for norm in norms)


def test_a_run_without_split_batch_norm_starts_from_its_weights_but_cannot_resume_it(data, tmp_path):
    train(data, tmp_path, *PLAIN, *SPLITS, '--split-bn', '--epochs', '1')
    with pytest.raises(ValueError, match='aux_bn'):
        build(data, tmp_path, *PLAIN, *SPLITS, '--no-split-bn', '--resume', 'auto', '--epochs', '2')
    source = str(tmp_path / 'run' / 'last.pth.tar')
    train(data, tmp_path / 'other', *PLAIN, *SPLITS, '--initial-checkpoint', source)


def test_an_unreadable_image_is_named(tmp_path):
    data = write_data(tmp_path / 'data')
    bad = next((data / 'train' / 'class_1').iterdir())
    bad.write_bytes(b'')
    folder = train(data, tmp_path, *PLAIN, *SPLITS)
    assert str(bad) in (folder / 'bad_images.csv').read_text()


def test_streams_are_refused():
    class Stream(torch.utils.data.IterableDataset):
        transform = None

        def __iter__(self):
            return iter(())

    config = dict(input_size=(3, 32, 32), interpolation='bilinear', mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(ValueError, match='--aug-splits .*wds/x'):
        set_train_transform(parse_train(['DIR', '--dataset', 'wds/x', *SPLITS]), Stream(), config)


@pytest.mark.slow
def test_two_ranks_share_the_statistics_of_every_view(data, tmp_path):
    flags = [*shlex.split('--model test_resnet --img-size 32 --num-classes 3 --device cpu -j 0 -b 4'), *PLAIN, *SPLITS]
    flags += ['--split-bn', '--output', tmp_path, '--experiment', 'run']
    call('train.py', data, *flags, processes=2).check_returncode()
    content = last(tmp_path / 'run')
    names = [name for name in content['state_dict'] if 'aux_bn' in name and name.endswith('running_mean')]
    assert names
    for name in names:
        own = content['state_dict'][name]
        first = content['state_dict'][name.partition('.aux_bn')[0] + '.running_mean']
        assert own.isfinite().all() and not torch.equal(own, first)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--aug-splits 1', '--aug-splits 1'),
        ('--jsd-loss', '--jsd-loss .*--aug-splits'),
        ('--loss jsd', '--loss jsd .*--aug-splits'),
        ('--aug-splits 2 --mixup 0.2', '--aug-splits 2 .*--mixup'),
        ('--aug-splits 2 --cutmix 1', '--aug-splits 2 .*--cutmix'),
        ('--aug-splits 2 --cutmix-minmax 0.2 0.8', '--aug-splits 2 .*--cutmix-minmax'),
        ('--aug-splits 2 --no-aug', '--aug-splits 2 .*--no-aug'),
        ('--aug-splits 2 --no-prefetcher', '--aug-splits 2 .*--no-prefetcher'),
        ('--aug-splits 2 --train-img-sizes 32 64', '--aug-splits 2 .*--train-img-sizes'),
        ('--aug-splits 2 --jsd-loss --bce-loss', '--jsd-loss .*--bce-loss'),
        ('--aug-splits 2 --jsd-loss --loss poly', '--jsd-loss .*--loss poly'),
        ('--aug-splits 2 --jsd-loss --task multilabel', '--loss jsd .*--task classification'),
        ('--aug-splits 2 --jsd-loss --loss-class-weight 2', '--loss-class-weight 2.*jsd'),
        ('--split-bn', '--split-bn .*--aug-splits'),
        ('--split-bn --resplit --sync-bn', '--split-bn .*--sync-bn'),
        ('--split-bn --resplit -b 5', '--batch-size 5.*--split-bn'),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_train(['DIR', *flags.split()])
