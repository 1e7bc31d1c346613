"""`--tf-preprocessing`: what is timm's part is TensorFlow's, of which a stand-in of the same interface is used here."""

import importlib.machinery
import importlib.util
import io
import json
import sys
import types

import numpy as np
import pytest
from image_folders import write_images
from PIL import Image
from runs import summary, train

import validate
from timm_mldecoder.flags import parse_validate


class Transform:
    """Of the bytes of an image file, its pixels [C, H, W]."""

    def __init__(self, is_training, size, interpolation):
        assert not is_training
        self.size = size

    def __call__(self, file):
        assert isinstance(file, bytes)
        image = Image.open(io.BytesIO(file)).convert('RGB').resize((self.size[1], self.size[0]))
        return np.rollaxis(np.array(image), 2)


@pytest.fixture
def tensorflow(monkeypatch):
    package = types.ModuleType('tensorflow')
    package.__spec__ = importlib.machinery.ModuleSpec('tensorflow', None)
    module = types.ModuleType('timm.data.tf_preprocessing')
    module.TfPreprocessTransform = Transform
    monkeypatch.setitem(sys.modules, 'tensorflow', package)
    monkeypatch.setitem(sys.modules, 'timm.data.tf_preprocessing', module)


def test_files_reach_the_transform_of_tensorflow_whole(tensorflow, tmp_path, capsys):
    data = write_images(tmp_path / 'data', train=4, validation=3, size=32)  # of the size of the model: nothing resizes
    folder = train(data, tmp_path, '--epochs', '1', '--crop-pct', '1')
    bad = next((data / 'validation' / 'class_1').iterdir())

    def score(*flags):
        capsys.readouterr()
        checkpoint = str(folder / 'last.pth.tar')
        flags = ['-j', '0', '--device', 'cpu', '--checkpoint', checkpoint, '--tf-preprocessing', *flags]
        validate.main([str(data), *flags])
        return json.loads(capsys.readouterr().out.split('--result\n')[1])

    assert score()['top1'] == pytest.approx(float(summary(folder)[-1]['eval_top1']), abs=1e-4)
    bad.write_bytes(b'')
    assert score('--bad-image', 'skip')['bad_images'] == 1


def test_without_tensorflow_it_is_one_line(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'tensorflow' else found(name))
    with pytest.raises(ValueError, match='--tf-preprocessing .*tensorflow') as error:
        parse_validate(['DIR', '--tf-preprocessing'])
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'flags', ['--no-prefetcher', '--dataset torch/cifar10', '--dataset wds/x', '--tta 5', '--input-size 3 32 64']
)
def test_what_it_does_not_work_with_is_refused_by_name(tensorflow, flags):
    with pytest.raises(ValueError, match=f'--tf-preprocessing .*{flags.split()[0]}'):
        parse_validate(['DIR', '--tf-preprocessing', *flags.split()])
