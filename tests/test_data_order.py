"""Class folders that differ in case or leading zeros: one order in every process, as without ties in timm's."""

import json
import logging
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import call, environment
from timm.utils import natural_key

from timm_mldecoder.data import Annotations, MultiLabelDataset, class_to_index, create_dataset
from timm_mldecoder.data.class_order import alike, sort_key
from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import parse_train
from timm_mldecoder.loading.compare_classes import check_same_classes, likely_causes, use_classes_of
from timm_mldecoder.loading.ranks import _describe
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loss import _weights_of_counts

TIED = ['b', 'B', 'x1', 'X01', 'x001', 'X1', 'z', '10', '9', '09']
ORDER = ['09', '9', '10', 'B', 'b', 'X01', 'X1', 'x001', 'x1', 'z']
PROGRAM = """
import sys
from timm_mldecoder.data import class_to_index, create_dataset
dataset = create_dataset('', sys.argv[1], 'train')
print(list(class_to_index(dataset)), [(path[len(sys.argv[1]):], target) for path, target in dataset.reader.samples])
"""


def write_folders(root, names, split='train'):
    for name in names:
        (root / split / name).mkdir(parents=True)
        for index in range(2):
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(root / split / name / f'{index}.png')
    return root


def test_the_order_of_classes_and_files_is_one_in_all_processes(tmp_path):
    write_folders(tmp_path, TIED)
    printed = set()
    for seed in range(2):
        process = subprocess.run(
            [sys.executable, '-c', PROGRAM, tmp_path],
            capture_output=True,
            text=True,
            env={**environment(), 'PYTHONHASHSEED': str(seed)},
        )
        assert process.returncode == 0, process.stderr
        printed.add(process.stdout)
    assert len(printed) == 1
    assert printed.pop().startswith(str(ORDER))


def test_the_order_without_ties_is_that_of_timm():
    names = [f'class {number}' for number in (10, 9, 100, 1)] + ['Zebra', 'apple', '7', 'n01440764', 'n2']
    assert sorted(names, key=sort_key) == sorted(names, key=natural_key)


def test_digits_that_are_no_decimals_are_names(tmp_path):
    write_folders(tmp_path, ['②', '①', 'm²', 'm10', 'm9'])
    assert list(class_to_index(create_dataset('', str(tmp_path), 'train'))) == ['m9', 'm10', 'm²', '①', '②']


@pytest.mark.parametrize(
    ('names', 'groups'),
    [(['Cat', 'dog', 'cat'], [['Cat', 'cat']]), (['7', '007', '70'], [['7', '007']]), (['a1', 'a2', 'b'], [])],
)
def test_names_that_are_almost_equal_are_warned_about(names, groups, tmp_path, caplog):
    assert alike(names) == groups
    write_folders(tmp_path, names)
    with caplog.at_level(logging.WARNING):
        create_dataset('', str(tmp_path), 'train')
    found = [all(repr(name) in record.message for name in groups[0]) for record in caplog.records]
    assert found == [True] * len(groups)


@pytest.mark.parametrize('script', ['train.py', pytest.param('validate.py', marks=pytest.mark.slow)])
def test_ranks_with_other_files_end_in_one_line_each(script, tmp_path):
    for rank, names in enumerate((['cat', 'dog'], ['cat', 'wolf'])):
        for split in ('train', 'validation'):
            write_folders(tmp_path / f'rank{rank}', names, split)
    flags = shlex.split('--model test_resnet --num-classes 2 --img-size 32 -j 0 -b 2 --device cpu')
    flags += ['--output', str(tmp_path / 'out')] if script == 'train.py' else []
    if script == 'validate.py':
        torch.save(timm.create_model('test_resnet', num_classes=2).state_dict(), tmp_path / 'weights.pth')
        flags += ['--checkpoint', str(tmp_path / 'weights.pth')]
    process = call('tests/programs/data_of_rank.py', script, tmp_path / 'rank', *flags, processes=2)
    assert process.returncode != 0
    assert process.stderr.count("class 1 is 'wolf', and 'dog' on rank 0") == 2, process.stderr[-3000:]


def test_ranks_compare_names_of_files_and_labels_of_lists(tmp_path):
    images = [str(index) for index in range(3)]
    described = [
        _describe(MultiLabelDataset(Annotations(['a', 'b'], paths, [0, 1], labels, [1, 1])))
        for paths, labels in ((images, [0, 1]), (images, [0, 1]), (images[::-1], [0, 1]), (images, [1, 1]))
    ]
    assert described[0] == described[1]
    assert len({part.digest for part in described}) == 3


def test_the_number_of_classes_is_that_of_the_data(tmp_path):
    for split in ('train', 'validation'):
        write_folders(tmp_path, ['a', 'b', 'c', 'd'], split)
    flags = '--model test_resnet --img-size 32 -j 0 -b 2 --device cpu --output'
    options = parse_train([str(tmp_path), *flags.split(), str(tmp_path / 'out')])
    with join_world('cpu') as world:
        run = build_run(options, world)
    run.close()
    assert run.state.task.get_trainable_module().num_classes == 4
    assert run.options.num_classes == 4


TRAINED = ['blue', 'green', 'red', 'white']


@pytest.mark.parametrize('kind', ['folder', 'tar', 'csv', 'json'])
def test_the_classes_of_a_split_that_lacks_some_are_numbered_as_in_the_checkpoint(kind, tmp_path):
    shown = {'white': [3], 'blue': [0]}
    write_folders(tmp_path, shown)
    files = [f'{name}/{number}.png' for name in shown for number in range(2)]
    if kind == 'tar':
        with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
            for file in files:
                tar.add(tmp_path / 'train' / file, file)
    elif kind == 'csv':
        rows = [f'train/{file},{file.partition("/")[0]}' for file in files]
        (tmp_path / 'train.csv').write_text('\n'.join(['path,labels', *rows]))
    elif kind == 'json':
        rows = [[f'train/{file}', [file.partition('/')[0]]] for file in files]
        (tmp_path / 'train.json').write_text(json.dumps(dict(classes=['white', 'blue'], images=rows)))
    root = tmp_path / 'x.tar' if kind == 'tar' else tmp_path
    dataset = create_dataset(kind if kind in ('csv', 'json') else '', str(root), 'train')
    use_classes_of(dataset, TRAINED)
    assert list(class_to_index(dataset)) == TRAINED
    for index, file in enumerate(dataset.filenames()):
        target = dataset[index][1]
        numbers = target.nonzero()[:, 0].tolist() if kind in ('csv', 'json') else [target]
        assert numbers == shown[Path(file).parent.name]
    use_classes_of(dataset, TRAINED[:3])  # not all of them: left for the error
    assert list(class_to_index(dataset)) == TRAINED


@pytest.mark.parametrize('tarred', [False, True])
def test_a_split_for_validation_may_lack_a_class_of_training(tarred, tmp_path, caplog):
    def read(split):
        if not tarred:
            return create_dataset('', str(tmp_path), split)
        with tarfile.open(tmp_path / f'{split}.tar', 'w') as tar:
            tar.add(tmp_path / split, '.')
        return create_dataset('', str(tmp_path), f'{split}.tar')

    write_folders(tmp_path, TRAINED)
    write_folders(tmp_path, ['green', 'white'], 'validation')
    train, validation = read('train'), read('validation')
    check_same_classes(train, validation)
    assert [validation[index][1] for index in range(4)] == [1, 1, 3, 3]
    assert "the data has no 'blue', 'red'" in caplog.text
    write_folders(tmp_path, ['pink'], 'validation')
    with pytest.raises(ValueError, match='differ in their classes'):
        check_same_classes(train, read('validation'))


@pytest.mark.parametrize(
    ('names', 'cause'),
    [
        (['.cache', 'a'], "'.cache' is no class but a hidden folder"),
        (['a', 'b', 'a|b'], "'a|b' looks like several labels"),
        (['a', 'b\nx,c'], 'stray quote'),
        (['a', 'A'], 'only in case'),
    ],
)
def test_the_likely_cause_of_another_number_of_classes(names, cause):
    (found,) = likely_causes(names)
    assert cause in found


def test_weights_of_classes_that_no_or_every_image_shows(caplog):
    settings = dict(power=1.0, beta=0.999, max_weight=None)
    counts = torch.tensor([10.0, 20, 0, 40])
    weights = _weights_of_counts('', 'inv_freq', counts, 40, dict(settings, kind='class_weight'))
    assert weights.tolist() == pytest.approx([12 / 7, 6 / 7, 1, 3 / 7])
    weights = _weights_of_counts('', 'neg_pos', counts[[0, 1, 3]], 40, dict(settings, kind='pos_weight'))
    assert weights.tolist() == pytest.approx([3, 1, 1])
    assert len(caplog.records) == 2
