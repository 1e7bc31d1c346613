"""The front door: train, evaluate and load from Python, and the console command."""

import csv
import json
import re
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
from marks import few
from PIL import Image
from runs import ROOT, environment, write_data

import timm_mldecoder
from timm_mldecoder import __main__ as cli
from timm_mldecoder.metrics import MultiLabelEvaluator
from timm_mldecoder.predict.__main__ import main as predict
from timm_mldecoder.runtime.errors import run_command
from timm_mldecoder.train.__main__ import main as train

SETTINGS = dict(model='test_resnet', img_size=32, device='cpu', batch_size=4, workers=0)


def python(code):
    return subprocess.run([sys.executable, '-c', code], env=environment(), capture_output=True, text=True)


def test_a_whole_life(tmp_path, capsys):
    data = write_data(tmp_path / 'data')
    result = timm_mldecoder.train(
        data, **SETTINGS, num_classes=3, epochs=1, use_ml_decoder_head=1, output=tmp_path, experiment='run'
    )
    assert result.folder == tmp_path / 'run' and result.best.is_file() and len(result.rows) == 1
    metrics = timm_mldecoder.evaluate(data, checkpoint=result.best, device='cpu', workers=0)
    assert metrics['top1'] == pytest.approx(result.rows[0]['eval_top1'], abs=1e-3)
    again = timm_mldecoder.evaluate(data, checkpoint=result.folder, device='cpu', workers=0)
    assert again['top1'] == metrics['top1']
    loaded = timm_mldecoder.load(result.folder)
    assert loaded.task == 'classification' and len(loaded.class_names) == 3 and loaded.thresholds is None
    paths = sorted(path for path in data.rglob('*') if path.is_file())[:5]
    labels = loaded.predict(paths, batch_size=2)
    assert len(labels) == 5 and all(len(found) == 1 for found in labels)
    image = Image.open(paths[0])
    for given in (image, np.asarray(image), np.asarray(image)[None]):
        assert loaded.predict(given)[0][0][:2] == labels[0][0][:2]
    with pytest.raises(TypeError, match='uint8'):
        loaded.predict(np.zeros((48, 48, 3), np.float32))
    again = timm_mldecoder.train(output=tmp_path, experiment='run', resume='auto')  # its options know the data
    assert again.rows == result.rows
    assert not capsys.readouterr().out  # the command prints what functions return
    train(['--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto'])
    (best,) = json.loads(capsys.readouterr().out.removeprefix('--result\n'))
    assert best['epoch'] == 0 and best['validation'].keys() == {'loss', 'top1'}


@pytest.mark.parametrize('kind', few(['transparent', '16 bit', 'rgb', 'float', 'palette'], 2))
def test_load_gives_the_labels_of_the_command_for_any_image(kind, tmp_path):
    data = write_data(tmp_path / 'data')
    result = timm_mldecoder.train(data, **SETTINGS, num_classes=3, epochs=1, lr=0.1, output=tmp_path, experiment='run')
    values = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    image = {
        'rgb': lambda: Image.fromarray(values[..., :3]),
        'transparent': lambda: Image.fromarray(values),
        '16 bit': lambda: Image.fromarray(values[..., 0].astype(np.uint16) * 257),
        'float': lambda: Image.fromarray(values[..., 0].astype(np.float32) / 255),
        'palette': lambda: Image.fromarray(values[..., :3]).quantize(8),
    }[kind]()
    (tmp_path / 'images').mkdir()
    image.save(tmp_path / 'images' / 'x.tif' if kind != 'palette' else tmp_path / 'images' / 'x.png')
    flags = ['--checkpoint', str(result.best), '--out', str(tmp_path / 'x.csv'), '--device', 'cpu', '-j', '0']
    predict([str(tmp_path / 'images'), *flags, '--top-k', '3'])
    with (tmp_path / 'x.csv').open() as file:
        expected = {row['label']: float(row['score']) for row in csv.DictReader(file)}
    loaded = timm_mldecoder.load(result.folder, top_k=3)
    for given in (next((tmp_path / 'images').iterdir()), image):
        (labels,) = loaded.predict(given)
        assert {label.name: label.score for label in labels} == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    'first',
    [
        'import timm_mldecoder.train.loop',
        *(pytest.param(code, marks=pytest.mark.slow) for code in ('pass', 'import timm_mldecoder.api')),
    ],
)
def test_train_is_callable_whatever_is_imported_first(first):
    code = f'{first}\nimport timm_mldecoder as t\nassert callable(t.train)\n'
    code += 'try: t.train("x", no_such_flag=1)\nexcept ValueError as e: assert "no_such_flag" in str(e)'
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_library_works_without_fcntl():
    code = 'import sys; sys.modules["fcntl"] = None\nimport timm, timm_mldecoder\n'
    code += 'import timm_mldecoder.losses, timm_mldecoder.metrics, timm_mldecoder.data\n'
    code += 'import timm_mldecoder.predict.__main__\n'
    code += 'timm.create_model("test_resnet", ml_decoder=True)'
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_evaluate_needs_a_model(tmp_path):
    with pytest.raises(ValueError, match='needs checkpoint=.* or model='):
        timm_mldecoder.evaluate(tmp_path)


def test_console_lists_commands_and_refuses_others(capsys):
    cli.main(['--help'])
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)
    with pytest.raises(ValueError, match='validate'):
        cli.main(['evalidate'])


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_a_command_has_all_of_its_help_and_one_line_for_a_mistake(name, capsys):
    main = import_module(cli.COMMANDS[name][0]).main
    shown = []
    for flag in ('--help', '--help-all'):
        with pytest.raises(SystemExit) as end:
            main([flag])
        assert not end.value.code
        shown.append(capsys.readouterr().out)
    assert (shown[0] == shown[1]) == (name not in ('train', 'validate'))
    assert run_command(lambda: main(['--nonsense'])) == 2
    assert re.fullmatch(r'.*: error: .*\n', capsys.readouterr().err)


def test_evaluator_refuses_a_number_of_classes_as_its_device():
    with pytest.raises(ValueError, match='12'):
        MultiLabelEvaluator(12)


CONSUMER = """
import timm_mldecoder
from timm_mldecoder.losses import AsymmetricLoss
from timm_mldecoder.metrics import MultiLabelEvaluator
reveal_type(timm_mldecoder.load('x').predict('y')[0][0].score)
reveal_type(timm_mldecoder.train('x', epochs=1).best)
reveal_type(timm_mldecoder.evaluate('x'))
reveal_type(timm_mldecoder.MLDecoder(3))
reveal_type(timm_mldecoder.convert_state_dict({}, timm_mldecoder.MLDecoder(3)))
reveal_type(AsymmetricLoss())
reveal_type(MultiLabelEvaluator().compute())
timm_mldecoder.no_such_name
"""


def test_a_type_checker_sees_the_types_of_public_names(tmp_path):
    api = pytest.importorskip('mypy.api')
    (tmp_path / 'consumer.py').write_text(CONSUMER)
    config = ['--config-file', str(ROOT / 'pyproject.toml'), '--cache-dir', str(ROOT / '.mypy_cache')]
    printed, errors, _ = api.run([str(tmp_path / 'consumer.py'), *config])
    assert not errors
    types = re.findall(r'Revealed type is "(.*)"', printed)
    assert [name.rpartition('.')[2].replace('builtins.', '') for name in types] == [
        'float', 'Path | None', 'dict[str, Any]', 'MLDecoder', 'Tensor]', 'AsymmetricLoss', 'OrderedDict[str, float]',
    ], printed  # fmt: skip
    assert re.findall(r'error: (.*?)  \[', printed) == ['Module has no attribute "no_such_name"'], printed
