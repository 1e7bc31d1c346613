"""Annotations in compact form: the blocks of CSV files have the labels of the row reader; large files are cached."""

import logging
import multiprocessing
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from multilabel_data import write_coco, write_text

from timm_mldecoder.data import annotations, create_dataset
from timm_mldecoder.data.formats import csv_blocks, csv_list
from timm_mldecoder.data.formats.csv_list import read_csv

NAMES = ['cat', 'dog', 'café', 'zebra', ' spaced ', 'Ünïcode', 'a|b']


@pytest.fixture(params=['pyarrow', 'csv module'])
def large(request, monkeypatch):
    """Small files are read and cached as large ones."""
    monkeypatch.setattr(annotations, 'CACHED', 0)
    monkeypatch.setattr(csv_blocks, 'BLOCK_ROWS', 7)
    if request.param == 'pyarrow':
        pytest.importorskip('pyarrow')
        monkeypatch.setattr(csv_blocks, 'BLOCK_BYTES', 200)
    else:
        monkeypatch.setitem(sys.modules, 'pyarrow', None)


def content(found):
    return found.class_names, found.paths.tolist(), *(part.tolist() for part in found.entries())


def by_rows(root, monkeypatch, split='train', **options):
    """Read without blocks and cache."""
    with monkeypatch.context() as patch:
        patch.setattr(csv_list, '_read_plain', lambda *args: None)
        patch.setattr(annotations, 'CACHED', 2**60)
        return read_csv(root, split, **options)


def write_random(path, seed, images=50, delimiter=',', separator=';'):
    draw = random.Random(seed)
    rows = [delimiter.join(('number', 'labels', 'path', 'ignored'))]
    for index in range(images):
        names = draw.sample(NAMES, draw.randint(0, len(NAMES)))
        half = draw.randint(0, len(names))
        labels = names[:half] + draw.choices(names[:half], k=draw.randint(0, 2)) if half else []
        fields = (
            str(index),
            separator.join(labels),
            f'é/{"x" * draw.randint(1, 9)}{index}.png',
            separator.join(names[half:]),
        )
        rows.append(delimiter.join(fields))
    write_text(path, *rows)


@pytest.mark.parametrize('delimiter, separator', [(',', ';'), ('\t', ', '), (';', '|')])
def test_blocks_have_the_labels_of_the_row_reader(large, tmp_path, monkeypatch, delimiter, separator):
    write_random(tmp_path / 'train.csv', 0, delimiter=delimiter, separator=separator)
    write_random(tmp_path / 'validation.csv', 1, delimiter=delimiter, separator=separator)
    options = {'label_separator': separator}
    for split in ('train', 'validation'):
        with monkeypatch.context() as patch:
            patch.setattr(csv_list, '_read_rows', None)  # blocks alone
            found = read_csv(tmp_path, split, **options)
        assert content(found) == content(by_rows(tmp_path, monkeypatch, split, **options))
        assert found.has_ignored and found.unlisted == annotations.NEGATIVE
    assert found.entries()[1].dtype == np.uint8


ODD = {
    'two rows per image': ['a.png,cat', 'b.png,dog', 'a.png,dog'],
    'a quoted label': ['a.png,"cat"', 'b.png,"dog ""big"""'],
    'a path to normalize': ['./a.png,cat', 'x//b.png,dog'],
    'blanks around a path': [' a.png ,cat', 'b.png,dog'],
    'fields left out': ['a.png,cat,x', 'b.png,dog'],
    'a quote within a field': ['a.png,c"at', 'b.png,dog'],
    'a blank line': ['a.png,cat', '', 'b.png,dog'],
    'no labels at all': ['a.png,', 'b.png,'],
}


@pytest.mark.parametrize('odd', ODD)
def test_other_forms_are_read_by_rows(large, odd, tmp_path, monkeypatch):
    write_text(tmp_path / 'train.csv', 'path,labels,other', *ODD[odd])
    assert content(read_csv(tmp_path, 'train')) == content(by_rows(tmp_path, monkeypatch))


@pytest.mark.parametrize('rows, named', [
    (['a.png,cat,', 'b.png,dog,dog'], "line 3.*'dog'.*both given and ignored"),
    (['a.png,cat,', ',dog,'], 'line 3'),
    (['a.png,cat,', 'b.png,nan,'], "line 3.*'nan'"),
    (['a.png,cat,', 'b.png,,zebra'], "line 3.*'zebra'"),
    (['a.png,cat,', 'b.png,dog,,,'], 'line 3.*5 fields'),
    (['a.png,"cat,', 'b.png,dog,'], 'quote'),
])  # fmt: skip
def test_a_mistake_is_named_with_its_line(large, rows, named, tmp_path):
    write_text(tmp_path / 'train.csv', 'path,labels,ignored', *rows)
    with pytest.raises(ValueError, match=named):
        read_csv(tmp_path, 'train')
    assert not list((tmp_path / '.timm_mldecoder').glob('csv-*/*.npy'))


def test_a_large_file_is_read_once_and_again_when_it_or_a_flag_changes(large, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    write_random(tmp_path / 'train.csv', 0)
    first = read_csv(tmp_path, 'train')
    with monkeypatch.context() as patch:
        patch.setattr(csv_list, 'read_blocks', None)
        again = read_csv(tmp_path, 'train')
        assert content(again) == content(first)
        assert isinstance(again.paths, np.memmap)
        with pytest.raises(TypeError):
            read_csv(tmp_path, 'train', label_separator=';')
    write_text(tmp_path / 'train.csv', 'path,labels', 'other.png,cat')
    caplog.clear()
    assert read_csv(tmp_path, 'train').paths.tolist() == [b'other.png']
    assert [record.getMessage().split(': ')[1] for record in caplog.records] == [
        'read 1 labels of 1 images into a cache'
    ]
    write_text(tmp_path / 'classes.txt', 'dog', 'cat')
    assert read_csv(tmp_path, 'train').class_names == ['dog', 'cat']


def test_json_lists_are_cached_too(tmp_path, monkeypatch):
    text = '{"classes": ["b", "a"], "images": [["x.png", ["a", "a"]], ["y.png", []]]}'
    (tmp_path / 'train.json').write_text(text)
    before = create_dataset('json', str(tmp_path), 'train', missing=None, instances=True).annotations
    monkeypatch.setattr(annotations, 'CACHED', 0)
    for _ in range(2):
        found = create_dataset('json', str(tmp_path), 'train', missing=None, instances=True).annotations
        assert content(found) == content(before) and found.instances.tolist() == [2]
    assert list((tmp_path / '.timm_mldecoder').glob('json-*/label.npy'))


@pytest.mark.parametrize(('name', 'options'), [('coco2014', dict(instances=True)), ('coco', dict(unannotated='drop'))])
def test_coco_files_are_cached_too(name, options, tmp_path, monkeypatch):
    write_coco(tmp_path)
    options['missing'] = None
    before = create_dataset(name, str(tmp_path), 'train', **options).annotations
    monkeypatch.setattr(annotations, 'CACHED', 0)
    create_dataset(name, str(tmp_path), 'train', missing=None)  # other options are another cache
    for _ in range(2):
        found = create_dataset(name, str(tmp_path), 'train', **options).annotations
        assert content(found) == content(before)
        if 'instances' in options:
            assert found.instances.tolist() == before.instances.tolist()
    assert len(list((tmp_path / '.timm_mldecoder').glob('coco-*/label.npy'))) == 2


def test_a_small_file_leaves_no_cache(tmp_path):
    write_random(tmp_path / 'train.csv', 0)
    read_csv(tmp_path, 'train')
    assert os.listdir(tmp_path) == ['train.csv']


def _read_and_tell(root, queue):
    annotations.CACHED = 0
    read = csv_list.read_blocks
    csv_list.read_blocks = lambda *args: queue.put('built') or read(*args)
    queue.put(content(read_csv(Path(root), 'train'))[1][:1])


def test_one_of_several_processes_builds(tmp_path):
    write_random(tmp_path / 'train.csv', 0, images=2000)
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    processes = [context.Process(target=_read_and_tell, args=(str(tmp_path), queue)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=120) for _ in range(4)]
    for process in processes:
        process.join()
    assert found.count('built') == 1 and queue.empty()
