"""Each multi-label format, written to disk as it is distributed and read back: images, targets, names, mistakes."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from multilabel_data import (
    WRITTEN,
    write_coco,
    write_csv,
    write_image,
    write_json,
    write_open_images,
    write_text,
    write_voc,
)
from PIL import Image
from timm.data import create_loader

from timm_mldecoder.data import FORMATS, create_dataset
from timm_mldecoder.data.text_files import read_names, read_rows
from timm_mldecoder.flags import parse_train
from timm_mldecoder.loading.datasets import create_split

multi_label_formats = pytest.mark.parametrize('name', WRITTEN)


def expected_target(class_names: list[str], listed: dict[str, int], default: int) -> list[float]:
    return [float(listed.get(name, default)) for name in class_names]


def targets(dataset) -> list[list[float]]:
    return [dataset.annotations.target(index).tolist() for index in range(len(dataset))]


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
def test_the_loader_of_timm_takes_it(tmp_path, name):
    write, class_names, images, default = WRITTEN[name]
    write(tmp_path)
    # the options that timm's scripts pass for every dataset
    dataset = create_dataset(
        name, str(tmp_path), 'validation', batch_size=2, seed=1, repeats=0, class_map='', download=False,
        input_img_mode='RGB', input_key=None, target_key=None, num_samples=None, trust_remote_code=False,
    )  # fmt: skip
    loader = create_loader(dataset, (3, 8, 8), 2, device=torch.device('cpu'), num_workers=0)
    batches = list(loader)
    assert all(batch.shape[1:] == (3, 8, 8) for batch, _ in batches)
    batch_targets = torch.cat([target for _, target in batches])
    assert batch_targets.tolist() == [expected_target(class_names, listed, default) for listed in images.values()]


@multi_label_formats
def test_a_subset_and_a_pickled_copy_have_the_same_labels(tmp_path, name):
    WRITTEN[name][0](tmp_path)
    whole = create_dataset(name, str(tmp_path), 'train').annotations
    part = pickle.loads(pickle.dumps(whole.subset(np.array([1, 0]))))
    assert [part.path(index) for index in range(2)] == [whole.path(1), whole.path(0)]
    assert [part.target(index).tolist() for index in range(2)] == [whole.target(1).tolist(), whole.target(0).tolist()]
    dense = np.full((2, len(whole.class_names)), whole.unlisted)
    image, label, value = part.entries()
    dense[image, label] = value
    assert dense.tolist() == [part.target(index).tolist() for index in range(2)]


def test_every_format_is_tested_here_or_in_a_file_of_its_own():
    assert set(FORMATS) - set(WRITTEN) == {'nuswide', 'coco'}


def test_voc_has_its_other_splits_and_may_be_given_at_any_level(tmp_path):
    write_voc(tmp_path)
    for root in (tmp_path, tmp_path / 'VOCdevkit', tmp_path / 'VOCdevkit' / 'VOC2007'):
        for split in ('trainval', 'test'):
            dataset = create_dataset('voc2007', str(root), split)
            assert len(dataset) == 3 and dataset[0][0].size == (20, 10)


@pytest.mark.parametrize(('difficult', 'bird', 'cats'), [('ignore', -1, 1), ('positive', 1, 2), ('negative', 0, 1)])
def test_difficult_objects_of_voc_count_as_requested(tmp_path, difficult, bird, cats):
    write_voc(tmp_path)
    dataset = create_dataset('voc2007', str(tmp_path), 'train', difficult=difficult, instances=True)
    assert dataset.annotations.target(2)[dataset.class_names.index('bird')] == bird
    assert dataset.annotations.target(1)[dataset.class_names.index('cat')] == 1, 'it also shows an easy one'
    image, label, _ = dataset.annotations.entries()
    counts = dict(zip(zip(image.tolist(), label.tolist(), strict=True), dataset.annotations.instances, strict=True))
    assert counts[1, dataset.class_names.index('cat')] == cats
    assert counts[2, dataset.class_names.index('bird')] == (3 if difficult == 'positive' else 0)
    if difficult == 'ignore':
        assert targets(dataset) == targets(create_dataset('voc2007', str(tmp_path), 'train')), 'of the lists'


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', '000012.xml'),
        ('<annotation>', '000012.xml'),
        ('<annotation><object><name>dog</name></object><object><name>yeti</name></object></annotation>', "2.*'yeti'"),
        ('<annotation><object><name>dog</name><difficult>2</difficult></object></annotation>', "object 1.*'2'"),
    ],
)
def test_a_bad_annotation_file_of_voc_is_named_with_its_object(tmp_path, content, message):
    write_voc(tmp_path)
    write_text(tmp_path / 'VOCdevkit/VOC2007/Annotations/000012.xml', content)
    with pytest.raises(ValueError, match=message):
        create_dataset('voc2007', str(tmp_path), 'train', difficult='positive')
    assert len(create_dataset('voc2007', str(tmp_path), 'train')) == 3, 'the lists suffice for the default'


@pytest.mark.parametrize('name', ['coco2014', 'json'])
def test_objects_are_counted_where_a_dataset_has_them(tmp_path, name):
    WRITTEN[name][0](tmp_path)
    annotations = create_dataset(name, str(tmp_path), 'train', instances=True).annotations
    assert annotations.instances.tolist() == [2, 2, 2]
    assert annotations.subset(np.array([1])).instances.tolist() == [2, 2]
    assert create_dataset(name, str(tmp_path), 'train').annotations.instances is None


def test_file_names_are_those_of_timm_datasets(tmp_path):
    write_csv(tmp_path)
    dataset = create_dataset('csv', str(tmp_path), 'train')
    assert dataset.filename(0) == 'images/11.png'
    assert dataset.filename(0, basename=True) == '11.png'
    assert Path(dataset.filename(0, absolute=True)) == tmp_path / 'images' / '11.png'
    assert dataset.filenames(basename=True) == ['11.png', '12.png', '13.png']


@pytest.mark.parametrize('name', ['', 'folder', 'ImageFolder', 'torch/image_folder'])
def test_the_names_of_timm_go_to_timm(tmp_path, name):
    write_image(tmp_path / 'train' / 'cat' / 'a.png', 1)
    write_image(tmp_path / 'train' / 'dog' / 'b.png', 2)
    dataset = create_dataset(name, str(tmp_path), 'train')
    assert [target for _, target in dataset] == [0, 1]


@pytest.mark.parametrize('name', ['coco2015', 'voc', 'csvv', 'CSV', 'foo/bar', 'csv/x'])
def test_an_unknown_name_lists_the_known_ones(tmp_path, name):
    with pytest.raises(ValueError, match=f'{name!r}.*coco2014.*csv.*torch/.*wds/'):
        create_dataset(name, str(tmp_path), 'train')


@pytest.mark.parametrize('content', [b'', b'no image', None])
def test_an_unreadable_image_is_named(tmp_path, content):
    write_csv(tmp_path)
    path = tmp_path / 'images' / '11.png'
    Image.fromarray(np.random.default_rng(0).integers(255, size=(99, 99), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(OSError, match='11.png'):
        create_dataset('csv', str(tmp_path), 'train')[0]


@multi_label_formats
def test_missing_images_are_an_error_or_left_out(tmp_path, name, caplog):
    WRITTEN[name][0](tmp_path)
    whole = create_dataset(name, str(tmp_path), 'train')
    gone, *kept = whole.filenames()
    Path(whole.filename(0, absolute=True)).unlink()
    with pytest.raises(ValueError, match=f'1 of {len(whole)} .*{gone}.*--missing-images'):
        create_dataset(name, str(tmp_path), 'train')
    part = create_dataset(name, str(tmp_path), 'train', missing='skip')
    assert part.filenames() == kept and targets(part) == targets(whole)[1:]
    assert len(list(part)) == len(kept)
    assert caplog.text.count(gone) == 1
    assert create_dataset(name, str(tmp_path), 'train', missing=None).filenames() == whole.filenames()
    for name_of_file in kept:
        (tmp_path / name_of_file).unlink()
    with pytest.raises(ValueError, match=f'{len(whole)} of {len(whole)}'):
        create_dataset(name, str(tmp_path), 'train', missing='skip')


def test_images_outside_of_the_root_are_found(tmp_path):
    write_image(tmp_path / 'elsewhere' / 'a.png', 1)
    write_image(tmp_path / 'root' / 'b.png', 1)
    write_text(tmp_path / 'root' / 'train.csv', 'path,labels', f'{tmp_path}/elsewhere/a.png,x', '../elsewhere/a.png,x',
               'b.png,x', './b.png,x')  # fmt: skip
    assert len(create_dataset('csv', str(tmp_path / 'root'), 'train')) == 2, 'both files have two spellings'


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_folder_in_the_form_of_voc_with_other_classes_is_said_to_be_that(tmp_path):
    write_voc(tmp_path)
    for path in tmp_path.rglob('*_train.txt'):
        path.unlink()
    with pytest.raises(ValueError, match='aeroplane_train.txt is missing: voc20xx has the 20 classes .* CSV or COCO'):
        create_dataset('voc2007', str(tmp_path), 'train')


VOC_LISTS = 'VOCdevkit/VOC2007/ImageSets/Main'
OPEN_IMAGES_LABELS = 'oidv6-train-annotations-human-imagelabels.csv'
COCO_FILE = 'annotations/instances_train2014.json'
MISTAKES = [
    ('csv', 'train.csv', 'cat;dog', 'cat;dgo', None, "train.csv, line 3.*'dgo'.*classes.txt"),
    ('csv', 'train.csv', 'labels', 'label', None, "train.csv, line 2.*'label'"),
    ('csv', 'train.csv', 'ignored', 'labels', None, "train.csv, line 1.*'labels'"),
    ('csv', 'train.csv', 'images/12.png', '', None, 'train.csv, line 3'),
    ('csv', 'train.csv', 'cat;dog', 'cat,dog,zebra', None, "train.csv, line 3: 5 fields .* 3.*'zebra'"),
    ('csv', 'train.csv', ',cat; dog', 'cat;dog,dog', None, "train.csv, line 4.*'dog'.*images/13.png"),
    ('csv', 'classes.txt', 'cat', 'dog', None, "classes.txt.*repeated: .'dog'"),
    ('csv', None, '', '', 'test', "'test'.*train.*validation"),
    ('json', 'train.json', '"cat", "dog"', '"cat", "dgo"', None, r"train.json, images\[1\].*12.png.*'dgo'"),
    ('json', 'train.json', '"cat", "dog"', '"cat", "\u200b "', None, r'train.json, images\[1\]'),
    ('json', 'train.json', '["images/11.png", ["dog", "dog"]]', '["images/11.png"]', None, r'train.json, images\[0\]'),
    ('json', 'train.json', '["dog", "dog"]', '"dog"', None, r'train.json, images\[0\]'),
    ('json', 'train.json', '["dog", "cat"]', '["dog", "dog"]', None, "train.json.*'dog'"),
    ('json', 'train.json', '["dog", "cat"]', '["dog", 1]', None, 'train.json.*classes'),
    ('json', 'train.json', '"images"', '"image"', None, 'train.json.*images'),
    ('json', 'train.json', ']}', '}', None, 'train.json'),
    ('json', None, '', '', 'test', "'test'.*train.*val"),
    ('coco2014', COCO_FILE, '"category_id": 18', '"category_id": 99', None, r'json, annotations\[0\].*category 99'),
    ('coco2014', COCO_FILE, '"image_id": 11', '"image_id": 99', None, r'annotations\[0\]: unknown image 99'),
    ('coco2014', COCO_FILE, '}]}', '}', None, 'train2014.json'),
    ('coco2014', COCO_FILE, '"categories"', '"cats"', None, 'train2014.json.*categories'),
    ('coco2014', None, '', '', 'test', "'test'.*train.*validation"),
    ('coco2017', 'annotations/instances_train2014.json', '', '', None, 'instances_train2017.json'),
    ('voc2007', f'{VOC_LISTS}/cat_train.txt', '000012  1', '000012  2', None, "cat_train.txt, line 2.*'000012  2'"),
    ('voc2007', f'{VOC_LISTS}/cat_train.txt', '000012  1', '000099  1', None, 'cat_train.txt, line 2'),
    ('voc2007', f'{VOC_LISTS}/cat_train.txt', '000012  1\n', '', None, 'Main.*train.txt'),
    ('voc2007', None, '', '', 'minival', "'minival'.*trainval"),
    ('voc2012', None, '', '', None, 'ImageSets/Main'),
    ('openimages', OPEN_IMAGES_LABELS, '/m/2,0', '/m/9,0', None, 'imagelabels.csv, line 3.*/m/9'),
    ('openimages', OPEN_IMAGES_LABELS, '/m/2,0', '/m/2,0.7', None, 'imagelabels.csv, line 3.*0.7'),
    ('openimages', OPEN_IMAGES_LABELS, '/m/2,0', '/m/2', None, 'imagelabels.csv, line 3'),
    ('openimages', OPEN_IMAGES_LABELS, 'Source', 'Origin', None, 'line 1.*Source.*Origin'),
    ('openimages', 'oidv6-classes-trainable.txt', '/m/2', '/m/9', None, "trainable.txt.*'/m/9'"),
    ('openimages', 'oidv6-class-descriptions.csv', ',dog', '', None, 'class-descriptions.csv, line 2'),
    ('openimages', None, '', '', 'val2', "'val2'.*validation"),
]


@pytest.mark.parametrize(('name', 'file', 'old', 'new', 'split', 'message'), MISTAKES)
def test_mistakes_name_file_line_and_label(tmp_path, name, file, old, new, split, message):
    writers = {'coco2017': write_coco, 'voc2012': write_voc}  # data of another year
    writers.get(name, WRITTEN[name][0])(tmp_path)
    if name == 'csv':
        write_text(tmp_path / 'classes.txt', 'cat', 'dog')
    if file:
        replace(tmp_path / file, old, new)
    with pytest.raises(ValueError, match=message):
        create_dataset(name, str(tmp_path), split or 'train')


@pytest.mark.parametrize('write', [write_json, write_coco])
def test_json_that_is_nested_too_deeply_is_named(tmp_path, write):
    write(tmp_path)
    path = next(tmp_path.rglob('*train*.json'))
    path.write_text('[' * 200_000)
    with pytest.raises(ValueError, match=path.name):
        create_dataset('json' if write is write_json else 'coco2014', str(tmp_path), 'train')


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('coco2014', dict(class_map='names.txt'), 'class_map'),
        ('csv', dict(download=True), 'download'),
        ('csv', dict(num_samples=5), 'num_samples'),
        ('csv', dict(instances=True), 'instances'),
        ('coco2014', dict(difficult='positive'), 'difficult'),
        ('voc2007', dict(difficult='maybe'), "'maybe'"),
        ('voc2007', dict(target_key='label'), 'target_key'),
        ('csv', dict(missing='maybe'), "'maybe'"),
    ],
)
def test_options_without_a_meaning_are_refused(tmp_path, name, options, message):
    WRITTEN[name][0](tmp_path)
    with pytest.raises(ValueError, match=message):
        create_dataset(name, str(tmp_path), 'train', **options)


def test_a_missing_folder_is_named(tmp_path):
    for root in (None, str(tmp_path / 'nowhere')):
        with pytest.raises(ValueError, match='nowhere' if root else 'None'):
            create_dataset('coco2014', root, 'train')


def test_open_images_has_a_test_split_and_does_without_a_list_of_trainable_classes(tmp_path):
    write_open_images(tmp_path)
    assert len(create_dataset('openimages', str(tmp_path), 'test')) == 2
    (tmp_path / 'oidv6-classes-trainable.txt').unlink()
    dataset = create_dataset('openimages', str(tmp_path), 'train')
    assert dataset.class_names == ['dog', 'cat', 'jaguar (/m/1)', 'jaguar (/m/2)', 'nobody, nowhere']
    assert len(dataset) == 3


def test_labels_that_are_present_and_absent_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_open_images(tmp_path)
    create_dataset('openimages', str(tmp_path), 'train')
    assert '1 labels are both present and absent in one image' in caplog.text


def test_coco_images_without_annotations_are_negatives_or_dropped(tmp_path, caplog):
    write_coco(tmp_path)
    with caplog.at_level(logging.INFO):
        kept, dropped = (
            create_dataset('coco2014', str(tmp_path), 'validation', unannotated=choice) for choice in ('keep', 'drop')
        )
    assert [len(kept), len(dropped)] == [3, 2]
    assert [kept[index][1].tolist() for index in range(3)] == [[1, 0], [1, 1], [0, 0]]
    assert [record.message.count('1 of 3 images') for record in caplog.records] == [1, 1]
    with pytest.raises(ValueError, match='unannotated.*ignore'):
        create_dataset('coco2014', str(tmp_path), 'validation', unannotated='ignore')


@pytest.mark.parametrize(
    ('annotations', 'images'),
    [
        ('{valid}/_annotations.coco.json', '{valid}'),  # Roboflow
        ('annotations/instances_{title}.json', 'images/{title}'),  # CVAT's own names
        ('annotations/instances_{val}.json', 'images/{val}'),  # CVAT, with images by split
        ('annotations/instances_{val}.json', 'images'),
        ('{validation}.json', '{validation}'),
        ('annotations/{val}.json', '{val}'),
        ('{val}/annotations.json', '{val}/images'),
    ],
)
def test_files_in_coco_format_as_tools_export_them(annotations, images, tmp_path):
    write_coco(tmp_path / 'coco')
    root = tmp_path / 'own'
    spelling = dict(valid='valid', val='val', validation='validation', title='Validation')
    for split, source in (('train', 'train2014'), ('validation', 'val2014')):
        names = spelling if split == 'validation' else {**dict.fromkeys(spelling, 'train'), 'title': 'Train'}
        file, folder = root / annotations.format(**names), root / images.format(**names)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / 'coco' / 'annotations' / f'instances_{source}.json', file)
        shutil.copytree(tmp_path / 'coco' / source, folder, dirs_exist_ok=True)
        dataset = create_dataset('coco', str(root), split)
        official = create_dataset('coco2014', str(tmp_path / 'coco'), split)
        assert dataset.class_names == official.class_names == ['dog', 'cat']
        for (image, target), (expected, labels) in zip(dataset, official, strict=True):
            assert image.tobytes() == expected.tobytes() and target.tolist() == labels.tolist()


def test_one_file_in_coco_format_is_for_all_splits(tmp_path):
    write_coco(tmp_path)
    file = shutil.move(tmp_path / 'annotations' / 'instances_train2014.json', tmp_path / 'train2014' / 'labels.json')
    for root in (file, tmp_path / 'train2014'):
        assert len(create_dataset('coco', str(root), 'train')) == 3
        with pytest.raises(ValueError, match='labels.json is one file for all splits: pass --val-fraction'):
            create_dataset('coco', str(root), 'validation')
    with pytest.raises(ValueError, match="no annotations of split 'train' in COCO format; looked for train/_annot"):
        create_dataset('coco', str(tmp_path / 'val2014'), 'train')
    for path in (tmp_path / 'train2014').glob('*.jpg'):
        path.rename(path.with_suffix('.jpeg'))
    with pytest.raises(ValueError, match=r'labels.json: its first image, COCO_train2014_\d+.jpg, is in none of'):
        create_dataset('coco', str(file), 'train')


def test_coco_categories_of_one_name_are_one_class(tmp_path, caplog):
    write_coco(tmp_path)
    path = tmp_path / 'annotations' / 'instances_train2014.json'
    content = json.loads(path.read_text())
    content['categories'].insert(1, dict(id=5, name='dog'))
    content['annotations'] += [dict(id=90, image_id=13, category_id=5), dict(id=91, image_id=11, category_id=5)]
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.INFO):
        dataset = create_dataset('coco2014', str(tmp_path), 'train', instances=True)
    assert dataset.class_names == ['dog', 'cat']
    assert [dataset[index][1].tolist() for index in range(3)] == [[1, 0], [1, 1], [1, 0]]
    assert dataset.annotations.instances.tolist() == [3, 2, 2, 1]
    assert any("18, 5 have the name 'dog'" in record.message for record in caplog.records)


def test_a_supercategory_without_annotations_and_names_that_are_almost_equal_are_warned_of(tmp_path, caplog):
    """Roboflow lists the name of the dataset as a category; `cat ` and both forms of an accent are one name."""
    write_coco(tmp_path)
    path = tmp_path / 'annotations' / 'instances_train2014.json'
    content = json.loads(path.read_text())
    content['categories'] += [dict(id=1, name='animal', supercategory='none'), dict(id=2, name=' cat')]
    content['categories'] += [dict(id=3, name='Dog', supercategory='Dog')]
    path.write_text(json.dumps(content))
    assert create_dataset('coco2014', str(tmp_path), 'train').class_names == ['dog', 'cat', 'animal', 'Dog']
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 2 and "'animal' has no annotation and is the supercategory" in lines[0]
    assert "only in case or leading zeros: 'dog', 'Dog'" in lines[1]


def test_the_flag_keeps_or_drops_images_without_annotations(tmp_path):
    WRITTEN['coco2014'][0](tmp_path)
    images = {}
    for value in ('keep', 'drop'):
        flags = ['--dataset', 'coco2014', '--task', 'multilabel', '--num-classes', '2', '--coco-unannotated', value]
        options = parse_train([str(tmp_path), '--device', 'cpu', *flags])
        images[value] = create_split(options, 'train', training=True).filenames()
    assert set(images['drop']) < set(images['keep'])


@pytest.mark.skipif(not Path('/dev/zero').is_char_device(), reason='needs a device that has no end')
@pytest.mark.parametrize('read', [read_names, lambda path: list(read_rows(path))], ids=['names', 'rows'])
def test_a_device_is_no_file(read):
    with pytest.raises(ValueError, match='/dev/zero: not a regular file'):
        read(Path('/dev/zero'))
