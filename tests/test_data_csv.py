"""The CSV format with files as people export them: classes, several rows per image, encodings, Unicode forms."""

import csv
import logging
import re
import sqlite3
import unicodedata
from pathlib import Path

import pytest
from multilabel_data import write_csv, write_text

from timm_mldecoder.data import create_dataset


def read(root, **options):
    dataset = create_dataset('csv', str(root), 'train', missing=None, **options)
    images = range(len(dataset))
    return dataset.class_names, {dataset.filename(i): dataset.annotations.target(i).tolist() for i in images}


def test_classes_come_from_a_file_where_there_is_one(tmp_path):
    write_csv(tmp_path)
    write_text(tmp_path / 'classes.txt', 'dog', 'zebra', 'cat')
    assert read(tmp_path)[0] == ['dog', 'zebra', 'cat']
    write_text(tmp_path / 'mine.txt', 'cat', 'dog', 'gnu')
    class_names, targets = read(tmp_path, class_map=str(tmp_path / 'mine.txt'))
    assert class_names == ['cat', 'dog', 'gnu']
    assert targets['images/12.png'] == [1, 1, 0]


def test_rows_of_one_image_are_merged(tmp_path, caplog):
    rows = ['path,labels,ignored', 'a.png,cat,', 'b.png,,', 'a.png,zebra,dog', 'a.png,cat,', 'c.png,dog']
    write_text(tmp_path / 'train.csv', *rows)
    with caplog.at_level(logging.INFO):
        class_names, targets = read(tmp_path)
    assert class_names == ['cat', 'dog', 'zebra']
    assert targets == {'a.png': [1, -1, 1], 'b.png': [0, 0, 0], 'c.png': [0, 1, 0]}
    assert len([record for record in caplog.records if 'train.csv' in record.message]) == 1


def test_rows_of_one_image_that_contradict_each_other_are_refused(tmp_path):
    write_text(tmp_path / 'train.csv', 'path,labels,ignored', 'a.png,cat,', 'b.png,,', 'a.png,dog,cat')
    with pytest.raises(ValueError, match="train.csv, line 4.*'cat'.*a.png.*2"):
        read(tmp_path)


def test_a_byte_order_mark_is_not_a_part_of_a_name(tmp_path):
    (tmp_path / 'train.csv').write_text('path,labels\na.png,cat\n', encoding='utf-8-sig')
    (tmp_path / 'classes.txt').write_text('cat\ndog\n', encoding='utf-8-sig')
    assert read(tmp_path) == (['cat', 'dog'], {'a.png': [1, 0]})


@pytest.mark.parametrize('file', ['train.csv', 'classes.txt'])
def test_a_file_in_another_encoding_is_named_with_the_line(tmp_path, file):
    write_text(tmp_path / 'train.csv', 'path,labels', 'a.png,cat')
    write_text(tmp_path / 'classes.txt', 'cat', 'dog')
    with (tmp_path / file).open('ab') as stream:
        stream.write('b.png,café\n'.encode('latin-1'))
    with pytest.raises(ValueError, match=f'{file}, line 3.*0xe9'):
        read(tmp_path)


def test_both_unicode_forms_of_a_name_are_one_class(tmp_path):
    names = [unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD')]
    assert names[0] != names[1]
    write_text(tmp_path / 'train.csv', 'path,labels', f'a.png,{names[1]}', f'b.png,{names[0]}')
    assert read(tmp_path) == ([names[0]], {'a.png': [1], 'b.png': [1]})
    write_text(tmp_path / 'classes.txt', names[1])
    assert read(tmp_path)[0] == [names[0]]


def test_names_that_differ_only_in_case_are_warned_about(tmp_path, caplog):
    write_text(tmp_path / 'train.csv', 'path,labels', 'a.png,Cat;dog', 'b.png,cat')
    assert read(tmp_path)[0] == ['Cat', 'cat', 'dog']
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert 'Cat' in record.message and 'cat' in record.message and 'dog' not in record.message


def test_the_separator_of_the_columns_of_a_file_is_logged_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_text(tmp_path / 'train.csv', 'path\tlabels', 'a.png\tcat', 'b.png\tdog')
    assert read(tmp_path) == read(tmp_path)
    assert caplog.text.count('columns are separated') == 1


POSTS = """
    CREATE TABLE posts (id INTEGER PRIMARY KEY, file TEXT, tags TEXT);
    CREATE TABLE tags (id INTEGER PRIMARY KEY, name TEXT);
    CREATE TABLE post_tags (post_id INTEGER, tag_id INTEGER);
    INSERT INTO posts VALUES (1, 'a/1.png', '1girl blue_hair,'), (2, 'a/2.png', ''), (3, 'b/3.png', 'blue_hair, solo');
    INSERT INTO tags VALUES (1, '1girl'), (2, 'solo'), (3, 'blue_hair,');
    INSERT INTO post_tags VALUES (1, 1), (1, 3), (3, 3), (3, 2);
"""


@pytest.mark.parametrize(('query', 'options'), [(0, {}), (1, {'label_separator': ' '})])
def test_a_database_is_exported_as_the_documentation_says(query, options, tmp_path):
    """The queries of docs/data.md; a tag with a comma is quoted in the file."""
    text = (Path(__file__).parent.parent / 'docs' / 'data.md').read_text()
    queries = re.findall(r'sqlite3 -csv -header posts.db "(.*?)"', text)
    database = sqlite3.connect(':memory:')
    database.executescript(POSTS)
    with (tmp_path / 'train.csv').open('w', newline='') as file:
        found = database.execute(queries[query])
        csv.writer(file).writerows([[column[0] for column in found.description], *found])
    annotations = create_dataset('csv', str(tmp_path / 'train.csv'), 'train', missing=None, **options).annotations
    assert annotations.class_names == ['1girl', 'blue_hair,', 'solo']
    assert {annotations.path(i): annotations.target(i).tolist() for i in range(3)} == {
        'a/1.png': [1, 1, 0],
        'a/2.png': [0, 0, 0],
        'b/3.png': [0, 1, 1],
    }
