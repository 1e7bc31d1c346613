"""Class folders that differ in case or leading zeros: one order in every process, as without ties in timm's."""

import logging
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from runs import environment
from timm.utils import natural_key

from timm_mldecoder.data import class_to_index, create_dataset
from timm_mldecoder.data.class_order import alike, sort_key

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
    for seed in range(4):
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
    assert [all(repr(name) in record.message for name in groups[0]) for record in caplog.records] == [True] * len(
        groups
    )
