"""NaFlex: sequences of patches in training and evaluation, as timm's script feeds them, and never their padding."""

import csv
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_folders import write_images
from marks import few
from multilabel_data import write_image
from runs import assert_same_run, build, call, fit_until_stopped, start, summary, train
from timm.data import NaFlexMixup, create_naflex_loader
from timm.data.naflex_dataset import NaFlexMapDatasetWrapper
from torch.utils.data import default_collate

from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import parse_train
from timm_mldecoder.loading.datasets import create_split
from timm_mldecoder.loading.loader import KeyedSamples
from timm_mldecoder.loading.naflex import PatchFormat, create_train_batches
from timm_mldecoder.loading.randomness import BATCH, key, seed_cpu
from timm_mldecoder.modeling.create import script
from validate import main as validate

SMALL = dict(embed_dim=48, depth=1, num_heads=3)
SIZES = 'embed_dim=48 depth=1 num_heads=3'
MODEL = f'--model naflexvit_base_patch16_gap --num-classes 3 --device cpu -j 0 --model-kwargs {SIZES}'
PATCHES = '--naflex-loader --naflex-train-seq-lens 8 16 --naflex-max-seq-len 16'
#: A run in which everything changes that a resumed run needs.
MOVING = shlex.split(f"""
    {MODEL} {PATCHES} -b 8 --epochs 3 --opt adamw --lr 1e-2 --warmup-epochs 0 --grad-accum-steps 2 --model-ema
    --model-ema-decay 0.8 --mixup 0.2 --cutmix 1 --reprob 0.3 --aa rand-m5 --use-ml-decoder-head 1
    --decoder-embedding 32
""")
HEAD = "ml_decoder={'decoder_embedding':48,'num_heads':4,'dim_feedforward':64,'dropout':0.0}"
# Of the parts of timm's script that these flags reach, library 1.0.31 with torch 2.15 on a CPU: `train.py --data-dir
# DATA --num-classes 3 --device cpu --model naflexvit_base_patch16_gap -j 0 --no-aug --naflex-loader --warmup-epochs 0
# --naflex-max-seq-len 16` and the flags given here, on `write_images(folder)`. The plug-in lets it take `ml_decoder`.
SUMMARIES = {
    '-b 16 --epochs 3 --opt sgd --lr 0.05 --grad-accum-steps 2 --naflex-train-seq-lens 9 16 25 '
    '--naflex-patch-sizes 12 16 --naflex-patch-size-probs 1 3 --model-kwargs enable_patch_interpolator=True '
    f'{SIZES}': """
        train_loss,eval_loss,lr
        1.5614057646857367,1.4844296601083544,0.05
        1.2526791625552707,1.127615057097541,0.037500000000000006
        1.106986763742235,1.0909583462609185,0.012500000000000006
    """,
    '-b 16 --epochs 3 --opt sgd --lr 0.05 --naflex-train-seq-lens 9 16 25 --naflex-loss-scale none '
    f'--model-kwargs {SIZES} {HEAD}': """
        train_loss,eval_loss,lr
        2.5166788578033445,1.209102416038513,0.05
        1.1613997750812106,1.116408724255032,0.037500000000000006
        1.1106931474473742,1.1036080837249755,0.012500000000000006
    """,
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """60 training and 15 validation images of three classes."""
    return write_images(tmp_path_factory.mktemp('data'), train=20, validation=5)


def patch_batch(padding=0.0):
    """Two images of 3 x 3 and 2 x 4 patches in sequences of 12, with a value in the padding."""
    patches = torch.randn(2, 12, 768, generator=torch.Generator().manual_seed(0))
    coord, valid = torch.zeros(2, 12, 2, dtype=torch.int64), torch.zeros(2, 12, dtype=torch.bool)
    for image, (rows, columns) in enumerate([(3, 3), (2, 4)]):
        grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing='ij')
        coord[image, : rows * columns] = torch.stack(grid, dim=-1).flatten(0, 1)
        valid[image, : rows * columns] = True
    patches[~valid] = padding
    return dict(patches=patches, patch_coord=coord, patch_valid=valid, seq_len=12)


@pytest.mark.parametrize('pool', few(['gap', 'map'], 1))
@pytest.mark.parametrize(
    'head',
    [
        {},
        dict(ml_decoder=dict(num_of_groups=3, decoder_embedding=32)),
        dict(ml_decoder=dict(decoder_embedding=32, num_layers=2)),
        dict(ml_decoder=dict(decoder_embedding=32, word_embeddings=torch.eye(7, 5))),
        dict(ml_decoder=dict(decoder_embedding=32, attention_projections=False)),
        dict(ml_decoder=dict(decoder_embedding=32, prefix_tokens=True)),
        dict(cosine_classifier=4.0),
    ],
    ids=['default', 'groups', 'two layers', 'text queries', 'no projections', 'prefix tokens', 'cosine'],
)
def test_padding_changes_no_logit(pool, head):
    model = timm.create_model(f'naflexvit_base_patch16_{pool}', num_classes=7, **SMALL, **head).eval()
    batch, padded = patch_batch(), patch_batch(37.0)
    nearly = dict(rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        logits = model(batch)
        torch.testing.assert_close(model(padded), logits, **nearly)
        seen = dict(padded, patch_valid=torch.ones(2, 12, dtype=torch.bool))
        assert not torch.allclose(model(seen), logits, **nearly), 'the mask is what hides the padding'
        with torch.autocast('cpu', dtype=torch.bfloat16):
            torch.testing.assert_close(model(padded), model(batch), **nearly)
        if 'ml_decoder' in head:
            model.get_classifier().fold()
            torch.testing.assert_close(model(padded), logits, rtol=1e-5, atol=1e-5)


def test_attention_weights_are_zero_at_padding():
    model = timm.create_model('naflexvit_base_patch16_gap', num_classes=7, ml_decoder=True, **SMALL).eval()
    batch = patch_batch(37.0)
    features = model.forward_features(**{name: batch[name] for name in ('patches', 'patch_coord', 'patch_valid')})
    tokens = model._image_tokens(model._pre_logits(features['patches']))
    weights = model.get_classifier().attention_weights(tokens, batch['patch_valid'])
    assert weights[~batch['patch_valid'][:, None].expand_as(weights)].eq(0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 7))


def test_padding_changes_no_logit_of_gemma4():
    options = dict(depth=1, num_classes=5, encoder_pool='', ml_decoder=dict(decoder_embedding=32))
    model = timm.create_model('gemma4_vit_167m', **options).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(patch_batch(1.0)), model(patch_batch(0.0)), rtol=1e-6, atol=1e-6)


def options_of(data, flags=''):
    return parse_train([str(data), *shlex.split(f'{MODEL} {PATCHES} -b 8 {flags}')])


def parts(data, flags='', rank=0, ranks=1, mixing=None):
    """Return dataset, batches and collate function of a training loader without augmentation."""
    options = options_of(data, flags)
    augmentation = dict(is_training=True, no_aug=True, interpolation='bicubic', use_prefetcher=True)
    world, patches = World(torch.device('cpu'), rank, ranks), PatchFormat((16, 16), channels_last=True)
    dataset = create_split(options, 'train', training=True)
    return create_train_batches(options, dataset, patches, world, augmentation=augmentation, mixing=mixing)


@pytest.mark.parametrize('ranks', [1, 2])
def test_batches_are_those_of_timms_loader(data, ranks):
    sizes = '--naflex-patch-sizes 8 16 --naflex-patch-size-probs 1 3'
    for rank in range(ranks):
        dataset, batches, collate = parts(data, sizes, rank, ranks)
        loader = create_naflex_loader(
            create_split(options_of(data), 'train', training=True), patch_size_choices=[8, 16],
            patch_size_choice_probs=[1, 3], train_seq_lens=(8, 16), batch_size=8, is_training=True, no_aug=True,
            interpolation='bicubic', num_workers=0, distributed=ranks > 1, rank=rank, world_size=ranks,
            device=torch.device('cpu'), pin_memory=False,
        ).loader  # fmt: skip
        for epoch in range(2):
            loader.dataset.set_epoch(epoch)
            batches.begin(epoch)
            drawn = [[sample for _, sample, _ in map(KeyedSamples(dataset).__getitem__, draws)] for draws in batches]
            assert len(batches) == len(drawn)
            for ours, theirs in zip(map(collate, drawn), loader, strict=True):
                assert torch.equal(ours[1], theirs[1])
                assert all(torch.equal(ours[0][name], theirs[0][name]) for name in ('patches', 'patch_coord'))
                assert torch.equal(ours[0]['patch_valid'], theirs[0]['patch_valid'])


@pytest.mark.parametrize('ranks', [1, 7])
def test_every_place_of_an_epoch_is_visited_once_from_any_batch(data, ranks):
    places, indices = [], []
    for rank in range(ranks):
        _, batches, _ = parts(data, rank=rank, ranks=ranks)
        batches.begin(3)
        whole = list(batches)
        places += [draw.position for draws in whole for draw in draws]
        indices += [draw.index[0] for draws in whole for draw in draws]
        batches.begin(3, batch=2)
        assert list(batches) == whole[2:]
    assert sorted(places) == list(range(len(places))) and len(places) < 60 + ranks
    assert set(indices) == set(range(60))


def test_images_are_mixed_as_by_timm_with_the_draws_of_their_batch(data):
    settings = dict(num_classes=3, mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1)
    dataset, batches, collate = parts(data, mixing=NaFlexMixup(**settings))
    first = next(iter(batches))
    samples = [KeyedSamples(dataset)[draw][1] for draw in first]
    seed_cpu(key(BATCH, 42, 0, first[0].position))
    mixed, target = collate(samples)
    seed_cpu(key(BATCH, 42, 0, first[0].position))
    images, expected = NaFlexMixup(**settings)([image for (image, _), _ in samples], [label for _, label in samples])
    assert torch.equal(target, torch.stack(expected))
    wrapper = NaFlexMapDatasetWrapper(range(8), patch_size=16, seq_lens=(len(mixed['patches'][0]),))
    patches = default_collate([wrapper.patchifiers[0](image)['patches'].float() for image in images])
    assert torch.equal(mixed['patches'][mixed['patch_valid']], patches.flatten(0, 1))

    collate.mixup_enabled = False
    plain, target = collate(samples)
    assert not torch.equal(plain['patches'], mixed['patches'])
    assert target.max(dim=1).values.eq(target.max()).all(), 'labels are smoothed still'


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.mark.parametrize('flags', SUMMARIES, ids=['sizes', 'sizes, head'])
def test_runs_follow_those_of_timms_script(images, tmp_path, flags):
    expected = list(csv.DictReader(line.strip() for line in SUMMARIES[flags].strip().splitlines()))
    run = f'{MODEL.partition(" --model-kwargs")[0]} --no-aug --naflex-loader --naflex-max-seq-len 16 --warmup-epochs 0'
    rows = summary(train(images, tmp_path, *f'{run} {flags}'.split()))
    for row, timms in zip(rows, expected, strict=True):
        for column in ('train_loss', 'eval_loss'):
            assert float(row[column]) == pytest.approx(float(timms[column]), abs=3e-3), column
        assert float(row['lr']) == pytest.approx(float(timms['lr']), rel=1e-9)


def test_the_loss_grows_with_the_batch_size(data, tmp_path):
    for number, (growth, expected) in enumerate(dict(none=1.0, sqrt=2**0.5, linear=2.0).items()):
        flags = shlex.split(f'{MODEL} {PATCHES} -b 8 --naflex-loss-scale {growth}')
        assert build(data, tmp_path / str(number), *flags).loss_scale(16) == pytest.approx(expected)


def test_a_size_that_is_no_multiple_of_the_patch_is_for_whole_images_alone(data, tmp_path):
    build(data, tmp_path / 'patches', *MODEL.split(), *PATCHES.split(), '--img-size', '50').close()
    with pytest.raises(ValueError, match='--img-size: the model does not take images of 50 x 50'):
        build(data, tmp_path / 'whole', *MODEL.split(), '--img-size', '50')


def test_normalizing_in_the_workers_trains_the_same(data, tmp_path):
    flags = shlex.split(f'{MODEL} {PATCHES} -b 8 --epochs 1 --no-aug')
    runs = [summary(train(data, tmp_path / name, *flags, *more))[0]
            for name, *more in (('a',), ('b', '--no-prefetcher'), ('c', '-j', '2'))]  # fmt: skip
    assert float(runs[0]['train_loss']) == pytest.approx(float(runs[1]['train_loss']), rel=1e-5)
    assert runs[0] == runs[2], 'the number of workers changes nothing'


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp('undisturbed'), *MOVING)


def stop_in(run, forward):
    """Send this process a SIGTERM during the given forward pass of training, counted from 1."""
    passes = iter(range(1, 100))

    def count(model, _):
        if model.training and next(passes) == forward:
            os.kill(os.getpid(), signal.SIGTERM)

    run.state.task.get_trainable_module().register_forward_pre_hook(count)


def test_a_run_stopped_within_an_epoch_resumes_to_the_bit(data, undisturbed, tmp_path, capsys):
    run = build(data, tmp_path, *MOVING)
    batches = len(run.train_loader)
    assert batches % 2, 'the last optimizer step has one batch only'
    stop_in(run, batches + 3)
    assert fit_until_stopped(run) == 143
    assert list((tmp_path / 'run').glob('recovery-1-*')), 'within the second epoch'
    stopped = tmp_path / 'stopped'
    shutil.copytree(tmp_path / 'run', stopped / 'run')
    assert_same_run(train(data, tmp_path, *MOVING, '--resume', 'auto'), undisturbed)
    with pytest.raises(ValueError, match='batch_size was 8 and is 16.*--naflex-loader'):
        build(data, stopped, *MOVING, '-b', '16', '--resume', 'auto')

    # validate.py takes the loader from the checkpoint
    best = undisturbed / 'model_best.pth.tar'
    validate([str(data), '--checkpoint', str(best), '--device', 'cpu', '-j', '0', '-b', '4'])
    scored = float(re.findall(r'"top1": ([\d.]+)', capsys.readouterr().out)[-1])
    assert scored == pytest.approx(max(float(row['eval_top1']) for row in summary(undisturbed)))
    with pytest.raises(ValueError, match='--tta.*--naflex-loader'):
        validate([str(data), '--checkpoint', str(best), '--device', 'cpu', '-j', '0', '--tta', '2'])


def test_unreadable_images_are_left_out(tmp_path):
    data = write_images(tmp_path / 'data', train=6, validation=3)
    for file in ('train/class_1/002.png', 'validation/class_0/001.png'):
        (data / file).write_bytes(b'no image')
    flags = shlex.split(f'{MODEL} {PATCHES} -b 8 -vb 4 --epochs 1 --val-bad-image skip')
    (row,) = summary(train(data, tmp_path, *flags))
    assert (row['train_bad_images'], row['eval_bad_images']) == ('1', '1')


def write_multilabel(folder, ignored):
    """24 images of two classes in CSV lists; with labels to ignore, or with all labels."""
    random = np.random.RandomState(0)
    for number in range(24):
        write_image(folder / f'{number}.jpg', 10 * number)
    for split, numbers in (('train', range(16)), ('validation', range(16, 24))):
        rows = [['path', 'labels', 'ignored']]
        for number in numbers:
            present = [name for name in ('dog', 'cat') if random.randint(2)]
            missing = ['dog'] if ignored and 'dog' not in present else []
            rows.append([f'{number}.jpg', ';'.join(present), ';'.join(missing)])
        with (folder / f'{split}.csv').open('w', newline='') as file:
            csv.writer(file).writerows(rows)
    return folder


@pytest.mark.parametrize('flags', few(['--loss asl --mixup 0.5', '--loss csl', '--loss db'], 1))
def test_multilabel_data(tmp_path, flags):
    data = write_multilabel(tmp_path / 'data', ignored='csl' in flags)
    run = f'{MODEL} {PATCHES} -b 8 --num-classes 2 --epochs 1 --task multilabel --dataset csv --use-ml-decoder-head 1'
    (row,) = summary(train(data, tmp_path, *shlex.split(f'{run} --decoder-embedding 32 {flags}')))
    assert float(row['train_loss']) > 0 and 0 <= float(row['eval_map']) <= 100


@pytest.mark.parametrize('flags, named', [
    ('--model test_vit', '--naflex-loader: test_vit'),
    ('--naflex-patchify-channels-first', '--naflex-patchify-channels-first'),
    ('--model gemma4_vit_167m --model-kwargs depth=1', '--naflex-patchify-channels-first'),
    ('--naflex-patch-sizes 8 16', 'enable_patch_interpolator'),
    (f'--model-kwargs {SIZES} probe_head=linear', 'probe_head'),
    ('--naflex-patch-sizes 8 16 --naflex-patch-size-probs 1', '--naflex-patch-size-probs 1'),
    ('--train-img-sizes 32 64', '--train-img-sizes'),
    ('--aug-repeats 2', '--aug-repeats'),
    ('--aug-splits 2', '--aug-splits'),
    ('--tta 2', '--tta'),
    ('--channels-last', '--channels-last'),
    ('--mixup-mode elem --mixup 1', '--mixup-mode'),
    ('--cutmix-minmax 0.2 0.8', '--cutmix-minmax'),
    ('--sampler balanced', '--sampler'),
    ('--torchscript', '--torchscript'),
])  # fmt: skip
def test_what_does_not_go_with_patches_is_named(data, tmp_path, flags, named):
    with pytest.raises(ValueError, match=named):
        build(data, tmp_path, *shlex.split(f'{MODEL} {PATCHES} -b 8 {flags}'))


def test_torchscript_of_a_model_that_reads_patches_is_refused():
    with pytest.raises(ValueError, match='--torchcompile'):
        script(timm.create_model('naflexvit_base_patch16_gap', **SMALL))


@pytest.mark.slow
def test_two_ranks_score_each_image_once(data, tmp_path, caplog):
    flags = [data, *MOVING, '--epochs', '2', '--output', tmp_path, '--experiment', 'run']
    two = call('train.py', *flags, processes=2)
    assert two.returncode == 0, two.stderr[-3000:]
    row = summary(tmp_path / 'run')[-1]
    checkpoint = str(tmp_path / 'run' / 'last.pth.tar')
    with caplog.at_level('INFO'):
        validate([str(data), '--checkpoint', checkpoint, '--device', 'cpu', '-j', '0', '-b', '7', '--use-ema'])
    (found,) = re.findall(r' \* Loss (\S+) Acc@1 (\S+)', caplog.text)
    assert [float(value) for value in found] == pytest.approx(
        [float(row['eval_loss']), float(row['eval_top1'])], abs=6e-4
    )


@pytest.mark.slow
def test_two_killed_ranks_resume_within_an_epoch_to_the_bit(data, tmp_path):
    flags = [data, *MOVING, '--recovery-interval', '1', '--output', tmp_path]
    whole = call('train.py', *flags, '--experiment', 'whole', processes=2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    log = tmp_path / 'log'
    launcher = start('train.py', *flags, '--experiment', 'run', '--resume', 'auto', log=log, processes=2)
    while not list(tmp_path.glob('run/recovery-1-*.tar')):
        assert launcher.poll() is None, log.read_text()
        time.sleep(0.02)
    for rank in Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split():
        os.kill(int(rank), signal.SIGKILL)
    assert launcher.wait() != 0
    resumed = call('train.py', *flags, '--experiment', 'run', '--resume', 'auto', processes=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert re.search(r'Resumed from .* at epoch 1, batch [1-9]', resumed.stderr)
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


@pytest.mark.slow
@pytest.mark.parametrize('sizes', ['', '--naflex-patch-sizes 8 16'])
def test_a_compiled_model_trains_the_same(data, tmp_path, sizes):
    flags = (
        f'{MODEL} enable_patch_interpolator=True {HEAD} {PATCHES} -b 8 --epochs 2 --no-aug --model-ema {sizes}'.split()
    )
    flags += ['--grad-accum-steps', '2']
    eager = summary(train(data, tmp_path / 'eager', *flags))
    compiled = summary(train(data, tmp_path / 'compiled', *flags, '--torchcompile', 'aot_eager'))
    for ours, theirs in zip(compiled, eager, strict=True):
        for name in ('train_loss', 'eval_loss'):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-4)
