"""Real signals and kills, in one process and in several."""

import json
import os
import re
import shlex
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress

import pytest
from runs import (
    DEADLINE,
    MODEL,
    MOVING,
    PATIENCE,
    assert_same_run,
    call,
    pid_of_rank,
    start,
    summary,
    train,
    wait_for,
    wait_until_gone,
)

from timm_mldecoder.checkpoint.files import PENDING, numbered, progress_by_name
from timm_mldecoder.runtime.files import TEMPORARY
from validate import main as validate

DISTRIBUTED = [*MOVING, '--dist-bn', 'reduce', '--aug-repeats', '2', '-j', '1', '-b', '2', '--epochs', '4']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_with_its_code(data, tmp_path, number):
    flags = [data, *MODEL, *MOVING, '-j', '1', '--epochs', '100', '--output', tmp_path, '--experiment', 'run']
    log = tmp_path / 'log'
    process = start('train.py', *flags, log=log)
    wait_for(r'Train: 1 \[', log, process)
    began = time.monotonic()
    os.killpg(process.pid, number)  # as a terminal and most schedulers do: workers get it too
    assert process.wait(PATIENCE) == 128 + number, log.read_text()
    assert time.monotonic() - began < DEADLINE
    assert 'Traceback' not in log.read_text()
    (recovery,) = (tmp_path / 'run').glob('recovery-*')
    assert f'--resume {recovery}' in log.read_text()


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
    os.kill(pid_of_rank(launcher, 1), signal.SIGTERM)  # to one of them
    launcher.wait(PATIENCE)
    assert time.monotonic() - began < DEADLINE
    codes = re.findall(r'exitcode *: (-?\d+)', log.read_text())
    assert set(codes) == {'143'}, log.read_text()
    assert list((tmp_path / 'run').glob('recovery-*'))

    call('train.py', *flags, processes=2).check_returncode()
    assert_same_run(tmp_path / 'run', undisturbed)


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_the_run_ends_the_same(data, tmp_path, undisturbed):
    flags = [data, *MODEL, *DISTRIBUTED, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto']
    log = tmp_path / 'log'
    launcher = start('train.py', *flags, '--recovery-interval', '1', log=log, processes=2, restarts=3)
    wait_for(r'Train: 1 \[', log, launcher)
    os.kill(pid_of_rank(launcher, 1), signal.SIGKILL)
    assert launcher.wait(PATIENCE) == 0, log.read_text()
    assert 'Resumed from' in log.read_text()
    assert_same_run(tmp_path / 'run', undisturbed)


@pytest.mark.parametrize('parallel', ['ddp', pytest.param('fsdp', marks=pytest.mark.slow)])
def test_all_ranks_skip_a_step_that_is_not_finite_on_one(data, tmp_path, parallel):
    flags = [data, *MODEL, '--epochs', '1', '-b', '2', '--no-ddp-bb', '--output', tmp_path, '--experiment', 'run']
    flags += ['--parallel', parallel]
    script = 'tests/programs/nonfinite_on_one_rank.py'
    launcher = start(script, *flags, tmp_path / 'report', log=tmp_path / 'log', processes=2)
    log = tmp_path / 'log'
    assert launcher.wait(PATIENCE) == 0, log.read_text()
    for rank in range(2):
        assert json.loads((tmp_path / f'report.{rank}').read_text()) == dict(made=[1, 3, 5, 6], unchanged=[2, 4])
    for step in (1, 3):
        assert f'skipped epoch 0, step {step}' in log.read_text()

    report = json.loads((tmp_path / 'run' / 'nonfinite.json').read_text())
    assert (report['epoch'], report['step']) == (0, 1)
    losses = [[batch['loss'] for batch in rank['batches']] for rank in report['ranks']]
    assert float(losses[0][0]) > 0 and losses[1] == ['nan']
    (nonfinite,) = report['ranks'][1]['batches']
    assert len(nonfinite['indices']) == 2 and all((data / 'train' / file).exists() for file in nonfinite['files'])


CUT = [*MODEL, '--epochs', '2', '-b', '2', '--lr', '0.01', '--aa', 'rand-m5', '--recovery-interval', '1']
RECORD = 'tests/programs/record_images.py'


def recorded(path):
    """Return the epoch, the batch and the hash of each image that any rank has recorded."""
    lines = [line.split() for file in path.parent.glob(f'{path.name}.*') for line in file.read_text().splitlines()]
    return [(int(epoch), int(batch), digest) for epoch, batch, digest in lines]


@pytest.fixture(scope='module', params=['ddp', 'fsdp'])
def cut(data, tmp_path_factory, request):
    """A run killed within its second epoch on two ranks: the images of that epoch in an undisturbed run, those trained
    before the newest checkpoint, and the folder."""
    output = tmp_path_factory.mktemp('cut')
    flags = [data, *CUT, '-j', '1', '--output', output, '--parallel', request.param]
    call(RECORD, output / 'whole', *flags, '--experiment', 'whole', processes=2).check_returncode()

    log = output / 'log'
    launcher = start(RECORD, output / 'part', *flags, '--experiment', 'run', log=log, processes=2)
    wait_for(r'Train: 1 \[ +1/', log, launcher)
    for pid in [pid_of_rank(launcher, rank) for rank in (0, 1)]:
        with suppress(ProcessLookupError):  # the launcher was faster
            os.kill(pid, signal.SIGKILL)
    assert launcher.wait(PATIENCE) != 0
    wait_until_gone(launcher.pid)  # workers and their server end with their rank

    epoch, batch = progress_by_name(numbered(output / 'run')[0])
    assert epoch == 1 and 1 <= batch < 6
    whole = Counter(digest for epoch, _, digest in recorded(output / 'whole') if epoch == 1)
    before = Counter(digest for epoch, number, digest in recorded(output / 'part') if epoch == 1 and number < batch)
    assert len(whole) == 24 and set(whole.values()) == {1}
    return whole, before, output / 'run', request.param


@pytest.mark.parametrize(('ranks', 'batch_size'), [(1, 2), (3, 2), (1, 6)])
@pytest.mark.slow
def test_a_run_killed_within_an_epoch_continues_on_other_ranks_with_the_same_images(
    data, tmp_path, cut, ranks, batch_size
):
    """Each sample of the epoch once, with the augmentation that it has in the undisturbed run."""
    whole, before, folder, parallel = cut
    shutil.copytree(folder, tmp_path / 'run')
    (tmp_path / 'run' / f'.last.pth.tar{TEMPORARY}').touch()  # what a kill while saving leaves
    (tmp_path / 'run' / PENDING).touch()
    flags = [data, *CUT, '-b', batch_size, '-j', '0', '--output', tmp_path, '--experiment', 'run', '--resume', 'auto']
    flags += ['--parallel', parallel]
    process = call(RECORD, tmp_path / 'rest', *flags, processes=ranks)
    assert process.returncode == 0, process.stderr
    rest = Counter(digest for _, _, digest in recorded(tmp_path / 'rest'))
    assert before + rest == whole
    assert f'world_size was 2 and is {ranks}' in process.stderr
    assert not [path.name for path in (tmp_path / 'run').iterdir() if TEMPORARY in path.name or path.name == PENDING]


@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.slow
def test_no_worker_is_left_after_an_error(data, tmp_path, ranks):
    broken = shutil.copytree(data, tmp_path / 'broken')
    image = broken / 'train' / 'class_1' / '002.png'
    image.write_bytes(b'')
    flags = [broken, *MODEL, '-b', '2', '-j', '2', '--bad-image', 'abort', '--output', tmp_path]
    log = tmp_path / 'log'
    process = start('train.py', *flags, log=log, processes=ranks)
    assert process.wait(PATIENCE) == 1
    assert f'{image} cannot be read' in log.read_text()
    wait_until_gone(process.pid)


def test_of_two_runs_started_in_one_folder_at_once_one_is_refused(data, tmp_path):
    flags = [data, *MODEL, '--epochs', '2', '--output', tmp_path, '--experiment', 'run']
    logs = [tmp_path / 'first', tmp_path / 'second']
    runs = [start('train.py', *flags, log=log) for log in logs]
    codes = [run.wait(PATIENCE) for run in runs]
    assert sorted(codes) == [0, 2], logs[0].read_text() + logs[1].read_text()
    refused = logs[codes.index(2)].read_text()
    assert 'Traceback' not in refused and '--experiment' in refused.splitlines()[-1]
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == ['0', '1']


@pytest.mark.parametrize('bad', [0, 2])
@pytest.mark.slow
def test_metrics_of_two_ranks_are_those_of_one(data, tmp_path, capsys, bad):
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
        *shlex.split('-b 3 -j 1 --device cpu --bad-image'),
        'skip' if bad else 'abort',
    ]
    capsys.readouterr()
    validate(flags)
    process = call('validate.py', *flags, processes=2)
    process.check_returncode()
    one, two = (json.loads(said.split('--result\n')[1]) for said in (capsys.readouterr().out, process.stdout))
    assert one == two
    assert one.get('bad_images', 0) == bad
