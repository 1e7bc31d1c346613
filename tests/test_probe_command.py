"""`python -m timm_mldecoder.probe`: heads side by side on a frozen backbone, cached features, complete checkpoints."""

import json
import logging
import os
import shlex
import signal
import time
from collections import namedtuple

import pytest
import timm
import torch
from image_folders import write_images
from marks import few
from multilabel_data import write_voc
from PIL import Image, ImageOps
from runs import call, start

import validate
from benchmarks.digits import write_digit_scenes
from timm_mldecoder.checkpoint.read import read_checkpoint
from timm_mldecoder.data.word_embeddings import write_word_embeddings
from timm_mldecoder.distributed.world import World
from timm_mldecoder.modeling.load import load as load_model
from timm_mldecoder.models.probes import PROBES
from timm_mldecoder.probe import report
from timm_mldecoder.probe.__main__ import main
from timm_mldecoder.probe.options import parse_probe
from timm_mldecoder.probe.sweep import _with_steps
from timm_mldecoder.runtime.errors import RunFailed

SMALL = shlex.split('--model test_resnet --img-size 64 --device cpu -j 0 -b 8 --epochs 2')
FAST = [*SMALL, '--heads', 'linear,ml_decoder_small:dim=16', '--lrs', '1e-3,1e-2,1e-1', '--seeds', '2']
PROGRAM = 'tests/programs/run_module.py'


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scenes')
    return write_digit_scenes(folder, 24, 12, 12, size=32, sides=(8, 16), max_digits=3)


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / 'images', train=8, validation=5, size=32)


def multilabel(scenes, *flags):
    return [str(scenes), *shlex.split('--dataset csv --task multilabel'), *flags]


def run(*flags, output, name='run'):
    """Probe in this process; the results."""
    main([*map(str, flags), '--output', str(output), '--experiment', name])
    return json.loads((output / name / report.RESULTS).read_text())


def comparable(folder):
    """The results without times."""
    results = json.loads((folder / report.RESULTS).read_text())
    del results['feature_seconds']
    for row in results['heads'].values():
        del row['seconds']
    return results


def validated(capsys, *flags):
    capsys.readouterr()
    validate.main([*map(str, flags), '--device', 'cpu', '-j', '0', '-b', '8'])
    return json.loads(capsys.readouterr().out.partition('--result\n')[2])


def assert_same_results(ours, theirs):
    """Compare all numbers to what sums in another order give in float32."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_same_results(ours[name], theirs[name])
    elif isinstance(ours, list):
        for pair in zip(ours, theirs, strict=True):
            assert_same_results(*pair)
    else:
        assert ours == (pytest.approx(theirs, rel=1e-4, abs=1e-4) if isinstance(ours, float) else theirs)


def test_every_head_is_scored_on_the_test_split_at_its_best_rate_and_saved_as_a_complete_model(
    scenes, tmp_path, capsys, caplog
):
    flags = multilabel(scenes, *FAST, '--test-split', 'test')
    results = run(*flags, output=tmp_path)
    printed = capsys.readouterr().out
    assert results['split'] == 'test' and results['chosen_on'] == 'validation' and len(results['runs']) == 12
    assert (tmp_path / 'run' / 'curves.png').read_bytes().startswith(b'\x89PNG')
    for label, row in results['heads'].items():
        assert f'| {label} | {row["mean"]:.2f} ± {row["std"]:.2f} | {row["parameters"]:,} |' in printed
        tried = {float(rate): value for rate, value in row['tried'].items()}
        assert row['lr'] == max(tried, key=tried.get) and len(tried) == 3
        assert row['at_end'] == (row['lr'] != 1e-2)
        assert row['at_end'] == any(label in record.getMessage() for record in caplog.records if '--lrs' in record.msg)
        path = tmp_path / 'run' / row['checkpoint']
        score = validated(capsys, scenes, '--dataset', 'csv', '--split', 'test', '--checkpoint', path)['map']
        assert min(abs(score - other) for other in row['scores']) < 1e-3


def test_the_range_of_rates_is_extended_while_the_best_one_is_at_its_end(scenes, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags = multilabel(scenes, *SMALL, *shlex.split('--heads max,linear --lrs 1e-5,1e-4 --seeds 2'))
    results = run(*flags, '--extend-lrs', 2, '--test-split', 'test', output=tmp_path)
    for label, row in results['heads'].items():
        tried = {float(rate): value for rate, value in row['tried'].items()}
        expected = [1e-5, 1e-4]  # in the order in which they are trained: of equal ones the first is the best
        while len(expected) < 4 and (best := max(expected, key=tried.get)) in (min(expected), max(expected)):
            expected.append(float(f'{best / 10 if best == min(expected) else best * 10:g}'))
        assert list(tried) == expected and len(tried) > 2
        assert row['lr'] == max(tried, key=tried.get)
        assert f'{label}: the best learning rate is at an end of the range' in caplog.text
        assert len([each for each in results['runs'] if each['head'] == label]) == 2 * len(tried)
    plain = run(*flags, output=tmp_path, name='plain')
    assert plain['runs'] == results['runs'][: len(plain['runs'])]


@pytest.mark.slow
def test_some_seeds_choose_the_rate_and_the_others_are_trained_at_it(scenes, tmp_path):
    flags = multilabel(scenes, *SMALL, *shlex.split('--heads max,ml_decoder_small:dim=16 --lrs 1e-3,1e-2 --seeds 3'))
    results = run(*flags, '--tuning-seeds', 1, '--test-split', 'test', output=tmp_path)
    whole = run(*flags, '--test-split', 'test', output=tmp_path, name='whole')
    everything = {(each['head'], each['lr'], each['seed']): each for each in whole['runs']}
    assert len(everything) == 12 and len(results['runs']) == 8
    for each in results['runs']:  # the runs are those of the whole grid
        expected = everything[each['head'], each['lr'], each['seed']]
        assert each['loss'] == pytest.approx(expected['loss'], rel=1e-5)
    for label, row in results['heads'].items():
        tried = {
            each['lr']: each['metrics']['1']['map']
            for each in results['runs']
            if (each['head'], each['seed']) == (label, 0)
        }
        assert row['lr'] == max(tried, key=tried.get) and len(row['scores']) == 3
        assert {each['seed'] for each in results['runs'] if (each['head'], each['lr']) == (label, row['lr'])} == {
            0,
            1,
            2,
        }
    with pytest.raises(ValueError, match='--tuning-seeds 4 is more than --seeds 3'):
        run(*flags, '--tuning-seeds', 4, output=tmp_path, name='more')


@pytest.mark.parametrize('ranks', [1, 2, 3])
@pytest.mark.parametrize('images', [3, 40, 240, 1640, 100_000])
def test_few_images_get_small_batches_and_enough_steps(images, ranks):
    world = World(torch.device('cpu'), size=ranks)
    options = _with_steps(parse_probe('', ['data', '--model', 'test_resnet']).train, images, world, cached=False)
    step = options.batch_size * ranks
    assert options.batch_size >= 1 and step <= 128 and options.epochs >= 10
    assert step > images or options.epochs * (images // step) >= 400
    assert images < 512 or images // step >= 32 or step < 16
    given = parse_probe('', ['data', '--model', 'test_resnet', '-b', '7', '--epochs', '3']).train
    assert _with_steps(given, images, world, cached=True) == given


def test_a_probe_of_few_images_takes_steps_enough(images, tmp_path):
    flags = '--model test_resnet --img-size 32 --device cpu -j 0 --heads linear --lrs 1e-2 --seeds 1 --val-interval 400'
    results = run(images, *flags.split(), '--cache', tmp_path / 'cache', output=tmp_path)
    assert results['epochs'] == 400 and results['heads']['linear']['mean'] is not None


def test_one_class_per_image(images, tmp_path, capsys):
    results = run(images, *FAST, '--heads', 'max,logsumexp', output=tmp_path)
    assert results['metric'] == 'top1' and results['split'] == 'validation'
    for row in results['heads'].values():
        score = validated(capsys, images, '--checkpoint', tmp_path / 'run' / row['checkpoint'])
        assert any(score['top1'] == pytest.approx(other) for other in row['scores'])


SWIN = shlex.split('--model-kwargs img_size=56 embed_dim=12 depths=(1,1) num_heads=(1,2)')
BACKBONES = {
    'ResNet': ('test_resnet', 64, []),
    'ConvNeXt': ('test_convnext', 64, []),
    'ViT with a class token': ('test_vit', 32, []),
    'ViT with a register': ('test_vit2', 32, []),
    'ViT with attention pooling': ('test_vit3', 32, ['--model-kwargs', 'img_size=32']),
    'Swin': ('swin_tiny_patch4_window7_224', 56, SWIN),
    'hybrid': ('test_coatnet', 32, ['--model-kwargs', 'img_size=32']),
}


@pytest.mark.parametrize('backbone', few(BACKBONES, ['ViT with a class token', 'Swin']))
def test_saved_models_have_the_logits_of_the_probe_and_its_very_backbone(backbone, scenes, tmp_path, monkeypatch):
    name, size, settings = BACKBONES[backbone]
    heads = [head for head in PROBES if head != 'class_token' or name == 'test_vit']
    seen = {}
    write = report.write_checkpoint

    def write_and_keep(path, options, model, run, **settings):
        write(path, options, model, run, **settings)
        with torch.no_grad():
            seen[path] = run.head.eval()(*model.read_tokens(x)), {k: v.clone() for k, v in model.state_dict().items()}

    x = torch.randn(2, 3, size, size)
    monkeypatch.setattr(report, 'write_checkpoint', write_and_keep)
    flags = f'--model {name} --img-size {size} --device cpu -j 0 -b 8 --epochs 1 --lrs 1e-3 --seeds 1'
    text = ','.join(f'{head}:dim=16:num_heads=4' if 'ml_decoder' in head else head for head in heads)
    run(*multilabel(scenes, *flags.split(), '--heads', text, *settings), output=tmp_path)
    assert len(seen) == len(heads)
    for path, (logits, weights) in seen.items():
        trained = load_model(path)
        with torch.no_grad():
            torch.testing.assert_close(trained.model(x), logits, rtol=1e-4, atol=1e-5)
        stored = trained.model.state_dict()
        assert all(torch.equal(stored[key], tensor) for key, tensor in weights.items())
        args = trained.options
        head = {'ml_decoder': {**args.ml_decoder_kwargs, 'decoder_embedding': args.decoder_embedding}}
        built = timm.create_model(
            name,
            num_classes=10,
            checkpoint_path=str(path),
            **args.model_kwargs,
            **(head if args.use_ml_decoder_head else {}),
        ).eval()
        with torch.no_grad():
            torch.testing.assert_close(built(x), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', PROBES)
def test_a_stored_model_is_rebuilt_with_its_head(name, tmp_path):
    options = {'dim': 16, 'num_heads': 4} if 'decoder' in name else {}
    model = timm.create_model('test_vit', num_classes=5, probe_head={'name': name, **options}).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=model._model_args)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=7).eval()
    assert other(x).shape == (2, 7)
    backbone = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=0)
    assert torch.equal(backbone.cls_token, model.cls_token)
    with pytest.raises(ValueError, match='no_such'):
        timm.create_model('test_vit', probe_head={'name': name, 'no_such': 1})


def test_a_run_is_the_same_whatever_other_heads_are_trained_beside_it(scenes, tmp_path):
    flags = multilabel(scenes, *SMALL, *shlex.split('--lrs 1e-2 --seeds 1 --heads'))
    run(*flags, 'max,ml_decoder:dim=16:num_heads=4,linear', output=tmp_path, name='all')
    run(*flags, 'ml_decoder:dim=16:num_heads=4', output=tmp_path, name='one')
    one, among = (
        next(row for row in comparable(tmp_path / name)['runs'] if 'decoder' in row['head']) for name in ('one', 'all')
    )
    assert one == among


@pytest.mark.slow
def test_two_ranks_give_the_table_of_one_and_read_and_write_the_same_cache(scenes, tmp_path):
    flags = [*multilabel(scenes, *FAST), '--test-split', 'test', '--heads', 'linear,ml_decoder:dim=16:num_heads=4']
    for cache in (['--cache', tmp_path / 'cache', '--cache-shard', '5', '--augment', '--cache-views', '2'], []):
        two = [PROGRAM, 'timm_mldecoder.probe', *flags, *cache, '-b', '4', '--output', tmp_path]
        call(*two, '--experiment', f'two {len(cache)}', processes=2).check_returncode()
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / 'cache').glob('*/*')}
        assert len(written) == 35  # two files of 10 + 3 + 3 shards, and a setup of each split
        run(*flags, *cache, output=tmp_path, name=f'one {len(cache)}')
        assert_same_results(*(comparable(tmp_path / f'{ranks} {len(cache)}') for ranks in ('one', 'two')))
        assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in written.items())


def test_cached_features_train_as_computed_ones_do(scenes, tmp_path):
    flags = multilabel(scenes, *FAST)
    computed = run(*flags, output=tmp_path, name='computed')
    cached = run(*flags, '--cache', tmp_path / 'cache', output=tmp_path, name='cached')
    for ours, theirs in zip(computed['runs'], cached['runs'], strict=True):
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=2e-2)  # float16 features


@pytest.mark.slow
def test_a_kill_while_writing_loses_no_finished_shard(scenes, tmp_path):
    cache = tmp_path / 'cache'
    more = ['--augment', '--cache-views', '10', '--cache', cache, '--cache-shard', '1', '--output', tmp_path]
    flags = [*multilabel(scenes, *FAST, '--epochs', '1'), *more]
    process = start(PROGRAM, 'timm_mldecoder.probe', *flags, '--experiment', 'killed', log=tmp_path / 'log')
    try:
        while len(list(cache.glob('train/*.tokens.npy'))) < 5:
            assert process.poll() is None, (tmp_path / 'log').read_text()
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finished = {path: path.stat().st_mtime_ns for path in cache.glob('train/*.tokens.npy')}
    assert 5 <= len(finished) < 10 * 24
    run(*flags, output=tmp_path, name='again')
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items())
    assert len(list(cache.glob('train/*.tokens.npy'))) == 10 * 24
    run(*flags, '--cache', tmp_path / 'other', output=tmp_path, name='whole')
    assert comparable(tmp_path / 'again') == comparable(tmp_path / 'whole')


ONE_RUN = [*SMALL, '--heads', 'linear', '--lrs', '1e-2', '--seeds', '1', '--epochs', '1']


def refuse_cache(named, *flags, output):
    with pytest.raises(ValueError, match=rf'(: |, ){named}(,| changed).*remove') as error:
        run(*flags, output=output, name='other')
    assert '\n' not in str(error.value)


@pytest.fixture(scope='module')
def cached(tmp_path_factory):
    """A folder with images, scenes, and a cache of each."""
    root = tmp_path_factory.mktemp('cached')
    write_images(root / 'images', train=8, validation=5, size=32)
    write_images(root / 'same images', train=8, validation=5, size=32)
    (root / 'names.txt').write_text('class_2\nclass_1\nclass_0\n')
    write_digit_scenes(root / 'scenes', 24, 12, size=32, sides=(8, 16), max_digits=3)
    names = (root / 'scenes' / 'classes.txt').read_text().split()
    (root / 'scenes' / 'other.txt').write_text('\n'.join(names[::-1]))
    (root / 'split.json').write_text(json.dumps({'seen': names[:7], 'unseen': names[7:]}))
    write_word_embeddings(root / 'words.safetensors', torch.eye(10), names)
    (root / 'split.txt').write_text((root / 'split.json').read_text())
    for kind in CACHED:
        run(*cached_run(root, kind), output=root, name=kind)
    return root


CACHED = {
    'images': '--data-dir {root}/images',
    'scenes': '--data-dir {root}/scenes --dataset csv --task multilabel',
    'seen classes': '--data-dir {root}/scenes --dataset csv --task multilabel --class-split {root}/split.json '
    '--score-classes seen',
}


def cached_run(root, kind, flags=''):
    """The flags of a run that reads the cache of a kind, and those that a test adds."""
    texts = [text.format(root=root) for text in shlex.split(f'{CACHED[kind]} {flags}')]
    return [*ONE_RUN, '--cache', root / f'cache of {kind}', *texts]


@pytest.mark.parametrize(
    ('kind', 'flags', 'named'),
    few(
        [
            ('images', '--model test_resnet --seed 7', 'weights'),
            ('images', '--crop-pct 0.5', 'transform'),
            ('images', "--data-dir '{root}/same images'", '--data-dir'),
            ('seen classes', '--class-split {root}/split.txt', '--class-split'),
            ('images', '--model-kwargs output_stride=16', 'model'),
            ('images', '--mean 0.1 0.1 0.1', 'transform'),
            ('images', '--interpolation nearest', 'transform'),
            ('images', '--augment', 'transform'),
            ('images', '--input-img-mode YCbCr', '--input-img-mode'),
            ('images', '--amp --amp-dtype bfloat16', 'precision'),
            ('images', '--fast-norm', 'precision'),
            ('images', '--val-split train', 'split'),
            ('images', '--dataset torch/image_folder', '--dataset'),
            ('images', '--class-map {root}/names.txt', '--class-map'),
            ('images', '--task multilabel --num-classes 3', '--task'),
            ('images', '--cache-shard 5', 'shard'),
            ('scenes', '--class-map {root}/scenes/other.txt', '--class-map'),
            ('scenes', '--class-split {root}/split.json --score-classes seen', '--class-split'),
            (
                'seen classes',
                '--heads ml_decoder_small --word-embeddings {root}/words.safetensors --score-classes all',
                '--score-classes',
            ),
        ],
        4,
    ),
)
def test_a_cache_of_another_model_transform_or_data_is_refused(kind, flags, named, cached):
    refuse_cache(named, *cached_run(cached, kind, flags), output=cached)


def test_a_cache_of_changed_files_is_refused(images, tmp_path):
    base = [images, *ONE_RUN, '--cache', tmp_path / 'cache']
    run(*base, output=tmp_path)
    os.utime(next(images.glob('train/*/*.png')), ns=(0, 0))
    refuse_cache('data', *base, output=tmp_path)


@pytest.mark.slow
def test_a_cache_of_other_difficult_labels_is_refused(tmp_path):
    write_voc(tmp_path / 'voc')
    flags = shlex.split('-b 2 --dataset voc2007 --task multilabel --cache')
    voc = [tmp_path / 'voc', *ONE_RUN, *flags, tmp_path / 'cache']
    run(*voc, output=tmp_path)
    refuse_cache('--voc-difficult', *voc, '--voc-difficult', 'positive', output=tmp_path)


@pytest.mark.slow
def test_a_cache_of_other_columns_or_records_is_refused(tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')

    def write(value):
        gray = [Image.new('RGB', (32, 32), (value + index,) * 3) for index in range(16)]
        rows = {'image': gray, 'negative': [ImageOps.invert(image) for image in gray]}
        rows |= {'label': [0, 1] * 8, 'half': [0] * 8 + [1] * 8, 'several': [[0, 1], [1]] * 8}
        kinds = {'image': datasets.Image(), 'negative': datasets.Image()}
        kinds |= {'label': datasets.ClassLabel(2), 'half': datasets.ClassLabel(2)}
        kinds |= {'several': datasets.Sequence(datasets.Value('int64'))}
        for split in ('train', 'validation'):
            table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
            table.to_parquet(tmp_path / 'records' / f'{split}.parquet')

    (tmp_path / 'records').mkdir()
    flags = f'--dataset hfds/{tmp_path}/records --data-dir {tmp_path}/hub --input-key image'
    base = [*ONE_RUN, *flags.split(), '--cache', tmp_path / 'cache']
    several = [
        *base,
        *shlex.split('--task multilabel --num-classes 2 --target-key several --cache'),
        tmp_path / 'several',
    ]
    write(0)
    run(*base, output=tmp_path)
    run(*base, output=tmp_path, name='again')
    run(*several, output=tmp_path, name='several')
    refuse_cache('--input-key', *base, '--input-key', 'negative', output=tmp_path)
    refuse_cache('--target-key', *base, '--target-key', 'half', output=tmp_path)
    refuse_cache('--num-classes', *several, '--num-classes', '3', output=tmp_path)
    refuse_cache('--target-format', *several, '--target-format', 'multihot', output=tmp_path)
    write(100)
    refuse_cache('data', *base, output=tmp_path)


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(images, tmp_path, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr('shutil.disk_usage', lambda path: usage(100, 0, 100))
    with pytest.raises(RunFailed, match='29,952 more bytes'):
        run(images, *SMALL, '--heads', 'linear', '--cache', tmp_path / 'cache', output=tmp_path)
    assert not list((tmp_path / 'cache').glob('*/*.npy'))


def test_each_epoch_reads_its_own_view(images, tmp_path):
    flags = [images, *SMALL, '--heads', 'linear', '--lrs', '1e-2', '--seeds', '1', '--augment']
    two, one = (
        run(*flags, '--cache', tmp_path / views, '--cache-views', views, output=tmp_path, name=views)
        for views in ('2', '1')
    )
    assert two['runs'][0]['loss'][0] == one['runs'][0]['loss'][0]
    assert two['runs'][0]['loss'][1] != one['runs'][0]['loss'][1]


@pytest.fixture
def words(scenes, tmp_path):
    names = (scenes / 'classes.txt').read_text().split()
    generator = torch.Generator().manual_seed(0)
    write_word_embeddings(tmp_path / 'words.safetensors', torch.randn(len(names), 12, generator=generator), names)
    (tmp_path / 'split.json').write_text(json.dumps({'seen': names[:7], 'unseen': names[7:]}))
    return tmp_path


def test_text_queries_are_trained_on_seen_classes_and_score_unseen_ones(scenes, words, tmp_path, capsys):
    text = ['--word-embeddings', words / 'words.safetensors', '--class-split', words / 'split.json']
    flags = multilabel(scenes, *SMALL, '--lrs', '1e-2', '--seeds', '1')
    heads = ['--heads', 'ml_decoder:dim=16:num_heads=4,ml_decoder_small:dim=16']
    results = run(*flags, *text, *heads, '--random-queries', '2', output=tmp_path)
    assert results['metric'] == 'zsl_map'
    for row in results['heads'].values():
        checkpoint = tmp_path / 'run' / row['checkpoint']
        score = validated(capsys, scenes, '--dataset', 'csv', '--checkpoint', checkpoint)
        assert score['zsl_map'] == pytest.approx(row['mean'], abs=1e-3)
    with pytest.raises(ValueError, match='linear'):
        run(*flags, *text, '--heads', 'linear,ml_decoder_small', output=tmp_path, name='other')
    with pytest.raises(ValueError, match='--word-embeddings'):
        run(*flags, *text[:2], '--heads', 'linear', output=tmp_path, name='other')


def test_backbones_from_files(scenes, images, tmp_path, monkeypatch):
    heads = ('linear', 'ml_decoder_small:dim=16')
    flags = ['--heads', ','.join(heads), '--lrs', '1e-2', '--seeds', '1', '--test-split', 'test']
    run(images, *SMALL, *flags[:-2], '--model-kwargs', 'output_stride=16', output=tmp_path, name='first')
    first = tmp_path / 'first' / 'linear.pth.tar'
    weights = load_model(first).model.state_dict()
    stored = {name: tensor for name, tensor in weights.items() if not name.startswith('fc.')}
    model = timm.create_model('test_resnet', num_classes=3, output_stride=16)
    model.load_state_dict(stored, strict=False)
    timm.models.save_for_hf(model, tmp_path / 'folder', model_args={'output_stride': 16})
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    sources = {
        'train.py': f'--initial-checkpoint {first}',
        'folder': f'--model local-dir:{tmp_path / "folder"} --pretrained',
        'file': f'--model test_resnet --model-kwargs output_stride=16 --pretrained '
        f'--pretrained-path {tmp_path / "weights.pth"}',
    }
    losses, read = {}, []
    load = torch.load
    monkeypatch.setattr(
        torch, 'load', lambda path, *args, **kwargs: read.append(str(path)) or load(path, *args, **kwargs)
    )
    for name, source in sources.items():
        device = ['--device', 'cpu', '-j', '0', '-b', '8', '--epochs', '1', '--img-size', '64']
        results = run(*multilabel(scenes, *device, *source.split(), *flags), output=tmp_path, name=name)
        losses[name] = results['runs'][0]['loss'][0]
        assert read.count(str(first)) == (name == 'train.py'), 'a checkpoint is read once'
        for head in results['heads'].values():
            trained = load_model(tmp_path / name / head['checkpoint'])
            assert all(torch.equal(trained.model.state_dict()[key], tensor) for key, tensor in stored.items()), name
        read.clear()
    assert losses['train.py'] == losses['folder'] == losses['file']


def test_a_diverged_rate_is_not_chosen(images, tmp_path):
    flags = shlex.split('--heads linear --lrs 1e-2,1e30 --seeds 1 --opt sgd')
    results = run(images, *SMALL, *flags, '--epochs', '3', output=tmp_path)
    assert results['heads']['linear']['lr'] == 1e-2 and results['heads']['linear']['mean'] > 0


@pytest.mark.parametrize(
    ('flags', 'named'),
    [
        ('--heads class_token', 'class_token'),
        ('--heads no_such_head', 'logsumexp'),
        ('--heads max,max', 'max'),
        ('--heads linear:no_such=1', 'no_such'),
        ('--lr 0.1', '--lrs'),
        ('--lrs 0', '--lrs'),
        ('--freeze-backbone', '--freeze-backbone'),
        ('--use-ml-decoder-head 1', '--heads'),
        ('--mixup 0.1', '--mixup'),
        ('--hflip 0', '--augment'),
        ('--cache-views 2', '--cache'),
        ('--cache-shard 2', '--cache'),
        ('--val-split=', '--val-split'),
        ('--no-such-flag', '--no-such-flag'),
        ('-b 100', '--batch-size'),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(flags, named, images, tmp_path):
    with pytest.raises(ValueError, match=named):
        run(images, *SMALL, *flags.split(), output=tmp_path)


def test_results_are_not_overwritten(images, tmp_path):
    flags = [images, *SMALL, '--heads', 'linear', '--lrs', '1e-2', '--seeds', '1']
    run(*flags, output=tmp_path)
    assert 'optimizer' in read_checkpoint(tmp_path / 'run' / 'linear.pth.tar')
    with pytest.raises(ValueError, match='--experiment'):
        run(*flags, output=tmp_path)


@pytest.mark.slow
def test_a_process_with_workers_ends(tmp_path):
    """Workers ignore SIGTERM, so that whoever starts them must end them."""
    write_images(tmp_path / 'data', train=8, validation=4, classes=2, size=32)
    flags = '--model test_resnet --img-size 32 --heads linear --lrs 1e-2 --seeds 1 --epochs 1 -b 4 -j 1 --device cpu'
    process = call('tests/programs/run_module.py', 'timm_mldecoder.probe', 'data', *flags.split(), folder=tmp_path)
    assert process.returncode == 0, process.stderr
    assert '| linear |' in process.stdout
