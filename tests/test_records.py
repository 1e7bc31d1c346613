"""Names as labels of Hugging Face datasets and WebDataset shards, and targets that do not fit the task."""

import io
import json
import pickle
import re
import shlex

import pytest
from image_folders import write_images
from PIL import Image
from runs import build, summary, train
from test_train_data import SMALL, write_shards

from timm_mldecoder.data import class_to_index, overlap, summarize
from timm_mldecoder.flags import parse_train
from timm_mldecoder.loading.compare_classes import use_classes_of
from timm_mldecoder.loading.datasets import create_split

TAGS = ['old house', 'tree', 'caf\u0065\u0301']


def write_rows(folder, column, labels):
    """Parquet files of 12 and 6 images, whose label is a function of the number."""
    datasets = pytest.importorskip('datasets')
    images = sorted(str(path) for path in write_images(folder / 'png', train=6, validation=0).rglob('*.png'))
    for split, count in (('train', 12), ('validation', 6)):
        rows = {'image': images[:count], column: [labels(number) for number in range(count)]}
        data = datasets.Dataset.from_dict(rows).cast_column('image', datasets.Image())
        data.to_parquet(folder / 'rows' / f'{split}-00000-of-00001.parquet')
    return f'--data-dir {folder}/cache --dataset hfds/{folder}/rows --input-key image --target-key {column}'


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')


def targets(dataset):
    return [dataset[number][1] for number in range(len(dataset))]


@pytest.mark.parametrize(
    ('column', 'labels', 'flags'),
    [
        ('tags', lambda number: [TAGS[number % 3], TAGS[(number + 1) % 3]], ''),
        ('tag_string', lambda number: f'{"abc"[number % 3]}_x  {"abc"[(number + 1) % 3]}_x', ''),
        ('text', lambda number: f'{TAGS[number % 3]}, {TAGS[(number + 1) % 3]}', '--label-separator ,'),
    ],
)
def test_names_are_labels(column, labels, flags, tmp_path):
    flags = [*shlex.split(write_rows(tmp_path, column, labels)), '--task', 'multilabel', *flags.split()]
    options = parse_train([*flags, '--num-classes', '3'])
    parts = [create_split(options, split) for split in ('train', 'validation')]
    names = list(class_to_index(parts[0]))
    assert len(names) == 3 and names == sorted(names) == list(class_to_index(parts[1]))
    assert not names[0].endswith(',') and 'caf\u0065\u0301' not in names
    shown = [[names[index] for index in target.nonzero().flatten()] for target in targets(parts[1])]
    assert shown[0] == shown[3] != shown[1] and all(len(part) == 2 for part in shown)
    run = build(tmp_path / 'cache', tmp_path, *flags, '--epochs', '1')
    assert run.state.class_names == names


def test_names_of_rows_are_annotations(tmp_path):
    flags = shlex.split(write_rows(tmp_path, 'tags', lambda number: [TAGS[number % 3], TAGS[(number + 1) % 3]]))
    flags += ['--task', 'multilabel', '--num-classes', '3', '--partial-labels', 'rps=0.5', '--val-fraction', '0.25']
    options = parse_train(flags)
    train, validation = (create_split(options, split, training=split == 'train') for split in ('train', 'validation'))
    assert len(train) + len(validation) == 12 and summarize(validation).positives.sum() == 2 * len(validation)
    assert train.annotations.has_ignored and not validation.annotations.has_ignored
    assert summarize(train).duplicates is None and overlap(train, validation) == []
    use_classes_of(train, trained := ['new', *reversed(train.class_names)])
    assert train.class_names == trained and (train[0][1] == train.annotations.target(0)).all()
    names = {dataset.filename(index) for dataset in (train, validation) for index in range(len(dataset))}
    assert len(names) == 12


@pytest.mark.parametrize('gone', [None, dict(bytes=b'', path=None)])
@pytest.mark.parametrize('labels', ['ab', (0, 1)])
def test_a_row_without_an_image_is_a_damaged_image(gone, labels, tmp_path, caplog):
    datasets = pytest.importorskip('datasets')
    pixels = io.BytesIO()
    Image.new('RGB', (40, 40)).save(pixels, 'PNG')
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('string' if labels == 'ab' else 'int64'))
    for split in ('train', 'validation'):
        images = [gone if number == 2 else dict(bytes=pixels.getvalue(), path=None) for number in range(6)]
        rows = [dict(image=image, label=labels[number % 2]) for number, image in enumerate(images)]
        data = datasets.Dataset.from_list(rows, features=features)
        data.to_parquet(tmp_path / 'rows' / f'{split}-00000-of-00001.parquet')
    flags = f'--data-dir {tmp_path}/cache --dataset hfds/{tmp_path}/rows --num-classes 2 --epochs 1'
    run = train(tmp_path / 'cache', tmp_path, *shlex.split(flags), '--val-bad-image', 'skip')
    assert len(summary(run)) == 1
    assert caplog.text.count('image 2 of the dataset') >= 2


def test_a_name_per_image_is_a_class(tmp_path):
    flags = shlex.split(write_rows(tmp_path, 'kind', lambda number: TAGS[number % 3]))
    dataset = create_split(parse_train(flags), 'train')
    assert list(class_to_index(dataset)) == ['caf\u00e9', 'old house', 'tree']
    assert targets(dataset)[:3] == [1, 2, 0]
    classes = tmp_path / 'classes.txt'
    classes.write_text('tree\ncaf\u00e9\nold house\n')
    assert targets(create_split(parse_train([*flags, '--class-map', str(classes)]), 'train'))[:3] == [2, 0, 1]
    classes.write_text('tree\nold house\n')
    with pytest.raises(ValueError, match=r"row 2: unknown label 'café'"):
        create_split(parse_train([*flags, '--class-map', str(classes)]), 'train')


@pytest.mark.parametrize(
    ('labels', 'flags', 'message'),
    [
        (lambda number: ['a', 'b'], '', "'labels' has several classes per image.*--task multilabel"),
        (lambda number: [1, 2], '', "'labels' has several classes per image.*--task multilabel"),
        (lambda number: number % 2, '--task multilabel', 'leave --task multilabel out'),
        (lambda number: 'cat, dog', '--task multilabel', "--label-separator ','"),
        (lambda number: None if number == 5 else 'cat', '', 'row 5: expected one class, got None'),
    ],
)
def test_targets_that_do_not_fit_are_one_line(labels, flags, message, tmp_path):
    flags = [*shlex.split(write_rows(tmp_path, 'labels', labels)), *flags.split(), '--num-classes', '2']
    with pytest.raises(ValueError, match=message) as error:
        create_split(parse_train(flags), 'train')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('labels', 'flags', 'message'),
    [
        (lambda number: ['a', 'b'], '', '--task multilabel'),
        (lambda number: 'a', '', "'labels' has names: pass --class-map"),
        (lambda number: number % 2, '--task multilabel', 'leave --task multilabel out'),
    ],
)
def test_streams_that_do_not_fit_are_one_line(labels, flags, message, tmp_path):
    flags = [*shlex.split(write_rows(tmp_path, 'labels', labels)), *flags.split(), '--num-classes', '2']
    flags += ['--dataset', f'hfids/{tmp_path}/rows', '--train-num-samples', '12', '--dataset-download']
    with pytest.raises(ValueError, match=message):
        create_split(parse_train(flags), 'train', num_samples=12)


@pytest.mark.parametrize(
    ('files', 'flags', 'name'),
    [
        (lambda i: {'cls': TAGS[i % 3].encode()}, '', 'eval_top1'),
        (lambda i: {'json': json.dumps({'tags': [TAGS[i % 3], 'tree']}).encode()},
         '--task multilabel --target-key tags', 'eval_map'),
        (lambda i: {'json': json.dumps({'tags': f'{TAGS[i % 3]};tree'}).encode()},
         '--task multilabel --target-key tags --label-separator ;', 'eval_map'),
    ],
)  # fmt: skip
def test_names_in_shards(files, flags, name, tmp_path):
    pytest.importorskip('webdataset')
    shards = write_shards(tmp_path / 'shards', files)
    flags = ['--dataset', 'wds/small', *flags.split()]
    with pytest.raises(ValueError, match='--class-map'):
        create_split(parse_train([str(shards), *flags, *SMALL]), 'train')
    classes = tmp_path / 'classes.txt'
    classes.write_text('\n'.join(sorted(TAGS)) + '\n')
    train(shards, tmp_path, *SMALL, *flags, '--class-map', str(classes), '--epochs', '1', '-j', '1')
    (row,) = summary(tmp_path / 'run')
    assert float(row[name]) > 0


def test_workers_that_unpickle_a_dataset_have_the_names(tmp_path):
    flags = shlex.split(write_rows(tmp_path, 'kind', lambda number: TAGS[number % 3]))
    dataset = create_split(parse_train(flags), 'validation')
    assert targets(pickle.loads(pickle.dumps(dataset))) == targets(dataset) == [1, 2, 0, 1, 2, 0]


def test_shards_of_another_task_are_one_line(tmp_path):
    pytest.importorskip('webdataset')
    shards = write_shards(tmp_path / 'shards', lambda i: {'json': json.dumps({'tags': [0, 1]}).encode()})
    with pytest.raises(ValueError, match='--task multilabel'):
        create_split(parse_train([str(shards), '--dataset', 'wds/small', '--target-key', 'tags', *SMALL]), 'train')


@pytest.mark.parametrize(
    ('files', 'flag'),
    [
        (['photos.csv'], '--dataset csv'),
        (['train.csv', 'images/a.png'], '--dataset csv'),
        (['train.json', 'a.png'], '--dataset json'),
        (
            ['tags.csv', 'shop/a.png', 'home/b.png'],
            'give it in place of the folder, with --dataset csv',
        ),
        (['annotations/instances_val2014.json', 'val2014/a.png', 'train2014/a.png'], '--dataset coco2014'),
        (['VOCdevkit/VOC2012/JPEGImages/a.jpg'], '--dataset voc2012'),
        (['_info.json', 'a-000.tar'], '--dataset wds/'),
        (['data/train-00000-of-00001.parquet'], '--dataset hfds/{root}'),
    ],
)
def test_a_forgotten_dataset_is_named(files, flag, tmp_path):
    for file in files:
        (tmp_path / 'data' / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'data' / file).write_text('')
    root = tmp_path / 'data' / 'photos.csv' if files == ['photos.csv'] else tmp_path / 'data'
    task = ['--task', 'multilabel'] if 'shop/a.png' in files else []
    with pytest.raises(ValueError, match=re.escape(flag.format(root=root))) as error:
        create_split(parse_train([str(root), *task]), 'train')
    assert '\n' not in str(error.value)


def test_a_class_map_names_the_classes_of_indices(tmp_path):
    pytest.importorskip('webdataset')
    shards = write_shards(tmp_path / 'shards', lambda i: {'cls': str(i % 3).encode()})
    (tmp_path / 'classes.txt').write_text('\n'.join(sorted(TAGS)) + '\n')
    flags = ['--dataset', 'wds/small', *SMALL, '--class-map', str(tmp_path / 'classes.txt')]
    dataset = create_split(parse_train([str(shards), *flags]), 'train')
    assert {target for _, target in dataset} == {0, 1, 2} and len(class_to_index(dataset)) == 3


@pytest.mark.parametrize('entry', ['num_samples', 'name', 'filenames'])
def test_an_entry_that_the_shards_lack_is_named(entry, tmp_path):
    pytest.importorskip('webdataset')
    shards = write_shards(tmp_path / 'shards', lambda i: {'cls': b'0'})
    info = json.loads((shards / '_info.json').read_text())
    del info['splits']['train'][entry]
    (shards / '_info.json').write_text(json.dumps(info))
    with pytest.raises(ValueError, match=f'_info.json.*{entry}.*train'):
        create_split(parse_train([str(shards), '--dataset', 'wds/small', *SMALL]), 'train')
