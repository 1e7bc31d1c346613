"""Runs killed over and over, at random moments, come to the same as those that were left alone."""

import json
import os
import random
import shlex
import signal
import subprocess
import time

import pytest
from runs import MODEL, MOVING, assert_same_run, command, environment, last, start, train, write_data
from soak_runs import GROUPS

from timm_mldecoder.checkpoint.files import newest
from timm_mldecoder.checkpoint.read import RUN, read_checkpoint

KILLS = 50
LIFE = 2.0  # seconds after the first log line of a step, at most
PATIENCE = 300


def progress(content):
    return content[RUN]['epoch'], content[RUN]['batch']


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    data = write_data(tmp_path / 'data')
    flags = [*MOVING, '--epochs', '250', '--checkpoint-hist', '3', '-j', '1']
    undisturbed = train(data, tmp_path / 'undisturbed', *flags)

    folder, log = tmp_path / 'killed' / 'run', tmp_path / 'log'
    killed = [
        data,
        *MODEL,
        *flags,
        '--output',
        folder.parent,
        *shlex.split('--experiment run --resume auto --recovery-interval 1'),
    ]
    random.seed(0)
    kills = lost = failed = 0
    reached = (0, 0)
    while kills < KILLS:
        process = start('train.py', *killed, log=log)
        end = time.monotonic() + PATIENCE
        while 'Train: ' not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        time.sleep(random.uniform(0, LIFE))
        assert process.poll() is None, 'the run is too short for so many kills'
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1

        for path in folder.glob('*.pth.tar'):
            try:
                read_checkpoint(path)
            except ValueError:
                failed += 1
        _, content = newest(folder)
        lost += not content or progress(content) < reached
        if content:
            reached = progress(content)
            lost += sum(not (folder / name).exists() for name, _ in content['saver']['checkpoint_files'])

    assert start('train.py', *killed, log=log).wait(PATIENCE) == 0, log.read_text()
    equal = True
    try:
        assert_same_run(folder, undisturbed)
    except AssertionError:
        equal = False
    print(
        f'\nkills {kills}, checkpoints lost {lost}, loads failed {failed}, reached {progress(last(folder))}, '
        f'final weights equal to the undisturbed run: {"yes" if equal else "no"}'
    )
    assert (lost, failed, equal) == (0, 0, True)


@pytest.mark.slow
@pytest.mark.parametrize('group', GROUPS)
def test_killed_runs_of_every_kind_end_like_undisturbed_ones(group, tmp_path):
    """Prints the rows of the table of docs/reliability.md."""
    rows, log = [], tmp_path / 'errors'
    with (
        log.open('w') as errors,
        subprocess.Popen(
            command('tests/programs/soak.py', tmp_path, group, '0'),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(),
        ) as process,
    ):
        for line in process.stdout:  # a row when its run ends
            if line[:1] != '{':
                continue
            rows.append(row := json.loads(line))
            equal = 'yes' if row['equal'] else 'no'
            print(f'| {group} | `{row["name"]}` | {row["kills"]} | {row["resumed"]} | {equal} |', flush=True)
    assert [row['name'] for row in rows] == list(GROUPS[group]), log.read_text()[-3000:]
    wrong = [row for row in rows if not row['equal'] or row['lost'] or row['unreadable'] or row['left']]
    assert not wrong, json.dumps(wrong, indent=1)
    assert all(row['kills'] for row in rows), 'a run that is not killed shows nothing'
    if group == 'sharded':
        kills, writing = (sum(row[key] for row in rows) for key in ('kills', 'writing'))
        print(f'{kills} kills, {writing} of them while tensors were written')
        assert kills >= 20 and writing
