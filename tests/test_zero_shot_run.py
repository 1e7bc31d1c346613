"""Zero-shot runs from the command line: train on seen classes, score unseen ones, change the classes, score again."""

import csv
import json
import math
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from marks import few
from sklearn.metrics import average_precision_score
from timm.models import save_for_hf
from torch import distributed as dist
from torch import multiprocessing as mp

from benchmarks import shapes
from timm_mldecoder.data.word_embeddings import write_word_embeddings
from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.evaluation.evaluate import evaluate
from timm_mldecoder.losses import RandomQueryLoss, create_loss
from timm_mldecoder.metrics.zero_shot import ZeroShotEvaluator
from timm_mldecoder.runtime.log import EvalLog
from train import main as train
from validate import main as validate

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


@pytest.fixture
def data():
    return shapes.write_shapes('data', 48, 32)


def scores(capsys, *arguments: str) -> dict[str, float]:
    capsys.readouterr()
    validate([*SCORE, *arguments])
    return json.loads(capsys.readouterr().out.partition('--result')[2])


@pytest.mark.parametrize('way', few(['--random-queries 4 --query-noise 0.1 --model-ema', '', '--num-of-groups 12'], 1))
def test_train_then_score_unseen_and_changed_classes(data, capsys, way):
    train([*TRAIN, *way.split()])
    with open('out/run/summary.csv') as file:
        row = next(csv.DictReader(file))
    assert 0 < float(row['eval_zsl_map']) < 100 and 0 < float(row['eval_gzsl_map']) < 100

    # what the checkpoint was ranked by comes out again, to the last digit
    again = scores(capsys)
    assert again['zsl_map'] == float(row['eval_zsl_map']) and again['gzsl_f1_top5'] == float(row['eval_gzsl_f1_top5'])
    # the unseen alone, on the images that show one
    alone = scores(capsys, '--score-classes', 'unseen')
    assert alone['map'] == pytest.approx(again['zsl_map'], rel=1e-6)
    assert alone['of1_top3'] == pytest.approx(again['zsl_f1_top3'], rel=1e-6)

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


def zero_shot_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets of 40 images, 5 seen and 4 unseen classes; many images show no unseen class."""
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(40, 9, generator=generator) < 0.15).float()
    return torch.randn(40, 9, generator=generator), target


def reference(kind: str, logits: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Metrics of all given images and classes, by scikit-learn and plain loops."""
    metrics = {f'{kind}_map': 100 * average_precision_score(target.numpy(), logits.numpy(), average='macro')}
    for name, k in (('top3', 3), ('top5', min(5, logits.shape[1]))):
        pairs = list(zip(target.tolist(), logits.tolist(), strict=True))
        hits = [row[i] for row, scores in pairs for i in sorted(range(len(row)), key=lambda i: -scores[i])[:k]]
        precision, recall = sum(hits) / len(hits), sum(hits) / target.sum().item()
        metrics[f'{kind}_p_{name}'], metrics[f'{kind}_r_{name}'] = 100 * precision, 100 * recall
        metrics[f'{kind}_f1_{name}'] = 200 * precision * recall / (precision + recall)
    return metrics


def zero_shot_reference(logits: torch.Tensor, target: torch.Tensor, alone: torch.Tensor) -> dict[str, float]:
    """The paper's protocol: the unseen classes on the images that show one, all classes on all images."""
    shows = [index for index, row in enumerate(target[:, 5:].tolist()) if 1 in row]
    assert 0 < len(shows) < len(target)
    return reference('zsl', alone[shows], target[shows, 5:]) | reference('gzsl', logits, target)


@pytest.mark.parametrize('separate', [False, True])
def test_zero_shot_metrics_are_those_of_the_paper(separate):
    logits, target = zero_shot_data()
    alone = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)) if separate else logits[:, 5:]
    expected = zero_shot_reference(logits, target, alone)
    evaluator = ZeroShotEvaluator(5, max_samples=40)
    padding = torch.ones(3, 9)
    parts = [(logits[:15], target[:15], alone[:15]), (logits[15:], target[15:], alone[15:]),
             (padding, padding, padding[:, 5:])]  # fmt: skip
    for *both, unseen in parts:
        evaluator.update(*both, unseen if separate else None)
    metrics = evaluator.compute()
    assert tuple(metrics) == evaluator.metric_names
    del metrics['loss']
    assert metrics == pytest.approx(expected, rel=1e-9)


def test_without_an_image_of_an_unseen_class_zsl_is_nan_and_gzsl_is_not():
    logits, target = zero_shot_data()
    target[:, 5:] = 0
    evaluator = ZeroShotEvaluator(5)
    evaluator.update(logits, target)
    assert {math.isnan(value) for name, value in evaluator.compute().items() if name.startswith('zsl')} == {True}
    assert not math.isnan(evaluator.compute()['gzsl_map'])


def rank_main(rank: int, folder: str) -> None:
    """Rank 0 has 30 images, rank 1 has 10 images and 3 of padding; only rank 0 sees unseen classes."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    logits, target = zero_shot_data()
    target[30:, 5:] = 0
    evaluator = ZeroShotEvaluator(5, max_samples=[30, 10][rank])
    for part in [slice(0, 17), slice(17, 30)] if rank == 0 else [slice(30, 40), slice(0, 3)]:
        evaluator.update(logits[part], target[part])
    torch.save(evaluator.compute(distributed=True), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_ranks_give_the_zero_shot_metrics_of_one(tmp_path):
    mp.start_processes(rank_main, args=(str(tmp_path),), nprocs=2, start_method='fork')
    logits, target = zero_shot_data()
    target[30:, 5:] = 0
    evaluator = ZeroShotEvaluator(5)
    evaluator.update(logits, target)
    for rank in range(2):
        assert torch.load(tmp_path / f'{rank}.pt') == pytest.approx(evaluator.compute(), rel=1e-12)


class TwoBatches:
    """A loader of two batches."""

    bad_images = ()

    def __init__(self, images: torch.Tensor, target: torch.Tensor) -> None:
        self._batches = list(zip(images.split(25), target.split(25), strict=True))

    def __len__(self) -> int:
        return len(self._batches)

    def batches(self) -> list:
        return self._batches


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    'way', [{}, dict(num_of_groups=3), dict(self_attention=True), dict(num_of_groups=3, learnable_queries=True)]
)
def test_zsl_scores_the_unseen_classes_alone_whatever_the_head(way, compiled):
    torch.manual_seed(0)
    words, (_, target) = torch.randn(9, 12), zero_shot_data()
    images = torch.randn(40, 3, 32, 32)
    head = dict(
        decoder_embedding=32, num_heads=4, dim_feedforward=64, word_embeddings=words, class_names=list('abcdefghi')
    )
    model = timm.create_model('test_resnet', ml_decoder={**head, **way}).eval()
    evaluator = ZeroShotEvaluator(5)
    runs = torch.compile(model, backend='eager') if compiled else model
    with join_world('cpu') as world:
        loader = TwoBatches(images, target)
        log = EvalLog('Test', evaluator, len(loader), 1, False)
        found = evaluate(runs, loader, evaluator, world, autocast=nullcontext, log=log)
    assert model.get_classifier().class_names == list('abcdefghi')  # all classes are back

    with torch.inference_mode():
        logits = model(images)
        model.get_classifier().set_word_embeddings(words[5:])
        alone = model(images)
    assert torch.allclose(logits[:, 5:], alone, rtol=1e-4, atol=1e-5) == (way == {})
    del found['loss']
    assert found == pytest.approx(zero_shot_reference(logits, target, alone), rel=1e-6)


def test_random_queries_are_positive_targets():
    logits, target = torch.randn(3, 6), (torch.rand(3, 4) < 0.5).float()
    for name in ('bce', 'asl'):
        loss = create_loss(name)
        whole = torch.cat([target, torch.ones(3, 2)], dim=1)
        assert torch.equal(RandomQueryLoss(loss)(logits, target), loss(logits, whole))
