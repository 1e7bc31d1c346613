"""Others' programs take ML-Decoder models unchanged: timm's scripts, Hugging Face transformers; and timm without one.

timm's scripts are not installed with timm. What they do with a model is done here, through the same functions.
"""

import json

import pytest
import timm
import torch
from timm.models import load_checkpoint, save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from timm.utils.onnx import onnx_export, onnx_forward
from torch import nn

from timm_mldecoder import MLDecoder

NAMES = ['test_resnet', 'test_vit', 'test_convnext']  # timm's smallest
CLASSES = 7

# Imports timm alone, reads --model-kwargs and builds the model as timm's train.py, validate.py and benchmark.py do.
SCRIPT = """
import argparse, json
import timm
from timm.utils import ParseKwargs

parser = argparse.ArgumentParser()
parser.add_argument('--model-kwargs', nargs='*', default={{}}, action=ParseKwargs)
for line in {lines!r}:
    args = parser.parse_args(line)
    try:
        model = timm.create_model(
            'test_resnet', pretrained=False, in_chans=3, num_classes=7, drop_rate=0.0, drop_path_rate=None,
            global_pool=None, scriptable=False, checkpoint_path='', **args.model_kwargs,
        )
        head = model.get_classifier()
        print(json.dumps([type(head).__name__, head.weight.shape[0]]))  # classes of a Linear, groups of an MLDecoder
    except ValueError as error:
        print(json.dumps(['ValueError', str(error)]))
"""


def test_model_kwargs_of_timms_scripts(python):
    cases = {
        (): ['Linear', CLASSES],
        ('--model-kwargs', 'ml_decoder=True'): ['MLDecoder', CLASSES],
        ('--model-kwargs', "ml_decoder={'num_of_groups': 3}"): ['MLDecoder', 3],
        ('--model-kwargs', 'ml_decoder=False'): ['Linear', CLASSES],
        ('--model-kwargs', 'ml_decoder=yes'): [
            'ValueError',
            "ml_decoder must be True, False or a dict of options, got 'yes'",
        ],
    }
    printed = python(SCRIPT.format(lines=[list(line) for line in cases])).stdout.splitlines()
    assert [json.loads(line) for line in printed] == list(cases.values())


@pytest.mark.parametrize('name', NAMES)
def test_train_then_validate(name, tmp_path):
    """The order of timm's train.py, then what its validate.py and inference.py load."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, ml_decoder=True)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.01, layer_decay=0.75)
    ema = ModelEmaV3(model, decay=0.5)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path))
    images, targets = torch.randn(4, 3, 160, 160), torch.arange(4)
    before = {name: value.clone() for name, value in model.get_classifier().named_parameters()}
    loss = nn.functional.cross_entropy(model(images), targets)
    loss.backward()
    optimizer.step()
    ema.update(model)
    saver.save_checkpoint(epoch=0, metric=1.0)
    for parameter, value in model.get_classifier().named_parameters():
        assert not torch.equal(before[parameter], value), f'{parameter} was not trained'

    path = str(tmp_path / 'last.pth.tar')
    for use_ema, trained in ((True, ema.module), (False, model)):
        validated = timm.create_model(name, num_classes=CLASSES, ml_decoder=True)
        load_checkpoint(validated, path, use_ema=use_ema)
        with torch.inference_mode():
            assert torch.equal(validated.eval()(images), trained.eval()(images))


@pytest.mark.parametrize('training', [False, True])
def test_benchmark(training):
    """timm's benchmark.py: parameter count, channels_last, mixed precision, with and without gradients."""
    model = timm.create_model('test_resnet', ml_decoder=True).to(memory_format=torch.channels_last).train(training)
    plain = timm.create_model('test_resnet')
    assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in plain.parameters())
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(training), torch.autocast('cpu', dtype=torch.bfloat16):
        logits = model(images)
    assert logits.shape == (2, model.num_classes)
    assert logits.isfinite().all()
    if training:
        logits.float().logsumexp(dim=1).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('use_dynamo', [False, True])
@pytest.mark.filterwarnings('ignore')  # the exporters warn about themselves
def test_onnx_export(use_dynamo, tmp_path):
    pytest.importorskip('onnxruntime')
    model = timm.create_model('test_resnet', num_classes=CLASSES, ml_decoder=True, exportable=True)
    path = str(tmp_path / 'model.onnx')
    onnx_export(model, path, batch_size=2, input_size=(3, 64, 64), use_dynamo=use_dynamo)
    images = torch.randn(5, 3, 64, 64)  # the batch stays free
    with torch.inference_mode():
        expected = model(images)
    torch.testing.assert_close(torch.from_numpy(onnx_forward(path, images)), expected, atol=1e-4, rtol=1e-4)


class TestTransformers:
    """The timm wrapper of Hugging Face transformers, from a local folder."""

    @pytest.fixture
    def folder(self, tmp_path):
        config = {
            'architecture': 'test_resnet',
            'num_classes': CLASSES,
            'model_args': {'ml_decoder': True},
            'label_names': [f'class {index}' for index in range(CLASSES)],
            'pretrained_cfg': {'input_size': [3, 64, 64], 'num_classes': CLASSES},
        }
        (tmp_path / 'config.json').write_text(json.dumps(config))
        return tmp_path

    def test_forward_save_reload(self, folder):
        transformers = pytest.importorskip('transformers')
        images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForImageClassification.from_config(config).eval()
        assert isinstance(model.timm_model.get_classifier(), MLDecoder)
        assert model.config.id2label[3] == 'class 3'

        output = model(pixel_values=images, labels=labels, output_hidden_states=True)
        assert output.logits.shape == (2, CLASSES)
        assert torch.equal(output.logits, model.timm_model(images))
        output.loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

        model.save_pretrained(folder / 'saved')
        again, info = transformers.AutoModelForImageClassification.from_pretrained(
            folder / 'saved', output_loading_info=True
        )
        assert not any(info.values()), info
        assert torch.equal(again.eval()(pixel_values=images).logits, output.logits)

    def test_folder_written_by_timm(self, tmp_path):
        """num_classes goes to the top level: transformers refuses it twice, of any timm model."""
        transformers = pytest.importorskip('transformers')
        model = timm.create_model('test_resnet', ml_decoder=dict(num_of_groups=5))
        model.reset_classifier(CLASSES)
        save_for_hf(model, tmp_path, safe_serialization=True)
        config = json.loads((tmp_path / 'config.json').read_text())
        del config['model_args']['num_classes']
        (tmp_path / 'config.json').write_text(json.dumps(config))
        wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(wrapped.eval()(pixel_values=images).logits, model.eval()(images))


# What timm does without an ML-Decoder: build, train, save, load, cut features out. Prints a digest of every result.
PLAIN = """
import hashlib, io, tempfile
import torch, timm

def digest(tensors):
    return hashlib.sha256(b''.join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()

for name in ('test_resnet', 'test_vit'):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, drop_rate=0.1)
    images = torch.randn(2, 3, 160, 160)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(images).square().mean().backward()
        optimizer.step()
    print(name, type(model), model._model_args, model.pretrained_cfg)
    print(digest(model.state_dict().values()), digest([model.eval()(images)]))
    with tempfile.TemporaryDirectory() as folder:
        timm.models.save_for_hf(model, folder)
        print(open(folder + '/config.json').read())
        for classes in (7, 3):
            again = timm.create_model('local-dir:' + folder, pretrained=True, num_classes=classes)
            print(type(again), digest(again.state_dict().values()))
    features = timm.create_model(name, features_only=True)
    print(type(features), digest(features(images)))
"""


def test_timm_without_a_head_gives_the_same_results(python):
    off = python(PLAIN, TIMM_MLDECODER_AUTOLOAD='0').stdout
    assert 'test_resnet' in off and 'MLDecoder' not in off
    for activation in ('', 'import timm_mldecoder; timm_mldecoder.plugin.activate()\n'):
        assert python(activation + PLAIN).stdout == off
