"""Multi-label metrics against scikit-learn, timm and plain loops; exact whatever the batches, ranks and chunks."""

import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    matthews_corrcoef,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
)
from timm.task.evaluator import MultiLabelClassificationEvaluator
from torch import distributed as dist

from timm_mldecoder.metrics import MultiLabelEvaluator, average_precision, best_thresholds
from timm_mldecoder.metrics import multilabel as metrics_module

NUM_IMAGES, NUM_CLASSES = 57, 7


def make_data(ignored: float = 0.0, ties: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets; the last class never occurs."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(NUM_IMAGES, NUM_CLASSES, generator=generator)
    if ties:
        logits = (2 * logits).round() / 2
    target = (torch.rand(NUM_IMAGES, NUM_CLASSES, generator=generator) < 0.3).float()
    target[:, -1] = 0
    target[torch.rand(target.shape, generator=generator) < ignored] = -1
    return logits, target


def evaluate(logits, target, batch_size: int = 8, **options) -> MultiLabelEvaluator:
    evaluator = MultiLabelEvaluator(**options)
    for batch in zip(logits.split(batch_size), target.split(batch_size), strict=True):
        evaluator.update(*batch)
    return evaluator


@pytest.mark.parametrize('ignored', [0.0, 0.4])
def test_average_precision_is_sklearns_on_the_annotated_entries(ignored):
    logits, target = make_data(ignored)
    result = average_precision(logits, target)
    for column in range(NUM_CLASSES - 1):
        known = target[:, column] >= 0
        expected = average_precision_score(target[known, column], logits[known, column])
        assert result[column].item() == pytest.approx(expected, abs=1e-12)
    assert result[-1] == 0  # no positive


def test_precision_recall_and_f1_are_sklearns():
    logits, target = make_data(ties=False)  # which of two equal scores is among the top 3 is undefined
    result = evaluate(logits, target, top_k=(3, 5)).compute()
    top = {k: np.zeros(target.shape, dtype=int) for k in (3, 5)}
    for k, predicted in top.items():
        np.put_along_axis(predicted, logits.topk(k).indices.numpy(), 1, axis=1)
    for suffix, predicted in {'': (logits >= 0).int().numpy(), '_top3': top[3], '_top5': top[5]}.items():
        cp, cr, *_ = precision_recall_fscore_support(target, predicted, average='macro', zero_division=0)
        op, recall, of1, _ = precision_recall_fscore_support(target, predicted, average='micro', zero_division=0)
        expected = dict(cp=cp, cr=cr, cf1=2 * cp * cr / (cp + cr), op=op, **{'or': recall}, of1=of1)
        for name, value in expected.items():
            assert result[name + suffix] == pytest.approx(100 * value, abs=1e-9), name + suffix
    for average in ('micro', 'macro'):
        expected = f1_score(target, (logits >= 0).int(), average=average, zero_division=0)
        assert result[f'{average}_f1'] == pytest.approx(100 * expected, abs=1e-9)


def test_without_ignored_labels_the_values_are_timms():
    logits, target = make_data()
    timm_evaluator = MultiLabelClassificationEvaluator()
    timm_evaluator.update(logits, target)
    result = evaluate(logits, target).compute()
    for name, value in timm_evaluator.compute().items():
        assert result[name] == pytest.approx(value, rel=1e-6), name


def test_ignored_entries_change_nothing_whatever_their_score():
    logits, target = make_data(ignored=0.4)
    expected = evaluate(logits, target).compute()
    louder = torch.where(target < 0, 50.0, logits)
    assert evaluate(louder, target).compute() == pytest.approx(expected, rel=1e-12)
    # a class nobody annotated in an image cannot be among its top 3
    one = evaluate(torch.tensor([[9.0, 1.0, 0.0, -1.0, -2.0]]), torch.tensor([[-1.0, 0, 0, 1, 0]])).compute()
    assert one['op_top3'] == pytest.approx(100 / 3)


def test_partial_maps_are_those_of_the_selective_losss_code():
    """The definition of the code of arXiv 2110.10955, as a plain loop over the classes."""
    logits, target = make_data(ignored=0.4, ties=False)
    target[:, 0] = torch.where(target[:, 0] == 0, -1, target[:, 0])  # no negative
    target[:, 1] = -1  # not annotated
    result = evaluate(logits, target).compute()
    found, weights = [], []
    for scores, labels in zip(logits.T.tolist(), target.T.tolist(), strict=True):
        ranked = [label for _, label in sorted(zip(scores, labels, strict=True), reverse=True) if label >= 0]
        if 1 in ranked and 0 in ranked:
            places = [place for place, label in enumerate(ranked, 1) if label == 1]
            found.append(sum(number / place for number, place in enumerate(places, 1)) / len(places))
            weights.append(len(places))
    assert len(found) == NUM_CLASSES - 3
    weighted = sum(weight * value for weight, value in zip(weights, found, strict=True)) / sum(weights)
    assert result['map_partial'] == pytest.approx(100 * sum(found) / len(found), rel=1e-12)
    assert result['map_weighted'] == pytest.approx(100 * weighted, rel=1e-12)
    assert result['map_partial'] != pytest.approx(result['map'], rel=1e-3)


def test_without_a_class_of_positives_and_negatives_the_partial_maps_are_0():
    result = evaluate(torch.randn(4, 2), torch.tensor([[1.0, 0]] * 4)).compute()
    assert (result['map_partial'], result['map_weighted'], result['map']) == (0, 0, 50)


def test_metric_names_are_those_computed():
    logits, target = make_data()
    evaluator = evaluate(logits, target, top_k=(1, 5))
    assert tuple(evaluator.compute()) == evaluator.metric_names
    assert evaluator.default_metric in evaluator.metric_names


@pytest.mark.parametrize('chunk', [1, 100, 150])
def test_chunks_of_classes_do_not_show(monkeypatch, chunk):
    logits, target = make_data(ignored=0.2)
    expected = evaluate(logits, target)
    expected_metrics, expected_thresholds = expected.compute(), expected.tune_thresholds()
    monkeypatch.setattr(metrics_module, 'CHUNK', chunk)
    evaluator = evaluate(logits, target)
    assert evaluator.compute() == pytest.approx(expected_metrics, rel=1e-12)
    torch.testing.assert_close(evaluator.class_ap, expected.class_ap, rtol=1e-12, atol=0)
    assert torch.equal(evaluator.tune_thresholds(), expected_thresholds)


def test_padding_of_a_sampler_is_left_out():
    logits, target = make_data()
    expected = evaluate(logits[:50], target[:50]).compute()
    assert evaluate(logits, target, max_samples=50).compute() == expected


def test_nan_scores_make_map_nan():
    logits, target = make_data()
    logits[3, 2] = math.nan
    assert math.isnan(evaluate(logits, target).compute()['map'])


@pytest.mark.parametrize('ignored', [0.0, 0.4])
def test_tuned_thresholds_reach_the_best_f1_of_all_thresholds(ignored):
    logits, target = make_data(ignored)
    scores = logits.sigmoid()
    thresholds = best_thresholds(scores, target)
    for column in range(NUM_CLASSES - 1):
        known = target[:, column] >= 0
        truth, score = target[known, column].numpy(), scores[known, column].double().numpy()
        best = max(f1_score(truth, score >= cut) for cut in np.unique(score))
        assert f1_score(truth, score >= thresholds[column].item()) == pytest.approx(best, abs=1e-12)
    assert thresholds[-1] == 0.5  # no positive

    plain, tuned = evaluate(logits, target).compute(), evaluate(logits, target, threshold=thresholds).compute()
    assert tuned['macro_f1'] > plain['macro_f1']


@pytest.mark.parametrize('ignored', [0.0, 0.4])
def test_thresholds_reach_the_best_mcc_and_the_highest_recall_at_a_precision(ignored):
    logits, target = make_data(ignored)
    scores = logits.sigmoid()
    mcc, precise = (best_thresholds(scores, target, metric) for metric in ('mcc', 'precision=0.7'))
    for column in range(NUM_CLASSES - 1):
        known = target[:, column] >= 0
        truth, score = target[known, column].numpy(), scores[known, column].double().numpy()
        best = max(matthews_corrcoef(truth, score >= cut) for cut in np.unique(score))
        assert matthews_corrcoef(truth, score >= mcc[column].item()) == pytest.approx(best, abs=1e-12)
        both = [(precision_score(truth, score >= cut), recall_score(truth, score >= cut)) for cut in np.unique(score)]
        reached = [recall for precision, recall in both if precision >= 0.7]
        found = score >= precise[column].item()
        if reached:
            assert (precision_score(truth, found) >= 0.7, recall_score(truth, found)) == (True, max(reached))
        else:
            assert precision_score(truth, found) == max(precision for precision, _ in both)
    with pytest.raises(ValueError, match='precision=2: expected f1, mcc'):
        best_thresholds(scores, target, 'precision=2')


@pytest.mark.parametrize('metric', ['f1', 'mcc', 'precision=0.6'])
def test_the_classes_of_a_category_share_the_best_threshold(metric):
    logits, target = make_data(0.3)
    categories = torch.arange(NUM_CLASSES) % 2
    thresholds = evaluate(logits, target).tune_thresholds(metric=metric, categories=categories)
    for category in (0, 1):
        columns = categories == category
        (threshold,) = set(thresholds[columns].tolist())
        known = target[:, columns] >= 0
        truth, score = target[:, columns][known].numpy(), logits.sigmoid()[:, columns][known].numpy()

        def quality(cut: float, truth=truth, score=score) -> float:
            found = score >= np.float32(cut)
            if metric == 'f1':
                return f1_score(truth, found)
            if metric == 'mcc':
                return matthews_corrcoef(truth, found)
            precision = precision_score(truth, found, zero_division=0)
            return recall_score(truth, found) if precision >= 0.6 else precision - 1

        assert quality(threshold) == pytest.approx(max(quality(cut / 1000) for cut in range(1001)), abs=1e-12)


def test_a_threshold_between_neighbouring_floats_still_separates_them():
    low = torch.tensor(0.3)
    high = torch.nextafter(low, torch.tensor(1.0))
    threshold = best_thresholds(torch.stack([low, high])[:, None], torch.tensor([[0.0], [1.0]])).float()
    assert low < threshold <= high


def test_classes_whose_score_says_nothing_are_named(caplog):
    target = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 0.0]])
    evaluate(torch.zeros(2, 3), target).compute()
    assert '2 of 3 classes have no negative image and count as AP 100' in caplog.text


def rank_main(rank: int, world_size: int, folder: str) -> None:
    """Rank 1 has fewer images than rank 0, rank 2 has none."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world_size)
    metrics_module.CHUNK = 100
    logits, target = make_data(ignored=0.2)
    part = [slice(0, 40), slice(40, None), slice(0, 0)][rank]
    evaluator = evaluate(logits[part], target[part])
    result = dict(
        metrics=evaluator.compute(distributed=True),
        class_ap=evaluator.class_ap,
        thresholds=evaluator.tune_thresholds(distributed=True),
        of_categories=evaluator.tune_thresholds(distributed=True, categories=torch.arange(NUM_CLASSES) % 2),
        mean=evaluator.per_class(lambda logits, _: logits.mean(0), distributed=True),
    )
    torch.save(result, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_three_ranks_give_what_one_gives(tmp_path):
    mp.spawn(rank_main, args=(3, str(tmp_path)), nprocs=3)
    logits, target = make_data(ignored=0.2)
    evaluator = evaluate(logits, target)
    expected = evaluator.compute()
    for rank in range(3):
        result = torch.load(tmp_path / f'{rank}.pt')
        assert result['metrics'] == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(result['class_ap'], evaluator.class_ap, rtol=1e-12, atol=0)
        assert torch.equal(result['thresholds'], evaluator.tune_thresholds())
        categories = torch.arange(NUM_CLASSES) % 2
        assert torch.equal(result['of_categories'], evaluator.tune_thresholds(categories=categories))
        torch.testing.assert_close(result['mean'], logits.double().mean(0), atol=1e-6, rtol=0)


@pytest.mark.slow  # one and a half minutes
def test_open_images_fits_in_memory(program):
    peak = float(program('metrics_peak.py').stdout)
    print(f'{peak:.2f} GiB')
    assert 1.8 < peak < 3.5  # 1.86 GiB are stored; the rest is the work on one chunk


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: MultiLabelEvaluator(threshold=1.5), '1.5'),
        (lambda: MultiLabelEvaluator(top_k=(0,)), 'top_k'),
        (lambda: MultiLabelEvaluator().compute(), 'empty'),
        (lambda: MultiLabelEvaluator().update(torch.zeros(2, 3), torch.zeros(2)), 'one shape'),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
