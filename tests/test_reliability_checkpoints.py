"""Checkpoint files through kills, failing system calls, damage and malice."""

import os
import pickle
import random
import shlex
import shutil
from argparse import Namespace

import pytest
import torch
from marks import few
from runs import MODEL, build, call, fit, last, train

from timm_mldecoder.checkpoint.read import ENTRIES, RUN, RUN_ENTRIES, read_checkpoint
from timm_mldecoder.data.word_embeddings import read_word_embeddings
from timm_mldecoder.runtime.errors import RunFailed
from validate import main as validate


def test_no_kill_while_saving_loses_a_checkpoint(tmp_path):
    process = call('tests/programs/saving.py', 'kill', folder=tmp_path)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 25, 'it was killed before it could save'


def test_a_step_of_saving_that_fails_loses_no_checkpoint(tmp_path):
    process = call('tests/programs/saving.py', 'fail', folder=tmp_path)
    assert process.returncode == 0, process.stderr


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp('trained'), '--epochs', '2', '--opt', 'adamw', '--lr', '1e-3')


@pytest.fixture
def folder(trained, tmp_path):
    """A run of two epochs, to be damaged."""
    return shutil.copytree(trained, tmp_path / 'run')


def test_a_full_disk_ends_the_run_in_one_line_and_the_checkpoint_stays(data, folder):
    flags = [
        data,
        *MODEL,
        *shlex.split('--epochs 3 --opt adamw --experiment run --resume auto --output'),
        folder.parent,
    ]
    process = call('tests/programs/limited_file_size.py', 100_000, *MODEL, *flags)
    assert process.returncode == 1
    assert 'Traceback' not in process.stderr
    assert f'could not write {folder}/pending.pth.tar: ' in process.stderr.splitlines()[-1]
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
    model = shlex.split('--model test_resnet --img-size 32 --num-classes 3')
    code = 'mkdir, which could execute code'  # read_checkpoint's reason
    attempts = {
        '--resume': (lambda: build(data, folder.parent, '--resume', str(file)), code),
        '--resume auto': (lambda: build(data, folder.parent, '--resume', 'auto'), f'--resume auto.*{folder}'),
        '--initial-checkpoint': (lambda: build(data, tmp_path, '--initial-checkpoint', str(file)), code),
        '--pretrained-path': (lambda: build(data, tmp_path, '--pretrained', '--pretrained-path', str(file)), code),
        '--class-map': (lambda: build(data, tmp_path, '--class-map', str(class_map)), f'{class_map}|mkdir'),
        '--checkpoint': (lambda: validate([*evaluation, *model, '--checkpoint', str(file)]), code),
        '--checkpoint of a folder': (
            lambda: validate([*evaluation, *model, '--checkpoint', str(folder)]),
            rf'{folder}/last\.pth\.tar',
        ),
        '--word-embeddings': (lambda: read_word_embeddings(file), str(file)),
    }
    for flag, (attempt, named) in attempts.items():
        # a second way of loading would leave its trace
        with pytest.raises((ValueError, RunFailed), match=named):
            attempt()
        assert not trace.exists(), flag


WRONG = [None, 'text', {'a': 'b'}, '', [], {}, 3, -1, {'a': torch.ones(2)}, [{'epoch': 'x'}], [{}], Namespace()]


@pytest.mark.parametrize('value', few(WRONG, 3), ids=repr)
def test_an_entry_with_wrong_contents_is_refused_or_does_no_harm(data, trained, tmp_path, value):
    """Every entry of the schema in turn, behind --resume and --checkpoint; some values are valid for some entries."""
    path, content = tmp_path / 'wrong.pth.tar', last(trained)
    for name in (*ENTRIES, *RUN_ENTRIES):
        wrong = {**content, RUN: {**content[RUN], name: value}} if name in RUN_ENTRIES else {**content, name: value}
        torch.save(wrong, path)
        try:
            read_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error) and name in str(error)
        else:
            assert_one_error(data, path, tmp_path / name)


def assert_one_error(data, path, output):
    """Resume from a checkpoint and score it: each succeeds or ends in a ValueError that names the file."""
    flags = ['--opt', 'adamw', '--lr', '1e-3', '--resume', str(path)]
    evaluation = shlex.split(f'{data} --device cpu -j 0 -b 15 --checkpoint {path}')
    for attempt in (lambda: fit(build(data, output, '--epochs', '3', *flags)), lambda: validate(evaluation)):
        try:
            attempt()
        except ValueError as error:
            assert str(path) in str(error)


def test_flags_name_a_file_with_wrong_contents(data, trained, tmp_path):
    path = tmp_path / 'wrong.pth.tar'
    torch.save({**last(trained), 'optimizer': []}, path)
    with pytest.raises(ValueError, match=f'--resume.*{path}: optimizer'):
        build(data, tmp_path, '--resume', str(path))
    with pytest.raises(ValueError, match=f'{path}: optimizer'):
        validate(shlex.split(f'{data} --device cpu -j 0 --checkpoint {path}'))


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


@pytest.mark.parametrize('how', few(['truncated', 'empty', 'not a checkpoint', 'zeros'], 1))
def test_a_damaged_checkpoint_is_named_with_the_newest_one_that_loads(data, folder, how, caplog):
    newest = folder / 'last.pth.tar'
    damage(newest, how)
    with pytest.raises(ValueError, match=f'{newest} .*{folder}/checkpoint-1.pth.tar'):
        build(data, folder.parent, '--opt', 'adamw', '--resume', str(newest))
    assert build(data, folder.parent, '--opt', 'adamw', '--resume', 'auto').state.epoch == 2
    assert f'skipped: {newest}' in caplog.text

    damage(folder / 'checkpoint-1.pth.tar', how)
    assert build(data, folder.parent, '--opt', 'adamw', '--resume', 'auto').state.epoch == 1
    damage(folder / 'checkpoint-0.pth.tar', how)
    with pytest.raises(ValueError, match=f'--resume auto.*{folder}'):
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
