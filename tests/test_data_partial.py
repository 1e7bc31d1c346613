"""Partial annotation, simulated as in the code of arXiv 2110.10955."""

import numpy as np
import pytest
from multilabel_data import write_coco

import train
from timm_mldecoder.data.annotations import IGNORED, NEGATIVE, POSITIVE, Annotations
from timm_mldecoder.data.partial import leave_out_labels
from timm_mldecoder.runtime.errors import run_command

IMAGES, CLASSES = 400, 3


def annotations(share: float = 0.1) -> Annotations:
    """Random labels: few positives, some that are ignored, the others negative."""
    draws = np.random.default_rng(0).random((IMAGES, CLASSES))
    image, label = np.nonzero(draws < share + 0.05)
    value = np.where(draws[image, label] < share, POSITIVE, IGNORED)
    paths = [f'{index}.jpg' for index in range(IMAGES)]
    return Annotations([f'class {index}' for index in range(CLASSES)], paths, image, label, value)


def dense(part: Annotations) -> np.ndarray:
    return np.stack([part.target(index).numpy() for index in range(len(part))])


@pytest.mark.parametrize(('number', 'expected'), [(10, 10), (1000, None)])
def test_fixed_per_class_keeps_as_many_positives_and_negatives_of_each_class(number, expected):
    full = dense(annotations())
    part = dense(leave_out_labels(annotations(), f'fpc={number}'))
    kept = part != IGNORED
    assert (part[kept] == full[kept]).all()
    for meaning in (POSITIVE, NEGATIVE):
        wanted = (full == meaning).sum(axis=0) if expected is None else expected
        assert ((part == meaning).sum(axis=0) == wanted).all()


def test_random_per_sample_leaves_a_share_of_all_labels_out():
    full = dense(annotations())
    part = dense(leave_out_labels(annotations(), 'rps=0.3'))
    kept = part != IGNORED
    assert (part[kept] == full[kept]).all()
    assert kept.sum() / (full != IGNORED).sum() == pytest.approx(0.7, abs=0.05)
    assert (dense(leave_out_labels(annotations(), 'rps=0')) == full).all()
    assert (dense(leave_out_labels(annotations(), 'rps=1')) == IGNORED).all()


@pytest.mark.parametrize('way', ['fpc=20', 'rps=0.5'])
def test_the_draw_follows_the_seed(way):
    first, again, other = (dense(leave_out_labels(annotations(), way, seed)) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def run(root, *more):
    small = '--task multilabel --num-classes 2 --model test_resnet --img-size 32 -b 2 -j 0 --epochs 1 --device cpu'
    return run_command(lambda: train.main([str(root), '--dataset', 'coco2014', *small.split(), *more]))


def test_training_with_partial_labels_logs_what_it_kept_and_validates_on_all(tmp_path, caplog):
    write_coco(tmp_path)
    output = ['--output', str(tmp_path / 'out'), '--experiment', 'run']
    loss = ['--loss', 'csl', '--loss-kwargs', 'mode=ignore_normalize_classes']
    with caplog.at_level('INFO'):
        assert run(tmp_path, '--partial-labels', 'fpc=1', *loss, *output) == 0
    assert 'fpc=1: kept 2 positive and 2 negative labels' in caplog.text
    assert (tmp_path / 'out' / 'run' / 'summary.csv').is_file()


@pytest.mark.parametrize('way', ['fpc', 'fpc=0', 'fpc=1.5', 'rps=2', 'rps=nan', 'mean=3', '0.5'])
def test_another_way_is_one_line(tmp_path, capsys, way):
    write_coco(tmp_path)
    assert run(tmp_path, '--partial-labels', way, '--output', str(tmp_path / 'out')) == 2
    error = capsys.readouterr().err
    assert way in error and error.count('\n') == 1
    assert not (tmp_path / 'out').exists()
