"""Heads for frozen backbones: each against its formula."""

from contextlib import nullcontext

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from timm_mldecoder.head import MLDecoder
from timm_mldecoder.models.probe_model import remove_head
from timm_mldecoder.models.probes import PROBES, SMALL_ML_DECODER, EfficientProbe
from timm_mldecoder.probe.features import Backbone

F, C = 32, 5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tokens():
    return torch.randn(6, 9, F, dtype=torch.float64)


@pytest.mark.parametrize('name', PROBES)
def test_every_probe_maps_tokens_to_logits_and_trains_all_its_parameters(name, tokens):
    probe = PROBES[name](F, C).double()
    logits = probe(tokens, tokens[:, 0])
    assert logits.shape == (6, C)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in probe.parameters())
    if name != 'class_token':
        torch.testing.assert_close(probe.eval()(tokens), probe(tokens, tokens[:, 1]), msg='the class token is not used')


@pytest.mark.parametrize('name, pool', [
    ('linear', lambda tokens, class_token: tokens.mean(1)),
    ('max', lambda tokens, class_token: tokens.max(1).values),
    ('class_token', lambda tokens, class_token: class_token),
])  # fmt: skip
def test_linear_probes_are_batchnorm_and_linear_on_what_is_pooled(name, pool, tokens):
    probe, class_token = PROBES[name](F, C).double(), torch.randn(6, F, dtype=torch.float64)
    pooled = pool(tokens, class_token)
    normalized = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-5).sqrt()
    expected = normalized @ probe.fc.weight.T + probe.fc.bias
    torch.testing.assert_close(probe(tokens, class_token), expected)


def test_logsumexp_is_the_log_of_the_mean_of_exponentials_of_token_logits(tokens):
    probe = PROBES['logsumexp'](F, C).double().eval()
    logits = tokens / (1 + 1e-5) ** 0.5 @ probe.fc.weight.T + probe.fc.bias
    torch.testing.assert_close(probe(tokens), logits.exp().mean(1).log())


def test_efficient_probing_averages_one_slice_of_the_values_per_query(tokens):
    probe = EfficientProbe(F, C, num_queries=4, dim=8).double().eval()
    nn.init.normal_(probe.queries)
    pooled = torch.zeros(6, 8, dtype=torch.float64)
    for b, image in enumerate(tokens):
        for m, query in enumerate(probe.queries):
            weights = torch.softmax(image @ query / F**0.5, dim=0)
            pooled[b, 2 * m : 2 * m + 2] = weights @ (image @ probe.value.weight[2 * m : 2 * m + 2].T)
    expected = pooled / (1 + 1e-5) ** 0.5 @ probe.fc.weight.T + probe.fc.bias
    torch.testing.assert_close(probe(tokens), expected)
    with pytest.raises(ValueError, match='divide.*8.*3'):
        EfficientProbe(F, C, num_queries=3, dim=8)


def test_attention_pool_is_timms_module_and_a_linear_classifier(tokens):
    probe = PROBES['attention_pool'](F, C).double()
    nn.init.normal_(probe.pool.kv.bias)
    torch.testing.assert_close(probe(tokens), probe.fc(probe.pool(tokens)))


def test_weights_of_ml_decoder_probes_are_those_of_a_model_with_the_head(tokens):
    options = dict(SMALL_ML_DECODER, learnable_queries=True, decoder_embedding=64)
    model = timm.create_model('test_vit', num_classes=C, ml_decoder=options)
    probe = PROBES['ml_decoder_small'](model.num_features, C)
    model.get_classifier().load_state_dict(probe.state_dict())
    head = MLDecoder(
        C, decoder_embedding=F, initial_num_features=F, **SMALL_ML_DECODER, learnable_queries=True
    ).double()
    probe = PROBES['ml_decoder_small'](F, C).double()
    head.load_state_dict(probe.state_dict())
    assert torch.equal(head(tokens), probe(tokens))


@pytest.mark.parametrize('num_features, num_classes', [(384, 80), (96, 10), (768, 1000)])
def test_probes_have_the_documented_number_of_parameters(num_features, num_classes):
    width, K, D = num_features, min(num_classes, 100), min(num_features, 256)
    classifier = width * num_classes + num_classes
    group_fc = K * D * -(-num_classes // K) + num_classes
    expected = {
        **dict.fromkeys(('linear', 'max', 'class_token', 'logsumexp'), 2 * width + classifier),
        'attention_pool': 12 * width**2 + 10 * width + classifier,
        'efficient_probing': width**2 + 34 * width + classifier,
        'ml_decoder_small': D * width + 5 * D + K * D + group_fc,
    }
    for name, count in expected.items():
        assert sum(p.numel() for p in PROBES[name](num_features, num_classes).parameters()) == count, name


@pytest.mark.parametrize('name', PROBES)
def test_defaults_fit_widths_that_are_no_power_of_two(name):
    tokens = torch.randn(2, 4, 90)
    assert PROBES[name](90, C)(tokens, tokens[:, 0]).shape == (2, C)


def test_the_small_ml_decoder_takes_text_queries():
    embeddings = torch.randn(C, 7)
    probe = PROBES['ml_decoder_small'](F, C, word_embeddings=embeddings).eval()
    logits = probe(torch.randn(2, 4, F))
    probe.set_word_embeddings(embeddings[:3])
    assert logits.shape == (2, C) and probe(torch.randn(2, 4, F)).shape == (2, 3)


def test_wrong_pooling_is_named(tokens):
    with pytest.raises(ValueError, match="'mean'|mean.*'sum'"):
        PROBES['linear'](F, C, pool='sum')
    with pytest.raises(ValueError, match='class_token'):
        PROBES['class_token'](F, C)(tokens)


def test_features_are_computed_with_batch_norm_folded_and_the_model_stays_as_it_is():
    model = remove_head(timm.create_model('test_resnet', num_classes=3).eval())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    plain, folded = (Backbone(model, nullcontext, image) for image in (None, torch.randn(1, 3, 32, 32)))
    calls = {}
    for name, backbone in {'plain': plain, 'folded': folded}.items():
        called = []
        with register_module_forward_hook(lambda module, *_, called=called: called.append(type(module))):
            calls[name] = called, backbone(images)[0]
    assert calls['plain'][0].count(nn.BatchNorm2d) == len(norms) and nn.BatchNorm2d not in calls['folded'][0]
    tokens = calls['folded'][1]
    torch.testing.assert_close(tokens, calls['plain'][1], rtol=1e-4, atol=1e-4 * float(tokens.abs().max()))
    assert folded.digest() == plain.digest()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
