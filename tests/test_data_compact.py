"""Annotations in compact form: the blocks of CSV files have the labels of the row reader; large files are cached."""

import json
import logging
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from multilabel_data import WRITTEN, write_coco, write_text

from timm_mldecoder.data import annotations, create_dataset, json_entries
from timm_mldecoder.data.compact import TableBuilder
from timm_mldecoder.data.formats import csv_blocks, csv_list
from timm_mldecoder.data.formats.csv_list import read_csv
from timm_mldecoder.flags import parse_train
from timm_mldecoder.loading.datasets import create_split

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
        assert isinstance(again._table['paths'], np.memmap)
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


@pytest.mark.parametrize('block', [*range(1, 20), 1000])
def test_json_is_read_entry_by_entry(block, tmp_path, monkeypatch):
    monkeypatch.setattr(json_entries, 'BLOCK', block)
    content = {
        'a': [],
        'b é"\\': [1, -2.5e3, 'x]},"', None, True, [[]], {'c': [{}]}],
        'd': {'e': [1]},
        'f': 12,
        'g': ['ü'],
    }
    for text in (
        json.dumps(content),
        json.dumps(content, indent=1, ensure_ascii=False) + '\n',
        '{}',
        ' { "a" : [ 12 ] }',
        '{"a": [1.5e3, -0.25, 1E-7,2.5e+30],"b":-1.25e-3,"c":[12e5]}',
    ):
        (tmp_path / 'x.json').write_text(text, encoding='utf-8-sig')
        found = json_entries.read_object(tmp_path / 'x.json')
        assert {key: [*value] if isinstance(value, Iterator) else value for key, value in found} == json.loads(text)
        assert [key for key, _ in json_entries.read_object(tmp_path / 'x.json')] == [*json.loads(text)], (
            'lists left out'
        )


@pytest.mark.parametrize('text', [
    '', '{', '{"a"', '{"a": [1 2]}', '{"a": [1,]}', '{"a": [1]', '{"a": [1]} 1', '{"a": tru}', '{1: 2}',
    '{"a": 1, "a": 2}',
    '{"a": [{"b": "c}]}', '{"a": ' + '[' * 200_000, '{"a": [' + '[' * 200_000,
])  # fmt: skip
def test_other_json_is_refused_with_the_position(text, tmp_path):
    (tmp_path / 'x.json').write_text(text)
    with pytest.raises(ValueError, match=r'x\.json is not JSON: .* at character \d+$'):
        for _, value in json_entries.read_object(tmp_path / 'x.json'):
            list(value) if isinstance(value, Iterator) else value


def write_nus_wide(root):
    write_text(
        root / 'data.csv', 'path,labels,split', 'a.jpg,"[sky, clouds]",train', 'b.jpg,[],train', 'c.jpg,[sea],val'
    )


FORMATS = [(name, {}) for name in ('nuswide', *WRITTEN)]
FORMATS += [('json', dict(instances=True)), ('coco2014', dict(instances=True, unannotated='drop'))]
FORMATS += [('voc2007', dict(difficult='positive', instances=True))]


@pytest.mark.parametrize(('name', 'options'), FORMATS)
def test_every_format_is_cached_until_its_files_or_a_flag_change(name, options, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    WRITTEN.get(name, [write_nus_wide])[0](tmp_path)

    def read(**options):
        """The annotations, the warnings, and how many lines tell of a new cache."""
        caplog.clear()
        found = create_dataset(name, str(tmp_path), 'train', missing=None, **options).annotations
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        instances = None if found.instances is None else found.instances.tolist()
        return found, (content(found), found.unlisted, instances, warnings), caplog.text.count('into a cache')

    expected = read(**options)[1]
    assert not (tmp_path / '.timm_mldecoder').exists()
    monkeypatch.setattr(annotations, 'CACHED', 0)
    read()  # other flags are another cache
    for built in (bool(options), False):
        found, same, lines = read(**options)
        assert same == expected and lines == built
        assert isinstance(found._table['label'], np.memmap)
    for path in tmp_path.rglob('*'):
        if path.is_file() and '.timm_mldecoder' not in path.parts:
            os.utime(path, (1, 1))
    assert read(**options)[1:] == (expected, 1), 'built again, with one line'


def test_the_warnings_of_a_reader_are_those_of_its_cache_too(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(annotations, 'CACHED', 0)
    write_coco(tmp_path)
    path = tmp_path / 'annotations' / 'instances_train2014.json'
    names = [dict(id=1, name='animal', supercategory='none'), dict(id=3, name='Dog', supercategory='animal')]
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, 'categories': [*found['categories'], *names]}))
    for _ in range(2):
        caplog.clear()
        create_dataset('coco2014', str(tmp_path), 'train', missing=None)
        assert "'animal' has no annotation" in caplog.text and "leading zeros: 'dog', 'Dog'" in caplog.text


def test_the_cache_of_data_that_may_not_be_changed_is_where_one_says(large, tmp_path):
    data, cache = tmp_path / 'data', tmp_path / 'cache'
    write_random(data / 'train.csv', 0)
    flags = ['--dataset', 'csv', '--task', 'multilabel', '--cache-dir', str(cache)]
    found = create_split(parse_train([str(data), *flags]), 'train', missing=None).annotations
    (label,) = cache.glob('*/csv-*/label.npy')
    assert os.listdir(data) == ['train.csv'] and found._table['label'].filename == label
    again = create_split(parse_train([str(data), *flags]), 'train', missing=None).annotations
    assert content(again) == content(found) == content(read_csv(data, 'train'))


def _build_slowly(root, queue):
    annotations.CACHED = 0
    csv_blocks.BLOCK_ROWS, csv_blocks.BLOCK_BYTES = 7, 200
    add, builds = TableBuilder.add, []

    def slow(*args):
        add(*args)
        builds.append(args)
        if len(builds) == 5:
            queue.put('half')
            time.sleep(600)

    TableBuilder.add = slow
    read_csv(Path(root), 'train')


def test_a_process_that_is_killed_while_it_builds_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, 'CACHED', 0)
    write_random(tmp_path / 'train.csv', 0, images=200)
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    process = context.Process(target=_build_slowly, args=(str(tmp_path), queue))
    process.start()
    assert queue.get(timeout=600) == 'half'
    cache = tmp_path / '.timm_mldecoder'
    assert list(cache.glob('.csv-*/paths.npy')) and not list(cache.glob('csv-*/*'))
    process.kill()
    process.join()
    found = read_csv(tmp_path, 'train')
    assert len(found) == 200 and isinstance(found._table['label'], np.memmap)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [found._folder.name], 'what was left is removed'
    names = {path.stem for path in found._folder.iterdir()}
    assert names == {'paths', 'offsets', 'start', 'label', 'value', 'classes', 'warnings', 'unlisted'}


def test_other_classes_and_paths_are_renumbered_as_they_are_read(large, tmp_path):
    write_random(tmp_path / 'train.csv', 0)
    whole = read_csv(tmp_path, 'train')
    names = ['new', *reversed(whole.class_names[1:])]
    part = whole.subset(np.arange(40)[::-3]).with_classes(names).with_paths(lambda path: f'x/{path}.png')
    part = part.with_classes(names[1:]).with_paths(str.upper)
    assert part._table is whole._table, 'nothing is copied'
    image, label, value = part.entries()
    assert part.paths.tolist() == [f'x/{whole.path(i)}.png'.upper().encode() for i in range(39, -1, -3)]
    places = [whole.class_names.index(name) for name in names[1:]]
    for index, before in enumerate(range(39, -1, -3)):
        assert part.path(index) == f'x/{whole.path(before)}.png'.upper()
        assert part.target(index).tolist() == whole.target(before)[places].tolist()
        dense = np.zeros(len(places))
        dense[label[image == index]] = value[image == index]
        assert dense.tolist() == part.target(index).tolist()
        assert (np.diff(label[image == index].astype(int)) > 0).all()


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
