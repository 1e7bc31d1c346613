"""train.py and validate.py end to end: what a run leaves behind, and what can be done with it."""

import csv
import json
import re
import shlex
import shutil

import pytest
import timm
import torch
import yaml
from image_folders import write_images
from PIL import Image
from runs import build, fit, summary

import train
import validate
from timm_mldecoder.checkpoint.read import read_checkpoint
from timm_mldecoder.evaluation.evaluate import test_time_views as views_of
from timm_mldecoder.loading import create_loaders as loaders
from timm_mldecoder.runtime.errors import RunFailed
from timm_mldecoder.validate import checkpoints as sweep
from timm_mldecoder.validate.score import score_model

SMALL = shlex.split("""
    --num-classes 3 --device cpu --model test_resnet --img-size 32 -b 12 -j 0 --epochs 3 --opt adamw --lr 2e-3
    --warmup-epochs 0
""")
HEAD = ['--use-ml-decoder-head', '1', '--decoder-embedding', '64']


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return str(write_images(tmp_path_factory.mktemp('images'), train=24, validation=7))


@pytest.fixture(scope='module')
def finished(images, tmp_path_factory):
    """The folder of a run with an ML-Decoder head and EMA weights, which rank its checkpoints."""
    folder = tmp_path_factory.mktemp('output')
    flags = '--lr 4e-3 --no-aug --model-ema --model-ema-decay 0.2 --checkpoint-hist 2 --save-epochs 2'
    run_train(images, folder, *HEAD, *shlex.split(flags))
    return folder / 'run'


def run_train(images, output, *flags, experiment='run'):
    """Train a small model, and return the rows of the summary."""
    train.main([images, *SMALL, *flags, '--output', str(output), '--experiment', experiment])
    return summary(output / experiment)


def result(capsys):
    return json.loads(capsys.readouterr().out.split('--result\n')[1])


def test_a_run_leaves_the_files_that_timm_users_know(finished):
    names = {path.name for path in finished.iterdir()}
    assert {'args.yaml', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar', 'milestone-2.pth.tar'} <= names
    numbered = [name for name in names if name.startswith('checkpoint-')]
    assert len(numbered) == 2
    assert [row['epoch'] for row in summary(finished)] == ['0', '1', '2']
    assert float(summary(finished)[-1]['train_loss']) < float(summary(finished)[0]['train_loss'])


def test_the_best_checkpoint_is_that_of_the_best_epoch(finished):
    scores = [float(row['eval_top1']) for row in summary(finished)]
    best = torch.load(finished / 'model_best.pth.tar', weights_only=False)
    assert (best['metric'], best['epoch']) == (max(scores), scores.index(max(scores)))


def test_timm_loads_the_checkpoints(finished):
    model = timm.create_model('test_resnet', num_classes=3, ml_decoder=dict(decoder_embedding=64))
    timm.models.load_checkpoint(model, str(finished / 'last.pth.tar'), use_ema=False)
    saved = torch.load(finished / 'last.pth.tar', weights_only=False)['state_dict']
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    optimizer = torch.optim.AdamW(timm.optim.param_groups_weight_decay(model))
    assert timm.models.resume_checkpoint(model, str(finished / 'last.pth.tar'), optimizer) == 3


def test_validation_scores_a_checkpoint_as_training_did(finished, images, capsys):
    """Size, crop, classes, precision and the choice of EMA weights come with the checkpoint."""
    best = torch.load(finished / 'model_best.pth.tar', weights_only=False)
    flags = shlex.split('--model test_resnet --use-ml-decoder-head=1 -j 0')
    validate.main([images, *flags, '--checkpoint', str(finished / 'model_best.pth.tar')])
    scored = result(capsys)
    assert scored['top1'] == best['metric']
    assert scored['img_size'] == 32


@pytest.mark.parametrize(('batch', 'precision'), [('5', []), ('64', ['--model-dtype', 'float32'])])
def test_the_score_does_not_depend_on_the_batch(finished, images, capsys, batch, precision):
    last = str(finished / 'last.pth.tar')
    validate.main([images, '--checkpoint', last, '-j', '0', '-b', batch, *precision])
    row = summary(finished)[-1]
    scored = result(capsys)
    assert scored['top1'] == float(row['eval_top1'])
    assert scored['model'] == 'test_resnet', 'the model comes with the checkpoint'


def test_raw_weights_are_scored_with_a_flag(finished, images, capsys):
    """Of a checkpoint with EMA weights, whose raw weights are others."""
    content = read_checkpoint(finished / 'last.pth.tar')
    raw, ema = (next(iter(content[key].values())) for key in ('state_dict', 'state_dict_ema'))
    assert not torch.equal(raw, ema)
    flags = [images, '-j', '0', '--checkpoint']
    for ema, key in (([], 'state_dict_ema'), (['--use-ema'], 'state_dict_ema'), (['--no-use-ema'], 'state_dict')):
        bare = {'state_dict': content[key], **{name: content[name] for name in content if 'state_dict' not in name}}
        torch.save(bare, finished.parent / 'bare.pth.tar')
        validate.main([*flags, str(finished / 'last.pth.tar'), *ema])
        ours = result(capsys)
        validate.main([*flags, str(finished.parent / 'bare.pth.tar')])
        assert ours['top1'] == result(capsys)['top1']


def test_a_folder_of_checkpoints_is_scored_into_a_table(finished, images, tmp_path, capsys):
    table = tmp_path / 'results.csv'
    validate.main(
        [images, '--checkpoint', str(finished), '-j', '0', '--metrics-avg', 'macro', '--results-file', str(table)]
    )
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == len(list(finished.glob('*.pth.tar'))) == len(result(capsys))
    assert rows == sorted(rows, key=lambda row: -float(row['top1']))
    assert all(float(row['macro_recall']) == pytest.approx(float(row['top1'])) for row in rows), 'classes of equal size'


@pytest.fixture
def three(finished, tmp_path):
    """A folder of checkpoints, the second of which is damaged."""
    folder = tmp_path / 'three'
    folder.mkdir()
    for name in 'ac':
        shutil.copy(finished / 'last.pth.tar', folder / f'{name}.pth.tar')
    (folder / 'b.pth.tar').write_bytes(b'damaged')
    return folder


def test_one_checkpoint_of_several_that_fails_is_skipped_and_named(three, images, tmp_path, capsys, caplog):
    table = tmp_path / 'results.csv'
    with pytest.raises(RunFailed, match=r'1 of 3 could not be scored: .*b\.pth\.tar'):
        validate.main([images, '--checkpoint', str(three), '-j', '0', '--results-file', str(table)])
    rows = list(csv.DictReader(table.open()))
    assert [row['checkpoint'] for row in rows] == [str(three / name) for name in ('a.pth.tar', 'c.pth.tar')]
    assert len(result(capsys)) == 2
    assert f'skipped {three}/b.pth.tar' in caplog.text


def test_what_was_scored_before_an_interruption_is_kept(three, images, tmp_path, capsys, monkeypatch):
    scored, table = [], tmp_path / 'results.csv'

    def interrupted(options, *rest):
        if scored:
            raise KeyboardInterrupt
        scored.append(options.checkpoint)
        return score_model(options, *rest)

    monkeypatch.setattr(sweep, 'score_model', interrupted)
    with pytest.raises(KeyboardInterrupt):
        validate.main([images, '--checkpoint', str(three), '-j', '0', '--results-file', str(table)])
    assert [row['checkpoint'] for row in csv.DictReader(table.open())] == scored
    assert len(result(capsys)) == 1


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--checkpoint', 'none.pth.tar'], 'none.pth.tar: no such file'),
        (['--checkpoint', '{last}', '--model', 'test_vit'], 'holds another model'),
        (['--checkpoint', '{last}', '--num-classes', '4'], 'holds another model'),
        (['--checkpoint', '{last}', '--split', 'test'], "has no folder 'test'"),
        (['--checkpoint', '{last}', '--test-pool'], '--test-pool'),
        (['--checkpoint', '{last}', '--valid-labels', 'none.txt'], '--valid-labels none.txt'),
        (['--model', 'resnet51'], '--model resnet51'),
    ],
)
def test_mistakes_of_validation_are_named(finished, images, flags, message):
    flags = [flag.replace('{last}', str(finished / 'last.pth.tar')) for flag in flags]
    with pytest.raises(ValueError, match=message):
        validate.main([images, '-j', '0', *flags])


def test_valid_labels_select_outputs(finished, images, tmp_path, capsys):
    labels = tmp_path / 'labels.txt'
    flags = [images, '--checkpoint', str(finished / 'last.pth.tar'), '-j', '0']
    validate.main(flags)
    for order in ('0 1 2', '1 2 0'):  # every class, in its place and then in another
        labels.write_text(order)
        validate.main([*flags, '--valid-labels', str(labels)])
    plain, same, other = (json.loads(text)['top1'] for text in capsys.readouterr().out.split('--result\n')[1:])
    assert plain == same > other


def test_views_at_test_time_are_flips_and_crops(finished, images, tmp_path, capsys, caplog):
    batch = torch.randn(2, 3, 8, 8)
    assert torch.equal(views_of(2, (8, 8))(batch)[1], batch.flip(-1))
    corners, whole = views_of(5, (6, 6))(batch), views_of(10, (6, 6))(batch)
    assert torch.equal(corners[3], batch[..., 2:, 2:]) and torch.equal(whole[8], batch.flip(-1)[..., 2:, 2:])

    mirrored = shutil.copytree(images, tmp_path / 'mirrored')
    for path in mirrored.glob('validation/*/*.png'):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    caplog.set_level('INFO')
    lines = []
    whole = ['--crop-pct', '1']  # a crop may be a pixel off the centre, and is then another one when mirrored
    for folder, views, flags in (
        (images, '2', whole),
        (mirrored, '2', whole),
        (images, '0', whole),
        (images, '10', []),
    ):
        caplog.clear()
        validate.main([str(folder), '--checkpoint', str(finished / 'last.pth.tar'), '-j', '0', '--tta', views, *flags])
        lines.append(float(re.search(r'\* Loss ([\d.]+)', caplog.text)[1]))
    assert lines[0] == pytest.approx(lines[1], abs=1e-3) and len(set(lines)) >= 3


def test_pooling_at_test_time_sees_whole_images(images, tmp_path, capsys, monkeypatch):
    weights, seen = tmp_path / 'weights.pth', []
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), weights)

    def create_transform(*args, **settings):
        seen.append(settings['crop_pct'])
        return timm.data.create_transform(*args, **settings)

    monkeypatch.setattr(loaders, 'create_transform', create_transform)
    flags = shlex.split('--model test_resnet --num-classes 3 -j 0 --img-size 320 --test-pool --checkpoint')
    validate.main([images, *flags, str(weights)])
    assert seen == [result(capsys)['crop_pct']] == [1.0]


def test_the_colours_of_images_come_with_the_checkpoint(images, tmp_path, capsys):
    flags = '--epochs 1 --in-chans 4 --input-img-mode CMYK --mean 0.5 --std 0.5'
    run_train(images, tmp_path, *shlex.split(flags))
    capsys.readouterr()
    validate.main([images, '--checkpoint', str(tmp_path / 'run' / 'last.pth.tar'), '-j', '0'])
    assert result(capsys)['top1'] == float(summary(tmp_path / 'run')[-1]['eval_top1'])


def test_args_yaml_repeats_the_run(images, tmp_path, capsys):
    flags = shlex.join(SMALL).replace('--lr 2e-3', '--epochs 1 --opt lamb --mixup 0.2')
    train.main([images, *shlex.split(flags), '--output', str(tmp_path), '--experiment', 'first'])
    written = tmp_path / 'first' / 'args.yaml'
    assert yaml.safe_load(written.read_text())['lr'] == pytest.approx(0.1 * (12 / 256) ** 0.5)
    train.main(['--config', str(written), '--experiment', 'second'])
    assert summary(tmp_path / 'first') == summary(tmp_path / 'second')
    results = capsys.readouterr().out.split('--result\n')
    assert json.loads(results[1]) == json.loads(results[2])


def test_without_a_validation_split_the_loss_ranks(images, tmp_path):
    train.main([images, *SMALL, '--epochs', '2', '--val-split', '', '--output', str(tmp_path), '--experiment', 'run'])
    rows = summary(tmp_path / 'run')
    assert list(rows[0]) == ['epoch', 'train_loss', 'lr']
    best = torch.load(tmp_path / 'run' / 'model_best.pth.tar', weights_only=False)
    assert best['metric'] == min(float(row['train_loss']) for row in rows)


def test_image_sizes_change_within_an_epoch(images, tmp_path):
    sizes = {24: 16, 32: 12, 48: 8}
    flags = ['--train-img-sizes', *map(str, sizes), '--train-batch-sizes', *map(str, sizes.values())]
    run = build(images, tmp_path, *SMALL, *flags, '--epochs', '1', '--variable-batch-loss-scale', 'sqrt')
    seen, scales = [], []
    run.state.task.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    scale = run.loss_scale
    run.loss_scale = lambda images: scales.append(scale(images)) or scales[-1]
    fit(run)
    assert len({height for _, _, height, _ in seen}) > 1
    assert all(height == width and batch == sizes[height] for batch, _, height, width in seen)
    assert scales == [pytest.approx((batch / 12) ** 0.5) for batch, *_ in seen]


def test_multi_epochs_loader_changes_the_time_not_the_numbers(images, tmp_path):
    run = [images, *SMALL, '-j', '2', '--output', str(tmp_path)]
    train.main([*run, '--experiment', 'plain'])
    train.main([*run, '--experiment', 'early', '--use-multi-epochs-loader'])
    assert summary(tmp_path / 'plain') == summary(tmp_path / 'early')


def test_mixup_ends_at_its_off_epoch(images, tmp_path):
    """With the model held still, mixed and plain batches differ in their loss alone."""
    flags = '--epochs 2 --lr 1e-12 --smoothing 0 --no-aug --bn-momentum 0 --model test_efficientnet -j 2'
    run = [images, *SMALL, *shlex.split(flags), '--output', str(tmp_path)]
    train.main([*run, '--experiment', 'plain'])
    train.main([*run, '--experiment', 'mixed', '--mixup', '8', '--mixup-off-epoch', '1'])
    plain, mixed = ([float(row['train_loss']) for row in summary(tmp_path / name)] for name in ('plain', 'mixed'))
    assert mixed[0] != pytest.approx(plain[0], rel=1e-3)
    assert mixed[1] == pytest.approx(plain[1], rel=1e-3)


def test_compiled_and_plain_training_agree(images, tmp_path):
    run = [images, *SMALL, '--epochs', '1', '--output', str(tmp_path)]
    train.main([*run, '--experiment', 'plain'])
    train.main([*run, '--experiment', 'compiled', '--torchcompile', 'eager', '--model-ema'])
    plain, compiled = (summary(tmp_path / name)[0]['train_loss'] for name in ('plain', 'compiled'))
    assert float(compiled) == pytest.approx(float(plain), rel=1e-3)
    saved = torch.load(tmp_path / 'compiled' / 'last.pth.tar', weights_only=False)
    assert not any('_orig_mod' in name for name in (*saved['state_dict'], *saved['state_dict_ema']))


def test_flags_that_need_more_than_bare_weights(images, tmp_path):
    weights = tmp_path / 'bare.pth'
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), weights)
    flags = [images, '--model', 'test_resnet', '--num-classes', '3', '-j', '0', '--checkpoint', str(weights)]
    with pytest.raises(ValueError, match='--use-ema'):
        validate.main([*flags, '--use-ema'])
    with pytest.raises(ValueError, match='--write-thresholds'):
        validate.main([*flags, '--task', 'multilabel', '--write-thresholds'])
    assert 'thresholds' not in torch.load(weights)
