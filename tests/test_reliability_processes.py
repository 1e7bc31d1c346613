"""Real signals and kills, in one process and in several."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from runs import MODEL, MOVING, assert_same_run, build, call, start, train, write_data

from validate import main as validate

PATIENCE = 240  # seconds: each of several processes takes a few to start, many where cores are shared
DEADLINE = 30  # seconds: what a scheduler gives a process between SIGTERM and SIGKILL
DISTRIBUTED = [*MOVING, '--dist-bn', 'reduce', '--aug-repeats', '2', '-j', '1', '-b', '2', '--epochs', '4']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('data'))


def wait_for(pattern, log, process):
    """Wait until a pattern is in the log of a process."""
    end = time.monotonic() + PATIENCE
    while not re.search(pattern, log.read_text()):
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def pid_of_rank(launcher, rank):
    """The process id of a rank that torchrun has started."""
    children = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()
    return next(int(pid) for pid in children if f'\0RANK={rank}\0' in Path(f'/proc/{pid}/environ').read_text())


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_with_its_code(data, tmp_path, number):
    flags = [data, *MODEL, *MOVING, '-j', '1', '--epochs', '100', '--output', tmp_path, '--experiment', 'run']
    log = tmp_path / 'log'
    process = start('train.py', *flags, log=log)
    wait_for(r'Train: 1 \[', log, process)
    began = time.monotonic()
    os.killpg(process.pid, number)  # as a terminal and most schedulers do: loader processes get it too
    assert process.wait(PATIENCE) == 128 + number, log.read_text()
    assert time.monotonic() - began < DEADLINE
    assert 'Traceback' not in log.read_text()
    (recovery,) = (tmp_path / 'run').glob('recovery-*')
    assert f'--resume {recovery} goes on from there' in log.read_text()


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory):
    """The folder of a run in two processes."""
    output = tmp_path_factory.mktemp('undisturbed')
    flags = [data, *MODEL, *DISTRIBUTED, '--output', output, '--experiment', 'run']
    call('train.py', *flags, processes=2).check_returncode()
    return output / 'run'


def test_sigterm_stops_all_ranks_after_the_same_step_and_they_resume_together(data, tmp_path, undisturbed):
    flags = [data, *MODEL, *DISTRIBUTED, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto']
    log = tmp_path / 'log'
    launcher = start('train.py', *flags, log=log, processes=2)
    wait_for(r'Train: 0 \[', log, launcher)
    began = time.monotonic()
    os.kill(pid_of_rank(launcher, 1), signal.SIGTERM)  # one of them: the other has to hear of it
    launcher.wait(PATIENCE)
    assert time.monotonic() - began < DEADLINE
    codes = re.findall(r'exitcode *: (-?\d+)', log.read_text())
    assert set(codes) == {'143'}, log.read_text()
    assert list((tmp_path / 'run').glob('recovery-*'))

    with pytest.raises(ValueError, match='world_size was 2 and is 1.*use the same'):
        build(data, tmp_path, *DISTRIBUTED, '--resume', 'auto')
    call('train.py', *flags, processes=2).check_returncode()
    assert_same_run(tmp_path / 'run', undisturbed)


def test_a_killed_rank_is_restarted_and_the_run_comes_to_the_same(data, tmp_path, undisturbed):
    flags = [data, *MODEL, *DISTRIBUTED, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto']
    log = tmp_path / 'log'
    launcher = start('train.py', *flags, '--recovery-interval', '1', log=log, processes=2, restarts=3)
    wait_for(r'Train: 1 \[', log, launcher)
    os.kill(pid_of_rank(launcher, 1), signal.SIGKILL)
    assert launcher.wait(PATIENCE) == 0, log.read_text()
    assert 'Resumed from' in log.read_text()
    assert_same_run(tmp_path / 'run', undisturbed)


# Rank 1 spoils its loss in one step and its gradient in another.
SPOILT = """
import json, sys
import torch
from timm_mldecoder.engine.train.loop import fit
from timm_mldecoder.engine.flags import parse_train
from timm_mldecoder.engine.train.setup import set_up
from timm_mldecoder.engine.runtime.distributed import join_world

*flags, told = sys.argv[1:]
options = parse_train(flags)
with join_world(options) as world:
    run = set_up(options, world)
    model, task = run.state.task.get_eval_model(), run.state.task
    steps, before, made = [0], [], []

    def snapshot(module, inputs):
        steps[0] += 1
        before.append([tensor.clone() for tensor in model.state_dict().values()])

    def spoil(module, inputs, result):
        if world.rank == 1 and steps[0] == 2:
            result['loss'] = result['loss'] * float('nan')

    task.register_forward_pre_hook(snapshot)
    task.register_forward_hook(spoil)
    next(model.parameters()).register_hook(
        lambda gradient: gradient / 0 if world.rank == 1 and steps[0] == 4 else gradient)
    run.state.optimizer.register_step_post_hook(lambda *_: made.append(steps[0]))
    fit(run)

same = [all(map(torch.equal, now, later)) for now, later in zip(before, before[1:])]
with open(f'{told}.{world.rank}', 'w') as file:
    json.dump(dict(made=made, unchanged=[step + 1 for step, is_same in enumerate(same) if is_same]), file)
"""


def test_all_ranks_leave_out_a_step_that_is_not_finite_on_one(data, tmp_path):
    script = tmp_path / 'spoilt.py'
    script.write_text(SPOILT)
    flags = [data, *MODEL, '--epochs', '1', '-b', '2', '--no-ddp-bb', '--output', tmp_path, '--experiment', 'run']
    launcher = start(script, *flags, tmp_path / 'told', log=tmp_path / 'log', processes=2)
    log = tmp_path / 'log'
    assert launcher.wait(PATIENCE) == 0, log.read_text()
    for rank in range(2):
        told = json.loads((tmp_path / f'told.{rank}').read_text())
        assert told == dict(made=[1, 3, 5, 6], unchanged=[2, 4])
    assert 'Skipped epoch 0, update 1: loss or gradients are not finite (1 in a row)' in log.read_text()
    assert 'Skipped epoch 0, update 3' in log.read_text()

    report = json.loads((tmp_path / 'run' / 'nonfinite.json').read_text())
    assert (report['epoch'], report['update']) == (0, 1)
    losses = [[batch['loss'] for batch in rank['batches']] for rank in report['ranks']]
    assert float(losses[0][0]) > 0 and losses[1] == ['nan']
    (spoilt,) = report['ranks'][1]['batches']
    assert len(spoilt['indices']) == 2 and all((data / 'train' / file).exists() for file in spoilt['files'])


@pytest.mark.parametrize('bad', [0, 2])
def test_metrics_of_two_processes_are_those_of_one(data, tmp_path, capsys, bad):
    """13 images, or 11 of them: neither is a multiple of two."""
    own = shutil.copytree(data, tmp_path / 'data')
    for name in ('class_0/000.png', 'class_2/001.png'):
        (own / 'validation' / name).unlink()
    for name in ('class_0/003.png', 'class_2/004.png')[:bad]:
        (own / 'validation' / name).write_bytes(b'')
    folder = train(data, tmp_path, '--epochs', '1', '--lr', '0.05')
    flags = [
        str(own),
        '--checkpoint',
        str(folder / 'last.pth.tar'),
        '-b',
        '3',
        '-j',
        '1',
        '--device',
        'cpu',
        '--bad-image',
        'skip' if bad else 'abort',
    ]
    capsys.readouterr()
    validate(flags)
    process = call('validate.py', *flags, processes=2)
    process.check_returncode()
    one, two = (json.loads(said.split('--result\n')[1]) for said in (capsys.readouterr().out, process.stdout))
    assert one == two
    assert one.get('bad_images', 0) == bad
