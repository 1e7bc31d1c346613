"""Paths are compared by the file they mean, in every reader."""

import json
import os
from itertools import product

import numpy as np
import pytest
from multilabel_data import write_image

from timm_mldecoder.data import DatasetSummary, create_dataset, overlap, same_files, summarize


def write_images(root):
    for number in range(4):
        write_image(root / 'real' / f'{number}.png', number)
    (root / 'linked').symlink_to('real')
    (root / 'alias.png').symlink_to('real/3.png')


SPELLINGS = ['real/0.png', './real//0.png', 'linked/0.png', 'real/../real/0.png', '{root}/real/0.png']


def csv_reader(root, split, images):
    lines = [f'{path},{";".join(labels)}' for path, labels in images]
    (root / f'{split}.csv').write_text('\n'.join(['path,labels', *lines]) + '\n')
    (root / 'classes.txt').write_text('a\nb\n')
    return create_dataset('csv', str(root), split)


def json_reader(root, split, images):
    (root / f'{split}.json').write_text(json.dumps({'classes': ['a', 'b'], 'images': images}))
    return create_dataset('json', str(root), split)


def coco_reader(root, split, images):
    names = {'train': 'train2017', 'validation': 'val2017'}
    for name in names.values():
        (root / name).mkdir(exist_ok=True)
    content = dict(
        images=[dict(id=number, file_name=f'../{path}') for number, (path, _) in enumerate(images)],
        categories=[dict(id=1, name='a'), dict(id=2, name='b')],
        annotations=[
            dict(id=f'{number}{label}', image_id=number, category_id='ab'.index(label) + 1)
            for number, (_, labels) in enumerate(images)
            for label in labels
        ],
    )
    (root / 'annotations').mkdir(exist_ok=True)
    (root / 'annotations' / f'instances_{names[split]}.json').write_text(json.dumps(content))
    return create_dataset('coco2017', str(root), split)


READERS = [csv_reader, json_reader, coco_reader]


# paths of COCO are relative to the folder of the split
@pytest.mark.parametrize(
    ('read', 'spelling'),
    [pair for pair in product(READERS, SPELLINGS) if pair != (coco_reader, '{root}/real/0.png')],
)
def test_one_file_in_two_spellings_is_one_image_with_a_warning(read, spelling, tmp_path, caplog):
    write_images(tmp_path)
    other = spelling.format(root=tmp_path)
    dataset = read(tmp_path, 'train', [['real/1.png', ['a']], ['real/0.png', ['a']], [other, ['b']]])
    assert [dataset.annotations.target(index).tolist() for index in range(len(dataset))] == [[1, 0], [1, 1]]
    if other != 'real/0.png' or read is not csv_reader:  # rows of one path are the labels of one image
        assert '1 files are listed more than once' in caplog.text
        assert '1 of them with other labels' in caplog.text and 'real/0.png' in caplog.text


@pytest.mark.parametrize('read', READERS)
def test_links_are_found_in_both_splits(read, tmp_path):
    write_images(tmp_path)
    train = read(tmp_path, 'train', [['real/1.png', ['a']], ['real/3.png', ['a']]])
    validation = read(tmp_path, 'validation', [['alias.png', ['a']], ['linked/2.png', ['b']]])
    assert [name.removeprefix('train2017/../') for name in overlap(train, validation)] == ['real/3.png']


def test_links_between_class_folders_contradict_each_other(tmp_path):
    for name in ('train/cat/1.png', 'train/cat/2.png', 'train/dog/3.png', 'validation/dog/4.png'):
        write_image(tmp_path / name, 1)
    (tmp_path / 'train/dog/5.png').symlink_to('../cat/1.png')
    (tmp_path / 'train/cat/6.png').symlink_to('2.png')
    (tmp_path / 'validation/cat').symlink_to('../train/cat')
    train, validation = (create_dataset('', str(tmp_path), split) for split in ('train', 'validation'))
    found = summarize(train)
    assert len(found.duplicates) == 2
    assert found.contradictions == [f'{tmp_path}/train/cat/1.png = {tmp_path}/train/dog/5.png']
    assert any('other labels' in line and 'train/dog/5.png' in line for line in found.warnings('train'))
    assert len(overlap(train, validation)) == 2, 'the two files of train/cat'


def test_objects_of_one_file_are_added_up(tmp_path):
    write_images(tmp_path)
    images = [['real/0.png', ['a', 'a']], ['alias.png', []], ['linked/0.png', ['a', 'b']]]
    (tmp_path / 'train.json').write_text(json.dumps({'classes': ['a', 'b'], 'images': images}))
    annotations = create_dataset('json', str(tmp_path), 'train', instances=True).annotations
    assert annotations.instances.tolist() == [3, 1]


def test_names_of_another_case_are_one_file_where_the_disk_says_so(tmp_path, monkeypatch):
    paths = np.array([b'a/X.png', b'a/x.png', b'b/x.png'])
    assert len(set(same_files.file_ids(paths, tmp_path).tolist())) == 3
    monkeypatch.setattr(same_files, 'ignores_case', lambda folder: True)
    assert same_files.repeated(same_files.file_ids(paths, tmp_path))[0].tolist() == [0, 1]


def test_the_disk_of_these_tests_knows_case(tmp_path):
    (tmp_path / 'name').touch()
    assert same_files.ignores_case(os.fsencode(tmp_path)) == (tmp_path / 'NAME').exists()


def test_groups_are_in_the_order_of_their_first_member():
    groups = same_files.repeated(np.array([7, 3, 9, 3, 7, 7, -5]))
    assert [group.tolist() for group in groups] == [[0, 4, 5], [1, 3]]
    assert same_files.repeated(np.zeros(0, np.int64)) == []


@pytest.mark.parametrize(
    ('positives', 'images', 'line'),
    [([4], 4, 'one class'), ([4, 1], 4, 'every image has the class a'), ([3, 1], 4, None), ([0, 0], 0, None)],
)
def test_classes_that_nothing_can_be_learnt_of(positives, images, line):
    found = DatasetSummary(images, list('ab')[: len(positives)], np.array(positives))
    lines = found.warnings('train')
    assert (line is None and not lines) or (len(lines) == 1 and line in lines[0])
    assert found.warnings('validation', training=False) == []
