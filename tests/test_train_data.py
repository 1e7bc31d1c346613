"""Data as users have it, through train.py and validate.py: WebDataset shards and Hugging Face data sets on disk."""

import io
import json
import shlex
import tarfile

import numpy as np
import pytest
from image_folders import write_images
from PIL import Image
from runs import last, summary

import train
import validate

SMALL = shlex.split(
    '--num-classes 3 --device cpu --model test_resnet --img-size 32 -b 6 -j 0 --epochs 2 '
    '--warmup-epochs 0 --opt adamw --lr 2e-3'
)


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
                Image.fromarray(random.randint(0, 256, (40, 40, 3)).astype(np.uint8)).save(pixels, 'JPEG')
                for extension, content in {'jpg': pixels.getvalue(), **labels(index)}.items():
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


def test_webdataset_shards_train_resume_and_score(tmp_path, capsys):
    pytest.importorskip('webdataset')
    shards = write_shards(tmp_path / 'shards', lambda index: {'cls': str(index % 3).encode()})
    run = [str(shards), '--dataset', 'wds/small', *SMALL, '-j', '1', '--output', str(tmp_path)]
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


@pytest.mark.parametrize(
    ('flags', 'labels'),
    [
        (['--target-key', 'tags'], lambda index: {'tags': [index % 3, (index + 1) % 3]}),
        (['--target-key', 'tags', '--target-format', 'multihot'], lambda index: {'tags': [1, int(index % 3 == 1), 0]}),
        (['--target-key', 'cat,dog,car'], lambda index: {'cat': index % 2, 'dog': 1, 'car': 0}),
    ],
)
def test_multi_label_targets_of_records(tmp_path, flags, labels):
    """Indices, values a class, and one field a class."""
    pytest.importorskip('webdataset')
    shards = write_shards(tmp_path / 'shards', lambda index: {'json': json.dumps(labels(index)).encode()})
    train.main(
        [
            str(shards),
            *shlex.split('--dataset wds/small --task multilabel'),
            *flags,
            *SMALL,
            *shlex.split('--epochs 1 --output'),
            str(tmp_path),
            '--experiment',
            'run',
        ]
    )
    (row,) = summary(tmp_path / 'run')
    assert 0 < float(row['eval_map']) <= 100


def test_hugging_face_data_on_disk(tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    images = write_images(tmp_path / 'images', train=8, validation=4)
    train.main(
        [
            '--data-dir',
            str(tmp_path / 'cache'),
            '--dataset',
            f'hfds/{images}',
            *SMALL,
            *shlex.split('--input-key image --target-key label --output'),
            str(tmp_path),
            '--experiment',
            'run',
        ]
    )
    assert len(summary(tmp_path / 'run')) == 2
    assert last(tmp_path / 'run')['class_names'] == ['class_0', 'class_1', 'class_2']
