"""The losses against references written straight from the formulas, entry by entry, in float64."""

import csv
import math

import pytest
import torch
from image_folders import write_images
from timm.loss import AsymmetricLossMultiLabel, BinaryCrossEntropy

from timm_mldecoder.flags import train_options
from timm_mldecoder.losses import LOSSES, REDUCTIONS, automatic_scale, create_loss
from timm_mldecoder.train.loss import create_train_loss
from train import main as train

BATCH, CLASSES = 6, 11


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bce_entry(x, y):
    return -(y * math.log(sigmoid(x)) + (1 - y) * math.log(sigmoid(-x)))


def asl_entry(x, y, gamma_neg=4.0, gamma_pos=1.0, clip=0.05):
    p = sigmoid(x)
    q = min(1 - p + clip, 1)
    focus = (1 - (p * y + q * (1 - y))) ** (gamma_pos * y + gamma_neg * (1 - y))
    return -focus * (y * math.log(p) + (1 - y) * math.log(q))


def aam_entry(c, y, scale=30.0, margin=0.35, balance=0.8, gamma_neg=0.0, gamma_pos=0.0):
    p_pos, p_neg = sigmoid(scale * (c - margin)), sigmoid(-scale * (c + margin))
    focus = 1.0
    if gamma_pos > 0 or gamma_neg > 0:
        p_neg = min(p_neg + 0.05, 1)
        focus = (y * p_neg + (1 - y) * p_pos) ** (gamma_pos * y + gamma_neg * (1 - y))
    return -focus * (balance / scale * y * math.log(p_pos) + (1 - balance) / scale * (1 - y) * math.log(p_neg))


def focal_margin(x, gamma=2.0, margin=1.0):
    p = sigmoid(x - margin)
    return -((1 - p) ** gamma) * math.log(p)


def hill_entry(x, y, lamb=1.5, **options):
    p = sigmoid(x)
    return y * focal_margin(x, **options) + (1 - y) * (lamb - p) * p**2


def splc_entry(x, y, threshold=0.6, **options):
    negative = focal_margin(x, **options) if sigmoid(x) > threshold else -math.log(sigmoid(-x))
    return y * focal_margin(x, **options) + (1 - y) * negative


ENTRIES = {'bce': bce_entry, 'asl': asl_entry, 'aam': aam_entry, 'hill': hill_entry, 'splc': splc_entry}
CASES = [
    ('bce', {}),
    ('asl', {}),
    ('asl', dict(gamma_neg=2.0, gamma_pos=0.0, clip=0.0)),
    ('asl', dict(gamma_neg=7.0, clip=0.2)),
    ('aam', {}),
    ('aam', dict(scale=23.0, margin=0.0, balance=0.7)),
    ('aam', dict(scale=7.0, gamma_neg=1.0, gamma_pos=2.0)),
    ('hill', {}),
    ('hill', dict(lamb=2.0, gamma=0.5, margin=0.0)),
    ('splc', {}),
    ('splc', dict(threshold=0.9, gamma=1.0, margin=0.5)),
]


def make_data(name: str, soft: bool = False, ignored: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(BATCH, CLASSES, generator=generator, dtype=torch.float64)
    if name == 'aam':
        logits = logits.tanh()  # cosines
    target = torch.rand(BATCH, CLASSES, generator=generator, dtype=torch.float64)
    target = target if soft else (target < 0.3).double()
    target[torch.rand(target.shape, generator=generator) < ignored] = -1
    return logits, target


def entries(function, logits, target, **options) -> torch.Tensor:
    """The reference of every entry, 0 where the target is ignored."""
    values = [
        0.0 if y < 0 else function(x, y, **options)
        for x, y in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64).view(logits.shape)


@pytest.mark.parametrize(('soft', 'ignored'), [(False, 0.0), (True, 0.0), (False, 0.4), (True, 0.4)])
@pytest.mark.parametrize(('name', 'options'), CASES)
def test_entries_follow_the_formula(name, options, soft, ignored):
    logits, target = make_data(name, soft, ignored)
    expected = entries(ENTRIES[name], logits, target, **options)
    result = create_loss(name, reduction='none', **options)(logits, target)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)
    single = create_loss(name, reduction='none', **options)(logits.float(), target.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(('name', 'options'), [*CASES, ('csl', {})])
def test_smoothing_moves_annotated_targets_only(name, options):
    logits, target = make_data(name, ignored=0.4)
    smooth = torch.where(target < 0, target, 0.9 * target + 0.05)
    expected = create_loss(name, **options)(logits, smooth)
    torch.testing.assert_close(create_loss(name, smoothing=0.1, **options)(logits, target), expected)


@pytest.mark.parametrize('name', LOSSES)
def test_reductions(name):
    logits, target = make_data(name, ignored=0.4)
    each = create_loss(name, reduction='none')(logits, target)
    counts = create_loss(name).entries(logits, target)[1]  # all but labels to ignore, of which CSL uses some
    assert name == 'csl' or torch.equal(counts, target >= 0)
    expected = dict(sum=each.sum(), batchmean=each.sum() / BATCH, mean=each.sum() / counts.sum(), none=each)
    for reduction in REDUCTIONS:
        torch.testing.assert_close(create_loss(name, reduction=reduction)(logits, target), expected[reduction])


def reference_csl(
    logits,
    target,
    mode,
    gamma_neg,
    gamma_pos,
    gamma_unann,
    weight_unann,
    weight_pos,
    weight_neg,
    clip,
    prior,
    threshold,
    topk,
) -> float:
    """CSL as the paper says it, over Python lists."""
    logits, target = logits.tolist(), target.tolist()
    unannotated = [(i, j) for i, row in enumerate(target) for j, y in enumerate(row) if y < 0]
    unannotated.sort(key=lambda entry: -logits[entry[0]][entry[1]])
    likely = set(unannotated[: topk * len(logits)])
    frequent = {j for j in range(CLASSES) if prior is not None and prior[j] > threshold}
    total = 0.0
    for i, row in enumerate(logits):
        # "ignore_normalize_classes" of the published code: g = 1 / (1 + annotated labels of the image) + 1
        share = 1 + 1 / (1 + sum(y >= 0 for y in target[i])) if mode == 'ignore_normalize_classes' else 1
        for j, x in enumerate(row):
            if target[i][j] >= 0:
                weight = weight_pos if target[i][j] else weight_neg
                total += share * weight * asl_entry(x, target[i][j], gamma_neg, gamma_pos, clip)
            elif mode == 'negative' or (mode == 'selective' and (i, j) not in likely and j not in frequent):
                total += weight_unann * asl_entry(x, 0.0, gamma_unann, gamma_pos, clip)
    return total


@pytest.mark.parametrize(('clip', 'weights'), [(0.0, (1.0, 1.0, 1.0)), (0.05, (0.3, 1.0, 1.0)), (0.0, (0.3, 2.0, 0.7))])
@pytest.mark.parametrize(
    ('mode', 'with_prior', 'topk'),
    [
        ('ignore', False, 5),
        ('ignore_normalize_classes', False, 5),
        ('negative', False, 5),
        ('selective', False, 2),
        ('selective', True, 0),
        ('selective', True, 2),
    ],
)
def test_selective_loss_follows_the_paper(mode, with_prior, topk, clip, weights):
    logits, target = make_data('csl', ignored=0.6)
    prior = [0.01 * j for j in range(CLASSES)] if with_prior else None
    gammas = dict(gamma_neg=1.0, gamma_pos=0.0, gamma_unann=2.0)
    gammas |= dict(zip(('weight_unann', 'weight_pos', 'weight_neg'), weights, strict=True))
    expected = reference_csl(logits, target, mode, *gammas.values(), clip, prior, 0.05, topk)
    loss = create_loss('csl', mode=mode, class_prior=prior, likelihood_topk=topk, clip=clip, **gammas)
    assert loss(logits, target).item() == pytest.approx(expected, rel=1e-7)


def test_selective_loss_with_more_likely_entries_than_there_are_leaves_all_unannotated_out():
    logits, target = make_data('csl', ignored=0.6)
    everything = create_loss('csl', likelihood_topk=CLASSES)(logits, target)
    torch.testing.assert_close(everything, create_loss('csl', mode='ignore')(logits, target))


@pytest.mark.parametrize('detach', [True, False])
@pytest.mark.parametrize('gamma_pos', [0.0, 1.0])
def test_asymmetric_loss_and_its_gradient_are_timms_for_moderate_logits(detach, gamma_pos):
    logits, target = make_data('asl')
    gradients = []
    for loss in (
        create_loss('asl', gamma_pos=gamma_pos, detach_focusing=detach, reduction='sum'),
        AsymmetricLossMultiLabel(4, gamma_pos, 0.05, disable_torch_grad_focal_loss=detach, reduction='sum'),
    ):
        x = logits.float().requires_grad_()
        value = loss(x, target.float())
        gradients.append((value.detach(), *torch.autograd.grad(value, x)))
    for ours, timms in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, timms, rtol=1e-4, atol=1e-5)


def test_bce_is_timms():
    logits, target = make_data('bce')
    ours = create_loss('bce', smoothing=0.1, reduction='mean')(logits, target)
    torch.testing.assert_close(ours, BinaryCrossEntropy(smoothing=0.1, smooth_dense=True)(logits, target))


@pytest.mark.parametrize(
    ('name', 'options'), [('asl', dict(detach_focusing=False)), ('aam', dict(gamma_neg=2.0)), ('bce', {})]
)
def test_gradients_go_through_the_focusing_weights(name, options):
    logits, target = make_data(name, soft=True, ignored=0.3)
    loss = create_loss(name, **options)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (logits.requires_grad_(),))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ('name', 'options'),
    [*((name, {}) for name in LOSSES), ('asl', dict(gamma_neg=0.5, gamma_pos=0.5, detach_focusing=False))],
)
def test_extreme_logits_are_finite_and_still_learn(name, options, dtype):
    extremes = torch.tensor([[-100.0, 100.0, 0.0]] * 4, dtype=dtype).requires_grad_()
    target = torch.tensor([[1.0, 0, 1], [0, 1, 0], [-1, -1, -1], [0.3, 0.7, 0.5]])
    with torch.autocast('cpu', torch.bfloat16):
        value = create_loss(name, **options)(extremes, target)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite()
    assert extremes.grad.isfinite().all()
    assert extremes.grad[0, 0] < 0  # a positive scored -100 is pulled up ...
    if name not in ('asl', 'hill', 'splc'):
        assert extremes.grad[0, 1] > 0  # ... and a negative scored 100 pushed down, unless it may be a missed positive


def test_scaled_logits_are_the_same_loss():
    cosines, target = make_data('aam', ignored=0.2)
    options = dict(scale=17.0, margin=0.2)
    expected = create_loss('aam', **options)(cosines, target)
    torch.testing.assert_close(create_loss('aam', scaled_logits=True, **options)(17.0 * cosines, target), expected)


@pytest.mark.parametrize(('num_classes', 'scale'), [(1, 7), (20, 7), (80, math.sqrt(5) * math.log(79)), (10**6, 30)])
def test_automatic_scale(num_classes, scale):
    assert automatic_scale(num_classes) == pytest.approx(scale)


def test_a_loss_without_a_scale_takes_the_automatic_one():
    cosines, target = make_data('aam')
    expected = create_loss('aam', scale=automatic_scale(CLASSES))(cosines, target)
    torch.testing.assert_close(create_loss('aam', scale=None)(cosines, target), expected)


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('focal', {}, 'focal.*aam.*asl.*bce.*csl'),
        ('asl', dict(reduction='max'), 'max.*batchmean'),
        ('asl', dict(smoothing=1.0), '1.0'),
        ('asl', dict(clip=1.5), 'clip=1.5'),
        ('asl', dict(gamma_neg=-1.0), 'gamma_neg=-1'),
        ('csl', dict(mode='all'), 'all.*selective'),
        ('csl', dict(mode='ignore', class_prior=[0.1]), 'selective'),
        ('csl', dict(gamma_unann=-2.0), 'gamma_unann=-2'),
        ('csl', dict(weight_pos=-1.0), 'weight_pos=-1'),
        ('aam', dict(balance=1.2), 'balance=1.2'),
        ('hill', dict(lamb=0.0), 'lamb must be above 0'),
        ('hill', dict(gamma=-1.0), 'gamma must be at least 0'),
        ('splc', dict(threshold=0.0), 'threshold must be in'),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_loss(name, **options)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r'\[2, 3\] and \[2, 4\]'):
        create_loss('asl')(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match='7 entries for 3 classes'):
        create_loss('csl', class_prior=[0.1] * 7)(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize('ignored', [0, 1, 9, 20])
def test_the_mean_is_over_the_annotated_labels(ignored):
    """Logits of zero cost ln 2 per label, however many labels are to be ignored."""
    target = (torch.arange(20).view(4, 5) % 3 == 0).float()
    target.view(-1)[:ignored] = -1
    logits = torch.zeros(4, 5, requires_grad=True)
    loss = create_loss('bce', reduction='mean')(logits, target)
    loss.backward()
    assert loss.item() == pytest.approx(0 if ignored == 20 else math.log(2))
    assert logits.grad.abs().sum().item() == pytest.approx(0 if ignored == 20 else 0.5)


OWN_LOSS = """
import torch


class Scaled(torch.nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, logits, target):
        return self.scale * torch.nn.functional.cross_entropy(logits, target)


NOT_A_LOSS = dict
"""


def test_a_run_with_a_loss_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own_losses.py').write_text(OWN_LOSS)
    write_images(tmp_path / 'data', train=2, validation=1)
    flags = (
        'data --model test_resnet --num-classes 3 --img-size 32 -j 0 -b 3 --device cpu --epochs 1 --warmup-epochs 0 '
    )
    flags += '--smoothing 0 --output out --no-aug --sched none --opt sgd '
    losses = {}
    for name, loss, lr in (('ce', '', 0.1), ('scaled', '--loss own_losses:Scaled --loss-kwargs scale=10', 0.01)):
        train([*f'{flags} {loss} --experiment {name} --lr {lr}'.split()])
        with open(f'out/{name}/summary.csv') as file:
            (row,) = csv.DictReader(file)
        losses[name] = float(row['train_loss']), float(row['eval_loss'])
    assert losses['scaled'][0] == pytest.approx(10 * losses['ce'][0], rel=1e-4)
    assert losses['scaled'][1] == pytest.approx(losses['ce'][1], rel=1e-4)  # the same steps


@pytest.mark.parametrize(
    ('loss', 'message'),
    [
        ('nothing.of_this:Kind', "No module named 'nothing'"),
        ('timm.loss:Missing', 'has no attribute .Missing'),
        ('builtins:dict', 'not a torch.nn.Module'),
        ('torch.nn:CrossEntropyLoss', "unexpected keyword argument 'scale'"),
    ],
)
def test_a_loss_of_ones_own_that_is_none_is_refused(loss, message):
    options = train_options(data='.', loss=loss, loss_kwargs=dict(scale=1))
    with pytest.raises(ValueError, match=f'--loss {loss}.*{message}'):
        create_train_loss(options, [])


def test_an_unknown_loss_is_answered_with_the_names():
    with pytest.raises(ValueError, match='--loss hil: choose from .*hill.*package.module:Class'):
        train_options(data='.', loss='hil')
