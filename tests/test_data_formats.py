"""Each multi-label format, written to disk as it is distributed and read back: images, targets, names, mistakes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from multilabel_data import WRITTEN, write_coco, write_csv, write_image, write_open_images, write_text, write_voc
from PIL import Image
from timm.data import create_loader

from timm_mldecoder.data import FORMATS, create_dataset

multi_label_formats = pytest.mark.parametrize('name', WRITTEN)


def expected_target(class_names: list[str], listed: dict[str, int], default: int) -> list[float]:
    return [float(listed.get(name, default)) for name in class_names]


@multi_label_formats
@pytest.mark.parametrize('split', ['train', 'validation', 'val'])
def test_a_format_reads_what_was_written(tmp_path, name, split):
    write, class_names, images, default = WRITTEN[name]
    write(tmp_path)
    dataset = create_dataset(name, str(tmp_path), split)
    assert dataset.class_names == class_names
    assert len(dataset) == len(images)
    for (image, target), (number, listed) in zip(dataset, images.items(), strict=False):
        assert image.mode == 'RGB' and abs(image.getpixel((3, 3))[0] - number) <= 1
        assert target.dtype == torch.float32
        assert target.tolist() == expected_target(class_names, listed, default)
    ignored = default == -1 or any(-1 in listed.values() for listed in images.values())
    assert dataset.annotations.has_ignored == ignored


@multi_label_formats
@pytest.mark.parametrize('prefetch', [True, False])
def test_timms_loader_takes_it(tmp_path, name, prefetch):
    write, class_names, images, default = WRITTEN[name]
    write(tmp_path)
    # the options timm's scripts pass whatever the data set
    dataset = create_dataset(
        name, str(tmp_path), 'validation', batch_size=2, seed=1, repeats=0, class_map='', download=False,
        input_img_mode='RGB', input_key=None, target_key=None, num_samples=None, trust_remote_code=False,
    )  # fmt: skip
    loader = create_loader(dataset, (3, 8, 8), 2, use_prefetcher=prefetch, device=torch.device('cpu'), num_workers=1)
    batches = list(loader)
    assert all(batch.shape[1:] == (3, 8, 8) for batch, _ in batches)
    targets = torch.cat([target for _, target in batches])
    assert targets.tolist() == [expected_target(class_names, listed, default) for listed in images.values()]


def test_every_format_is_tested_here_or_has_a_file_of_its_own():
    assert set(FORMATS) - set(WRITTEN) <= {'nuswide'}


def test_voc_has_its_other_splits_and_may_be_given_at_any_level(tmp_path):
    write_voc(tmp_path)
    for root in (tmp_path, tmp_path / 'VOCdevkit', tmp_path / 'VOCdevkit' / 'VOC2007'):
        for split in ('trainval', 'test'):
            dataset = create_dataset('voc2007', str(root), split)
            assert len(dataset) == 3 and dataset[0][0].size == (20, 10)


def test_open_images_has_a_test_split_and_does_without_a_list_of_trainable_classes(tmp_path):
    write_open_images(tmp_path)
    assert len(create_dataset('openimages', str(tmp_path), 'test')) == 2
    (tmp_path / 'oidv6-classes-trainable.txt').unlink()
    dataset = create_dataset('openimages', str(tmp_path), 'train')
    assert dataset.class_names == ['dog', 'cat', 'jaguar (/m/1)', 'jaguar (/m/2)', 'nobody, nowhere']
    assert len(dataset) == 3


def test_csv_classes_come_from_a_file_where_there_is_one(tmp_path):
    write_csv(tmp_path)
    write_text(tmp_path / 'classes.txt', 'dog', 'zebra', 'cat')
    assert create_dataset('csv', str(tmp_path), 'train').class_names == ['dog', 'zebra', 'cat']
    write_text(tmp_path / 'mine.txt', 'cat', 'dog', 'gnu')
    dataset = create_dataset('csv', str(tmp_path), 'train', class_map=str(tmp_path / 'mine.txt'))
    assert dataset.class_names == ['cat', 'dog', 'gnu']
    assert dataset[1][1].tolist() == [1, 1, 0]


def test_file_names_are_told_as_timms_data_sets_tell_them(tmp_path):
    write_csv(tmp_path)
    dataset = create_dataset('csv', str(tmp_path), 'train')
    assert dataset.filename(0) == 'images/11.png'
    assert dataset.filename(0, basename=True) == '11.png'
    assert Path(dataset.filename(0, absolute=True)) == tmp_path / 'images' / '11.png'
    assert dataset.filenames(basename=True) == ['11.png', '12.png', '13.png']


def test_other_names_go_to_timm(tmp_path):
    write_image(tmp_path / 'train' / 'cat' / 'a.png', 1)
    write_image(tmp_path / 'train' / 'dog' / 'b.png', 2)
    dataset = create_dataset('', str(tmp_path), 'train')
    assert [target for _, target in dataset] == [0, 1]


@pytest.mark.parametrize('content', [b'', b'no image', None])
def test_an_unreadable_image_is_named(tmp_path, content):
    write_csv(tmp_path)
    path = tmp_path / 'images' / '11.png'
    Image.fromarray(np.random.default_rng(0).integers(255, size=(99, 99), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(OSError, match='11.png'):
        create_dataset('csv', str(tmp_path), 'train')[0]


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


VOC_LISTS = 'VOCdevkit/VOC2007/ImageSets/Main'
OPEN_IMAGES_LABELS = 'oidv6-train-annotations-human-imagelabels.csv'
COCO_FILE = 'annotations/instances_train2014.json'
MISTAKES = [
    ('csv', 'train.csv', 'cat;dog', 'cat;dgo', None, "train.csv, line 3: unknown label 'dgo'.*classes.txt"),
    ('csv', 'train.csv', 'labels', 'label', None, "train.csv, line 1.*lacks.*'labels'"),
    ('csv', 'train.csv', 'images/12.png', '', None, 'train.csv, line 3: expected a path'),
    ('csv', 'classes.txt', 'cat', 'dog', None, "classes.txt.*repeated: .'dog'"),
    ('csv', None, '', '', 'test', "'test'.*train.*validation"),
    ('coco2014', COCO_FILE, '"category_id": 18', '"category_id": 99', None, 'json, annotation 0.*category 99'),
    ('coco2014', COCO_FILE, '"image_id": 11', '"image_id": 99', None, 'annotation 0: unknown image 99'),
    ('coco2014', COCO_FILE, '}]}', '}', None, 'train2014.json is not a complete'),
    ('coco2014', COCO_FILE, '"categories"', '"cats"', None, 'train2014.json.*KeyError..categories'),
    ('coco2014', None, '', '', 'test', "'test'.*train.*validation"),
    ('coco2017', 'annotations/instances_train2014.json', '', '', None, 'instances_train2017.json is missing'),
    ('voc2007', f'{VOC_LISTS}/cat_train.txt', '000012  1', '000012  2', None, "cat_train.txt, line 2.*'000012  2'"),
    ('voc2007', f'{VOC_LISTS}/cat_train.txt', '000012  1', '000099  1', None, 'cat_train.txt, line 2'),
    ('voc2007', f'{VOC_LISTS}/cat_train.txt', '000012  1\n', '', None, 'do not name the same images'),
    ('voc2007', None, '', '', 'minival', "'minival'.*trainval"),
    ('voc2012', None, '', '', None, 'No folder ImageSets/Main'),
    ('openimages', OPEN_IMAGES_LABELS, '/m/2,0', '/m/9,0', None, 'imagelabels.csv, line 3.*/m/9'),
    ('openimages', OPEN_IMAGES_LABELS, '/m/2,0', '/m/2,0.7', None, 'imagelabels.csv, line 3.*0.7'),
    ('openimages', OPEN_IMAGES_LABELS, 'Source', 'Origin', None, 'line 1.*Source.*Origin'),
    ('openimages', 'oidv6-classes-trainable.txt', '/m/2', '/m/9', None, "trainable.txt.*'/m/9'"),
    ('openimages', 'oidv6-class-descriptions.csv', ',dog', '', None, 'class-descriptions.csv, line 2'),
    ('openimages', None, '', '', 'val2', "'val2'.*validation"),
]


@pytest.mark.parametrize(('name', 'file', 'old', 'new', 'split', 'message'), MISTAKES)
def test_mistakes_name_file_line_and_label(tmp_path, name, file, old, new, split, message):
    writers = {'coco2017': write_coco, 'voc2012': write_voc}  # another year than asked for
    writers.get(name, WRITTEN[name][0])(tmp_path)
    if name == 'csv':
        write_text(tmp_path / 'classes.txt', 'cat', 'dog')
    if file:
        replace(tmp_path / file, old, new)
    with pytest.raises(ValueError, match=message):
        create_dataset(name, str(tmp_path), split or 'train')


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('coco2014', dict(class_map='names.txt'), 'class_map'),
        ('csv', dict(download=True), 'download'),
        ('csv', dict(num_samples=5), 'num_samples'),
        ('voc2007', dict(target_key='label'), 'target_key'),
    ],
)
def test_options_without_a_meaning_are_refused(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        create_dataset(name, str(tmp_path), 'train', **options)


def test_a_missing_folder_is_named(tmp_path):
    for root in (None, str(tmp_path / 'nowhere')):
        with pytest.raises(ValueError, match='nowhere' if root else 'None'):
            create_dataset('coco2014', root, 'train')
