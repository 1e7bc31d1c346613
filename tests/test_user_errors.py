"""A user's mistake ends with exit code 2 and one line that names it."""

import os
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from image_folders import write_images
from runs import MODEL, build, call, train

import timm_mldecoder
from timm_mldecoder.export.__main__ import main as export
from timm_mldecoder.flags import parse_train, parse_validate
from timm_mldecoder.predict.__main__ import main as predict
from timm_mldecoder.runtime.errors import run_command
from train import main as train_main
from validate import main as validate_main


@pytest.fixture(scope='module')
def checkpoint(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp('trained'), '--epochs', '1') / 'last.pth.tar'


@pytest.fixture
def line_of(tmp_path, capsys, monkeypatch):
    """Run a script that ends with exit code 2, and return the line of its error."""
    monkeypatch.chdir(tmp_path)

    def run(main, *flags):
        capsys.readouterr()
        code = run_command(lambda: main([str(flag) for flag in flags]))
        output = capsys.readouterr().err
        assert code == 2, output
        assert 'Traceback' not in output
        line = output.splitlines()[-1]
        assert re.search(r': error: ', line)
        return line

    return run


def without(data, tmp_path, *names):
    """The data, but for some images."""
    copy = shutil.copytree(data, tmp_path / 'copy')
    for pattern in names:
        for path in copy.glob(pattern):
            path.unlink()
    return copy


def test_data_that_is_not_there(data, tmp_path, line_of):
    assert 'nowhere: no such folder' in line_of(train_main, 'nowhere', *MODEL)
    assert "has no folder 'testing'" in line_of(train_main, data, *MODEL, '--val-split', 'testing')
    (tmp_path / 'empty').mkdir()
    assert 'empty' in line_of(train_main, tmp_path / 'empty', *MODEL)


def test_images_without_class_folders_get_the_flag_of_the_annotations(data, tmp_path, line_of, checkpoint):
    flat = tmp_path / 'flat'
    for split in ('train', 'validation'):
        shutil.copytree(data / split / 'class_0', flat / split)
    line = line_of(train_main, flat, *MODEL)
    assert '--dataset' in line and '--dataset csv' not in line
    for split in ('train', 'validation'):
        (flat / f'{split}.csv').write_text('path,labels\n')
    assert 'train.csv is there: add --dataset csv' in line_of(train_main, flat, *MODEL)
    assert 'add --dataset csv' in line_of(validate_main, flat, '--checkpoint', checkpoint, '--device', 'cpu')


def test_a_class_without_images(data, tmp_path, line_of):
    assert 'class_1' in line_of(train_main, without(data, tmp_path, 'train/class_1/*'), *MODEL)


def test_another_number_of_classes(data, tmp_path, line_of, checkpoint):
    line = line_of(train_main, data, *MODEL, '--num-classes', '5')
    assert "the data has 3 classes ('class_0', 'class_1', 'class_2'), the model 5" in line
    fewer = without(data, tmp_path, '*/class_2/*')
    line = line_of(train_main, fewer, *MODEL, '--num-classes', '2', '--resume', checkpoint)
    assert "class 2 is missing in the data and 'class_2' in the checkpoint" in line
    line = line_of(train_main, data, *MODEL, '--use-ml-decoder-head', '1', '--resume', checkpoint)
    assert 'fc.layers.0' in line
    line = line_of(validate_main, data, '--checkpoint', checkpoint, '--device', 'cpu', '--num-classes', '4')
    assert f'--checkpoint {checkpoint}' in line and 'fc' in line


def test_a_class_that_has_no_image_anywhere_is_named(data, tmp_path, line_of, caplog):
    fewer = without(data, tmp_path, '*/class_1/*')
    assert 'no images are in class_1' in line_of(train_main, fewer, *MODEL)
    build(fewer, tmp_path, '--num-classes', '2')
    assert any('class_1' in record.getMessage() for record in caplog.records if record.levelname == 'WARNING')


def test_classes_that_are_not_those_of_the_checkpoint(data, tmp_path, line_of, checkpoint):
    flags = ['--checkpoint', checkpoint, '--device', 'cpu', '-j', '0']
    fewer = without(data, tmp_path, 'validation/class_1/*')
    (fewer / 'validation' / 'class_2').rename(fewer / 'validation' / 'dogs')
    line = line_of(validate_main, fewer, *flags)
    assert "class 1 is 'dogs' in the data and 'class_1' in the checkpoint" in line and "not trained on 'dogs'" in line
    (fewer / 'validation' / 'dogs').rename(fewer / 'validation' / 'class_2')
    names = tmp_path / 'names.txt'
    names.write_text('class_0\nclass_1\nclass_2')
    validate_main([str(flag) for flag in (fewer, *flags, '--class-map', names)])


@pytest.mark.parametrize(
    ('flags', 'named'),
    [
        (['--gp', 'foo'], '--model test_resnet: Invalid pool type: foo'),
        (['--model', 'dla34', '--grad-checkpointing'], '--model dla34: gradient checkpointing not supported'),
        (['--model', 'resnetblur18', '--pretrained'], '--model resnetblur18: No pretrained weights exist'),
        (['--model', 'swin_tiny_patch4_window7_224', '--img-size', '64'], 'img_size=64'),
        (['--in-chans', '4'], '--in-chans'),
        (['--input-img-mode', 'XYZ'], '--input-img-mode XYZ'),
        (['--model-kwargs', 'zzz=1'], '(--model-kwargs zzz=1)'),
        (['--model-kwargs', 'output_stride=7'], 'AssertionError() (--model-kwargs output_stride=7)'),
        (['--pretrained-cfg-overlay', 'zzz=1'], '(--pretrained-cfg-overlay zzz=1)'),
        (['--pretrained-cfg-overlay', 'mean=zzz'], '--pretrained-cfg-overlay mean: zzz: expects a number'),
        (['--pretrained-cfg-overlay', 'interpolation=zzz'], '--pretrained-cfg-overlay interpolation: zzz: expects'),
        (['--opt-kwargs', 'zzz=1'], '--opt sgd --opt-kwargs zzz=1'),
        (['--loss-class-weight', '1,2'], '--loss-class-weight 1,2: 2 values, and 3 classes'),
        (['-b', '25'], '--batch-size 25'),
    ],
)
def test_what_a_model_does_not_take(data, line_of, flags, named):
    assert named in line_of(train_main, data, *MODEL, *flags)


def test_what_a_model_that_is_evaluated_does_not_take(data, tmp_path, line_of, checkpoint):
    flags = [data, '--device', 'cpu', '-j', '0']
    assert 'No pretrained weights exist' in line_of(validate_main, *flags, '--model', 'resnetblur18')
    assert 'Invalid pool type: foo' in line_of(validate_main, *flags, '--checkpoint', checkpoint, '--gp', 'foo')
    assert '--model' in line_of(validate_main, *flags, '--model', '')
    flags = [*flags, '--checkpoint', checkpoint]
    assert ' than --use-ml-decoder-head 1: ' in line_of(validate_main, *flags, '--use-ml-decoder-head', '1')
    labels = tmp_path / 'labels.txt'
    for text, named in (('0 7', ' 7 '), ('-1', ' -1 '), ('', ' 0 classes'), ('2 0', ' 2 classes')):
        labels.write_text(text)
        line = line_of(validate_main, *flags, '--valid-labels', labels)
        assert f'--valid-labels {labels}' in line and named in line


@pytest.mark.parametrize(
    'flags',
    ['test_vit --img-size 60', 'convnext_atto --img-size 20', 'vgg11 --img-size 20', 'mixer_s32_224 --img-size 64'],
)
def test_a_size_that_a_model_does_not_take_is_named_before_the_run_begins(data, tmp_path, line_of, flags):
    line = line_of(train_main, data, '--model', *flags.split(), '--output', tmp_path / 'runs')
    assert '--img-size' in line and f'{flags.split()[-1]} x {flags.split()[-1]}' in line
    assert not (tmp_path / 'runs').exists()


def test_a_model_built_for_its_size_by_an_argument_is_evaluated_at_that_size(data, tmp_path):
    """The size that counts is the checkpoint's, not that of the model's pretrained weights."""
    folder = train(
        data,
        tmp_path,
        *shlex.split(
            '--model swin_tiny_patch4_window7_224 --img-size 32 --epochs 1 --model-kwargs img_size=32 '
            'window_size=2 embed_dim=8 depths=(1,1) num_heads=(1,1)'
        ),
    )
    validate_main([str(data), '--device', 'cpu', '-j', '0', '--checkpoint', str(folder / 'last.pth.tar')])


def test_files_that_are_missing_or_wrong(data, tmp_path, line_of, checkpoint):
    for flag in ('--resume', '--initial-checkpoint', '--pretrained-path'):
        assert 'nothing.pth' in line_of(train_main, data, *MODEL, flag, 'nothing.pth')
    torch.save({'state_dict': {'other.weight': torch.ones(3)}}, tmp_path / 'other.pth')
    for flags in (['--initial-checkpoint'], ['--pretrained', '--pretrained-path']):
        assert f'{flags[-1]} other.pth: ' in line_of(train_main, data, *MODEL, *flags, 'other.pth')
        head = ['--use-ml-decoder-head', '1', '--decoder-embedding', '8']
        assert f'{flags[-1]} other.pth: ' in line_of(train_main, data, *MODEL, *head, *flags, 'other.pth')
    assert 'nothing.txt' in line_of(train_main, data, *MODEL, '--class-map', 'nothing.txt')


def test_an_output_that_cannot_be_written(data, tmp_path, line_of):
    (tmp_path / 'file').touch()
    assert '--output: cannot write to file/run' in line_of(
        train_main, data, *MODEL, '--output', 'file', '--experiment', 'run'
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
def test_cuda_where_there_is_none(data, line_of):
    line = line_of(train_main, data, *MODEL, '--device', 'cuda')
    assert '--device cuda' in line and '--device cpu' in line
    assert parse_train([str(data), *MODEL]).device == parse_validate([str(data)]).device == 'cpu'


@pytest.mark.skipif(not hasattr(select, 'poll'), reason='only POSIX tells that a pipe has no reader')
@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize('flags', ['--help', 'train --help-all', 'validate'])
def test_a_reader_of_the_output_that_ends_early_is_no_error(flags, unbuffered, monkeypatch):
    monkeypatch.setenv('PYTHONUNBUFFERED', unbuffered)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stdout:
        command = [sys.executable, '-m', 'timm_mldecoder', *flags.split()]
        process = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    closed = subprocess.run(
        ['sh', '-c', f'exec "$0" -m timm_mldecoder {flags} >&-', sys.executable], capture_output=True
    )
    assert closed.returncode == (2 if flags == 'validate' else 0) and b'Traceback' not in closed.stderr
    if flags == 'validate':  # has nothing to print: its error stays
        assert process.returncode == 2 and 'DIR' in process.stderr
    else:
        assert (process.returncode, process.stderr) == (141, '')


def test_a_warning_is_one_line_without_code(capsys, caplog):
    run_command(lambda: [warnings.warn('twice', stacklevel=1) for _ in range(2)])
    assert [record.getMessage().endswith('UserWarning: twice') for record in caplog.records] == [True]


def test_one_line_of_a_real_process_and_a_port_that_is_taken(data, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in dict(
            RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=port
        ).items():
            monkeypatch.setenv(name, value)
        process = call('train.py', data, *MODEL, '--output', tmp_path)
    assert process.returncode == 2
    assert 'Traceback' not in process.stderr
    line = process.stderr.splitlines()[-1]
    assert line.startswith('train.py: error: ') and port in line and 'free port' in line


@pytest.mark.parametrize('program', ['predict', 'export', 'validate', 'load'])
def test_weights_that_do_not_name_their_model_are_answered_with_the_way_to_convert_them(program, tmp_path):
    path = tmp_path / 'own.pth'
    torch.save(timm.create_model('test_vit', num_classes=3).state_dict(), path)
    write_images(tmp_path / 'data', train=1, validation=1)
    calls = {
        'predict': lambda: predict(
            [str(tmp_path / 'data'), '--checkpoint', str(path), '--out', str(tmp_path / 'x.csv')]
        ),
        'export': lambda: export([str(path), str(tmp_path / 'x.onnx'), '--format', 'onnx']),
        'validate': lambda: validate_main([str(tmp_path / 'data'), '--checkpoint', str(path), '--device', 'cpu']),
        'load': lambda: timm_mldecoder.load(path),
    }
    with pytest.raises(ValueError, match=r'own\.pth.*convert') as caught:
        calls[program]()
    assert 'Missing key' not in str(caught.value) and '--model' in str(caught.value)


@pytest.mark.parametrize('change', ['--num-classes 2', '--use-ml-decoder-head 1 --num-classes 3', '--model test_vit'])
def test_an_initial_checkpoint_of_another_model_is_answered_with_the_ways_that_work(change, tmp_path):
    data = write_images(tmp_path / 'data', train=4, validation=2, classes=2 if '2' in change.split() else 3)
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), tmp_path / 'own.pth')
    flags = f'--model test_resnet --num-classes 3 --img-size 160 -b 4 -j 0 --device cpu --output {tmp_path} {change}'
    with pytest.raises(ValueError, match='--pretrained-path.*local-dir:'):
        train_main([str(data), *flags.split(), '--initial-checkpoint', str(tmp_path / 'own.pth')])
    if 'vit' not in change:  # the first way works
        start = f'--pretrained --pretrained-path {tmp_path}/own.pth --epochs 1 --warmup-epochs 0 --experiment second'
        train_main([str(data), *flags.split(), *start.split()])
        assert (tmp_path / 'second' / 'last.pth.tar').is_file()
