"""A checkpoint of train.py as a folder: the scores, labels and preprocessing of the checkpoint, for timm and others."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch
from image_folders import write_images
from marks import few
from PIL import Image
from timm.data import resolve_model_data_config

from benchmarks import shapes
from timm_mldecoder.checkpoint import folders
from timm_mldecoder.checkpoint.folders import folder_settings, save_folder
from timm_mldecoder.convert import main as convert
from timm_mldecoder.flags import parse_train
from timm_mldecoder.modeling.load import load
from timm_mldecoder.predict.__main__ import main as predict
from timm_mldecoder.probe.__main__ import main as probe
from train import main as train
from validate import main as validate

RUN = shlex.split('-j 0 -b 8 --device cpu --epochs 1 --warmup-epochs 0 --lr 0.05 --output out --experiment run')
SINGLE = shlex.split('data --model test_resnet --num-classes 3 --img-size 32')
MULTILABEL = shlex.split('data --dataset csv --task multilabel --model test_resnet --img-size 48 --num-classes 75')
HEAD = '--use-ml-decoder-head 1 --decoder-embedding 32 --ml-decoder-kwargs num_heads=4 dim_feedforward=64'
CHECKPOINT = 'out/run/last.pth.tar'


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def scores(capsys, *flags):
    """The metrics of validate.py."""
    capsys.readouterr()
    validate(['data', '-j', '0', '-b', '5', '--device', 'cpu', *flags])
    result = json.loads(capsys.readouterr().out.partition('--result')[2])
    return {name: value for name, value in result.items() if name not in ('model', 'checkpoint')}


def check_folder(capsys, *flags):
    """The folder of the checkpoint has its logits, its scores, and its settings; also for transformers."""
    convert([CHECKPOINT, 'folder'])
    trained = load(CHECKPOINT)
    model = timm.create_model('local-dir:folder', pretrained=True).eval()
    config = resolve_model_data_config(model)
    assert config.keys() == trained.data_config.keys()
    for name, value in config.items():
        value = tuple(value) if isinstance(value, list) else value  # as JSON gives it back
        assert value == trained.data_config[name], name
    assert model.pretrained_cfg['label_names'] == trained.class_names
    claims = json.loads(Path('folder/config.json').read_text())['pretrained_cfg']
    assert not claims.get('license') and not claims.get('tag') and not claims.get('paper_ids'), 'of weights of timm'
    assert '## Start weights\n\nrandom\n' in Path('folder/README.md').read_text()
    images = torch.randn(2, *config['input_size'])
    with torch.no_grad():
        assert torch.equal(model(images), trained.model(images))
    expected = scores(capsys, '--checkpoint', CHECKPOINT, *flags)
    assert expected == scores(capsys, '--model', 'local-dir:folder', '--pretrained', *flags)
    return model


def check_transformers(model):
    """Transformers loads the folder unchanged: the same tensors, labels and logits."""
    transformers = pytest.importorskip('transformers')
    loaded = transformers.TimmWrapperForImageClassification.from_pretrained('folder').eval()
    assert list(loaded.config.id2label.values()) == model.pretrained_cfg['label_names']
    state = loaded.timm_model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    images = torch.randn(2, *model.pretrained_cfg['input_size'])
    with torch.no_grad():  # the same tensors at other addresses are summed in another order
        torch.testing.assert_close(loaded(images).logits, model(images), rtol=1e-5, atol=1e-5)
    if images.shape[1] == 3:  # the pipeline opens every image as RGB
        check_pipeline(transformers, model)


def check_pipeline(transformers, model):
    """The pipeline gives the scores that predict writes: a sigmoid for the multi-label task, else a softmax."""
    config = resolve_model_data_config(model)
    pixels = torch.randint(256, (40, 40, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    loaded = load('folder')
    with torch.no_grad():
        expected = loaded.scores(loaded.model(timm.data.create_transform(**config, is_training=False)(image)[None]))
    found = transformers.pipeline('image-classification', 'folder')(image, top_k=len(loaded.class_names))
    found = {entry['label']: entry['score'] for entry in found}
    assert [found[name] for name in loaded.class_names] == pytest.approx(expected[0].tolist(), abs=1e-4)


@pytest.mark.parametrize(
    'flags',
    few(
        [
            f'{HEAD} --ml-decoder-kwargs num_heads=2 memory_activation=leaky_relu learnable_queries=True num_layers=2',
            '--model-kwargs output_stride=16 --crop-pct 0.8 --mean 0.4 0.4 0.4 --std 0.2 0.2 0.2',
            '--cosine-classifier 5',
            f'{HEAD} --ml-decoder-kwargs num_heads=4 classifier=cosine cosine_scale=4.0',
            f'{HEAD} --model-ema --model-ema-decay 0.5',
        ],
        2,
    ),
    ids=['head', 'model-kwargs', 'cosine', 'cosine-head', 'ema'],
)
def test_a_folder_scores_what_its_checkpoint_scores(flags, capsys):
    write_images(Path('data'), train=8, validation=5)
    train([*SINGLE, *RUN, *flags.split()])
    check_transformers(check_folder(capsys))
    assert folder_settings('local-dir:folder') == {'task': 'classification'}


@pytest.mark.parametrize('words', few([True, False], 1))
def test_a_multilabel_folder_has_task_and_thresholds(words, capsys):
    shapes.write_shapes('data', 32, 32)
    extra = ['--word-embeddings', 'data/words.safetensors'] if words else []
    train([*MULTILABEL, *RUN, *HEAD.split(), *extra])
    validate(shlex.split(f'data --dataset csv -j 0 --device cpu --checkpoint {CHECKPOINT} --write-thresholds'))
    model = check_folder(capsys, '--dataset', 'csv')
    settings = folder_settings('local-dir:folder')
    assert settings['task'] == 'multilabel'
    assert settings['thresholds'] == torch.load(CHECKPOINT, weights_only=False)['thresholds']
    check_transformers(model)


@pytest.mark.parametrize(
    'head',
    [{'ml_decoder': dict(decoder_embedding=32, num_heads=4)}, {'probe_head': dict(name='ml_decoder_small', dim=32)}],
    ids=['ml-decoder', 'probe'],
)
def test_a_folder_with_text_queries_loads_in_transformers(head):
    words = dict(word_embeddings=torch.randn(3, 8), class_names=['a', 'b', 'c'])
    ((option, options),) = head.items()
    model = timm.create_model('test_resnet', num_classes=3, **{option: options | words}).eval()
    save_folder(model, 'folder', class_names=['a', 'b', 'c'], data_config={'input_size': (3, 32, 32)})
    check_transformers(timm.create_model('local-dir:folder', pretrained=True).eval())


def test_the_weights_of_a_folder_are_those_that_the_flag_names():
    write_images(Path('data'), train=8, validation=5)
    train([*SINGLE, *RUN, '--model-ema', '--model-ema-decay', '0.5'])
    for flag, ema in (('--use-ema', True), ('--no-use-ema', False)):
        convert([CHECKPOINT, f'folder{flag}', flag])
        state = timm.create_model(f'local-dir:folder{flag}', pretrained=True).state_dict()
        expected = load(CHECKPOINT, use_ema=ema).model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_the_model_card_has_tags_labels_metrics_and_a_training_command_that_parses():
    write_images(Path('data'), train=8, validation=5)
    train([*SINGLE, *RUN, *HEAD.split(), '--model-ema', '--no-prefetcher', '--mean', '0.4', '0.5', '0.6'])
    convert([CHECKPOINT, 'folder'])
    card = Path('folder/README.md').read_text()
    metadata = card.split('---')[1]
    assert {'- timm', '- transformers', '- ml-decoder'} <= set(metadata.splitlines())
    assert 'class_0, class_1, class_2' in card and 'top1 ' in card
    command = next(line for line in card.splitlines() if line.startswith('`train.py')).strip('`')
    options, trained = parse_train(shlex.split(command)[1:]).to_dict(), load(CHECKPOINT).content['args']
    for name in ('model', 'img_size', 'lr', 'model_ema', 'mean', 'ml_decoder_kwargs', 'decoder_embedding'):
        assert options[name] == vars(trained)[name], name


def test_a_folder_that_exists_is_left_alone_and_flags_of_other_checkpoints_are_refused():
    write_images(Path('data'), train=8, validation=5)
    train([*SINGLE, *RUN])
    with pytest.raises(ValueError, match='--input-size'):
        convert([CHECKPOINT, 'folder', '--input-size', '64'])
    Path('folder').mkdir()
    Path('folder/notes').touch()
    with pytest.raises(ValueError, match='folder'):
        convert([CHECKPOINT, 'folder'])
    assert [path.name for path in Path('folder').iterdir()] == ['notes']


@pytest.mark.parametrize('exists', [False, True])
def test_a_folder_that_fails_midway_leaves_nothing(exists, monkeypatch):
    def fail(*arguments):
        raise OSError('no space left on device')

    if exists:
        Path('folder').mkdir()
    model = timm.create_model('test_resnet', num_classes=3)
    monkeypatch.setattr(folders, 'model_card', fail)
    with pytest.raises(OSError, match='no space'):
        save_folder(model, 'folder')
    assert [str(path) for path in Path().rglob('*')] == ['folder'] * exists


def test_a_run_that_scores_raw_weights_alone_gives_those(capsys):
    write_images(Path('data'), train=8, validation=5)
    train([*SINGLE, *RUN, '--model-ema', '--model-ema-decay', '0.5', '--model-ema-force-cpu'])
    taken, raw = (load(CHECKPOINT, use_ema=ema).model.state_dict() for ema in (None, False))
    assert all(torch.equal(taken[name], tensor) for name, tensor in raw.items())


@pytest.mark.parametrize('program', few(['train', 'probe'], 1))
def test_a_run_from_a_folder_needs_the_folder_no_more(program, tmp_path, monkeypatch):
    """Loaded, converted, predicted with and resumed from another working directory, after the folder is gone."""
    write_images(Path('data'), train=8, validation=5)
    train([*SINGLE, *RUN, *HEAD.split(), '--model-kwargs', 'output_stride=16'])
    convert([CHECKPOINT, 'start'])
    flags = ['data', '--model', 'local-dir:start', '--pretrained', '--num-classes', '3', '--device', 'cpu', '-j', '0']
    flags += ['-b', '4', '--img-size', '32', '--epochs', '1', '--output', 'out', '--experiment', 'second']
    if program == 'train':
        train([*flags, '--warmup-epochs', '0'])
        made = Path('out/second/last.pth.tar').resolve()
    else:
        probe([*flags, '--heads', 'attention_pool', '--lrs', '1e-3', '--seeds', '1'])
        made = next(Path('out/second').rglob('*.pth.tar')).resolve()
    images = torch.randn(2, 3, 32, 32)
    expected = load(str(made)).model(images)
    shutil.rmtree('start')
    (tmp_path / 'elsewhere').mkdir()
    data = Path('data').resolve()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert torch.equal(load(str(made)).model(images), expected)
    convert([str(made), 'converted'])
    assert torch.equal(timm.create_model('local-dir:converted', pretrained=True).eval()(images), expected)
    assert scores_of(data, made)
    if program == 'train':
        flags[0], flags[flags.index('--epochs') + 1] = str(data), '2'
        flags[flags.index('--output') + 1] = str(made.parent.parent)
        train([*flags, '--warmup-epochs', '0', '--resume', 'auto'])
        assert load(str(made)).content['epoch'] == 1


def scores_of(data, checkpoint):
    predict([str(data / 'validation'), '--checkpoint', str(checkpoint), '--out', 'x.csv', '--device', 'cpu', '-j', '0'])
    return Path('x.csv').read_text().count('.png')
