"""Checkpoint files through kills, failing system calls, damage and malice."""

import os
import pickle
import random
import shutil

import pytest
import system_calls
import torch
from runs import MODEL, ROOT, build, last, train, write_data
from timm_mldecoder.engine.runtime.failure import RunFailed

from timm_mldecoder.checkpoints.published import read_checkpoint
from timm_mldecoder.data.word_embeddings import read_word_embeddings
from validate import main as validate

SAVING = f"""
import sys
sys.path.insert(0, {str(ROOT / 'tests')!r})
import os, pathlib, random, resource, signal, sys, time
import torch
from system_calls import fail
from timm_mldecoder.engine.checkpoint.files import CheckpointFolder
from timm_mldecoder.checkpoints.published import read_checkpoint

def save(checkpoints, epoch, size=1000):
    checkpoints.save_epoch(epoch, epoch % 7, lambda: dict(
        epoch=epoch, weights=torch.full((size,), float(epoch)), saver=checkpoints.state_dict()))

def load(name):
    content = read_checkpoint(name)
    assert (content['weights'] == content['epoch']).all()
    return content['epoch']
"""


def test_no_kill_while_saving_costs_a_checkpoint(python):
    told = python(
        SAVING
        + """
checkpoints = CheckpointFolder(pathlib.Path(), max_history=3)
save(checkpoints, 0)
random.seed(0)
reached = 0
for kill in range(25):
    child = os.fork()
    if not child:
        for epoch in range(reached + 1, 10 ** 9):
            save(checkpoints, epoch)
    time.sleep(random.uniform(0.005, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    saver = read_checkpoint('last.pth.tar')['saver']
    assert load('last.pth.tar') >= reached
    reached = load('last.pth.tar')
    checkpoints.load_state_dict(saver, pathlib.Path())
    assert all(load(name) >= 0 for name, _ in checkpoints.ranked) and checkpoints.ranked
    # the best may be one of the next epoch already, which a resumed run comes to again
    assert load('model_best.pth.tar') <= reached + 1
print(reached)
"""
    ).stdout
    assert int(told) > 25, 'it was killed before it could save'


@system_calls.needed
def test_a_step_of_saving_that_fails_costs_no_checkpoint(python):
    python(
        SAVING
        + """
def attempt(fault):
    child = os.fork()
    if not child:
        fault()
        try:
            save(checkpoints, 6, size=100_000)
        except OSError as error:
            pathlib.Path('told').write_text(str(error))
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

checkpoints = CheckpointFolder(pathlib.Path(), max_history=3)
save(checkpoints, 5)
disk_full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for fault, reason in [
        (lambda: fail('fsync'), 'No space left'),
        (lambda: fail('rename'), 'No space left'), (disk_full, '')]:
    assert attempt(fault) == 1
    told = pathlib.Path('told').read_text()
    assert told.startswith('could not write pending.pth.tar: ' + reason), told
    assert load('last.pth.tar') == load('model_best.pth.tar') == load('checkpoint-5.pth.tar') == 5
    assert sorted(os.listdir()) == ['checkpoint-5.pth.tar', 'last.pth.tar', 'model_best.pth.tar', 'told']

# a file system without links
assert attempt(lambda: fail('link')) == 0
assert load('last.pth.tar') == load('model_best.pth.tar') == load('checkpoint-6.pth.tar') == 6
"""
    )


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp('trained'), '--epochs', '2', '--opt', 'adamw', '--lr', '1e-3')


@pytest.fixture
def folder(trained, tmp_path):
    """A run of two epochs, to be damaged."""
    return shutil.copytree(trained, tmp_path / 'run')


@system_calls.needed
def test_a_full_disk_ends_the_run_in_one_line_and_the_checkpoint_stays(data, folder, python):
    flags = [
        str(data),
        *MODEL,
        '--epochs',
        '3',
        '--opt',
        'adamw',
        '--output',
        str(folder.parent),
        '--experiment',
        'run',
        '--resume',
        'auto',
    ]
    process = python(
        f"""
import resource, sys
from timm_mldecoder.engine.runtime import cli
from train import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(cli.run(lambda: main({flags})))
""",
        check=False,
        PYTHONPATH=str(ROOT),
    )
    assert process.returncode == 1
    assert 'Traceback' not in process.stderr
    assert f'error: could not write {folder}/pending.pth.tar: ' in process.stderr.splitlines()[-1]
    assert last(folder)['epoch'] == 1


class Malice:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def malicious(folder, tmp_path):
    """Files that run code where they are loaded with all of pickle, and the trace they would leave."""
    trace = tmp_path / 'trace'
    content = {**last(folder), 'extra': Malice(trace)}
    torch.save(content, tmp_path / 'file.pth.tar')
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps(Malice(trace)))
    torch.load(tmp_path / 'file.pth.tar', weights_only=False)
    trace.rmdir()  # it works
    return tmp_path / 'file.pth.tar', tmp_path / 'map.pkl', trace


def test_no_path_flag_runs_what_is_in_a_file(data, folder, malicious, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the scores of a folder are written
    file, class_map, trace = malicious
    shutil.copy(file, folder / 'last.pth.tar')
    for path in folder.glob('checkpoint-*'):
        shutil.copy(file, path)
    evaluation = [str(data), '--device', 'cpu', '-j', '0']
    attempts = {
        '--resume': lambda: build(data, folder.parent, '--resume', str(file)),
        '--resume auto': lambda: build(data, folder.parent, '--resume', 'auto'),
        '--initial-checkpoint': lambda: build(data, folder.parent, '--initial-checkpoint', str(file)),
        '--pretrained-path': lambda: build(data, folder.parent, '--pretrained', '--pretrained-path', str(file)),
        '--class-map': lambda: build(data, folder.parent, '--class-map', str(class_map)),
        '--checkpoint': lambda: validate([*evaluation, *MODEL[:6], '--checkpoint', str(file)]),
        '--checkpoint of a folder': lambda: validate([*evaluation, *MODEL[:6], '--checkpoint', str(folder)]),
        'embeddings': lambda: read_word_embeddings(file),
    }
    for flag, attempt in attempts.items():
        # a second way of loading would leave its trace
        with pytest.raises((ValueError, RunFailed), match='(?i)refused|loads|cannot be read|permitted|could not be'):
            attempt()
        assert not trace.exists(), flag


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes(
        {
            'empty': b'',
            'truncated': content[: len(content) // 2],
            'not a checkpoint': b'<html>not found</html>',
            'zeros': bytes(len(content)),
        }[how]
    )


@pytest.mark.parametrize('how', ['empty', 'truncated', 'not a checkpoint', 'zeros'])
def test_a_damaged_checkpoint_is_named_with_the_newest_one_that_loads(data, folder, how, caplog):
    newest = folder / 'last.pth.tar'
    damage(newest, how)
    with pytest.raises(ValueError, match=f'{newest} .*the newest one that loads is {folder}/checkpoint-1.pth.tar'):
        build(data, folder.parent, '--opt', 'adamw', '--resume', str(newest))
    assert build(data, folder.parent, '--opt', 'adamw', '--resume', 'auto').state.epoch == 2
    assert f'Passed over: {newest}' in caplog.text

    damage(folder / 'checkpoint-1.pth.tar', how)
    assert build(data, folder.parent, '--opt', 'adamw', '--resume', 'auto').state.epoch == 1
    damage(folder / 'checkpoint-0.pth.tar', how)
    with pytest.raises(ValueError, match=f'no checkpoint in {folder} loads'):
        build(data, folder.parent, '--resume', 'auto')


def test_resume_auto_starts_afresh_where_there_is_nothing(data, tmp_path):
    assert build(data, tmp_path, '--resume', 'auto').state.epoch == 0


def test_any_damage_is_an_error_that_names_the_file(trained, tmp_path):
    content = (trained / 'last.pth.tar').read_bytes()
    random.seed(0)
    path = tmp_path / 'damaged.pth.tar'
    refused = 0
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(random.choice([1, 10, 1000])):
            changed[random.randrange(len(changed))] = random.randrange(256)
        path.write_bytes(changed[: random.choice([len(changed), random.randrange(len(changed))])])
        try:
            read_checkpoint(path)  # bytes of a weight may change without notice
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 30
