"""Predict: images in, labels, scores and features out, in finished parts, by any number of ranks."""

import csv
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from marks import few
from PIL import Image
from runs import command, environment
from timm.data import create_transform
from torch._dynamo.testing import CompileCounter

from timm_mldecoder.checkpoint.folders import save_folder
from timm_mldecoder.data.class_files import read_implications
from timm_mldecoder.data.word_embeddings import write_word_embeddings
from timm_mldecoder.modeling.load import load
from timm_mldecoder.predict import parts as parts_module
from timm_mldecoder.predict.__main__ import main as predict
from timm_mldecoder.predict.parts import Label, Parts, Prediction
from timm_mldecoder.predict.pictures import picture_path
from timm_mldecoder.runtime.errors import RunFailed
from timm_mldecoder.runtime.files import harmless
from train import main as train

NAMES = ['sky', 'zebra', 'traffic light']
HEAD = dict(decoder_embedding=32, num_heads=4, dim_feedforward=64)
IMAGES = ['a.jpg', 'b.png', 'deeper/c.png']
SMALL = shlex.split('--device cpu -j 0 -b 2')


@pytest.fixture(autouse=True)
def _in_an_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def images():
    """Three images, a text file, a hidden image and one in a hidden folder."""
    for name in (*IMAGES, '._a.jpg', '.cache/d.png'):
        write_image(Path('images', name), seed=len(name))
    Path('images/notes.txt').write_text('not an image')
    return 'images'


def write_image(path, seed, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def save_model(task='multilabel', thresholds=None, names=NAMES, data_config=None, **head):
    model = timm.create_model('test_resnet', num_classes=len(names), ml_decoder={**HEAD, **head}).eval()
    save_folder(model, 'folder', class_names=names, task=task, thresholds=thresholds, data_config=data_config)
    return model


def scores_of(model, path, task='multilabel'):
    transform = create_transform(**{**timm.data.resolve_model_data_config(model), 'is_training': False})
    with torch.no_grad():
        logits = model(transform(Image.open(path).convert('RGB'))[None])[0]
    return logits.sigmoid() if task == 'multilabel' else logits.softmax(0)


def rows_of(path):
    with open(path, newline='') as file:
        return [(row['image'], row['label'], float(row['score'] or -1)) for row in csv.DictReader(file)]


def expected_rows(model, threshold, top_k=3):
    rows = []
    for name in IMAGES:
        scores = scores_of(model, Path('images', name))
        found = [
            (name, NAMES[i], scores[i].item())
            for i in scores.argsort(descending=True)[:top_k]
            if scores[i] >= threshold
        ]
        rows += found or [(name, '', -1.0)]
    return rows


def assert_rows(found, wanted):
    assert [row[:2] for row in found] == [row[:2] for row in wanted]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in wanted], abs=1e-4)


def test_labels_by_threshold_and_by_rank(images, capsys):
    model = save_model()
    median = torch.cat([scores_of(model, Path('images', name)) for name in IMAGES]).median().item() + 1e-6
    base = [images, '--model', 'local-dir:folder', *SMALL]
    predict([*base, '--threshold', str(median), '--out', 'labels.csv'])
    assert_rows(rows_of('labels.csv'), expected_rows(model, median))
    assert f' {sum(bool(label) for _, label, _ in rows_of("labels.csv"))} labels' in f' {capsys.readouterr().out}'
    predict([*base, '--threshold', str(median), '--top-k', '1', '--out', 'both.csv'])
    assert_rows(rows_of('both.csv'), expected_rows(model, median, top_k=1))
    assert not Path('labels.csv.parts').exists()


def test_top_k_and_threshold_both_apply():
    save_model(thresholds=dict(zip(NAMES, [0.5, 0.5, 0.8], strict=True)))
    predictor = load('folder', top_k=2)
    for scores, expected in [
        ([0.9, 0.6, 0.85], [0, 2]),
        ([0.9, 0.6, 0.7], [0, 1]),
        ([0.6, 0.1, 0.7], [0]),
        ([0.1] * 3, []),
    ]:
        both = torch.tensor([scores, [0.0, 1.0, 1.0]])
        assert [[label.index for label in labels] for labels in predictor.labels(both)] == [expected, [1, 2]]


def test_the_formats_hold_the_same(images):
    pyarrow_parquet = pytest.importorskip('pyarrow.parquet')
    save_model()
    for suffix in ('csv', 'jsonl', 'parquet'):
        predict([images, '--model', 'local-dir:folder', *SMALL, '--threshold', '0.4', '--out', f'labels.{suffix}'])
    lines = [json.loads(line) for line in Path('labels.jsonl').read_text().splitlines()]
    assert [line['image'] for line in lines] == IMAGES
    of_json = [(line['image'], found['label']) for line in lines for found in line['labels']]
    of_csv = [row[:2] for row in rows_of('labels.csv') if row[1]]
    table = pyarrow_parquet.read_table('labels.parquet').to_pylist()
    assert of_json == of_csv == [(row['image'], row['label']) for row in table if row['label']]


def test_a_folder_records_its_task_and_thresholds(images):
    model = save_model(task='classification')
    predict([images, '--model', 'local-dir:folder', *SMALL, '--out', 'single.csv'])
    best = [scores_of(model, Path('images', name), 'classification').max(0) for name in IMAGES]
    assert_rows(
        rows_of('single.csv'), [(n, NAMES[b.indices], b.values.item()) for n, b in zip(IMAGES, best, strict=True)]
    )

    Path('folder').rename('other')
    model = save_model(thresholds={'traffic light': 0.0, 'zebra': 1.0, 'sky': 1.0})
    predict([images, '--model', 'local-dir:folder', *SMALL, '--out', 'tuned.csv'])
    assert [row[:2] for row in rows_of('tuned.csv')] == [(name, 'traffic light') for name in IMAGES]


def test_scores_and_features(images):
    model = save_model()
    base = [images, '--model', 'local-dir:folder', *SMALL]
    predict([*base, '--out', 'a.csv', '--scores', 's.npz', '--features', 'f.npz', '--part-size', '2'])
    scores, features = np.load('s.npz'), np.load('f.npz')
    assert list(scores['classes']) == NAMES and list(scores['images']) == list(features['images']) == IMAGES
    assert scores['scores'].dtype == np.float32
    wanted = torch.stack([scores_of(model, Path('images', name)) for name in IMAGES])
    np.testing.assert_allclose(scores['scores'], wanted.numpy(), atol=1e-6)
    predict([*base, '--out', 'h.csv', '--scores', 'h.npz', '--scores-dtype', 'float16'])
    assert np.load('h.npz')['scores'].dtype == np.float16
    np.testing.assert_array_equal(np.load('h.npz')['scores'], scores['scores'].astype(np.float16))
    assert features['features'].shape == (3, model.num_features)
    predict([*base, '--out', 'b.csv', '--features', 'q.npz', '--feature-kind', 'queries'])
    assert np.load('q.npz')['features'].shape == (3, 3, 32)


def test_shards_and_lists_are_sources_too(images):
    save_model()
    base = ['--model', 'local-dir:folder', *SMALL, '--threshold', '0']
    with tarfile.open('shard.tar', 'w') as tar:
        for name in IMAGES:
            content = Path('images', name).read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    Path('images/list.csv').write_text('path,comment\nb.png,x\na.jpg,y\n')
    Path('images/model_best.pth.tar').write_bytes(b'a checkpoint beside the images is no shard of them')
    predict([images, *base, '--out', 'folder.csv'])
    predict(['shard.tar', *base, '--out', 'tar.csv'])
    predict(['images/list.csv', *base, '--out', 'list.csv'])
    Path('images/train.csv').write_text('path,labels\nb.png,sky\na.jpg,zebra\n')
    Path('images/validation.csv').write_text('path,labels\nb.png,sky\na.jpg,zebra\n')
    predict([images, '--dataset', 'csv', *base, '--out', 'dataset.csv'])
    folder = rows_of('folder.csv')
    assert [(name.removeprefix('shard.tar/'), *rest) for name, *rest in rows_of('tar.csv')] == folder
    assert sorted(rows_of('list.csv')) == sorted(row for row in folder if row[0] in ('a.jpg', 'b.png'))
    assert rows_of('list.csv')[0][0] == 'b.png'
    assert rows_of('dataset.csv') == rows_of('list.csv')


def test_unreadable_images_are_listed_and_do_not_stop_it(images):
    save_model()
    Path('images/bad.jpg').write_bytes(Path('images/a.jpg').read_bytes()[:200])
    Path('images/empty.png').touch()
    base = [images, '--model', 'local-dir:folder', *SMALL, '--threshold', '0', '--top-k', '1']
    predict([*base, '--out', 'labels.csv', '--scores', 's.npz'])
    assert [row[0] for row in rows_of('labels.csv')] == list(np.load('s.npz')['images']) == IMAGES
    with open('labels.csv.errors.csv') as file:
        assert [row['image'] for row in csv.DictReader(file)] == ['bad.jpg', 'empty.png']
    with pytest.raises(RunFailed, match='bad.jpg'):
        predict([*base, '--out', 'other.csv', '--bad-image', 'abort'])
    Path('images/bad.jpg').unlink()
    predict([*base, '--out', 'more.csv'])  # another output in the same folder has errors of its own
    assert len(Path('labels.csv.errors.csv').read_text().splitlines()) == 3
    assert len(Path('more.csv.errors.csv').read_text().splitlines()) == 2


def test_a_kill_loses_at_most_the_parts_under_way(images):
    """Killed again and again, the same command comes to the rows of an undisturbed run, none twice."""
    for number in range(60):
        write_image(Path('many', f'{number:03d}.png'), number)
    Path('many/030.png').write_bytes(b'damaged')
    save_model()
    base = ['many', '--model', 'local-dir:folder', *SMALL, '--threshold', '0', '--part-size', '3']
    predict([*base, '--out', 'whole.csv'])
    flags = [sys.executable, '-m', 'timm_mldecoder.predict', *base, '--out', 'killed.csv']
    for parts in (2, 9):
        process = subprocess.Popen(flags, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(Path().glob('killed.csv.parts/*.jsonl'))) < parts and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    predict([*base, '--out', 'killed.csv'])
    assert Path('killed.csv').read_text() == Path('whole.csv').read_text()
    assert len(Path('killed.csv.errors.csv').read_text().splitlines()) == 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize('place', ['_join_arrays', 'shutil.rmtree'])
def test_a_kill_while_the_parts_are_joined_leaves_nothing_to_repair(images, place, monkeypatch):
    save_model()
    Path('images/bad.jpg').touch()
    flags = [images, '--model', 'local-dir:folder', *SMALL, '--part-size', '1', '--out', 'labels.csv', '--scores']

    def kill(*arguments, **settings):
        raise Killed

    predict([*flags[:-2], 'whole.csv', '--scores', 'whole.npz'])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(parts_module.shutil, 'rmtree', kill) if '.' in place else patch.setattr(Parts, place, kill)
        predict([*flags, 'scores.npz'])
    assert Path('labels.csv').exists() and Path('labels.csv.errors.csv').exists()
    assert Path('labels.csv.parts').exists() == (place == '_join_arrays')
    if place == '_join_arrays':
        predict([*flags, 'scores.npz'])
    else:  # everything is written
        with pytest.raises(ValueError, match='labels.csv exists'):
            predict([*flags, 'scores.npz'])
    for name, whole in (('labels.csv', 'whole.csv'), ('labels.csv.errors.csv', 'whole.csv.errors.csv')):
        assert Path(name).read_text() == Path(whole).read_text()
    for name, found in np.load('scores.npz').items():
        assert (found == np.load('whole.npz')[name]).all(), name


def test_parts_of_other_options_are_not_continued(images, monkeypatch):
    save_model()
    base = [images, '--model', 'local-dir:folder', *SMALL, '--out', 'labels.csv', '--amp', '--amp-dtype']
    monkeypatch.setattr(Parts, 'finish', Mock(side_effect=RuntimeError('killed')))
    with pytest.raises(RuntimeError, match='killed'):
        predict([*base, 'bfloat16'])
    for flags in (['float16'], ['bfloat16', '--top-k', '1'], ['bfloat16', '--part-size', '1']):
        with pytest.raises(ValueError, match='labels.csv.parts'):
            predict([*base, *flags])


@pytest.mark.parametrize('kind', few(['queries', 'pooled'], 1))
def test_a_compiled_model_gives_features_too(images, kind, monkeypatch):
    save_model()
    base = [images, '--model', 'local-dir:folder', *SMALL, '--feature-kind', kind]
    predict([*base, '--out', 'a.csv', '--features', 'a.npz'])
    counter = CompileCounter()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=counter))
    predict([*base, '--out', 'b.csv', '--features', 'b.npz', '--torchcompile'])
    assert counter.op_count > 50, 'backbone and head run compiled'
    assert rows_of('a.csv') == rows_of('b.csv')
    np.testing.assert_allclose(np.load('a.npz')['features'], np.load('b.npz')['features'], atol=1e-3)


@pytest.mark.slow
def test_twenty_thousand_images_killed_five_times(tmp_path):
    """200 of them are damaged, and listed as errors. The rows are those of an undisturbed run, none twice, and those
    of two ranks. The memory of the process and its worker does not grow with the number of images."""
    draw = np.random.default_rng(0)
    for number in range(20_000):
        name = Path(f'many/{number // 1000:02d}/{number:05d}.png')
        name.parent.mkdir(parents=True, exist_ok=True)
        if number % 100 == 7:
            name.write_bytes(b'damaged')
        else:
            Image.new('RGB', (32, 32), (number % 256, number // 256, 90)).save(name)
    save_model(data_config={'input_size': (3, 32, 32)})
    flags = shlex.split('--model local-dir:folder --device cpu -j 1 -b 64 --threshold 0 --part-size 256 --out')
    module = ['-m', 'timm_mldecoder.predict']
    silent = dict(stdout=subprocess.DEVNULL, env=environment())

    memory = {}
    for source, out in (('many/00', 'thousand.csv'), ('many', 'whole.csv')):
        process = subprocess.Popen([sys.executable, *module, source, *flags, out], **silent)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        memory[out] = usage.ru_maxrss / (1 if sys.platform == 'darwin' else 1024)  # of the larger process, in KB
    assert memory['whole.csv'] < memory['thousand.csv'] + 20 * 1024, memory
    with open('whole.csv.errors.csv') as file:
        assert [row['image'] for row in csv.DictReader(file)] == [
            f'{number // 1000:02d}/{number:05d}.png' for number in range(7, 20_000, 100)
        ]
    assert Path('whole.csv').read_text().count('\n') == 1 + 3 * 19_800

    for parts in sorted(draw.choice(70, 5, replace=False)):
        call = [sys.executable, *module, 'many', *flags, 'killed.csv']
        process = subprocess.Popen(call, stderr=subprocess.DEVNULL, **silent)
        while len(list(Path().glob('killed.csv.parts/*.jsonl'))) <= parts and process.poll() is None:
            time.sleep(draw.uniform(0.002, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(call, check=True, **silent)
    launcher = command('train.py', processes=2)[:-1]
    subprocess.run(
        [*launcher, *module, 'many', *flags, 'ranks.csv'], check=True, capture_output=True, env=environment()
    )
    for out in ('killed.csv', 'ranks.csv'):
        assert Path(out).read_text() == Path('whole.csv').read_text()
        assert Path(f'{out}.errors.csv').read_text() == Path('whole.csv.errors.csv').read_text()


@pytest.mark.slow
def test_two_ranks_write_what_one_does(images):
    for number in range(20):
        write_image(Path('many', f'{number:03d}.png'), number)
    save_model()
    flags = ['many', '--model', 'local-dir:folder', *SMALL, '--threshold', '0', '--part-size', '3', '-j', '1']
    predict([*flags, '--out', 'one.csv', '--scores', 'one.npz', '--pictures', 'one'])
    launcher = command('train.py', processes=2)[:-1]
    outputs = ['--out', 'two.csv', '--scores', 'two.npz', '--pictures', 'two']
    call = [*launcher, '-m', 'timm_mldecoder.predict', *flags, *outputs]
    subprocess.run(call, env=environment(), check=True, timeout=300)
    assert Path('two.csv').read_text() == Path('one.csv').read_text()
    assert (np.load('two.npz')['scores'] == np.load('one.npz')['scores']).all()
    assert sorted(os.listdir('two')) == sorted(os.listdir('one')) == [f'{number:03d}.png.png' for number in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_ctrl_c_and_an_unreadable_image_end_the_workers_too(images, processes):
    write_image(Path('many/000.png'), 0, size=(300, 300))
    for number in range(1, 300):
        shutil.copy('many/000.png', f'many/{number:03d}.png')
    save_model()
    flags = [
        'many',
        '--model',
        'local-dir:folder',
        '--device',
        'cpu',
        '-j',
        '2',
        '-b',
        '1',
        '--part-size',
        '2',
        '--out',
    ]
    launcher = command('train.py', processes=processes)[:-1]
    call = [*launcher, '-m', 'timm_mldecoder.predict', *flags]
    process = subprocess.Popen(
        [*call, 'x.csv'], env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    while not list(Path().glob('x.csv.parts/*.jsonl')) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    _, errors = process.communicate(timeout=60)
    assert process.returncode, errors
    assert processes > 1 or process.returncode == 130 and 'Traceback' not in errors
    with pytest.raises(ProcessLookupError):  # nothing of the group is left
        for _ in range(200):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    Path('many/010.png').write_bytes(b'damaged')
    process = subprocess.run(
        [*call, 'y.csv', '--bad-image', 'abort'], env=environment(), timeout=120, capture_output=True, text=True
    )
    assert process.returncode == 1 and '010.png' in process.stderr


def test_text_queries_take_the_classes_of_the_command_line(images):
    vectors = {name: torch.randn(6) for name in [*NAMES, 'tram, red']}
    write_word_embeddings('words.safetensors', torch.stack(list(vectors.values())), list(vectors))
    model = save_model(word_embeddings=torch.randn(3, 6), class_names=['x', 'y', 'z'])
    Path('classes.txt').write_text('traffic light\ntram, red\n')
    base = ['images/a.jpg', '--model', 'local-dir:folder', *SMALL, '--threshold', '0']
    words = ['--word-embeddings', 'words.safetensors']
    for number, (flags, names) in enumerate(
        [(['--classes', 'classes.txt', *words], ['traffic light', 'tram, red']), (words, list(vectors))]
    ):
        predict([*base, *flags, '--out', f'{number}.csv'])
        model.get_classifier().set_word_embeddings(torch.stack([vectors[name] for name in names]))
        wanted = dict(zip(names, scores_of(model, 'images/a.jpg').tolist(), strict=True))
        assert {row[1]: row[2] for row in rows_of(f'{number}.csv')} == pytest.approx(wanted, abs=1e-4)
    predict([*base, '--classes', 'z,x', '--out', 'own.csv'])
    assert {row[1] for row in rows_of('own.csv')} == {'z', 'x'}


@pytest.fixture
def checkpoint(images):
    for split in ('train', 'validation'):
        lines = ['path,labels', *(f'{name},{";".join(NAMES[i % 2 : 3])}' for i, name in enumerate(IMAGES[:2]))]
        Path('images', f'{split}.csv').write_text('\n'.join(lines) + '\n')
    train(
        shlex.split("""images --dataset csv --task multilabel --model test_resnet --num-classes 3 --img-size 64
        --device cpu -j 0 -b 2 --epochs 2 --warmup-epochs 0 --lr 0.1 --no-aug --use-ml-decoder-head 1
        --decoder-embedding 32 --ml-decoder-kwargs num_heads=4 --model-ema --model-ema-decay 0.5
        --output out --experiment run""")
    )
    return 'out/run/last.pth.tar'


def test_images_are_read_in_the_mode_of_the_training_run(images):
    for split in ('train', 'validation'):
        lines = ['path,labels', *(f'{name},sky;zebra' for name in IMAGES[:2]), f'{IMAGES[2]},traffic light']
        Path('images', f'{split}.csv').write_text('\n'.join(lines) + '\n')
    flags = """images --dataset csv --task multilabel --model test_resnet --num-classes 3 --img-size 64 --device cpu
        -j 0 -b 2 --epochs 1 --warmup-epochs 0 --no-aug --use-ml-decoder-head 1 --decoder-embedding 32 --output out
        --experiment run --input-img-mode YCbCr"""
    train(shlex.split(flags))
    predict(['images', '--checkpoint', 'out/run/last.pth.tar', *SMALL, '--threshold', '0', '--out', 'labels.csv'])
    trained = load('out/run/last.pth.tar')
    transform = create_transform(**{**trained.data_config, 'is_training': False})
    with torch.no_grad():
        expected = trained.model(transform(Image.open('images/a.jpg').convert('YCbCr'))[None])[0].sigmoid()
    found = [score for name, _, score in rows_of('labels.csv') if name == 'a.jpg']
    assert found == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-3)


def test_a_checkpoint_is_used_as_it_was_trained(checkpoint):
    base = ['images', '--checkpoint', checkpoint, *SMALL, '--threshold', '0']
    for name, flags in (('default', []), ('ema', ['--use-ema']), ('raw', ['--no-use-ema'])):
        predict([*base, *flags, '--out', f'{name}.csv'])
    default, ema, raw = (Path(f'{name}.csv').read_text() for name in ('default', 'ema', 'raw'))
    assert default == ema != raw
    content = torch.load(checkpoint, weights_only=False)
    torch.save({**content, 'thresholds': {'sky': 0.5, 'tram': 0.5}}, 'other.pth.tar')  # tuned on other classes
    with pytest.raises(ValueError, match="'zebra'|'traffic light'.*--threshold"):
        predict(['images', '--checkpoint', 'other.pth.tar', *SMALL, '--out', 'other.csv'])
    predict(['images', '--checkpoint', 'other.pth.tar', *SMALL, '--threshold', '0.5', '--out', 'other.csv'])


def test_pictures_show_what_the_model_saw(checkpoint):
    """A wide image whose ends the centre crop cuts off: their colours are not in the picture."""
    Path('wide').mkdir()
    wide = np.zeros((64, 256, 3), np.uint8)
    wide[:, :64, 0] = wide[:, -64:, 2] = 255
    wide[:, 96:160] = 255
    Image.fromarray(wide).save('wide/$a$_b^.png')
    predict(
        ['wide', '--checkpoint', checkpoint, *SMALL, '--out', 'wide.csv', '--threshold', '0.99', '--pictures', 'pics']
    )
    (picture,) = Path('pics').glob('*.png')
    colours = np.asarray(Image.open(picture).convert('RGB')).reshape(-1, 3).astype(int)
    assert not ((colours[:, 0] > 200) & (colours[:, 1] < 60)).any(), 'the red end'
    assert not ((colours[:, 2] > 200) & (colours[:, 1] < 60)).any(), 'the blue end'


@pytest.mark.parametrize('name', ['../../x.png', '/etc/x.png', 'a/../../x.png'])
def test_pictures_stay_in_their_folder(name):
    assert Path('pictures').resolve() in picture_path(Path('pictures'), name).resolve().parents


def test_no_field_is_a_formula_and_tags_without_letters_in_front_stay_as_they_are():
    for field in ('=1+1', '+1', '-1', '@x', '\tx', '\r=x'):
        assert harmless(field) == f"'{field}" and harmless(f'a{field}') == f'a{field}'
    for tag in ('=_=', '+_+', '@_@', '-_-', ';d', '^_^', '(o)_(o)'):
        assert harmless(tag) == tag


def test_labels_are_closed_under_implications(tmp_path):
    names = ['animal', 'cat', 'kitten', 'a -> b', 'car']
    (tmp_path / 'implications.txt').write_text('cat -> animal\n\nkitten -> cat\na -> b -> car\nkitten -> kitten\n')
    model = timm.create_model('test_resnet', num_classes=5, ml_decoder=True)
    save_folder(model, tmp_path / 'folder', class_names=names, task='multilabel')
    implications = read_implications(tmp_path / 'implications.txt', names)
    predictor = replace(load(tmp_path / 'folder', threshold=0.5), implications=implications)
    scores = torch.tensor([[0.1, 0.2, 0.9, 0.3, 0.2], [0.7, 0.6, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.8, 0.9], [0.0] * 5])
    found = [{label.name: round(label.score, 3) for label in labels} for labels in predictor.labels(scores)]
    assert found == [
        {'animal': 0.9, 'cat': 0.9, 'kitten': 0.9},
        {'animal': 0.7, 'cat': 0.6},
        {'a -> b': 0.8, 'car': 0.9},
        {},
    ]


@pytest.mark.parametrize(
    'line, message', [('cat animal', 'line 2: expected "tag -> tag"'), ('cat -> dog', "no class 'dog'")]
)
def test_implications_that_do_not_fit_are_refused(line, message, tmp_path):
    (tmp_path / 'implications.txt').write_text(f'cat -> animal\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_implications(tmp_path / 'implications.txt', ['animal', 'cat'])


def test_implications_of_a_single_label_model_or_under_a_limit_are_refused(tmp_path):
    for settings, message in ((dict(task='classification'), 'multi-label'), (dict(top_k=2), '--top-k')):
        with pytest.raises(ValueError, match=message):
            replace(trained_multilabel(tmp_path), **settings, implications=torch.zeros(2, 0, dtype=torch.long))


def trained_multilabel(folder):
    if not (folder / 'folder').exists():
        save_folder(timm.create_model('test_resnet', num_classes=2), folder / 'folder', task='multilabel')
    return load(str(folder / 'folder'))


@pytest.mark.parametrize('suffix', few(['.csv', '.jsonl', '.parquet'], 1))
def test_hostile_names_of_images_and_classes_stay_text_within_the_outputs(suffix):
    """From a shard and from a list, whose names are not those of files in a folder."""
    names = ['=1+1', '../../up', '<script>alert(1)</script>', '@a\nb, "c"', '/etc/passwd']
    members = ['=2+2.png', '/etc/x.png', 'line\nbreak.png', 'a/=b,"c".png', '../../up.png', 'broken=\n.png']
    write_image(Path('work/in/=x.png'), 1)
    content = Path('work/in/=x.png').read_bytes()
    with tarfile.open('work/in/=s.tar', 'w') as tar:
        for name in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content) * ('broken' not in name)
            tar.addfile(entry, io.BytesIO(content))
    with open('work/in/list.csv', 'w', newline='') as file:
        csv.writer(file).writerows([['path'], ['=x.png'], ['../in/=x.png'], ['=missing\n.png']])
    save_model(names=names)
    for number, source in enumerate(['work/in/=s.tar', 'work/in/list.csv']):
        Path(f'work/{number}').mkdir()
        flags = f'--model local-dir:folder --device cpu -j 0 --threshold 0 --pictures work/{number}/pictures'
        outputs = ['--out', f'work/{number}/labels{suffix}', '--scores', f'work/{number}/scores.npz']
        predict([source, *shlex.split(flags), *outputs])
        readable = list(np.load(f'work/{number}/scores.npz')['images'])
        assert len(readable) == (2 if number else 5) and list(np.load(f'work/{number}/scores.npz')['classes']) == names
        found = {path.name for path in Path(f'work/{number}').iterdir()}
        assert found == {f'labels{suffix}', f'labels{suffix}.errors.csv', 'scores.npz', 'pictures'}
        assert len([path for path in Path(f'work/{number}/pictures').rglob('*') if path.is_file()]) == len(readable)
        with open(f'work/{number}/labels{suffix}.errors.csv', newline='') as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        if suffix == '.csv':
            with open(f'work/{number}/labels.csv', newline='') as file:
                rows = list(csv.reader(file))
            assert len(rows) == 1 + len(names) * len(readable) and {len(row) for row in rows} == {3}
            cells += [cell for row in rows for cell in row]
            assert "'=1+1" in cells and '@a\nb, "c"' in {cell.lstrip("'") for cell in cells}
        elif suffix == '.jsonl':
            lines = [json.loads(line) for line in Path(f'work/{number}/labels.jsonl').read_text().splitlines()]
            assert [line['image'] for line in lines] == readable
            assert all({found['label'] for found in line['labels']} == set(names) for line in lines)
        assert not [cell for cell in cells if cell[:1] in tuple('=+-@\t\r')]
    assert sorted(path.name for path in Path().iterdir()) == ['folder', 'work']
    assert sorted(path.name for path in Path('work').iterdir()) == ['0', '1', 'in']


@pytest.mark.parametrize(
    ('flags', 'named'),
    [
        ('images --model local-dir:folder --classes zebra --out x.csv', '--classes'),
        ('empty --model local-dir:folder --out x.csv', 'empty: no images'),
        ('nowhere --model local-dir:folder --out x.csv', 'nowhere: no such'),
        ('images --checkpoint none.pth --out x.csv', 'none.pth: no such'),
        ('images --model local-dir:folder --use-ema --out x.csv', '--use-ema'),
        ('images --model local-dir:folder --out x.xml', '--out x.xml'),
        ('images --model local-dir:folder --out nowhere/x.csv', 'nowhere'),
        ('images --model zzz --out x.csv', 'zzz: no such'),
        ('images --model local-dir:folder --out x.csv --device zzz', '--device'),
        ('images --model local-dir:folder --out x.csv --device cuda:77', '--device'),
    ],
)
def test_mistakes_are_named(images, flags, named):
    save_model()
    Path('empty').mkdir()
    with pytest.raises(ValueError, match=named):
        predict([*flags.split(), '-j', '0', *([] if '--device' in flags else ['--device', 'cpu'])])
    assert not Path('x.csv').exists()


@pytest.mark.parametrize('suffix', ['.csv', '.jsonl', '.parquet'])
def test_file_names_that_are_not_utf8_are_escaped(suffix, tmp_path):
    parts = Parts(tmp_path / f'out{suffix}', 2, 2, {}, {})
    parts.begin()
    name = os.fsdecode(b'caf\xe9.png')
    parts.write(0, [Prediction(name, [Label(0, 'cat', 0.5)]), Prediction(name, error='damaged')])
    assert parts.finish() == 1
    assert b'caf\\udce9.png' in (tmp_path / f'out{suffix}').read_bytes().replace(b'\\\\', b'\\')
    assert b'caf\\udce9.png' in (tmp_path / f'out{suffix}.errors.csv').read_bytes()
