"""Multi-label data from the command line: every format, the published optimisation step by step, what a run leaves."""

import copy
import csv
import json
import logging
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from marks import few
from multilabel_data import WRITTEN, write_image
from PIL import Image
from sklearn.metrics import average_precision_score
from timm.loss import create_classification_loss
from timm.loss.class_weights import load_class_stats, resolve_class_weights
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.digits import NAMES, write_digit_scenes
from timm_mldecoder.checkpoint.read import read_checkpoint
from timm_mldecoder.data import create_dataset
from timm_mldecoder.data.class_files import read_priors
from timm_mldecoder.distributed.world import World, join_world
from timm_mldecoder.flags import parse_train
from timm_mldecoder.losses import AngularMarginLoss, AsymmetricLoss, ClassAwareSelectiveLoss
from timm_mldecoder.modeling.load import load as load_model
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import fit
from timm_mldecoder.train.loss import create_task, create_train_loss
from train import main as train
from validate import main as validate

ROOT = Path(__file__).resolve().parents[1]
SMALL = shlex.split("""
    --model test_resnet.r160_in1k --img-size 32 --device cpu -j 0 -b 2 --task multilabel
    --use-ml-decoder-head 1 --decoder-embedding 32 --ml-decoder-kwargs dropout=0.0
""")
# the optimisation of the published recipe, at a rate for so small a model
RECIPE = shlex.split("""
    --loss asl --loss-kwargs gamma_pos=0 detach_focusing=True reduction=sum
    --opt adam --lr 1e-3 --weight-decay 1e-4 --sched onecycle --warmup-lr 4e-5 --min-lr 4e-9
    --train-crop-mode squash --crop-mode squash --crop-pct 1 --mean 0 0 0 --std 1 1 1 --hflip 0
    --train-interpolation bilinear --cutout 0.5 --aa rand-m9-n2 --model-ema --model-ema-decay 0.9
    --output output --experiment run
""")
SCORE = shlex.split('--dataset csv --device cpu -j 0 -b 15')
CHECKPOINT = 'output/run/model_best.pth.tar'


def load(path: str | Path) -> dict:
    return read_checkpoint(path)


@pytest.fixture(autouse=True)
def _in_an_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp('scenes')
    return str(write_digit_scenes(folder, num_train=45, num_validation=24, size=32, sides=(8, 14)))


def train_scenes(scenes: str, *more: str) -> None:
    train([scenes, *SMALL, *RECIPE, *SCORE, '--num-classes', '10', '--epochs', '2', '--warmup-epochs', '1',
           '--val-interval', '2', *more])  # fmt: skip


@pytest.fixture(scope='module')
def trained(scenes, tmp_path_factory) -> Path:
    """What a run on the scenes wrote, for tests that need one of any kind."""
    folder = tmp_path_factory.mktemp('trained')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_scenes(scenes)
    return folder / 'output'


@pytest.fixture
def run(trained, _in_an_own_folder) -> None:
    """A copy of it in the working folder."""
    shutil.copytree(trained, 'output')


def last_row() -> dict[str, str]:
    with open('output/run/summary.csv') as file:
        return list(csv.DictReader(file))[-1]


@pytest.mark.parametrize('name', few(WRITTEN, ['coco2014', 'voc2007']))
def test_every_format_trains_and_validates(tmp_path, capsys, name):
    write, class_names, _, _ = WRITTEN[name]
    write(tmp_path / 'data')
    data = [str(tmp_path / 'data'), '--dataset', name, '--num-classes', str(len(class_names))]
    train([*data, *SMALL, *RECIPE, '--epochs', '4', '--warmup-epochs', '2', '--val-interval', '4'])
    assert load(CHECKPOINT)['class_names'] == class_names

    capsys.readouterr()
    validate([*data, '--checkpoint', CHECKPOINT, '--device', 'cpu', '-j', '0', '-b', '2'])
    result = capsys.readouterr().out
    for metric in ('map', 'of1_top3'):
        assert number(result, metric) == float(last_row()[f'eval_{metric}'])


def test_thirty_steps_are_those_of_a_plain_loop_with_torchs_one_cycle(scenes):
    schedule = ['--epochs', '5', '--warmup-epochs', '1', '-b', '7', '--val-split', '', '--val-interval', '5']
    options = parse_train([scenes, *SMALL, *RECIPE, '--dataset', 'csv', '--num-classes', '10', *schedule])
    batches = []
    with join_world(options.device) as world:
        run = build_run(options, world)
        model = run.state.task.get_trainable_module()
        reference, averaged = copy.deepcopy(model), copy.deepcopy(model)
        run.state.task.register_forward_pre_hook(lambda _, inputs: batches.append([x.clone() for x in inputs]))
        fit(run)
    assert len(batches) == 30

    decayed, others = [], []
    for name, parameter in reference.named_parameters():
        (others if parameter.ndim == 1 or name.endswith('.bias') else decayed).append(parameter)
    groups = [dict(params=others, weight_decay=0.0), dict(params=decayed, weight_decay=1e-4)]
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    one_cycle = OneCycleLR(optimizer, max_lr=1e-3, total_steps=30, pct_start=0.2)
    loss = AsymmetricLoss(gamma_neg=4, gamma_pos=0, clip=0.05, detach_focusing=True, reduction='sum')
    reference.train()
    for step, (images, target) in enumerate(batches):
        optimizer.zero_grad()
        loss(reference(images), target).backward()
        optimizer.step()
        if step < 29:
            one_cycle.step()
        with torch.no_grad():
            for mean, value in zip(averaged.state_dict().values(), reference.state_dict().values(), strict=True):
                decay = 0.9 if step and value.is_floating_point() else 0  # timm's average starts after the first update
                mean.copy_(decay * mean + (1 - decay) * value)

    for ours, plain in ((model, reference), (run.state.task.get_trainable_module(ema=True), averaged)):
        for value, expected in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
            # thirty steps of Adam: rounding that differs where kernels do, relative to the values and to the
            # learning rate, by which Adam moves a weight whatever the size of its gradient
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-2 * 1e-3)


def test_the_better_of_raw_and_ema_weights_ranks_an_epoch_and_is_what_validate_scores(scenes, capsys):
    train_scenes(scenes, '--better-of-ema')
    row = last_row()
    scores = {}
    for flag in ('', '--use-ema', '--no-use-ema'):
        capsys.readouterr()
        validate([scenes, *SCORE, '--checkpoint', CHECKPOINT, *flag.split()])
        scores[flag] = number(capsys.readouterr().out, 'map')
    assert scores[''] == float(row['eval_map']) == max(scores.values())
    assert scores[''] == scores['--use-ema' if row['eval_ema'] == '1' else '--no-use-ema']


def test_validate_stores_thresholds_and_uses_them_and_writes_priors_and_classes(run, scenes, capsys, caplog):
    capsys.readouterr()
    base = [scenes, *SCORE, '--checkpoint', CHECKPOINT]
    validate([*base, '--write-thresholds', '--write-class-priors', 'priors.csv'])
    written = capsys.readouterr().out
    content = load(CHECKPOINT)
    assert list(content['thresholds']) == list(NAMES)
    validate([*base, '--class-report', 'classes.csv'])
    tuned = capsys.readouterr().out
    validate([*base, '--multilabel-threshold', '0.5'])
    plain = capsys.readouterr().out
    assert number(tuned, 'macro_f1') == number(written, 'macro_f1') > number(plain, 'macro_f1')

    with open('classes.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['class'] for row in rows] == list(NAMES)
    assert sum(float(row['ap']) for row in rows) / 10 == pytest.approx(number(tuned, 'map'))
    assert [float(row['threshold']) for row in rows] == pytest.approx(list(content['thresholds'].values()))
    assert ((read_priors('priors.csv', NAMES) > 0) & (read_priors('priors.csv', NAMES) < 1)).all()

    # and the priors go into the loss of another run
    train_scenes(
        scenes, *shlex.split('--loss csl --loss-kwargs mode=selective --class-priors priors.csv --experiment another')
    )
    assert '--loss csl selects among labels to ignore' in caplog.text


def test_thresholds_of_categories_by_another_metric(run, scenes, caplog):
    # as taggers keep their tags
    rows = ''.join(f'{index},{name},{index // 5},17\n' for index, name in enumerate(NAMES))
    Path('tags.csv').write_text(f'tag_id,name,category,count\n{rows}')
    base = [scenes, *SCORE, '--checkpoint', CHECKPOINT, '--write-thresholds', '--threshold-metric', 'mcc']
    validate([*base, '--threshold-categories', 'tags.csv'])
    thresholds = list(load(CHECKPOINT)['thresholds'].values())
    assert len(set(thresholds[:5])) == len(set(thresholds[5:])) == 1 and thresholds[0] != thresholds[5]
    validate(base)
    assert len(set(load(CHECKPOINT)['thresholds'].values())) > 2
    precise = [*base[:-1], 'precision=1']
    validate(precise)
    assert 'no threshold reaches precision=1 for ' in caplog.text
    caplog.clear()
    validate([*precise, '--threshold-categories', 'tags.csv'])  # which count their classes together
    assert 'no threshold reaches' not in caplog.text
    Path('tags.csv').write_text('\n'.join(f'{name},a' for name in NAMES[1:]))
    for flags, message in (
        (['--threshold-categories', 'tags.csv'], f"tags.csv: no category of class '{NAMES[0]}'"),
        (['--threshold-metric', 'f2'], '--threshold-metric f2: expected f1, mcc'),
    ):
        with pytest.raises(ValueError, match=message):
            validate([*base, *flags])


def test_all_that_validate_writes_is_at_one_operating_point(run, scenes, capsys, caplog):
    caplog.set_level(logging.INFO)
    tuning = {}
    base = [scenes, *SCORE, '--checkpoint', CHECKPOINT, '--class-report', 'classes.csv', '--report']
    for flags, named in (
        (['untuned'], 'threshold 0.5'),
        (['tuning', '--write-thresholds'], 'thresholds tuned on this split'),
        (['tuned'], 'stored thresholds'),
        (['other', '--multilabel-threshold', '0.3'], 'threshold 0.3'),
    ):
        capsys.readouterr(), caplog.clear()
        validate([*base, *flags])
        result = json.loads(capsys.readouterr().out.split('--result')[1])
        with open('classes.csv') as file:
            rows = list(csv.DictReader(file))
        page = Path(flags[0], 'index.html').read_text()
        f1 = sum(float(row['f1'] or 0) for row in rows) / len(rows)
        assert result['macro_f1'] == pytest.approx(f1), named
        assert f'<dt>macro_f1</dt><dd>{f1:.3f}</dd>' in page
        assert result['operating_point'] == named and f'<dd>{named}</dd>' in page and named in caplog.text
        if 'stored' in named or 'tuned' in named:
            stored = list(load(CHECKPOINT)['thresholds'].values())
            assert [float(row['threshold']) for row in rows] == pytest.approx(stored)
            tuning = tuning if 'stored' in named else result
            of_metrics = {name: result[name] for name in tuning if 'f1' in name}
            assert {name: tuning[name] for name in of_metrics} == pytest.approx(of_metrics)


def test_the_loss_for_cosines_warns_about_other_logits(scenes, caplog):
    options = parse_train([scenes, '--dataset', 'csv', *SMALL, '--num-classes', '10', '--loss', 'aam'])
    dataset = create_dataset('csv', scenes, 'train')
    cosine = dict(classifier='cosine', decoder_embedding=32)
    for head, warned in (
        ({}, True),
        ({'cosine_classifier': 1.0}, False),
        ({'ml_decoder': True}, True),
        ({'ml_decoder': cosine}, False),
    ):
        caplog.clear()
        create_task(options, timm.create_model('test_resnet', num_classes=10, **head), dataset, {}, World('cpu'))
        assert ('--loss aam' in caplog.text) == warned, head


def test_the_class_report_has_the_scores_of_each_class_over_its_annotated_images(run, scenes):
    shutil.copytree(scenes, 'data')
    with open('data/validation.csv') as file:
        rows = list(csv.DictReader(file))
    with open('data/validation.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, ['path', 'labels', 'ignored'])
        writer.writeheader()
        for number, row in enumerate(rows):
            row['ignored'] = NAMES[number % 3]
            kept = [name for name in row['labels'].split(';') if name not in (row['ignored'], NAMES[-1])]
            writer.writerow({**row, 'labels': ';'.join(kept)})
            row['labels'] = kept
    validate(['data', *SCORE, '--checkpoint', CHECKPOINT, '--multilabel-threshold', '0.3', '--class-report', 'x.csv'])
    with open('x.csv') as file:
        report = list(csv.DictReader(file))

    # images have the size of the model, pixels go in as 0..1
    pixels = [torch.from_numpy(np.array(Image.open(f'data/{row["path"]}').convert('RGB'))) for row in rows]
    with torch.inference_mode():
        scores = load_model(CHECKPOINT).model(torch.stack(pixels).permute(0, 3, 1, 2) / 255).sigmoid()
    for name, found, column in zip(NAMES, report, scores.T.tolist(), strict=True):
        annotated = [(score, row) for score, row in zip(column, rows, strict=True) if row['ignored'] != name]
        pairs = [(name in row['labels'], score) for score, row in annotated]
        positives, predicted = sum(truth for truth, _ in pairs), sum(score >= 0.3 for _, score in pairs)
        right = sum(truth for truth, score in pairs if score >= 0.3)
        expected = dict(
            positives=positives,
            ap=positives and 100 * average_precision_score(*zip(*pairs, strict=True)),
            threshold=0.3,
            precision=predicted and 100 * right / predicted,
            recall=positives and 100 * right / positives,
            f1=predicted + positives and 200 * right / (predicted + positives),
        )
        assert found.pop('class') == name
        assert {key: float(value or 0) for key, value in found.items()} == pytest.approx(expected, rel=1e-6), name
    assert (report[-1]['positives'], report[-1]['ap'], report[-1]['recall']) == ('0', '', '')
    assert any(0 < float(row['precision'] or 0) < 100 for row in report)


def number(output: str, name: str) -> float:
    return float(output.split(f'"{name}": ')[1].split(',')[0])


def loss_of(name: str, root: Path, *flags: str) -> nn.Module:
    options = parse_train([str(root), '--dataset', name, *SMALL, *flags])
    return create_train_loss(options, create_dataset(name, str(root), 'train'))


def test_losses_are_those_of_timm_on_complete_labels_and_accept_labels_to_ignore(tmp_path):
    for name in ('coco2014', 'voc2007'):
        WRITTEN[name][0](tmp_path / name)
    complete, partial = tmp_path / 'coco2014', tmp_path / 'voc2007'
    assert isinstance(loss_of('coco2014', complete, '--loss', 'aam'), AngularMarginLoss)
    assert isinstance(loss_of('voc2007', partial, '--loss', 'csl'), ClassAwareSelectiveLoss)

    logits, target = torch.randn(4, 20), (torch.rand(4, 20) < 0.3).float()
    same = [
        ('', dict(loss_type='bce')),
        ('--smoothing 0.1', dict(loss_type='bce', smoothing=0.1)),
        ('--loss asl', dict(loss_type='asl')),
        ('--loss asl --loss-kwargs asl_gamma_neg=3', dict(loss_type='asl', asl_gamma_neg=3)),
        ('--loss asl --loss-kwargs gamma_neg=3', dict(loss_type='asl', asl_gamma_neg=3)),
    ]
    for flags, settings in same:
        expected = create_classification_loss(multi_label=True, **settings)(logits, target)
        for name, root in (('coco2014', complete), ('voc2007', partial)):
            loss = loss_of(name, root, *flags.split())
            torch.testing.assert_close(loss(logits, target), expected, rtol=1e-5, atol=0)
            if name == 'voc2007':
                other = torch.where(torch.arange(20) < 5, torch.randn(4, 20), logits)
                ignored = target.index_fill(1, torch.arange(5), -1)
                torch.testing.assert_close(loss(other, ignored), loss(logits, ignored))
    by_flag = loss_of('coco2014', complete, '--loss', 'asl')(logits, target)
    torch.testing.assert_close(AsymmetricLoss()(logits, target), by_flag, rtol=1e-5, atol=0)
    timms = loss_of('coco2014', complete, '--bce-sum')  # an option of timm's class alone
    expected = create_classification_loss('bce', multi_label=True, bce_sum=True)
    torch.testing.assert_close(timms(logits, target), expected(logits, target))


@pytest.mark.parametrize(
    'flags',
    [
        '--loss asl --asl-gamma-pos 0.5 --asl-gamma-neg 3 --asl-clip 0.1 --asl-reduction mean',
        '--loss twoway --twoway-tp 2 --twoway-tn 3',
        '--loss poly --poly-gamma 1 --poly-epsilon 3 --poly-alpha 0.3',
        '--loss db --class-stats STATS --db-neg-scale 3 --db-init-bias 0.1 --db-focal-gamma 1',
        '--loss bce --loss-class-weight effective_num --loss-weight-beta 0.9 --loss-weight-max 1.2 --class-stats STATS',
        '--loss bce --loss-pos-weight neg_pos --loss-weight-power 0.5 --loss-weight-max 2 --class-stats STATS',
    ],
)
def test_flags_of_losses_are_arguments_of_timms(tmp_path, flags):
    WRITTEN['coco2014'][0](tmp_path / 'data')
    stats = tmp_path / 'stats.json'
    stats.write_text(json.dumps(dict(pos_counts=[10, 2], num_samples=20)))
    words = flags.replace('STATS', str(stats)).split()
    given = dict(zip((word[2:].replace('-', '_') for word in words[::2]), words[1::2], strict=True))
    settings = {name: float(value) for name, value in given.items() if re.fullmatch(r'[\d.]+', value)}
    weights = {name.removeprefix('loss_weight_'): settings.pop(name) for name in [*settings] if 'weight' in name}
    if 'max' in weights:
        weights['max_weight'] = weights.pop('max')
    for kind in ('class_weight', 'pos_weight'):
        if f'loss_{kind}' in given:
            settings[kind] = resolve_class_weights(given[f'loss_{kind}'], kind, load_class_stats(stats), **weights)
    if given['loss'] == 'db':
        settings |= dict(class_counts=[10, 2], num_samples=20)
    if 'asl_reduction' in given:
        settings['asl_reduction'] = given['asl_reduction']
    logits, target = torch.randn(6, 2), torch.eye(2).repeat(3, 1)
    expected = create_classification_loss(given['loss'], multi_label=True, **settings)(logits, target)
    loss = loss_of('coco2014', tmp_path / 'data', *words)(logits, target)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    plain = loss_of('coco2014', tmp_path / 'data', *words[:2], *(words[-2:] if 'db' in words else []))
    assert not torch.isclose(plain(logits, target), loss), 'the flags change the loss'


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--loss', 'zlpr'], '--loss zlpr.*aam'),
        (['--mixup', '0.2', '-b', '2'], '--mixup.*voc2007'),
        (['--loss-pos-weight', '2'], '--loss-pos-weight'),
        (['--loss', 'csl', '--loss-kwargs', 'gamma=2'], 'gamma.*unexpected'),
        (['--loss', 'csl', '--loss-kwargs', 'mode=some'], 'some.*selective'),
    ],
)
def test_flags_that_contradict_labels_to_ignore_are_refused(tmp_path, flags, message):
    WRITTEN['voc2007'][0](tmp_path)
    with pytest.raises(ValueError, match=message):
        loss_of('voc2007', tmp_path, *flags)


def test_several_labels_per_image_need_the_multi_label_task(scenes):
    with pytest.raises(ValueError, match='csv.*--task multilabel'):
        train_scenes(scenes, '--task', 'classification', '--loss', 'bce')


def test_multi_label_results_of_one_label_per_image_are_refused(tmp_path):
    write_image(tmp_path / 'data' / 'validation' / 'cat' / '1.png', 1)
    model = timm.create_model('test_resnet.r160_in1k', num_classes=1)
    torch.save(model.state_dict(), 'untrained.pth')
    flags = ['--model', 'test_resnet.r160_in1k', '--num-classes', '1', '--device', 'cpu', '--class-report', 'x.csv']
    with pytest.raises(ValueError, match='--class-report.*multilabel'):
        validate([str(tmp_path / 'data'), *flags, '--checkpoint', 'untrained.pth'])


@pytest.mark.parametrize('flags', ['', '--mixup 0.5 --cutmix 0.5', '--no-prefetcher --mixup 0.5 -j 1'])
def test_targets_are_int8_until_they_are_on_the_device(tmp_path, flags):
    WRITTEN['coco2014'][0](tmp_path)
    flags = f'--dataset coco2014 --num-classes 2 --epochs 1 --output {tmp_path}/output {flags}'.split()
    options = parse_train([str(tmp_path), *SMALL, *flags])
    with join_world(options.device) as world:
        run = build_run(options, world)
    for loader in (run.train_loader, run.eval_loader):
        assert loader.dataset[0][1].dtype == torch.int8
    evaluated = torch.cat([target for _, target in run.eval_loader.batches()])
    annotations = run.eval_loader.dataset.annotations
    assert torch.equal(evaluated, torch.stack([annotations.target(index) for index in range(len(annotations))]))
    for _, target in run.train_loader.epoch(0):
        assert target.dtype == torch.float32 and bool((target % 1).any()) == ('--mixup' in flags)
    run.train_loader.close()
    run.eval_loader.close()
