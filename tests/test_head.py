"""MLDecoder against a plain reference written from the paper's formulas, and what a module has to survive."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from timm_mldecoder import MLDecoder

SMALL = dict(decoder_embedding=16, initial_num_features=12, num_heads=4, dim_feedforward=24)


def reference(head: MLDecoder, features: torch.Tensor) -> torch.Tensor:
    """Loops and explicit softmax, eval mode: facts of arXiv 2111.12933, sections 2.2 and 2.3."""
    p = dict(head.state_dict())
    num_heads = head.layers[0].multihead_attn.num_heads
    if features.dim() == 4:
        height, width = features.shape[2:]
        features = torch.stack([features[:, :, i, j] for i in range(height) for j in range(width)], dim=1)

    def norm(x, name):
        mean, var = x.mean(), ((x - x.mean()) ** 2).mean()
        return (x - mean) / torch.sqrt(var + 1e-5) * p[name + '.weight'] + p[name + '.bias']

    images = []
    for image in features:
        memory = [torch.clamp(p['embed.weight'] @ token + p['embed.bias'], min=0) for token in image]
        queries = list(p['queries.weight'])
        for index in range(len(head.layers)):
            layer = f'layers.{index}.'
            attn = layer + 'multihead_attn.'
            wq, wk, wv = p[attn + 'in_proj_weight'].chunk(3)
            bq, bk, bv = p[attn + 'in_proj_bias'].chunk(3)
            size = wq.shape[0] // num_heads
            out = []
            for query in queries:
                query = norm(query + query, layer + 'norm1')
                attended = []
                for h in range(num_heads):
                    rows = slice(h * size, (h + 1) * size)
                    q = (wq @ query + bq)[rows]
                    scores = torch.stack([q @ (wk @ m + bk)[rows] / math.sqrt(size) for m in memory])
                    weights = torch.exp(scores - scores.max())
                    weights = weights / weights.sum()
                    attended.append(sum(w * (wv @ m + bv)[rows] for w, m in zip(weights, memory, strict=True)))
                attended = p[attn + 'out_proj.weight'] @ torch.cat(attended) + p[attn + 'out_proj.bias']
                x = norm(query + attended, layer + 'norm2')
                hidden = torch.clamp(p[layer + 'linear1.weight'] @ x + p[layer + 'linear1.bias'], min=0)
                out.append(norm(x + p[layer + 'linear2.weight'] @ hidden + p[layer + 'linear2.bias'], layer + 'norm3'))
            queries = out
        weight, bias = p['group_fc.weight'], p['group_fc.bias']
        group = math.ceil(head.num_classes / len(queries))
        images.append(
            torch.stack(
                [queries[c // group] @ weight[c // group, :, c % group] + bias[c] for c in range(head.num_classes)]
            )
        )
    return torch.stack(images)


CASES = [(1, -1), (3, 8), (8, 8), (7, 3), (20, 6), (130, -1), (10, 1)]


@pytest.mark.parametrize('num_classes, groups', CASES)
@pytest.mark.parametrize('features', [(3, 12, 2, 3), (2, 5, 12)], ids=['map', 'tokens'])
@pytest.mark.parametrize('options', [{}, dict(num_layers=2, learnable_queries=True)], ids=['published', 'two layers'])
def test_logits_and_gradients_equal_the_reference(num_classes, groups, features, options):
    torch.manual_seed(0)
    head = MLDecoder(num_classes, groups, **SMALL, dropout=0.0, **options).double()
    for parameter in head.parameters():  # no zero bias, no unit scale that could hide a mistake
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(features, dtype=torch.float64)
    torch.testing.assert_close(head.eval()(x), reference(head, x), atol=1e-10, rtol=0)
    torch.testing.assert_close(head.float()(x.float()).double(), reference(head.double(), x), atol=1e-4, rtol=1e-5)

    torch.manual_seed(1)
    x, target = x.requires_grad_(), torch.randn(features[0], num_classes, dtype=torch.float64)
    parameters = dict(head.named_parameters())
    ours = torch.autograd.grad((head.train()(x) * target).sum(), [x, *parameters.values()])

    tracked = copy.copy(head)
    tracked.state_dict = lambda: {**dict(head.named_buffers()), **parameters}
    theirs = torch.autograd.grad((reference(tracked, x) * target).sum(), [x, *parameters.values()])
    for name, mine, yours in zip(['x', *parameters], ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, atol=1e-9, rtol=1e-9, msg=lambda text, name=name: f'{name}: {text}')


def test_float32_is_within_1e5_of_the_reference_at_the_published_size():
    torch.manual_seed(0)
    head = MLDecoder(12, initial_num_features=64).eval()
    x = torch.randn(1, 64, 2, 2)
    logits = head(x)
    torch.testing.assert_close(logits.double(), reference(head.double(), x.double()), atol=1e-5, rtol=0)


@pytest.mark.parametrize('num_classes, groups, queries, size', [
    (1, -1, 1, 1), (80, 100, 80, 1), (100, 100, 100, 1), (1000, -1, 100, 10), (1001, -1, 100, 11),
    (9605, 200, 200, 49), (2001, 2000, 2000, 2), (10**6, 1000, 1000, 1000),
])  # fmt: skip
def test_group_count_is_an_exact_ceiling(num_classes, groups, queries, size):
    head = MLDecoder(num_classes, groups, 8, 4, num_heads=2, dim_feedforward=8).eval()
    assert head.weight.shape == (queries, 8, size)
    with torch.no_grad():
        assert head(torch.randn(2, 4, 2, 2)).shape == (2, num_classes)


def test_initialization_is_the_published_one():
    torch.manual_seed(0)
    head = MLDecoder(1000)
    K, D, g = head.weight.shape
    assert head.weight.std().item() == pytest.approx(math.sqrt(2 / (D * g + K * g)), rel=0.01)
    assert head.queries.weight.std().item() == pytest.approx(1, rel=0.01)
    attn = head.layers[0].multihead_attn
    assert attn.in_proj_weight.abs().max().item() == pytest.approx(math.sqrt(6 / (4 * D)), rel=0.001)
    for bias in (head.bias, attn.in_proj_bias, attn.out_proj.bias):
        assert not bias.any()


def test_fixed_queries_are_saved_but_not_trained():
    head = MLDecoder(5, **SMALL)
    assert 'queries.weight' in head.state_dict() and 'queries.weight' not in dict(head.named_parameters())
    assert 'queries.weight' in dict(MLDecoder(5, **SMALL, learnable_queries=True).named_parameters())


def test_query_side_is_computed_once_in_eval_and_per_image_in_training():
    head = MLDecoder(9, 4, **SMALL)
    seen = []
    head.layers[0].norm1.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    x = torch.randn(6, 12, 2, 2)
    head.eval()(x)
    head.train()(x)
    assert seen == [(1, 4, 16), (6, 4, 16)]
    torch.manual_seed(0)
    same_image = head.train()(x[:1].expand(6, -1, -1, -1))
    assert len(same_image[:, 0].unique()) == 6, 'dropout differs from image to image'


def test_dropout_is_the_published_one_on_average():
    torch.manual_seed(0)
    head = MLDecoder(4, **SMALL).double().train()
    x = torch.randn(1, 3, 12, dtype=torch.float64)
    ask = head.layers[0].norm1
    dropped = []
    ask.register_forward_pre_hook(lambda module, args: dropped.append(args[0]))
    head(x.expand(4000, -1, -1))
    q = head.queries.weight
    ratio = dropped[0] / q  # 1 where dropped, else 1 + 1 / (1 - p)
    torch.testing.assert_close((ratio - 1).abs().lt(1e-9).double().mean().item(), 0.1, atol=0.005, rtol=0)
    torch.testing.assert_close(ratio.max().item(), 1 + 1 / 0.9, atol=1e-9, rtol=0)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    torch.manual_seed(0)
    head = MLDecoder(30, 7, **SMALL).eval()
    x = torch.randn(2, 12, 3, 3)
    expected = head(x)
    logits = head.to(dtype)(x.to(dtype))
    assert logits.dtype == dtype
    tolerance = {torch.float64: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=tolerance)
    head.train()(x.to(dtype)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_autocast_and_channels_last():
    torch.manual_seed(0)
    head = MLDecoder(30, 7, **SMALL).eval()
    x = torch.randn(2, 12, 3, 5)
    expected = head(x)
    torch.testing.assert_close(head(x.contiguous(memory_format=torch.channels_last)), expected)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        low = head(x)
    torch.testing.assert_close(low.float(), expected, atol=0.1, rtol=0.1)


def test_several_scales_are_tokens_side_by_side():
    torch.manual_seed(0)
    two = MLDecoder(5, 3, 16, (12, 12), num_heads=4, dim_feedforward=24).eval()
    one = MLDecoder(5, 3, **SMALL).eval()
    state = two.state_dict()
    for name in ('weight', 'bias'):
        state[f'embed.1.{name}'] = state[f'embed.0.{name}']
    two.load_state_dict(state)
    one.load_state_dict({k.replace('embed.0', 'embed'): v for k, v in state.items() if not k.startswith('embed.1')})
    x, y = torch.randn(2, 12, 2, 2), torch.randn(2, 3, 12)
    torch.testing.assert_close(two([x, y]), one(torch.cat([x.flatten(2).transpose(1, 2), y], 1)))
    with pytest.raises(ValueError, match='2 scales of features, got 1'):
        two([x])


def test_masked_tokens_are_not_looked_at():
    head = MLDecoder(5, 3, **SMALL).eval()
    x = torch.randn(2, 6, 12)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    logits = head(x, mask=mask)
    torch.testing.assert_close(logits[:1], head(x[:1, :4]))
    torch.testing.assert_close(logits[1:], head(x[1:]))


def test_attention_weights_are_those_of_the_forward():
    head = MLDecoder(7, 3, **SMALL).eval()
    x = torch.randn(2, 5, 12)
    weights = head.attention_weights(x)
    assert weights.shape == (2, 3, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    # with one value vector a token, and nothing else of the layer, the output is the weighted mean of the tokens
    attn = head.layers[0].multihead_attn
    _, query = head.layers[0].query_side(head.queries().unsqueeze(0))
    key, _ = attn.project_tokens(torch.relu(head.embed(x)))
    eye = torch.eye(5).expand(2, attn.num_heads, 5, 5)
    output = nn.functional.scaled_dot_product_attention(query.expand(2, -1, -1, -1), key, eye)
    torch.testing.assert_close(weights, output.mean(1))


def test_compile_fullgraph():
    torch.manual_seed(0)
    head = MLDecoder(30, 7, **SMALL).eval()
    x = torch.randn(2, 12, 3, 3)
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend='aot_eager')(x), head(x))
    head.train()
    torch.compile(head, fullgraph=True, backend='aot_eager')(x).sum().backward()


def test_copies_and_pickles():
    head = MLDecoder(30, 7, **SMALL).eval()
    x = torch.randn(2, 12, 3, 3)
    expected = head(x)
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    fresh = MLDecoder(30, 7, **SMALL).eval()
    fresh.load_state_dict(head.state_dict())
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), torch.load(file, weights_only=False), fresh):
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize('options, said', [
    (dict(num_classes=0), 'num_classes must be at least 1, got 0'),
    (dict(num_of_groups=0), 'num_of_groups must be at least 1, or negative for 100, got 0'),
    (dict(decoder_embedding=100), r'decoder_embedding \(100\) must be a multiple of num_heads \(8\)'),
    (dict(initial_num_features=0), 'initial_num_features'),
    (dict(dropout=1.0), r'dropout must be in \[0, 1\), got 1.0'),
    (dict(num_layers=0), 'num_layers must be at least 1'),
    (dict(dim_feedforward=-1), 'dim_feedforward .*got -1'),
])  # fmt: skip
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        MLDecoder(**{'num_classes': 5, **options})


def test_wrong_features_are_named():
    head = MLDecoder(5, **SMALL)
    with pytest.raises(ValueError, match=r'give \[B, F\]'):
        head(torch.randn(12))
    with pytest.raises(ValueError, match=r'width 12.* \[2, 3, 5, 5\].*initial_num_features, here 3 or 5'):
        head(torch.randn(2, 3, 5, 5))
    with pytest.raises(ValueError, match=r'x.movedim\(2, 1\)'):  # video, [B, T, F, H, W]
        head(torch.randn(2, 3, 12, 5, 5))
    with pytest.raises(ValueError, match='1 scales of features, got 2'):
        head([torch.randn(2, 12, 5, 5)] * 2)
