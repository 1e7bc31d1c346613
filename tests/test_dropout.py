"""Dropouts that keep less for the backward pass and change nothing else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timm_mldecoder.head.decoder_layer import Dropout, ReLUDropout


def plain(kind: type, x: torch.Tensor, p: float) -> torch.Tensor:
    return F.dropout(F.relu(x) if kind is ReLUDropout else x, p)


@pytest.fixture
def x():
    return torch.randn(64, 128, dtype=torch.float64, requires_grad=True)


def seeded(function, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return function(x)


@pytest.mark.parametrize('p', (0.1, 0.5))
def test_relu_dropout_is_dropout_of_relu(x, p):
    output, expected = seeded(ReLUDropout(p), x), seeded(lambda x: plain(ReLUDropout, x, p), x)
    assert torch.equal(output, expected)
    direction = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, direction)[0] for y in (output, expected)))


@pytest.mark.parametrize('kind', (Dropout, ReLUDropout))
def test_drops_its_share_and_keeps_the_mean(kind):
    x = torch.rand(1000, 1000) + 0.5
    output = kind(0.2)(x)
    assert (output == 0).double().mean().item() == pytest.approx(0.2, abs=0.002)
    torch.testing.assert_close(output[output != 0], (x / 0.8)[output != 0])


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
