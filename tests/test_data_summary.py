"""Statistics of datasets against counts by hand: summaries, overlap, classes, co-occurrence of classes."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from multilabel_data import write_image, write_open_images, write_text
from torchvision.datasets import CIFAR100, FakeData, ImageFolder

from timm_mldecoder.data import (
    Annotations,
    MultiLabelDataset,
    class_to_index,
    cooccurrence,
    create_dataset,
    overlap,
    summarize,
)
from timm_mldecoder.data.images import strict


@pytest.fixture
def scenes(tmp_path):
    rows = ['path,labels,ignored', 'a.png,cat;dog,', 'b.png,cat,zebra', 'c.png,,dog', 'e.png,cat,']
    write_text(tmp_path / 'train.csv', *rows)
    write_text(tmp_path / 'validation.csv', 'path,labels', 'b.png,cat', 'd.png,dog')
    write_text(tmp_path / 'classes.txt', 'cat', 'dog', 'zebra', 'gnu')
    return lambda split='train': create_dataset('csv', str(tmp_path), split, missing=None)


def test_a_summary_counts_images_classes_and_labels(scenes):
    summary = summarize(scenes())
    assert (summary.images, summary.class_names) == (4, ['cat', 'dog', 'zebra', 'gnu'])
    assert summary.positives.tolist() == [3, 1, 0, 0]
    assert summary.positives_per_class == (0, 0.5, 3)
    assert summary.never_positive == ['zebra', 'gnu']
    assert summary.ignored_share == 2 / 16
    assert summary.duplicates == []
    text = '\n'.join(summary.log_lines('train'))
    assert all(word in text for word in ('4 images', '4 classes', 'zebra, gnu', '12.5%'))
    assert all(line.startswith('train: ') for line in summary.log_lines('train'))


def test_a_summary_of_partial_annotation_counts_what_is_not_annotated(tmp_path):
    write_open_images(tmp_path)
    summary = summarize(create_dataset('openimages', str(tmp_path), 'train'))
    assert summary.positives.tolist() == [1, 2, 0, 0]
    assert summary.ignored_share == 4 / 8


def test_files_listed_twice_and_files_of_both_splits_are_found(tmp_path, scenes):
    assert overlap(scenes(), scenes('validation')) == ['b.png']
    images = [[f'{number % 7}/{"x" * (number % 5)}.png', []] for number in range(36)]
    (tmp_path / 'train.json').write_text(json.dumps({'classes': ['a'], 'images': images}))
    (tmp_path / 'validation.json').write_text(json.dumps({'classes': ['a'], 'images': [['9/long-name.png', []]]}))
    train, validation = (create_dataset('json', str(tmp_path), split, missing=None) for split in ('train', 'val'))
    assert len(train) == 35 and summarize(train).duplicates == [], 'one image is listed twice: merged'
    twice = Annotations(['a'], ['a.png', 'b.png', './a.png'], [], [], [])
    assert summarize(MultiLabelDataset(twice, tmp_path)).duplicates == ['a.png']
    assert overlap(train, validation) == []
    other = create_dataset('json', str(shutil.copytree(tmp_path, tmp_path / 'copy')), 'train', missing=None)
    assert overlap(train, other) == [], 'the same names in another folder'


def test_summaries_of_timm_and_torchvision_datasets(tmp_path):
    for path in ('train/cat/1.png', 'train/cat/2.png', 'train/dog/1.png', 'validation/cat/1.png'):
        write_image(tmp_path / path, 1)
    train, validation = (create_dataset('', str(tmp_path), split) for split in ('train', 'validation'))
    for dataset in (train, ImageFolder(str(tmp_path / 'train'))):
        summary = summarize(dataset)
        assert (summary.images, summary.class_names, summary.duplicates) == (3, ['cat', 'dog'], [])
        assert summary.positives.tolist() == [2, 1]
        assert overlap(dataset, validation) == [] and len(overlap(dataset, train)) == 3
    unknown = summarize(FakeData(5))
    assert (unknown.images, unknown.class_names, unknown.positives, unknown.duplicates) == (5, None, None, None)
    assert unknown.log_lines('train') == ['train: 5 images, an unknown number of classes']


def write_cifar(root):
    folder = root / 'cifar-100-python'
    folder.mkdir()
    for name in ('train', 'test'):
        content = {'data': np.zeros((3, 3072), np.uint8), 'fine_labels': [2, 0, 2]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / 'meta').write_bytes(pickle.dumps({'fine_label_names': ['apple', 'bed', 'can']}))


def test_classes_of_torchvision_are_known(tmp_path, monkeypatch):
    write_cifar(tmp_path)
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda *arguments: True)
    dataset = create_dataset('torch/cifar100', str(tmp_path), 'train')
    assert class_to_index(dataset) == {'apple': 0, 'bed': 1, 'can': 2}
    assert summarize(dataset).positives.tolist() == [1, 0, 2] and summarize(dataset).never_positive == ['bed']


def test_damaged_and_missing_files_of_cifar_are_named(tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / 'cifar-100-python' / 'train'
    with pytest.raises(ValueError, match=f'{path} is damaged.*{CIFAR100.train_list[0][1]}.*--dataset-download'):
        create_dataset('torch/cifar100', str(tmp_path), 'train')
    path.unlink()
    with pytest.raises(ValueError, match=f'{path} is missing.*{CIFAR100.url}.*--dataset-download'):
        create_dataset('torch/cifar100', str(tmp_path), 'train')


@pytest.mark.parametrize('download', [False, True])
def test_missing_files_of_stanford_cars_are_named_and_cannot_be_downloaded(tmp_path, download):
    with pytest.raises(ValueError, match='cars_meta.mat.*site is gone') as error:
        create_dataset('torch/stanford_cars', str(tmp_path), 'train', download=download)
    assert ('--dataset-download' in str(error.value)) == download


def test_classes_of_shards_are_those_of_the_class_map_or_of_the_info_file(tmp_path):
    pytest.importorskip('webdataset')
    splits = {'train': {'name': 'train', 'filenames': ['a.tar'], 'shard_lengths': [1], 'num_samples': 1}}
    for names in (['cat', 'dog'], None):
        info = {'splits': splits, **({'class_names': names} if names else {})}
        (tmp_path / '_info.json').write_text(json.dumps(info))
        dataset = create_dataset('wds/small', str(tmp_path), 'train')
        assert class_to_index(dataset) == (names and {'cat': 0, 'dog': 1})
    write_text(tmp_path / 'map.txt', 'dog', 'cat')
    dataset = create_dataset('wds/small', str(tmp_path), 'train', class_map=str(tmp_path / 'map.txt'))
    assert class_to_index(dataset) == {'dog': 0, 'cat': 1}


def test_wrong_columns_of_a_hugging_face_dataset_are_named_with_the_flag(tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for path in ('train/cat/1.png', 'train/dog/1.png'):
        write_image(tmp_path / 'images' / path, 1)

    def create(**keys):
        return create_dataset(f'hfds/{tmp_path}/images', str(tmp_path / 'cache'), 'train', **keys)

    assert class_to_index(create()) == {'cat': 0, 'dog': 1}
    with pytest.raises(ValueError, match="'img'.*--input-key.*label"):
        create(input_key='img', target_key='label')
    with pytest.raises(ValueError, match="'fine'.*--target-key.*label"):
        create(input_key='image', target_key='fine')
    with pytest.raises(ValueError, match="'hfds/'"):
        create_dataset('hfds/', str(tmp_path), 'train')


def test_a_first_row_without_an_image_is_no_missing_column(tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    write_image(tmp_path / 'cat.png', 1)
    rows = dict(image=[None, str(tmp_path / 'cat.png')], label=[0, 1])
    data = datasets.Dataset.from_dict(rows).cast_column('image', datasets.Image())
    data.to_parquet(tmp_path / 'rows' / 'train-00000-of-00001.parquet')
    dataset = strict(create_dataset(f'hfds/{tmp_path}/rows', str(tmp_path / 'cache'), 'train', input_key='image'))
    assert len(dataset) == 2 and dataset[1][1] == 1
    with pytest.raises(OSError):
        dataset[0]


def test_classes_are_in_the_order_of_their_indices():
    class Dataset:
        class_to_idx = {'b': 1, 'c': 2, 'a': 0}

    assert list(class_to_index(Dataset())) == ['a', 'b', 'c']
    assert class_to_index([]) is None


def test_cooccurrence_equals_a_dense_computation(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    counts = random.poisson(0.5, size=(50, 6))
    images = [
        [f'{index}.png', [f'c{label}' for label in range(6) for _ in range(row[label])]]
        for index, row in enumerate(counts)
    ]
    (tmp_path / 'train.json').write_text(json.dumps({'classes': [f'c{label}' for label in range(6)], 'images': images}))
    dataset = create_dataset('json', str(tmp_path), 'train', missing=None, instances=True)
    shown = (counts > 0).astype(float)
    together = shown.T @ shown * (1 - np.eye(6))
    np.testing.assert_allclose(cooccurrence(dataset)[0], together / counts.sum(0)[:, None], rtol=1e-12)
    np.testing.assert_allclose(cooccurrence(dataset, 'images')[0], together / shown.sum(0)[:, None], rtol=1e-12)
    part = dataset.annotations.subset(np.arange(0, 50, 3))
    expected = shown[::3].T @ shown[::3] * (1 - np.eye(6)) / counts[::3].sum(0)[:, None]
    np.testing.assert_allclose(cooccurrence(part)[0], expected, rtol=1e-12)


def test_targets_are_tensors_of_float32(scenes):
    target = scenes().annotations.target(1)
    assert target.dtype == torch.float32 and target.tolist() == [1, 0, -1, 0]
