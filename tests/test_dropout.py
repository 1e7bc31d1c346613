"""Dropouts that keep less for the backward pass and change nothing else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timm_mldecoder.head.layers import Attention, Dropout, ReLUDropout


@pytest.fixture
def x():
    return torch.randn(64, 128, dtype=torch.float64, requires_grad=True)


def seeded(function, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return function(x)


@pytest.mark.parametrize('p', (0.1, 0.5))
def test_relu_dropout_is_dropout_of_relu(x, p):
    output, expected = seeded(ReLUDropout(p), x), seeded(Dropout(p), F.relu(x))
    assert torch.equal(output, expected)
    direction = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, direction)[0] for y in (output, expected)))


@pytest.mark.parametrize('kind', (Dropout, ReLUDropout))
def test_drops_its_share_and_keeps_the_mean(kind):
    x = torch.rand(1000, 1000) + 0.5
    output = kind(0.2)(x)
    assert (output == 0).double().mean().item() == pytest.approx(0.2, abs=0.002)
    torch.testing.assert_close(output[output != 0], (x / 0.8)[output != 0])


@pytest.mark.parametrize('p', (0.001, 0.1, 0.5, 0.999))
def test_every_element_is_dropped_with_the_same_probability_independently_of_the_others(p):
    torch.manual_seed(0)
    dropped = Dropout(p)(torch.ones(2_000_000)) == 0
    for share, expected in (
        (dropped, p),
        (dropped[::2], p),  # even and odd elements are halves of one random number
        (dropped[1::2], p),
        (dropped[::2] & dropped[1::2], p**2),
        (dropped[1:-1:2] & dropped[2::2], p**2),
    ):
        deviation = (expected * (1 - expected) / len(share)) ** 0.5
        assert share.double().mean().item() == pytest.approx(expected, abs=4 * deviation)


def test_attention_with_dropout_is_that_of_torch():
    attention = Attention(16, 4, dropout=0.5).double().train()
    queries, tokens = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 7, 16, dtype=torch.float64)
    mask = torch.rand(3, 7) < 0.7
    mask[:, 0] = True
    number = 4000
    repeated = (t.repeat(number, *[1] * (t.dim() - 1)) for t in (queries, tokens, mask))
    mean = attention(*repeated).unflatten(0, (number, 3)).mean(dim=0)
    expected = attention.eval()(queries, tokens, mask)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize('kind', (Dropout, ReLUDropout))
def test_gradient_is_that_of_the_function(x, kind):
    assert torch.autograd.gradcheck(lambda x: seeded(kind(0.3), x), x[:3, :4])
    assert torch.autograd.gradgradcheck(lambda x: seeded(kind(0.3), x), x[:3, :4])


@pytest.mark.parametrize('kind', (Dropout, ReLUDropout))
def test_keeps_one_byte_an_element(x, kind):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kind(0.1)(x * 1)
    assert [(t.dtype, t.shape) for t in kept] == [(torch.bool, x.shape)]


@pytest.mark.parametrize('kind', (Dropout, ReLUDropout))
@pytest.mark.parametrize('change', (dict(p=0.0), dict(train=False)))
def test_does_not_drop(x, kind, change):
    module = kind(change.get('p', 0.5)).train(change.get('train', True))
    assert torch.equal(module(x * 1), F.relu(x) if kind is ReLUDropout else x)


def test_other_dtypes_under_autocast():
    layer = nn.Sequential(nn.Linear(8, 8), ReLUDropout(0.1), nn.Linear(8, 8))
    with torch.autocast('cpu', torch.bfloat16):
        output = layer(torch.randn(4, 8))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and layer[0].weight.grad.dtype == torch.float32


def test_compiles_in_one_graph(x):
    compiled = torch.compile(ReLUDropout(0.5), backend='aot_eager', fullgraph=True)
    output = compiled(x * 1)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(gradient, torch.where(output > 0, 2.0, 0.0))
