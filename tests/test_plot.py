"""Curves of runs, and the mean of several."""

import csv

import pytest

from timm_mldecoder.plot import main as plot
from timm_mldecoder.runtime.errors import run_command

pytest.importorskip('matplotlib')


def write_run(folder, scores):
    folder.mkdir()
    with (folder / 'summary.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['epoch', 'train_loss', 'eval_loss', 'eval_map', 'lr'])
        writer.writerows([epoch, 1.5, 100 - score, score, 0.1] for epoch, score in enumerate(scores))
    return str(folder)


def test_the_mean_of_three_runs_is_that_of_their_best_epochs(tmp_path, capsys):
    runs = [write_run(tmp_path / f'run_{seed}', scores) for seed, scores in enumerate([[80, 84, 82], [85, 83], [89]])]
    plot([*runs, '--output', str(tmp_path / 'curves.png'), '--best', 'map'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ['run_0: map 84.00 in epoch 1', 'run_1: map 85.00 in epoch 0', 'run_2: map 89.00 in epoch 0']
    assert lines[3] == 'mean of 3 runs: map 86.00 ± 2.65'
    assert (tmp_path / 'curves.png').stat().st_size > 1000
    plot([f'{runs[0]}/summary.csv', '--output', str(tmp_path / 'curves.png'), '--best', 'loss'])
    assert capsys.readouterr().out.splitlines()[0] == 'run_0: loss 16.00 in epoch 1', 'the smallest loss is the best'


def test_a_metric_that_a_run_does_not_have_is_named(tmp_path, capsys):
    run = write_run(tmp_path / 'run', [1, 2])
    output = tmp_path / 'curves.png'
    assert run_command(lambda: plot([run, '--output', str(output), '--best', 'top1'])) == 2
    error = capsys.readouterr().err
    assert '--best top1' in error and 'loss, map' in error and error.count('\n') == 1
    assert not output.exists()
