"""Data as users have it, through train.py and validate.py: WebDataset shards and Hugging Face datasets on disk."""

import io
import json
import shlex
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from image_folders import write_images
from marks import few
from PIL import Image
from runs import build, call, fit, last, summary
from torch.utils.data import default_collate

import train
import validate
from timm_mldecoder.loading.loader import Placement, TrainLoader
from timm_mldecoder.loading.randomness import EpochStart
from timm_mldecoder.train.run import Run

SMALL = shlex.split("""
    --num-classes 3 --device cpu --model test_resnet --img-size 32 -b 6 -j 0 --epochs 2 --warmup-epochs 0 --opt adamw
    --lr 2e-3
""")


def write_shards(folder, labels):
    """Two training shards and one for validation, as WebDataset keeps them, and timm's `_info.json` beside them.

    Args:
        folder: Where.
        labels: (shard, index) -> the files of a sample beside its image, by extension.
    """
    random = np.random.RandomState(0)
    counts = {'train-0.tar': 10, 'train-1.tar': 10, 'validation-0.tar': 9}
    folder.mkdir()
    for shard, count in counts.items():
        with tarfile.open(folder / shard, 'w') as tar:
            for index in range(count):
                pixels = io.BytesIO()
                image = random.randint(0, 256, (40, 40, 3)).astype(np.uint8)
                image[..., 2] = 10 * index
                Image.fromarray(image).save(pixels, 'PNG')
                for extension, content in {'png': pixels.getvalue(), **labels(index)}.items():
                    entry = tarfile.TarInfo(f'{index:04d}.{extension}')
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    splits = {
        name: {'name': name, 'filenames': [shard for shard in counts if shard.startswith(name)]}
        for name in ('train', 'validation')
    }
    for split in splits.values():
        split['shard_lengths'] = [counts[shard] for shard in split['filenames']]
        split['num_samples'] = sum(split['shard_lengths'])
    (folder / '_info.json').write_text(json.dumps({'splits': splits}))
    return folder


@pytest.mark.parametrize('workers', few(['1', '0'], 1))
def test_webdataset_shards_train_resume_and_score(workers, tmp_path, capsys):
    pytest.importorskip('webdataset')
    shards = write_shards(tmp_path / 'shards', lambda index: {'cls': str(index % 3).encode()})
    run = [str(shards), '--dataset', 'wds/small', *SMALL, '-j', workers, '--output', str(tmp_path)]
    train.main([*run, '--experiment', 'whole'])
    train.main([*run, '--experiment', 'parts', '--stop-epoch', '1'])
    train.main([*run, '--experiment', 'parts', '--resume', 'auto'])
    assert summary(tmp_path / 'parts') == summary(tmp_path / 'whole')
    capsys.readouterr()
    validate.main(
        [str(shards), '--dataset', 'wds/small', '-j', '0', '--checkpoint', str(tmp_path / 'whole' / 'last.pth.tar')]
    )
    scored = json.loads(capsys.readouterr().out.split('--result\n')[1])
    assert scored['top1'] == float(summary(tmp_path / 'whole')[-1]['eval_top1'])


@pytest.mark.parametrize('reported', [3, 4, 5, 6, 7])
def test_every_batch_of_a_stream_counts_whatever_length_it_reports(reported):
    """Five batches in optimizer steps of two: the last one is a step too, and no step divides by zero."""

    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 2 * reported

        def __iter__(self):
            return iter([(torch.zeros(3, 4, 4), 0)] * 10)

    options = dict(stream=dict(batch_size=2, drop_last=True), num_workers=0)
    loader = TrainLoader(Stream(), None, default_collate, Placement(torch.device('cpu')), **options)
    run = SimpleNamespace(
        options=SimpleNamespace(grad_accum_steps=2), state=SimpleNamespace(start=EpochStart()), train_loader=loader
    )
    steps, weight = [], 0.0
    for batch, _ in enumerate(loader.epoch(0)):
        accumulated, completes = Run.accumulation(run, batch)
        weight += 1 / accumulated
        if completes:
            steps.append((batch, weight))
            weight = 0.0
    assert len(loader) == reported and weight == 0 and steps[-1][0] == 4
    assert all(0.5 <= weight <= 1 for _, weight in steps)
    if reported == 5:
        assert steps == [(1, 1), (3, 1), (4, 1)]


@pytest.mark.parametrize(
    ('flags', 'labels', 'target'),
    [
        ('--target-key tags', lambda i: {'tags': [i % 3, (i + 1) % 3]}, lambda i: {i % 3, (i + 1) % 3}),
        (
            '--target-key tags --target-format multihot',
            lambda i: {'tags': [1, int(i % 3 == 1), 0]},
            lambda i: {0, 1} if i % 3 == 1 else {0},
        ),
        (
            '--target-key cat,dog,car',
            lambda i: {'cat': i % 2, 'dog': 1, 'car': int(i < 5)},
            lambda i: {number for number, given in enumerate((i % 2, 1, i < 5)) if given},
        ),
    ],
)
def test_multi_label_targets_of_records(tmp_path, flags, labels, target):
    """Indices, one value per class, and one field per class; the blue of an image is its number in the shard."""
    pytest.importorskip('webdataset')
    shards = write_shards(tmp_path / 'shards', lambda index: {'json': json.dumps(labels(index)).encode()})
    extra = '--dataset wds/small --task multilabel --epochs 1 --no-aug --mean 0 --std 1'
    run = build(shards, tmp_path, *SMALL, *shlex.split(f'{extra} {flags}'))
    seen = []
    run.state.task.register_forward_pre_hook(lambda _, inputs: seen.extend(zip(*inputs, strict=True)))
    fit(run)
    numbers = [round(image[2].mean().item() * 255 / 10) for image, _ in seen]
    assert set(numbers) == set(range(10)) and len(seen) >= 18
    for number, (_, values) in zip(numbers, seen, strict=True):
        expected = [float(name in target(number)) for name in range(3)]
        assert values.tolist() == expected
    (row,) = summary(tmp_path / 'run')
    assert 0 < float(row['eval_map']) <= 100


def test_hugging_face_data_on_disk(tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    images = write_images(tmp_path / 'images', train=8, validation=4)
    flags = f'--data-dir {tmp_path}/cache --dataset hfds/{images} --input-key image --target-key label'
    train.main([*shlex.split(flags), *SMALL, '--output', str(tmp_path), '--experiment', 'run'])
    assert len(summary(tmp_path / 'run')) == 2
    assert last(tmp_path / 'run')['class_names'] == ['class_0', 'class_1', 'class_2']


@pytest.mark.parametrize(('flag', 'kept'), [('--persistent-workers', True), ('--no-persistent-workers', False)])
def test_workers_are_kept_between_epochs_or_started_in_each(tmp_path, flag, kept):
    data = write_images(tmp_path / 'images', train=4, validation=2)
    run = build(data, tmp_path, '--epochs', '2', '-j', '1', flag)
    loader = run.train_loader._loader
    workers = []
    for epoch in (0, 1):
        for number, _ in enumerate(run.train_loader.epoch(epoch)):
            if not number:
                workers.append({worker.pid for worker in run.train_loader._running._workers})
    run.close()
    assert (workers[0] == workers[1]) == kept == loader.persistent_workers


def test_entries_of_the_pretrained_configuration_are_replaced(tmp_path):
    data = write_images(tmp_path / 'images', train=4, validation=2)
    model = timm.create_model('test_resnet', num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    flags = ['--pretrained', '--pretrained-path', str(tmp_path / 'weights.pth')]
    for extra, same in (([], False), (['--pretrained-cfg-overlay', 'num_classes=3'], True)):
        run = build(data, tmp_path, *flags, *extra)
        run.close()
        found = run.state.task.get_trainable_module()
        assert torch.equal(found.conv1[0].weight, model.conv1[0].weight)
        assert torch.equal(found.fc.weight, model.fc.weight) == same, 'without the entry the classifier is new'


@pytest.mark.slow
def test_streams_have_workers_on_several_ranks_too(tmp_path):
    pytest.importorskip('webdataset')
    shards = write_shards(tmp_path / 'shards', lambda index: {'cls': str(index % 3).encode()})
    flags = [shards, '--dataset', 'wds/small', *SMALL, '-j', '1', '--output', tmp_path, '--experiment', 'run']
    process = call('train.py', *flags, processes=2)
    assert process.returncode == 0, process.stderr[-3000:]
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == ['0', '1']


def write_single(folder):
    """A table of one class per image, as competitions have it: names without folder and suffix."""
    rows = []
    for number in range(24):
        name = ('blue', 'red')[number % 2]
        pixels = np.full((32, 32, 3), 40, np.uint8)
        pixels[..., 2 if name == 'blue' else 0] = 200
        path = folder / 'images' / f'{number:03}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        rows.append(f'{number:03},{name}')
    (folder / 'labels.csv').write_text('\n'.join(['id,label', *rows]))
    return folder / 'labels.csv'


def test_a_table_of_one_class_per_image_trains_as_class_folders_do(tmp_path, capsys):
    table = write_single(tmp_path / 'photos')
    flags = [table, '--dataset', 'csv', '--path-column', 'id', '--label-column', 'label', '--val-fraction', '0.25']
    small = (
        '--device cpu --model test_resnet --img-size 32 -b 6 -j 0 --epochs 8 --warmup-epochs 0 --opt adamw --lr 3e-3'
    )
    train.main(
        [str(flag) for flag in (*flags, *small.split(), '--no-aug', '--output', tmp_path, '--experiment', 'run')]
    )
    rows = summary(tmp_path / 'run')
    assert float(rows[-1]['eval_top1']) == 100
    capsys.readouterr()
    validate.main([str(table), '--checkpoint', str(tmp_path / 'run' / 'last.pth.tar'), '--device', 'cpu', '-j', '0'])
    assert json.loads(capsys.readouterr().out.split('--result\n')[1])['top1'] == 100
    table.write_text(table.read_text().replace('003,red', '003,red;blue'))
    with pytest.raises(ValueError, match=r'1 of 24 images .* exactly one class, such as images/003.jpg .*multilabel'):
        build(table, tmp_path, *flags[1:], '--num-classes', '2')


def test_class_folders_are_trained_with_several_labels_too(tmp_path):
    data = write_images(tmp_path / 'data', train=4, validation=2, classes=3)
    flags = [data, *SMALL, '--task', 'multilabel', '--output', tmp_path, '--experiment', 'run']
    train.main([str(flag) for flag in flags])
    assert 0 < float(summary(tmp_path / 'run')[-1]['eval_map']) <= 100
