"""Evaluation under mixed precision: logits in float32, and what a person sees of an epoch."""

import logging
import re

import pytest
import timm
import torch
from runs import train

import timm_mldecoder  # noqa: F401
from timm_mldecoder.evaluation.evaluate import float32_logits


@pytest.mark.parametrize('head', [{}, {'ml_decoder': True}, {'ml_decoder': {'num_of_groups': 5}}])
@pytest.mark.parametrize('model', [pytest.param('test_resnet', marks=pytest.mark.slow), 'test_vit'])
def test_logits_under_autocast_do_not_tie(model, head):
    torch.manual_seed(3)
    size = {'img_size': 32} if 'vit' in model else {}
    model = timm.create_model(model, num_classes=21, **head, **size).eval()
    images = torch.rand(64, 3, 32, 32)
    with torch.inference_mode(), torch.autocast('cpu', dtype=torch.bfloat16):
        rounded = model(images)
        with float32_logits(model):
            exact = model(images)
        again = model(images)
    assert exact.dtype == torch.float32 and torch.equal(rounded, again)
    assert (exact - rounded.float()).abs().max() < 0.05 * exact.abs().max()
    assert exact.unique().numel() > 2 * rounded.unique().numel()
    with torch.inference_mode(), float32_logits(model):
        assert torch.equal(model(images), model(images)), 'without autocast nothing changes'


@pytest.mark.parametrize(('flags', 'column'), [('', 'eval_top1'), ('--eval-metric loss', 'eval_loss')])
def test_each_epoch_has_a_line_with_its_metric_and_times(data, tmp_path, caplog, flags, column):
    caplog.set_level(logging.INFO)
    folder = train(data, tmp_path, '--epochs', '3', *flags.split())
    rows = (folder / 'summary.csv').read_text().split()
    index = rows[0].split(',').index(column)
    found = re.findall(rf'Epoch: (\d)  {column}: (\S+)  Time: \d+\.\ds  Left: (\d+:\d\d:\d\d)', caplog.text)
    assert [(epoch, value) for epoch, value, _ in found] == [
        (row.split(',')[0], f'{float(row.split(",")[index]):.3f}') for row in rows[1:]
    ]
    assert found[-1][2] == '0:00:00'
