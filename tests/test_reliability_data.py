"""Losses that are not finite, images that cannot be read, memory that runs out."""

import csv
import json
import re
import shutil
import struct

import pytest
import torch
from marks import few
from runs import BATCHES, MODEL, build, call, fit, last, summary, train

from timm_mldecoder.data import create_dataset
from timm_mldecoder.data.images import strict
from timm_mldecoder.loading.loader import KeyedSamples
from timm_mldecoder.runtime.errors import RunFailed
from validate import main as validate

BROKEN = {'train/class_0/001.png': b'', 'train/class_1/002.png': b'not an image', 'train/class_2/007.png': 'cut off'}
BROKEN_IN_VALIDATION = {'validation/class_0/002.png': b'', 'validation/class_2/000.png': 'cut off'}


@pytest.fixture
def broken(data, tmp_path):
    """Break some images of a copy of the data."""
    folder = shutil.copytree(data, tmp_path / 'broken')

    def break_images(images):
        for name, content in images.items():
            path = folder / name
            path.write_bytes(path.read_bytes()[:200] if content == 'cut off' else content)
        return folder

    return break_images


def score(capsys, *flags):
    capsys.readouterr()
    validate([*map(str, flags), '--device', 'cpu', '-j', '0', '-b', '4'])
    return json.loads(capsys.readouterr().out.split('--result\n')[1])


def make_nonfinite(run, batches):
    """Make the loss of some batches NaN, counted from 0 over the run; return the losses of the others."""
    count, finite = iter(range(100)), []

    def multiply(module, inputs, result):
        if next(count) in batches:
            result['loss'] = result['loss'] * float('nan')
        else:
            finite.append(result['loss'].item())

    run.state.task.register_forward_hook(multiply)
    return finite


def test_steps_in_a_row_that_are_not_finite_end_the_run(data, tmp_path):
    run = build(data, tmp_path, '--epochs', '1', '--nonfinite-limit', '3')
    make_nonfinite(run, range(100))
    weights = {name: tensor.clone() for name, tensor in run.eval_model.state_dict().items()}
    with pytest.raises(RunFailed, match='epoch 0, step 2.*3 steps in a row'):
        fit(run)
    for name, tensor in run.eval_model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_nonfinite_abort_ends_the_run_at_once(data, tmp_path):
    run = build(data, tmp_path, '--epochs', '1', '--nonfinite', 'abort')
    make_nonfinite(run, {1})
    with pytest.raises(RunFailed, match='epoch 0, step 1'):
        fit(run)
    report = json.loads((tmp_path / 'run' / 'nonfinite.json').read_text())
    (batch,) = report['ranks'][0]['batches']
    assert batch['loss'] == 'nan' and len(batch['indices']) == len(batch['files']) == 4


def test_the_images_of_a_batch_are_those_that_were_read(data, tmp_path):
    damaged = shutil.copytree(data, tmp_path / 'damaged')
    (damaged / 'train' / 'class_1' / '003.png').write_bytes(b'')
    counts = []
    for more in ([], ['--no-prefetcher']):  # timm's prefetcher loads the next batch before it yields one
        loader = build(damaged, tmp_path, '--epochs', '1', *more).train_loader
        counts.append([len(loader.bad_images) for _ in loader.epoch(0)])
    assert counts[0] == counts[1] and counts[0][-1] == 1

    run = build(damaged, tmp_path, '--epochs', '1', '--train-img-sizes', '24', '32')
    read = []
    for number, _ in enumerate(run.train_loader.epoch(0)):
        read += run.train_loader.image_indices(number)
    assert sorted(read) == [*range(11), 12, *range(12, 24)], 'image 11 is replaced by the next'


def test_a_skipped_step_changes_neither_ema_weights_nor_mean_loss(data, tmp_path):
    run = build(data, tmp_path, '--epochs', '1', '--model-ema', '--lr', '1e-9', '--grad-accum-steps', '2')
    losses = make_nonfinite(run, {3})
    fit(run)
    assert len(losses) == BATCHES - 1
    del losses[2]  # the other batch of that step
    assert float(summary(tmp_path / 'run')[0]['train_loss']) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert all(tensor.isfinite().all() for tensor in last(tmp_path / 'run')['state_dict_ema'].values())


def test_a_loss_scaler_that_searches_its_scale_is_not_a_failure(data, tmp_path, caplog):
    run = build(data, tmp_path, '--epochs', '2', '--nonfinite', 'abort')
    run.state.scaler = torch.amp.GradScaler('cpu', init_scale=2.0**127)  # float32 ends at 2 ** 128
    run.state.task.register_forward_hook(lambda module, inputs, result: {'loss': result['loss'] * 16})
    fit(run)
    skipped = caplog.text.count('the loss scale is too large')
    assert 2 <= skipped < 2 * BATCHES
    assert run.state.scaler.get_scale() == 2.0 ** (127 - skipped)
    assert not (tmp_path / 'run' / 'nonfinite.json').exists()
    assert last(tmp_path / 'run')['amp_scaler']['scale'] == run.state.scaler.get_scale()


@pytest.mark.parametrize('workers', few([2, 0], 1))
def test_training_continues_without_unreadable_images_and_names_them(broken, tmp_path, caplog, workers):
    root = broken(BROKEN)
    folder = train(root, tmp_path, '--epochs', '2', '-j', str(workers))
    assert [row['train_bad_images'] for row in summary(folder)] == ['3', '3']
    with (folder / 'bad_images.csv').open() as file:
        named = [row['path'] for row in csv.DictReader(file)]
    assert sorted(named) == sorted(str(root / name) for name in BROKEN)
    for name in BROKEN:
        assert caplog.text.count(f'unreadable image left out: {root / name}') == 2


def test_training_ends_at_an_unreadable_image_with_bad_image_abort(broken, tmp_path):
    root = broken({'train/class_1/002.png': b'not an image'})
    with pytest.raises(RunFailed, match=f'{root}/train/class_1/002.png cannot be read .*--bad-image skip'):
        train(root, tmp_path, '--epochs', '1', '--bad-image', 'abort', '-j', '2')


@pytest.mark.parametrize('kind', ['folder', 'csv'])
def test_an_image_that_would_not_fit_into_memory_is_unreadable(data, tmp_path, kind):
    """Its header claims so many pixels that PIL refuses, with an error of its own."""
    folder = tmp_path / 'train' / 'zebra'
    folder.mkdir(parents=True)
    image = next((data / 'train').glob('*/*'))
    shutil.copy(image, folder / '1.png')
    bomb = bytearray(b'BM' + bytes(52))
    struct.pack_into('<IIiiHH', bomb, 10, 54, 40, 1 << 20, 1 << 20, 1, 24)
    (folder / '0.png').write_bytes(bomb)
    (tmp_path / 'train.csv').write_text('path,labels\ntrain/zebra/0.png,zebra\ntrain/zebra/1.png,zebra\n')

    samples = KeyedSamples(strict(create_dataset('' if kind == 'folder' else kind, str(tmp_path), 'train')), 1)
    _, (image, _), (bad,) = samples[0]
    assert image.size == (48, 48)
    assert bad.path == str(folder / '0.png') and 'decompression bomb' in bad.reason
    assert samples[1][2] == []


def test_nothing_but_unreadable_images_ends_the_run(broken, data, tmp_path):
    images = (data / 'train').glob('*/*')
    root = broken({path.relative_to(data): b'' for path in images})
    with pytest.raises(RunFailed, match='cannot be read .*10'):
        train(root, tmp_path, '--epochs', '1')


def test_validation_stops_at_an_unreadable_image_or_scores_the_others(broken, data, tmp_path, capsys):
    checkpoint = train(data, tmp_path, '--epochs', '1') / 'last.pth.tar'
    root = broken(BROKEN_IN_VALIDATION)
    with pytest.raises(RunFailed, match=f'{root}/validation/class_0/002.png cannot be read'):
        score(capsys, root, '--checkpoint', checkpoint)
    skipped = score(capsys, root, '--checkpoint', checkpoint, '--bad-image', 'skip')
    assert skipped.pop('bad_images') == 2

    for name in BROKEN_IN_VALIDATION:
        (root / name).unlink()
    assert score(capsys, root, '--checkpoint', checkpoint) == skipped


def test_validation_while_training_stops_too(broken, tmp_path):
    root = broken(BROKEN_IN_VALIDATION)
    with pytest.raises(RunFailed, match='class_0/002.png cannot be read'):
        train(root, tmp_path, '--epochs', '1')
    folder = train(root, tmp_path, '--epochs', '1', '--val-bad-image', 'skip')
    assert summary(folder)[0]['eval_bad_images'] == '2'


LIMITED = 'tests/programs/limited_memory.py'


@pytest.mark.slow
def test_validation_takes_smaller_batches_where_memory_runs_out(data, tmp_path, capsys):
    checkpoint = train(data, tmp_path, '--epochs', '1') / 'last.pth.tar'
    flags = [data, '--checkpoint', checkpoint, '--img-size', '512', '--device', 'cpu', '-j', '0', '-b', '15']
    plain = call(LIMITED, 260, 'validate', *flags)
    assert plain.returncode == 2
    line = plain.stderr.splitlines()[-1]
    assert '--batch-size 15' in line and '--retry' in line

    process = call(LIMITED, 260, 'validate', *flags, '--retry')
    assert process.returncode == 0, process.stderr
    tried = re.findall(r'a batch of (\d+) does not fit into memory, trying (\d+)', process.stderr)
    assert tried and tried[0][0] == '15' and all(int(smaller) < int(size) for size, smaller in tried)
    result = json.loads(process.stdout.split('--result\n')[1])
    assert result == score(capsys, *flags[:-2])


def test_training_names_the_batch_size_where_memory_runs_out(data, tmp_path):
    flags = [data, *MODEL, '--img-size', '512', '-b', '24', '--output', tmp_path, '--epochs', '1']
    process = call(LIMITED, 400, 'train', *flags)
    assert process.returncode == 1
    line = process.stderr.splitlines()[-1]
    assert '--batch-size 24' in line and '--grad-accum-steps' in line
