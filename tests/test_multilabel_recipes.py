"""The multi-label recipes parse without a warning and hold the published figures."""

import csv
import logging
from pathlib import Path

import pytest

from timm_mldecoder.data.digits import write_digit_scenes
from timm_mldecoder.engine.flags import parse_train
from timm_mldecoder.engine.train.build import create_loss
from train import main as train

HPARAMS = Path(__file__).resolve().parents[1] / 'hparams'
RECIPES = {str(path.relative_to(HPARAMS)): path for folder in ('coco', 'voc', 'openimages')
           for path in sorted((HPARAMS / folder).glob('*.yaml'))}  # fmt: skip
# recipe: published mAP, and what the publication says of it
PUBLISHED = {
    'coco/resnet101_448_mldecoder.yaml': ('87.1', dict(model='resnet101', img_size=448)),
    'coco/tresnet_l_224_mldecoder.yaml': ('85.5', dict(model='tresnet_v2_l', img_size=224)),
    'coco/tresnet_l_448_mldecoder.yaml': ('90.0', dict(model='tresnet_v2_l', img_size=448)),
    'coco/tresnet_l_640_mldecoder.yaml': ('91.1', dict(model='tresnet_v2_l', img_size=640)),
    'coco/tresnet_xl_640_mldecoder.yaml': (
        '91.4',
        dict(model='tresnet_v2_l', model_kwargs=dict(layers=[3, 8, 34, 5]), img_size=640),
    ),
    'coco/tresnet_l_448_heads_gap.yaml': ('87.0', dict(use_ml_decoder_head=0)),
    'coco/tresnet_l_448_heads_mldecoder_k20.yaml': ('88.0', dict(use_ml_decoder_head=1, num_of_groups=20)),
    'coco/tresnet_l_448_heads_mldecoder_k80.yaml': ('88.1', dict(use_ml_decoder_head=1, num_of_groups=-1)),
    'voc/tresnet_l_448_mldecoder.yaml': ('96.6', dict(model='tresnet_v2_l', lr=5e-5, batch_size=128)),
    'coco/efficientnetv2_s_448_mldecoder_aam.yaml': ('88.75', dict(model='tf_efficientnetv2_s.in21k', img_size=448)),
    'coco/efficientnetv2_l_448_mldecoder_aam.yaml': ('90.10', dict(model='tf_efficientnetv2_l.in21k', img_size=448)),
    'coco/tresnet_l_448_mldecoder_aam.yaml': ('90.30', dict(model='tresnet_v2_l', img_size=448)),
    'coco/tresnet_l_640_mldecoder_aam.yaml': ('91.3', dict(model='tresnet_v2_l', img_size=640)),
    'voc/efficientnetv2_s_448_mldecoder_aam.yaml': ('95.86', dict(model='tf_efficientnetv2_s.in21k', img_size=448)),
    'voc/efficientnetv2_l_448_mldecoder_aam.yaml': ('96.05', dict(model='tf_efficientnetv2_l.in21k', img_size=448)),
    'voc/tresnet_l_448_mldecoder_aam.yaml': ('96.70', dict(model='tresnet_v2_l', img_size=448)),
    'openimages/tresnet_m_224_gap.yaml': ('86.0', dict(use_ml_decoder_head=0)),
    'openimages/tresnet_m_224_mldecoder_k100.yaml': ('86.7', dict(num_of_groups=100)),
    'openimages/tresnet_m_224_mldecoder_k200.yaml': ('86.8', dict(num_of_groups=200)),
    'openimages/tresnet_m_224_mldecoder_k400.yaml': ('86.8', dict(num_of_groups=400)),
    'openimages/tresnet_m_224_csl_ignore.yaml': ('85.38', dict(use_ml_decoder_head=0)),
    'openimages/tresnet_m_224_csl_negative.yaml': ('85.85', dict(use_ml_decoder_head=0)),
    'openimages/tresnet_m_224_csl_selective.yaml': ('86.72', dict(use_ml_decoder_head=0)),
}
ALL = dict(opt='adam', sched='onecycle', weight_decay=1e-4, model_ema=True, model_ema_decay=0.9997, better_of_ema=True,
           train_crop_mode='squash', crop_mode='squash', crop_pct=1.0, mean=[0, 0, 0], std=[1, 1, 1], cutout=0.5,
           cutout_prob=1.0, hflip=0.0, smoothing=0.0, decoder_embedding=768, task='multilabel')  # fmt: skip
COCO = dict(dataset='coco2014', num_classes=80, lr=1e-4, epochs=40, batch_size=56, loss='asl')
VOC = dict(dataset='voc2007', num_classes=20, train_split='trainval', val_split='test')
# metric learning, arXiv 2209.06585
AAM = dict(
    ALL, opt='momentum', momentum=0.9, weight_decay=5e-4, bias_lr_scale=2, sam=0.05, lr=0.007, epochs=60, batch_size=84,
    better_of_ema=False, mean=[0.5] * 3, std=[0.5] * 3, cutout=0.4, cutout_prob=0.5, hflip=0.5, use_ml_decoder_head=1,
    loss='aam', loss_kwargs=dict(scale=23, margin=0, balance=0.7, scaled_logits=True, reduction='sum'),
    ml_decoder_kwargs=dict(classifier='cosine', cosine_scale=23, memory_activation='leaky_relu'))  # fmt: skip
COCO_AAM = dict(AAM, dataset='coco2014', num_classes=80)
VOC_AAM = dict(AAM, **VOC, model_ema_decay=0.9993)
# recipes by the beginning of their name and, of an angular margin, its end: what they have in common
FAMILIES = {
    ('coco/', 'aam.yaml'): (COCO_AAM, 100, 1e3),
    ('voc/', 'aam.yaml'): (VOC_AAM, 100, 1e3),
    ('coco/', ''): (dict(ALL, **COCO), 25, 1e4),
    ('voc/', ''): (dict(ALL, **VOC), 25, 1e4),
    ('openimages/', ''): (ALL, 25, 1e4),
}  # options, and the factors by which the first rate is below the peak, and the last below the first
ASL = dict(gamma_neg=4, gamma_pos=0, clip=0.05, detach_focusing=True, reduction='sum')


def test_every_recipe_has_its_published_figure_here():
    assert set(RECIPES) == set(PUBLISHED)


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_recipe_holds_the_published_figures(name, caplog):
    score, figures = PUBLISHED[name]
    with caplog.at_level(logging.WARNING):
        options = parse_train(['DATA', '--config', str(RECIPES[name]), '--device', 'cpu'])
    assert not [record for record in caplog.records if 'No effect' in record.message]
    common, first, last = next(family for (start, end), family in FAMILIES.items()
                               if name.startswith(start) and name.endswith(end))  # fmt: skip
    figures = {**common, **figures}
    assert {option: getattr(options, option) for option in figures} == figures
    if options.loss == 'asl':
        assert options.loss_kwargs == ASL
    # the peak after a fifth
    assert options.warmup_epochs == 0.2 * options.epochs
    assert options.lr / options.warmup_lr == pytest.approx(first)
    assert options.warmup_lr / options.min_lr == pytest.approx(last)

    header = RECIPES[name].read_text().split('\ndataset:')[0]
    assert all(line.startswith('#') for line in header.strip().splitlines())
    assert f'Published  mAP {score} (arXiv' in header and 'not run' in header and f'hparams/{name}' in header


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_loss_of_a_recipe_can_be_built(name):
    options = parse_train(['DATA', '--config', str(RECIPES[name]), '--device', 'cpu'])
    loss = create_loss(options, dataset=None)
    assert loss.reduction == 'sum'


def test_the_angular_margin_recipe_trains(tmp_path, monkeypatch):
    """All of its options at once, on scenes of digits, a small model and a short run; seconds on one core."""
    monkeypatch.chdir(tmp_path)
    write_digit_scenes('scenes', num_train=64, num_validation=32, size=32, sides=(10, 16))
    train(['scenes', '--config', str(RECIPES['coco/tresnet_l_448_mldecoder_aam.yaml']), '--dataset', 'csv',
           '--num-classes', '10', '--model', 'test_resnet', '--img-size', '32', '--decoder-embedding', '32', '-b', '8',
           '--epochs', '15', '--warmup-epochs', '3', '--model-ema-decay', '0.9', '--val-interval', '5', '--device',
           'cpu', '-j', '0', '--aa', '', '--hflip', '0', '--output', '.', '--experiment', 'run'])  # fmt: skip
    with open('run/summary.csv', newline='') as file:
        early, _, late = (float(row['train_loss']) for row in csv.DictReader(file))
    assert late < 0.9 * early
