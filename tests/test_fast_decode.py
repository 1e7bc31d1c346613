"""`--decode fast`: JPEG files decoded smaller have the same labels and draws, close pixels, and the same faults."""

import numpy as np
import pytest
import torch
from PIL import Image

from timm_mldecoder.flags import train_options
from timm_mldecoder.loading.create_loaders import set_eval_transform, set_train_transform
from timm_mldecoder.loading.datasets import create_split
from timm_mldecoder.loading.randomness import seed_cpu

SIZE = 64
CONFIG = dict(input_size=(3, SIZE, SIZE), interpolation='bicubic', mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875)
FILES = ('large.jpg', 'small.jpg', 'large.png', 'grey.jpg')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('photographs')
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    for split in ('train', 'validation'):
        for number, name in enumerate(FILES):
            path = root / split / f'class{number % 2}' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            size = (50, 40) if name == 'small.jpg' else (800, 600)
            image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            image.convert('L' if name == 'grey.jpg' else 'RGB').save(path, **{'quality': 95} if 'jpg' in name else {})
    return root


def samples(folder, decode, training, **flags):
    """Each sample of a split by its file, drawn alike."""
    options = train_options(data_dir=str(folder), device='cpu', decode=decode, no_prefetcher=False, **flags)
    dataset = create_split(options, 'train' if training else 'validation', training=training)
    if training:
        dataset, _ = set_train_transform(options, dataset, CONFIG)
    else:
        set_eval_transform(options, dataset, CONFIG)
    found = {}
    for index in range(len(dataset)):
        seed_cpu(index)
        found[dataset.filename(index, basename=True)] = dataset[index]
    return found


@pytest.fixture
def decoded(monkeypatch):
    """The sizes at which JPEG files are decoded."""
    sizes, load = [], Image.Image.load
    monkeypatch.setattr(Image.Image, 'load', lambda image: sizes.append(image.size) or load(image))
    return sizes


@pytest.mark.parametrize('crop_mode', ['rrc', 'squash', 'rkrr'])
@pytest.mark.parametrize('training', [True, False])
def test_labels_are_equal_and_pixels_close(crop_mode, training, folder, decoded):
    flags = dict(train_crop_mode=crop_mode, scale=[0.5, 1.0])
    exact = samples(folder, 'exact', training, **flags)
    decoded.clear()
    fast = samples(folder, 'fast', training, **flags)
    assert ((200, 150) in decoded or (100, 75) in decoded) == (not training or crop_mode != 'rkrr')
    assert exact.keys() == fast.keys() == set(FILES)
    for name, (image, target) in exact.items():
        other, label = fast[name]
        assert label == target
        difference = (torch.as_tensor(image).float() - torch.as_tensor(other).float()).abs().mean()
        if name == 'large.jpg':
            assert difference < 3, (name, difference)
        else:
            assert difference == 0, (name, difference)  # nothing to leave out, or decoded as before


def test_files_that_exif_turns_are_decoded_whole_and_the_others_small(folder, tmp_path, decoded):
    """The recipes for own images have `--exif-rotate`."""
    for name, orientation in dict(upright=1, turned=6).items():
        exif = Image.Exif()
        exif[274] = orientation
        for split in ('train', 'validation'):
            (tmp_path / split / 'class0').mkdir(parents=True, exist_ok=True)
            with Image.open(folder / 'train' / 'class0' / 'large.jpg') as image:
                image.save(tmp_path / split / 'class0' / f'{name}.jpg', exif=exif)
    flags = dict(training=True, train_crop_mode='squash', exif_rotate=True)
    exact = samples(tmp_path, 'exact', **flags)
    decoded.clear()
    fast = samples(tmp_path, 'fast', **flags)
    assert {(800, 600), (100, 75)} <= {*decoded}
    difference = {name: (exact[name][0].float() - fast[name][0].float()).abs().mean() for name in exact}
    assert difference['turned.jpg'] == 0 < difference['upright.jpg'] < 3


@pytest.mark.parametrize('training', [True, False])
def test_a_truncated_file_is_an_error_as_before(training, folder, tmp_path):
    for split in ('train', 'validation'):
        (tmp_path / split / 'class0').mkdir(parents=True)
        content = (folder / 'train' / 'class0' / 'large.jpg').read_bytes()
        (tmp_path / split / 'class0' / 'cut.jpg').write_bytes(content[: len(content) // 3])
    messages = []
    for decode in ('exact', 'fast'):
        with pytest.raises(OSError) as error:
            samples(tmp_path, decode, training)
        messages.append(str(error.value))
    assert messages[0].split('(')[0] == messages[1].split('(')[0]  # then the bytes that are missing
