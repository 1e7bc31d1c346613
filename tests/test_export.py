"""Exported files: the logits of PyTorch for any batch size, and what the file says about itself."""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_folders import write_images
from marks import few
from PIL import Image
from runs import ROOT, environment
from test_head_inference import computed_constants

from timm_mldecoder import load
from timm_mldecoder.checkpoint.folders import save_folder
from timm_mldecoder.export import formats
from timm_mldecoder.export.__main__ import load_source, read_metadata
from timm_mldecoder.export.__main__ import main as export
from timm_mldecoder.export.compare import Images, compare
from timm_mldecoder.export.formats import FORMATS, Job, Network, _program
from timm_mldecoder.export.onnx_images import check_images, prepare_images
from timm_mldecoder.models.cosine import add_cosine_classifier
from timm_mldecoder.runtime.errors import RunFailed
from train import main as train
from validate import main as validate

NAMES = ['cat', 'dog', 'zebra', 'owl', 'bee', 'ant', 'fox']
SIZE = {'input_size': (3, 64, 64)}
SMALL = dict(decoder_embedding=32, num_heads=4, dim_feedforward=64)
WORDS = dict(word_embeddings=torch.randn(7, 12, generator=torch.Generator().manual_seed(0)), class_names=NAMES)
SWIN = dict(img_size=64, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 4))
FAMILIES = {
    'resnet': ('test_resnet', {}),
    'vit': ('test_vit', {'img_size': 64}),
    'convnext': ('test_convnext', {}),
    'efficientnet': ('test_efficientnet', {}),
    'swin': ('swin_tiny_patch4_window7_224', SWIN),
}
HEADS = {
    'pooling': None,
    'fixed': {},
    'learned': dict(learnable_queries=True, num_layers=2),
    'grouped': dict(num_of_groups=3),
    'cosine-head': dict(classifier='cosine', cosine_scale=4.0),
    'text': WORDS,
    'text-grouped': dict(**WORDS, group_size=2),
    'text-learned': dict(**WORDS, group_size=3, classifier='learned', learnable_queries=True),
    'text-shared-groups': dict(**WORDS, group_size=3, classifier='shared'),
}
FAST = {('resnet', 'fixed'), ('vit', 'text-grouped')}
CASES = [(family, 'fixed') for family in FAMILIES] + [('vit', head) for head in HEADS if head != 'fixed']
CASES += [('swin', 'pooling'), ('resnet', 'cosine')]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def create(family='resnet', head='fixed'):
    name, settings = FAMILIES[family]
    options = HEADS.get(head)
    model = timm.create_model(
        name, num_classes=7, **settings, **({} if options is None else {'ml_decoder': {**SMALL, **options}})
    )
    if head == 'cosine':
        add_cosine_classifier(model, 5.0)
    for parameter in model.parameters():  # some classifiers start from zeros, which hide any mistake
        torch.nn.init.normal_(parameter, std=0.1) if not parameter.any() else None
    return model.eval()


def save(model, folder='folder', **settings):
    save_folder(model, folder, class_names=NAMES, data_config=SIZE, **settings)
    return model


def images(count):
    return torch.rand(count, 3, 64, 64)


def run(path, batch):
    """The logits of a file, as its users run it."""
    if path.endswith('.onnx'):
        onnxruntime = pytest.importorskip('onnxruntime')
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        return torch.from_numpy(session.run(['logits'], {'images': batch.numpy()})[0])
    return torch.export.load(path).module()(batch)


@torch.no_grad()
def assert_same_logits(path, model, tolerance=1e-4):
    for size in (1, 7):
        batch = images(size)
        assert (run(path, batch) - model(batch)).abs().max() <= tolerance


@pytest.mark.parametrize(
    'family, head', [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]
)
def test_onnx_files_have_the_logits_of_every_family_and_head(family, head):
    pytest.importorskip('onnxruntime')
    model = create(family, head)
    metadata = dict(architecture=family, task='classification', class_names=NAMES, thresholds=None, precision='float32')
    job = Job(model, {**metadata, 'preprocessing': {'input_size': [3, 64, 64]}})
    FORMATS['onnx'].write(Path('model.onnx'), job)
    assert_same_logits('model.onnx', model)
    assert read_metadata('model.onnx') == job.metadata


@torch.no_grad()
@pytest.mark.parametrize('head', HEADS)
def test_folded_models_have_the_logits_of_the_model_and_no_label_embeddings(head):
    model, batch = create(head=head), images(3)
    expected = model(batch)
    network = Network(model)
    torch.testing.assert_close(network(batch), expected, rtol=1e-5, atol=1e-5)
    assert not [name for name in network.state_dict() if 'vocabulary' in name]
    assert torch.equal(model(batch), expected), 'the model itself is as it was'


@pytest.mark.parametrize(('head', 'precision'), [('fixed', 'float32'), ('text-grouped', 'bfloat16')])
def test_an_exported_model_computes_nothing_on_queries_before_attention(head, precision):
    metadata = dict(precision=precision, preprocessing={'input_size': [3, 64, 64]})
    program = _program(Job(create(head=head), metadata)).run_decompositions()
    assert computed_constants(program) <= {'aten.mul.Scalar', 'aten.clone.default'}, 'the scale of the attention'


def test_text_queries_whose_classes_changed_are_folded_with_the_new_ones():
    model = create(head='text-grouped')
    model.get_classifier().set_word_embeddings(torch.randn(4, 12), NAMES[:4])
    with torch.no_grad():
        batch = images(2)
        torch.testing.assert_close(Network(model)(batch), model(batch), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_becomes_a_torch_export_file_with_classes_thresholds_and_preprocessing(capsys):
    names = ['class_0', 'class_1', 'class_2']
    write_images(Path('data'), train=8, validation=5)
    for split in ('train', 'validation'):
        files = sorted(Path('data', split).rglob('*.png'))
        rows = [f'{file.relative_to("data")},{file.parent.name}' for file in files]
        Path(f'data/{split}.csv').write_text('\n'.join(['path,labels', *rows]) + '\n')
    train(
        shlex.split("""data --dataset csv --task multilabel --model test_resnet --num-classes 3 --img-size 32 -j 0
        -b 8 --device cpu --epochs 1 --warmup-epochs 0 --crop-pct 0.8 --model-ema --output out --experiment run""")
    )
    checkpoint = 'out/run/last.pth.tar'
    validate(shlex.split(f'data --dataset csv --device cpu -j 0 --checkpoint {checkpoint} --write-thresholds'))
    capsys.readouterr()
    export([checkpoint, 'model.pt2', '--format', 'torch-export', '--images', 'data/validation', '--no-use-ema'])
    assert 'class_0, class_1, class_2' in capsys.readouterr().out
    metadata = read_metadata('model.pt2')
    assert metadata['task'] == 'multilabel' and metadata['class_names'] == names
    assert metadata['thresholds'] == torch.load(checkpoint, weights_only=False)['thresholds']
    assert metadata['preprocessing']['input_size'] == [3, 32, 32] and metadata['preprocessing']['crop_pct'] == 0.8
    raw, batch = load_source(checkpoint, use_ema=False).model, torch.rand(7, 3, 32, 32)
    with torch.no_grad():
        assert (run('model.pt2', batch) - raw(batch)).abs().max() <= 1e-4
        assert (run('model.pt2', batch[:1]) - raw(batch[:1])).abs().max() <= 1e-4


def test_a_folder_becomes_a_file_in_half_precision_and_a_folder_again():
    model = save(create(), task='multilabel', thresholds=dict.fromkeys(NAMES, 0.25))
    export(['folder', 'half.pt2', '--format', 'torch-export', '--half'])
    assert_same_logits('half.pt2', model, 2e-2)
    export(['local-dir:folder', 'copy', '--format', 'safetensors', '--half'])
    export(['folder', 'again', '--format', 'safetensors'])
    expected = read_metadata('folder')
    assert expected['thresholds'] == dict.fromkeys(NAMES, 0.25) and expected['precision'] == 'float32'
    assert read_metadata('again') == expected
    assert read_metadata('half.pt2') == read_metadata('copy') == {**expected, 'precision': 'float16'}


@pytest.mark.parametrize(
    'out, form',
    [pytest.param('m.onnx', 'onnx', marks=pytest.mark.slow), ('m.pt2', 'torch-export'), ('copy', 'safetensors')],
)
def test_hostile_class_names_are_read_back_and_stay_text(out, form):
    if form == 'onnx':
        pytest.importorskip('onnxruntime')
    names = ['=1+1', '../../up', '/etc/x', '<script>alert(1)</script>', 'line\n---\nbreak', '@a, "b"', 'é']
    model = create(head='pooling')
    save_folder(
        model, 'folder', class_names=names, data_config=SIZE, task='multilabel', thresholds=dict.fromkeys(names, 0.3)
    )
    export(['folder', out, '--format', form])
    metadata = read_metadata(out)
    assert metadata['class_names'] == names and metadata['thresholds'] == dict.fromkeys(names, 0.3)
    assert sorted(path.name for path in Path().iterdir()) == sorted(['folder', out])
    if form == 'safetensors':
        card = Path('copy/README.md').read_text()
        assert '<script>' not in card and card.count('\n---\n') == 1 and 'line --- break' in card


def test_a_fixed_batch_size_is_the_only_one():
    save(create(head='pooling'))
    export(['folder', 'model.pt2', '--format', 'torch-export', '--batch-size', '2'])
    assert run('model.pt2', images(2)).shape == (2, 7)
    with pytest.raises((AssertionError, RuntimeError), match='size'):
        run('model.pt2', images(3))


@pytest.mark.slow
def test_onnx_files_beyond_the_limit_of_protobuf_have_their_weights_in_a_second_file(monkeypatch):
    pytest.importorskip('onnxruntime')
    monkeypatch.setattr(formats, 'LARGEST_PROTOBUF', 0)
    model = save(create())
    export(['folder', 'model.onnx', '--format', 'onnx'])
    assert Path('model.onnx.data').stat().st_size > Path('model.onnx').stat().st_size
    assert_same_logits('model.onnx', model)
    with pytest.raises(ValueError, match='model.onnx'):
        export(['folder', 'model.onnx', '--format', 'onnx'])


@pytest.mark.slow
def test_aot_files_run_compiled(capsys):
    model = save(create())
    export(['folder', 'model.pt2', '--format', 'aot'])
    compiled = torch._inductor.aoti_load_package('model.pt2')
    for size in (1, 7):
        batch = images(size)
        with torch.no_grad():
            assert (compiled(batch) - model(batch)).abs().max() <= 1e-4
    assert read_metadata('model.pt2') == read_metadata('folder')


@pytest.mark.slow
@pytest.mark.parametrize('calibration', [True, False])
def test_int8_files_report_labels_accuracy_and_speed_beside_float32(calibration, capsys):
    pytest.importorskip('onnxruntime')
    write_images(Path('data'), train=40, validation=10)
    model = 'test_resnet' if calibration else 'test_vit --model-kwargs img_size=48'
    train(
        shlex.split(f"""data --model {model} --num-classes 3 --img-size 48 -j 0 -b 20
        --device cpu --epochs 12 --opt adamw --lr 2e-3 --warmup-epochs 0 --output out --experiment run
        --use-ml-decoder-head 1 --decoder-embedding 32 --ml-decoder-kwargs num_heads=4""")
    )
    capsys.readouterr()
    flags = ['--calibration', 'data/train'] if calibration else []
    out = ['int8.onnx', '--format', 'onnx', '--quantize', 'int8', '--images', 'data/validation']
    export(['out/run/model_best.pth.tar', *out, *flags])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for precision in ('float32', 'int8'):
        assert lines[precision].count('ms per image') == 2 and 'top-1' in lines[precision]
    assert float(lines['agreement'].split()[1]) >= 90
    assert read_metadata('int8.onnx')['precision'] == 'int8'
    for size in (1, 7):
        batch = torch.rand(size, 3, 48, 48)
        assert run('int8.onnx', batch).shape == (size, 3) and np.isfinite(run('int8.onnx', batch)).all()


def test_a_file_that_differs_is_not_written():
    save(create())
    with pytest.raises(RunFailed, match='--tolerance'):
        export(['folder', 'copy', '--format', 'safetensors', '--half', '--tolerance', '1e-9'])
    assert [path.name for path in Path().iterdir()] == ['folder']


def test_quantized_models_that_give_other_labels_are_refused():
    metadata = {'task': 'classification', 'class_names': NAMES, 'thresholds': None}
    models = {'float32': lambda batch: batch, 'int8': lambda batch: -batch}
    some = Images(torch.eye(7), torch.arange(7))
    with pytest.raises(RunFailed, match='--min-agreement'):
        compare(models, some, metadata, min_agreement=0.5)
    agreement, *rows = compare(models, some, metadata)
    assert [row.split()[0] for row in rows] == list(models)
    assert '100.00 %' in rows[0] and ' 0.00 %' in rows[1] and ' 0.00 %' in agreement


@pytest.mark.parametrize('flags, message', [
    ('missing m.onnx --format onnx', 'missing'),
    ('folder m.pt --format onnx', '.onnx'),
    ('folder taken.pt2 --format torch-export', 'taken.pt2'),
    ('folder no/m.pt2 --format torch-export', 'no'),
    ('folder m.pt2 --format torch-export --use-ema', '--use-ema'),
    ('folder m.pt2 --format torch-export --opset 20', '--opset'),
    ('folder m.pt2 --format aot --quantize int8', '--quantize'),
    ('folder m.onnx --format onnx --calibration images', '--calibration'),
    ('folder m.onnx --format onnx --quantize int8 --half', '--half'),
    ('folder m.onnx --format onnx --device cuda', '--device'),
    ('folder m.pt2 --format aot --device zzz', '--device zzz'),
    ('folder m.pt2 --format torch-export --images none', 'none'),
    ('text.txt m.pt2 --format torch-export', 'text.txt'),
])  # fmt: skip
def test_mistakes_are_named_and_leave_nothing_behind(flags, message):
    save(create(head='pooling'))
    Path('taken.pt2').write_text('mine')
    Path('text.txt').write_text('no checkpoint')
    before = sorted(Path().iterdir())
    with pytest.raises(ValueError, match=message):
        export(flags.split())
    assert sorted(Path().iterdir()) == before and Path('taken.pt2').read_text() == 'mine'


def test_the_exit_codes_are_those_of_the_scripts():
    save(create(head='pooling'))
    command = [sys.executable, '-m', 'timm_mldecoder.export', 'folder', 'out', '--format']
    for code, flags in ((2, ['onnx']), (1, ['safetensors', '--half', '--tolerance', '0'])):
        process = subprocess.run([*command, *flags], env=environment(), capture_output=True, text=True, timeout=300)
        assert process.returncode == code and 'Traceback' not in process.stderr
        assert process.stderr.splitlines()[-1].startswith('export.py: error: ')
    assert [path.name for path in Path().iterdir()] == ['folder']


@pytest.mark.parametrize('name', ['broken.onnx', 'broken.pt2', 'folder'])
def test_files_of_others_have_no_metadata(name):
    Path('folder').mkdir()
    if name != 'folder':
        Path(name).write_text('no model')
    with pytest.raises(ValueError, match=name):
        read_metadata(name)


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('size, crop_pct', few([((64, 48), 0.9), ((64, 64), 0.875), ((48, 64), 1.0)], 1))
def test_an_onnx_file_prepares_images_as_timm_does(crop_mode, interpolation, size, crop_pct):
    onnxruntime = pytest.importorskip('onnxruntime')
    config = dict(input_size=[3, *size], interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode)
    config |= dict(mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
    metadata = dict(task='classification', preprocessing=config)
    write_identity(Path('pixels.onnx'), size)
    prepare_images(Path('pixels.onnx'), metadata)
    session = onnxruntime.InferenceSession('pixels.onnx')
    transform = timm.data.create_transform(**config, is_training=False)
    random = np.random.default_rng(0)
    for height, width in ((90, 160), (33, 47), (64, 64), (201, 77), (10, 300)):
        small = Image.fromarray(random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
        image = small.resize((width, height), Image.BICUBIC)
        found = session.run(['logits'], {'pixels': np.asarray(image)[None]})[0][0]
        levels = (found - transform(image).numpy()) * np.reshape(config['std'], (3, 1, 1)) * 255
        assert np.abs(levels).max() <= 2.01 and np.abs(levels).mean() < 0.3  # of 255, from rounding


def write_identity(path, size):
    """A file whose logits are the prepared images."""
    onnx = importlib.import_module('onnx')
    helper, shape = onnx.helper, ['batch', 3, *size]
    images, logits = (helper.make_tensor_value_info(name, 1, shape) for name in ('images', 'logits'))
    graph = helper.make_graph([helper.make_node('Identity', ['images'], ['logits'])], 'g', [images], [logits])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9), path)


@pytest.mark.parametrize('task', few(['multilabel', 'classification'], 1))
def test_the_program_of_the_page_labels_images_as_predict_does(task, capsys):
    pytest.importorskip('onnxruntime')
    save(create(), task=task, thresholds=dict.fromkeys(NAMES, 0.4) if task == 'multilabel' else None)
    write_images(Path('data'), train=1, validation=1)
    image = next(Path('data').rglob('*.png'))
    shutil.copy(image, 'image.png')
    export(['folder', 'pixels.onnx', '--format', 'onnx', '--with-preprocessing', '--images', 'data'])
    assert 'between scores of pixels' in capsys.readouterr().out
    assert read_metadata('pixels.onnx')['class_names'] == NAMES
    page = (ROOT / 'docs/export.md').read_text()
    program = next(code for code in re.findall(r'^```python\n(.*?)^```', page, re.M | re.S) if 'label(path)' in code)
    Path('label.py').write_text('import sys\nsys.modules["torch"] = sys.modules["timm"] = None\n' + program)
    done = subprocess.run([sys.executable, 'label.py'], capture_output=True, text=True, check=True)
    found = ast.literal_eval(done.stdout)
    (labels,) = load('folder').predict('image.png')
    assert [name for name, _ in found] == [label.name for label in labels]
    assert [score for _, score in found] == pytest.approx([label.score for label in labels], abs=1 / 255)
    assert found


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--format torch-export', '--with-preprocessing is for --format onnx'),
        ('--format onnx --quantize int8', 'exclude each other'),
        ('--format onnx --batch-size 4', 'leave --batch-size out'),
    ],
)
def test_preparation_of_images_where_it_cannot_be_is_refused(flags, message):
    pytest.importorskip('onnxruntime')
    save(create())
    with pytest.raises(ValueError, match=message):
        export(['folder', 'x.onnx', '--with-preprocessing', *flags.split()])


@pytest.mark.parametrize(
    'change', [dict(input_size=[1, 8, 8]), dict(interpolation='nearest'), dict(crop_pct=1.2)], ids=str
)
def test_images_that_a_graph_cannot_prepare_are_refused(change):
    config = dict(input_size=[3, 8, 8], interpolation='bicubic', crop_pct=1.0) | change
    with pytest.raises(ValueError, match='--with-preprocessing'):
        check_images(config)


@pytest.mark.parametrize('features', ['pooled', 'queries'])
@pytest.mark.parametrize('pixels', few([True, False], 1))
def test_an_onnx_file_with_features(features, pixels):
    onnxruntime = pytest.importorskip('onnxruntime')
    model, flags = save(create('vit', 'text-grouped'), task='multilabel'), ['--with-preprocessing'] * pixels
    export(['folder', 'model.onnx', '--format', 'onnx', '--features', features, *flags])
    session = onnxruntime.InferenceSession('model.onnx')
    if pixels:
        given, batch = {'pixels': np.zeros((1, 64, 64, 3), np.uint8)}, -torch.ones(1, 3, 64, 64)  # mean and std 0.5
    else:
        batch = images(3)
        given = {'images': batch.numpy()}
    logits, found = map(torch.from_numpy, session.run(['logits', 'features'], given))
    with torch.no_grad():
        maps = model.forward_features(batch)
        tokens = model._image_tokens(model._pre_logits(maps))
        head = model.get_classifier()
        expected = model.forward_head(maps, pre_logits=True) if features == 'pooled' else head.decode(tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, model(batch), rtol=1e-4, atol=1e-4)


def test_features_that_a_model_does_not_have_are_refused():
    pytest.importorskip('onnxruntime')
    save(create(head='pooling'))
    with pytest.raises(ValueError, match='--features queries needs an ML-Decoder head'):
        export(['folder', 'model.onnx', '--format', 'onnx', '--features', 'queries'])
