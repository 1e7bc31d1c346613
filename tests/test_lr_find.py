"""The learning rate range test: the rates it tries, the losses it sees, and what it leaves."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import MODEL, build, write_data

from timm_mldecoder.flags import parse_train
from timm_mldecoder.train.lr_find import Point, find_lr, rise, steepest_descent
from train import main as train


def run_test(data: Path, output: Path, *flags: str) -> list[Point]:
    train([str(data), *MODEL, '--output', str(output), '--experiment', 'run', *flags])
    with open(output / 'run' / 'lr_find.csv') as file:
        return [Point(*map(float, row.values())) for row in csv.DictReader(file)]


def test_the_rates_grow_exponentially_and_the_run_is_left_without_checkpoints(tmp_path):
    data = write_data(tmp_path / 'data')
    points = run_test(data, tmp_path, '--lr-find', '30', '--opt', 'adamw', '--warmup-epochs', '5')
    assert points[0].lr == pytest.approx(1e-7) and 10 < len(points) <= 30
    ratios = [after.lr / before.lr for before, after in zip(points, points[1:], strict=False)]
    assert ratios == pytest.approx([1e8 ** (1 / 29)] * len(ratios))
    mean = 0.0
    for number, point in enumerate(points, 1):
        mean = 0.9 * mean + 0.1 * point.loss
        assert point.smoothed == pytest.approx(mean / (1 - 0.9**number))
    assert Image.open(tmp_path / 'run' / 'lr_find.png').size == (600, 400)
    assert not list((tmp_path / 'run').glob('*.pth.tar'))
    # the folder is free for the run itself
    train([str(data), *MODEL, '--output', str(tmp_path), '--experiment', 'run', '--epochs', '1'])


def test_each_step_has_its_rate_and_parameter_groups_their_factors(tmp_path):
    data = write_data(tmp_path / 'data')
    flags = ['--lr-find', '10', '--opt', 'momentum', '--momentum', '0', '--bias-lr-scale', '3',
             '--weight-decay', '0', '--no-aug']  # fmt: skip
    run = build(data, tmp_path, *flags)
    seen = []
    step = run.state.optimizer.step

    def record(*arguments, **named):
        before = [[p.detach().clone() for p in group['params']] for group in run.state.optimizer.param_groups]
        rates = [group['lr'] for group in run.state.optimizer.param_groups]
        step(*arguments, **named)
        for old, rate, group in zip(before, rates, run.state.optimizer.param_groups, strict=True):
            for value, parameter in zip(old, group['params'], strict=True):
                torch.testing.assert_close(parameter.detach(), value - rate * parameter.grad)
        seen.append(sorted({round(rate, 12) for rate in rates}))

    run.state.optimizer.step = record
    find_lr(run)
    assert len(seen) >= 3
    for number, (low, high) in enumerate(seen):
        assert low == pytest.approx(1e-7 * 1e8 ** (number / 9), rel=1e-4) and high == pytest.approx(3 * low, rel=1e-4)


def test_the_steepest_descent_is_where_the_smoothed_loss_falls_most_per_decade():
    losses = [2.0, 2.0, 1.9, 1.2, 1.0, 0.9, 3.0]
    points = [Point(10.0**power, loss, loss) for power, loss in enumerate(losses, -5)]
    assert steepest_descent(points) == pytest.approx(1e-2)  # 1.9 before, 1.0 after
    assert rise(points) == pytest.approx(10) and rise(points[:-1]) == pytest.approx(1)


@pytest.mark.parametrize('flags', ['--lr-find 5', '--lr-find 100 --resume auto --experiment x'])
def test_mistakes_name_the_flag(flags):
    with pytest.raises(ValueError, match='--lr-find'):
        parse_train(['DIR', *flags.split()])
