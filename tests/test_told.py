"""What a run warns of: weights that stay random, crops that cut objects off, classes that are always or never shown."""

import numpy as np
import pytest
import timm
import torch
from image_folders import write_images
from marks import few
from PIL import Image
from runs import MODEL, build
from timm.data import create_transform
from timm.task import ClassificationEvaluator

from timm_mldecoder.data.transforms import lost_share, shown_share
from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.evaluation import evaluate
from timm_mldecoder.evaluation.predicted import PredictedClasses
from timm_mldecoder.flags import parse_train
from timm_mldecoder.metrics import MultiLabelEvaluator
from timm_mldecoder.probe.__main__ import main as probe_main
from timm_mldecoder.probe.options import parse_probe
from timm_mldecoder.probe.sweep import _create_splits
from timm_mldecoder.runtime.errors import advise_on_memory


@pytest.mark.parametrize('mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('pct', few([0.875, 1.0], 1))
@pytest.mark.parametrize('shape', [(240, 120), (100, 200), (160, 160)])
@pytest.mark.parametrize('size', [pytest.param((80, 80), marks=pytest.mark.slow), (60, 90)])
def test_the_share_is_that_of_the_transform_of_timm(mode, pct, shape, size):
    width, height = shape
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([x + 1, y + 1, 0 * x + 255], 2).astype(np.uint8))
    settings = dict(interpolation='nearest', crop_pct=pct, crop_mode=mode, mean=(0,) * 3, std=(1,) * 3)
    pixels = (create_transform((3, *size), **settings)(image) * 255).round().numpy()
    inside = pixels[2] == 255
    shown = [(channel[inside].max() - channel[inside].min() + 1) for channel in pixels[:2]]
    share = shown[0] * shown[1] / (width * height)
    assert shown_share(width, height, size, pct, mode) == pytest.approx(share, abs=0.035)


def test_the_loss_is_a_median():
    config = dict(input_size=(3, 64, 64), crop_pct=1.0, crop_mode='center')
    assert lost_share([(100, 100), (100, 100), (300, 100)], config) == 0
    assert lost_share([(100, 400), (200, 100), (300, 100)], config) == pytest.approx(2 / 3)
    assert lost_share([], config) == 0


def write_table(folder):
    paths = sorted((write_images(folder, train=3, validation=2, size=40) / 'train').rglob('*.png'))
    for split in ('train', 'validation'):
        rows = [f'{path.relative_to(folder)},{path.parent.name}' for path in paths]
        (folder / f'{split}.csv').write_text('\n'.join(['path,labels', *rows]) + '\n')
    return folder


@pytest.mark.parametrize('flags', ['', '--crop-mode squash --crop-pct 1'])
def test_an_evaluation_crop_is_warned_of(flags, tmp_path, caplog):
    data = write_table(tmp_path / 'data')
    build(data, tmp_path, '--dataset', 'csv', '--task', 'multilabel', *flags.split()).close()
    assert ('evaluation cuts 10% of the area' in caplog.text) == (not flags)
    caplog.clear()
    more = (
        '--dataset csv --task multilabel --model test_resnet --heads linear --lrs 1e-3 --seeds 1 --epochs 1 -b 3 -j 0'
    )
    probe_main([str(data), *more.split(), *flags.split(), '--device', 'cpu', '--output', str(tmp_path)])
    assert ('evaluation cuts 10% of the area' in caplog.text) == (not flags)


@pytest.mark.parametrize(
    ('flags', 'line'),
    [
        ('--freeze-backbone', '--freeze-backbone keeps random weights'),
        ('--freeze-backbone --pretrained', ''),
        ('--freeze-backbone --initial-checkpoint a.pth', ''),
        ('--model local-dir:folder', '--model local-dir:folder: its weights are not loaded; add --pretrained'),
        ('--model local-dir:folder --pretrained', ''),
        ('', ''),
    ],
)
def test_random_weights_are_warned_of(flags, line, caplog, tmp_path):
    (tmp_path / 'a.pth').touch()
    parse_train([str(tmp_path), *MODEL, *flags.replace('a.pth', str(tmp_path / 'a.pth')).split()])
    assert line in caplog.text and ('weights' in caplog.text) == bool(line)
    caplog.clear()
    parse_probe('', [str(tmp_path), *MODEL[:4], '--device', 'cpu'])
    assert 'a probe keeps random weights' in caplog.text


@pytest.mark.parametrize(
    ('size', 'flags', 'warned'),
    [
        (1, '--opt adamw --lr 1e-3', False), (0.2, '--opt adamw --lr 1e-3', False),
        (0.05, '--opt adamw --lr 1e-3', True),
        (1, '--opt adamw --lr 3e-2', True), (1, '--opt sgd --lr 3e-2', False),
        (0.05, '--opt adamw --lr 1e-3 --freeze-backbone', False),
    ],
)  # fmt: skip
def test_a_rate_too_fast_for_pretrained_weights_is_warned_of(size, flags, warned, tmp_path, caplog):
    model = timm.create_model('test_resnet', num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1 * size)
    torch.save(model.state_dict(), weights := tmp_path / 'weights.pth')
    data = write_images(tmp_path / 'data', train=4, validation=2, classes=3)
    build(data, tmp_path, *flags.split(), '--initial-checkpoint', str(weights)).close()
    lines = [record.getMessage() for record in caplog.records if 'moves the pretrained weights' in record.getMessage()]
    assert len(lines) == warned
    if lines:  # what it advises is not warned of
        caplog.clear()
        flags = flags.split()[:2] + lines[0].split()[-2:]
        build(data, tmp_path, *flags, '--initial-checkpoint', str(weights), '--experiment', 'again').close()
        assert 'moves the pretrained weights' not in caplog.text


@pytest.mark.parametrize(
    ('has', 'amp', 'told'),
    [
        (dict(architecture='x86_64', avx512_bf16=True), False, '--amp --channels-last is about twice as fast'),
        (dict(architecture='x86_64', amx_bf16=True), True, ''),
        (dict(architecture='x86_64', avx2=True), True, 'no instructions for bfloat16'),
        (dict(architecture='x86_64', avx2=True), False, ''),
        (dict(architecture='aarch64'), True, ''),
        (None, True, ''),
    ],
)
def test_what_bfloat16_does_on_a_cpu_is_said_once(has, amp, told, monkeypatch, caplog):
    caplog.set_level('INFO')
    monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    if has:
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has, raising=False)
    options = parse_train(['data', *MODEL, *['--amp'] * amp])
    caplog.clear()
    evaluate._advise_on_amp.cache_clear()
    for _ in range(2):
        evaluate.create_autocast(options, torch.device('cpu'))
    lines = [record.getMessage() for record in caplog.records if 'bfloat16' in record.getMessage()]
    assert len(lines) == bool(told) and all(told in line for line in lines)
    evaluate._advise_on_amp.cache_clear()


@pytest.mark.parametrize('task', ['multilabel', 'classification'])
def test_classes_that_are_always_or_never_predicted(task):
    logits = torch.tensor([[3.0, -1, -1, -9], [3, -1, -1, -9], [3, -1, -1, -9]])
    targets = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]])
    evaluator = MultiLabelEvaluator() if task == 'multilabel' else ClassificationEvaluator()
    with join_world('cpu') as world:
        predicted = PredictedClasses(evaluator, ['ant', 'bee', 'cow', 'dog'], 3, world)
        for part in (slice(0, 2), slice(2, 4)):
            # the last image is padding of a distributed sampler, and has another label
            scores = torch.cat([logits, torch.tensor([[-9.0, 9, 9, 9]])])[part]
            labels = torch.cat([targets, torch.tensor([[0, 0, 0, 1]])])[part]
            labels = labels if task == 'multilabel' else labels.argmax(1)
            evaluator.max_samples = 3
            evaluator.update(scores, labels)
            predicted.update(scores, labels)
        lines = predicted.lines()
    assert lines == [
        'predicted for no image, though some show them: 2 classes: bee, cow' if task == 'multilabel' else
        'predicted for no image, though some show them: 1 classes: cow',
        'predicted for every image, though some do not show them: 1 classes: ant',
    ]  # fmt: skip


def test_one_value_per_channel_is_told_with_what_to_do():
    with pytest.raises(ValueError, match='--batch-size 1: BatchNorm .* at least 2 images'), advise_on_memory(1, 1, 1):
        torch.nn.BatchNorm1d(3)(torch.zeros(1, 3))
    with pytest.raises(ValueError, match='another'), advise_on_memory(1, 1, 1):
        raise ValueError('another')


def test_a_probe_warns_of_files_in_both_splits_on_the_first_rank(tmp_path, caplog, monkeypatch):
    data = write_images(tmp_path, train=3, validation=2)
    (data / 'validation' / 'class_1' / 'zz.png').symlink_to(data / 'train' / 'class_1' / '000.png')
    options = parse_probe('', [str(data), *MODEL[:4], '--device', 'cpu'])
    with join_world('cpu') as world:
        _create_splits(options, world)
        assert '1 files are in both splits' in caplog.text
        caplog.clear()
        monkeypatch.setenv('RANK', '1')
        monkeypatch.setenv('WORLD_SIZE', '2')
        _create_splits(options, world)
        assert not caplog.records
