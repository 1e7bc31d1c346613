"""Zero-shot runs from the command line: train on seen classes, score unseen ones, change the classes, score again."""

import csv
import json
import logging
import shlex
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from timm.models import save_for_hf

from benchmarks import zero_shot as benchmark
from timm_mldecoder.data import shapes
from timm_mldecoder.data.word_embeddings import write_word_embeddings
from timm_mldecoder.engine.flags import parse_train
from timm_mldecoder.losses import RandomQueryLoss, create_loss
from timm_mldecoder.metrics.zero_shot import ZeroShotEvaluator
from train import main as train
from validate import main as validate

HPARAMS = Path(__file__).resolve().parents[1] / 'hparams' / 'nus_wide'
TRAIN = shlex.split("""
    data --dataset csv --task multilabel --model test_byobnet --img-size 48 --device cpu -j 0 -b 16 --no-aug
    --use-ml-decoder-head 1 --decoder-embedding 32 --ml-decoder-kwargs num_heads=4 dim_feedforward=64
    --word-embeddings data/words.safetensors --class-split data/split.json --opt adamw --lr 2e-3 --epochs 1
    --warmup-epochs 0 --output out --experiment run
""")
SCORE = shlex.split('data --dataset csv --device cpu -j 0 -b 16 --checkpoint out/run/last.pth.tar')


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data():
    return shapes.write_shapes('data', 48, 32)


def scores(capsys, *arguments: str) -> dict[str, float]:
    capsys.readouterr()
    validate([*SCORE, *arguments])
    return json.loads(capsys.readouterr().out.partition('--result')[2])


@pytest.mark.parametrize('way', ['', '--num-of-groups 12', '--random-queries 4 --query-noise 0.1 --model-ema'])
def test_train_then_score_unseen_and_changed_classes(data, capsys, way):
    train([*TRAIN, *way.split()])
    with open('out/run/summary.csv') as file:
        row = next(csv.DictReader(file))
    assert 0 < float(row['eval_zsl_map']) < 100 and 0 < float(row['eval_gzsl_map']) < 100

    # what the checkpoint was ranked by comes out again, to the last digit
    again = scores(capsys)
    assert again['zsl_map'] == float(row['eval_zsl_map']) and again['gzsl_f1_top5'] == float(row['eval_gzsl_f1_top5'])
    # the unseen alone: the same where every class has a query of its own
    alone = scores(capsys, '--score-classes', 'unseen')
    if 'groups' not in way:
        assert alone['map'] == pytest.approx(again['zsl_map'], abs=1e-6)

    # seen classes are known to the checkpoint; unseen ones are not, without a file
    assert 'map' in scores(capsys, '--score-classes', 'seen', '--word-embeddings', '')
    unseen = json.loads(Path('data/split.json').read_text())['unseen']
    with pytest.raises(ValueError, match=f'no embedding of {unseen[0]}, {unseen[1]}'):
        validate([*SCORE, '--word-embeddings', ''])


def test_a_saved_folder_is_scored_on_classes_of_its_own_or_other_ones(data, capsys):
    head = dict(decoder_embedding=32, num_heads=4, word_embeddings='data/words.safetensors')
    model = timm.create_model('test_byobnet', ml_decoder=head)
    save_for_hf(model, 'saved')
    data_flags = 'data --dataset csv --task multilabel --img-size 48 --device cpu -j 0'
    command = f'{data_flags} --model local-dir:saved --pretrained'
    capsys.readouterr()
    validate(command.split())
    own = json.loads(capsys.readouterr().out.partition('--result')[2])
    validate([*command.split(), '--word-embeddings', 'data/words.safetensors'])
    assert json.loads(capsys.readouterr().out.partition('--result')[2])['map'] == own['map']


def test_nus_wide_recipes_parse_and_train_on_files_as_distributed(caplog):
    lines = ['path,labels,split']
    for number in range(12):
        Image.new('RGB', (32, 32), (20 * number, 0, 0)).save(f'{number}.jpg')
        labels = ', '.join(['sky', 'zebra', 'tram'][number % 3 :][:2])
        lines.append(f'{number}.jpg,"[{labels}]",{"val" if number % 4 == 0 else "train"}')
    Path('data.csv').write_text('\n'.join(lines) + '\n')
    Path('benchmark_81_v0.json').write_text('{"train class": ["sky", "tram"], "test class": ["zebra"]}')
    write_word_embeddings('words.safetensors', torch.randn(3, 300), ['sky', 'tram', 'zebra'])
    for name, groups in [('full', -1), ('groups', 100)]:
        recipe = ['.', '--config', str(HPARAMS / f'tresnet_m_224_{name}.yaml'), '--device', 'cpu', '--word-embeddings',
                  'words.safetensors', '--class-split', 'benchmark_81_v0.json']  # fmt: skip
        with caplog.at_level(logging.WARNING):
            options = parse_train(recipe)
        assert not [record for record in caplog.records if 'No effect' in record.message]
        assert (options.num_of_groups, options.weight_decay, options.img_size) == (groups, 1e-4, 224)
        assert options.eval_metric == 'zsl_map' and options.random_queries and options.query_noise
        smaller = '--model test_byobnet --img-size 32 -b 2 -j 0 --epochs 2 --warmup-epochs 1 --experiment'
        few = ['--decoder-embedding', '32', '--num-of-groups', '1' if groups > 0 else '-1']
        train([*recipe, *smaller.split(), name, *few])
        with open(f'output/train/{name}/summary.csv') as file:
            row = next(csv.DictReader(file))
        assert {'eval_zsl_map', 'eval_gzsl_map'} < row.keys() and row['eval_gzsl_map'] != row['eval_zsl_map']


@pytest.mark.parametrize('flags, message', [
    ('--dataset csv --class-split none.json', 'none.json'),
    ('--dataset csv --word-embeddings none.safetensors', 'none.safetensors'),
    ('--dataset csv --word-embeddings few.safetensors', 'plain red disc'),
    ('--num-of-groups 12 --ml-decoder-kwargs classifier=learned', '75.*60'),
    ('--use-ml-decoder-head 0', '--use-ml-decoder-head 1'),
    ('--dataset csv --num-classes 7', '60.*7'),
])  # fmt: skip
def test_mistakes_are_named(data, flags, message):
    write_word_embeddings('few.safetensors', torch.randn(1, 4), ['plain red square'])
    with pytest.raises(ValueError, match=message):
        train([*TRAIN, *flags.split()])


@pytest.mark.parametrize('flags', ['', '--ablations'])
def test_the_benchmark_prints_a_row_a_way(flags, capsys):
    benchmark.main(f'--seeds 2 --scenes 32 --epochs 1 --validation-scenes 20 {flags}'.split())
    rows = [line.split('|')[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    ways = benchmark.ABLATIONS if flags else benchmark.WAYS
    assert [row[0].strip() for row in rows[2:]] == [*ways, 'chance']
    assert {len(row) for row in rows} == {3 if flags else 5}
    assert all(0 <= float(cell.split('±')[0]) <= 100 for row in rows[2:-1] for cell in row[1:])


def test_zero_shot_metrics_are_those_of_the_columns():
    torch.manual_seed(0)
    logits, target = torch.randn(40, 9), (torch.rand(40, 9) < 0.3).float()
    evaluator = ZeroShotEvaluator(5)
    for part in (slice(0, 15), slice(15, 40)):
        evaluator.update(logits[part], target[part])
    metrics = evaluator.compute()
    assert tuple(metrics) == evaluator.metric_names
    for kind, columns in (('zsl', slice(5, 9)), ('gzsl', slice(0, 9))):
        scored, wanted = logits[:, columns], target[:, columns]
        expected = average_precision_score(wanted.numpy(), scored.numpy(), average='macro')
        assert metrics[f'{kind}_map'] == pytest.approx(100 * expected)
        for k in (3, min(5, scored.shape[1])):
            hit = sum(wanted[i, j].item() for i in range(40) for j in scored[i].argsort(descending=True)[:k])
            precision, recall = hit / (40 * k), hit / wanted.sum().item()
            name = f'{kind}_{{}}_top{3 if k == 3 else 5}'
            assert metrics[name.format('p')] == pytest.approx(100 * precision)
            assert metrics[name.format('r')] == pytest.approx(100 * recall)
            assert metrics[name.format('f1')] == pytest.approx(200 * precision * recall / (precision + recall))


def test_random_queries_are_positive_targets():
    logits, target = torch.randn(3, 6), (torch.rand(3, 4) < 0.5).float()
    for name in ('bce', 'asl'):
        loss = create_loss(name)
        whole = torch.cat([target, torch.ones(3, 2)], dim=1)
        assert torch.equal(RandomQueryLoss(loss)(logits, target), loss(logits, whole))
