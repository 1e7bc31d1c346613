"""Files that commit 6c0c214 wrote, before the rooms of today: run folders are resumed, finished parts are refused.

`args_of_6c0c214.yaml` is the `args.yaml` of a run of that commit, whose checkpoints held the same values. The rest of a
checkpoint was that of today without the entries that are listed here. A run that commit stopped within and between
epochs was resumed by today's code to the losses that commit came to.
"""

import json
import shlex
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from runs import assert_same, last, summary, train

import timm_mldecoder
from timm_mldecoder.checkpoint.read import RUN
from timm_mldecoder.predict.__main__ import main as predict
from timm_mldecoder.probe.__main__ import main as probe
from train import main as train_main
from validate import main as validate

ARGS = Path(__file__).with_name('args_of_6c0c214.yaml')
SINCE = ('gradient_norm', 'model_config', 'train_data', 'held_out')
FLAGS = shlex.split("""
    --use-ml-decoder-head 1 --decoder-embedding 8 --num-of-groups 2 --ml-decoder-kwargs num_heads=2 dim_feedforward=8
    --epochs 2 --opt sgd --lr 0.01 --warmup-epochs 0 --model-ema --model-ema-decay 0.5 --no-model-ema-warmup --mixup 0.2
""")
SETUP = dict(
    weights='fc5814185df0d023', source='deac6bdba26071fe', classes=['class_0', 'class_1', 'class_2'], thresholds=None,
    preprocessing=[dict(input_size=[3, 32, 32], interpolation='bilinear', mean=[0.5] * 3, std=[0.5] * 3), 'RGB'],
    top_k=None, features='', amp=None, images=15, part_size=2, arrays=[],
)  # fmt: skip
CACHE = {
    'model': ['test_resnet', '[]'], 'precision': [False, False], 'weights': '0a19fe8b', 'transform': '([], None)',
    'data': '0d6d8fe5', '--dataset': '', '--input-key': None, '--target-key': None, '--target-format': 'indices',
    '--task': 'classification', '--voc-difficult': None, '--score-classes': 'all', '--data-dir': '/data',
    '--class-map': '', '--class-split': '', 'split': 'train', '--input-img-mode': 'RGB', '--num-classes': 3,
    'images': 24, 'tokens': [1, 96], 'views': 1, 'shard': 1024,
}  # fmt: skip


@pytest.fixture
def folder(data, tmp_path):
    """A run folder, stopped after its first epoch, as that commit wrote it."""
    folder = train(data, tmp_path, *FLAGS, '--stop-epoch', '1')
    args = yaml.safe_load(ARGS.read_text()) | dict(data=str(data), data_dir=str(data), output=str(tmp_path))
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    for path in folder.glob('*.pth.tar'):
        content = torch.load(path, weights_only=False)
        content['args'] = Namespace(**args)
        for name in SINCE:
            content[RUN].pop(name, None)
        path.unlink()  # a hard link
        torch.save(content, path)
    return folder


def test_a_run_folder_is_read_and_resumed(data, tmp_path, folder):
    validate([str(data), '--checkpoint', str(folder / 'last.pth.tar'), '--device', 'cpu', '-j', '0'])
    loaded = timm_mldecoder.load(folder)
    assert loaded.class_names == ['class_0', 'class_1', 'class_2'] and loaded.predict(next(data.rglob('*.png')))
    train_main(['--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto'])  # by its name, with its flags
    whole = train(data, tmp_path / 'whole', *FLAGS)
    assert summary(folder) == summary(whole)
    assert_same(*({**last(path), 'args': None} for path in (folder, whole)))


def test_parts_of_a_prediction_and_cached_features_are_refused_in_one_line(data, tmp_path, folder):
    (tmp_path / 'x.csv.parts').mkdir()
    (tmp_path / 'x.csv.parts' / 'setup.json').write_text(json.dumps(SETUP))
    flags = ['--checkpoint', str(folder / 'last.pth.tar'), '--device', 'cpu', '-j', '0', '--part-size', '2']
    with pytest.raises(ValueError, match='x.csv.parts holds parts of another prediction: remove it') as error:
        predict([str(data / 'validation'), *flags, '--out', str(tmp_path / 'x.csv')])
    assert '\n' not in str(error.value)
    (tmp_path / 'cache' / 'train').mkdir(parents=True)
    (tmp_path / 'cache' / 'train' / 'setup.json').write_text(json.dumps(CACHE))
    flags = '--model test_resnet --img-size 32 --device cpu -j 0 -b 8 --epochs 1 --heads linear --lrs 1e-2 --seeds 1'
    with pytest.raises(ValueError, match='changed since the features were written; remove the folder') as error:
        probe([str(data), *flags.split(), '--output', str(tmp_path), '--cache', str(tmp_path / 'cache')])
    assert '\n' not in str(error.value)
