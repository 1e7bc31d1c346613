"""Options of MLDecoder beyond the published head, each against a plain float64 reference written from its formulas."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from timm_mldecoder import MLDecoder

SMALL = dict(decoder_embedding=16, initial_num_features=12, num_heads=4, dim_feedforward=24, dropout=0.0)
WIDTH = 6  # of label embeddings


def build(num_classes=7, groups=-1, **options) -> MLDecoder:
    """A float64 head in eval mode without a zero bias or a unit scale that could hide a mistake."""
    torch.manual_seed(0)
    head = MLDecoder(num_classes, groups, **{**SMALL, **options}, dtype=torch.float64).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


def words(num_classes, seed=0, width=WIDTH):
    return torch.randn(num_classes, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decode(p, features, queries, slope=0.0):
    """One layer of the decoder by its formulas: features [B, F, H, W] and queries [K, D] to outputs [B, K, D]."""

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * p[f'{name}.weight'] + p[f'{name}.bias']

    def linear(x, name):
        return x @ p[f'{name}.weight'].T + p[f'{name}.bias']

    layer, outputs = 'layers.0', []
    (wq, wk, wv), (bq, bk, bv) = (p[f'{layer}.multihead_attn.in_proj_{kind}'].chunk(3) for kind in ('weight', 'bias'))
    for image in features:
        memory = linear(image.flatten(1).T, 'embed')
        memory = torch.where(memory > 0, memory, slope * memory)
        asked, heads = norm(2 * queries, f'{layer}.norm1'), []
        for rows in torch.arange(16).chunk(4):
            scores = (asked @ wq[rows].T + bq[rows]) @ (memory @ wk[rows].T + bk[rows]).T / math.sqrt(4)
            heads.append(torch.softmax(scores, dim=1) @ (memory @ wv[rows].T + bv[rows]))
        x = norm(asked + linear(torch.cat(heads, dim=1), f'{layer}.multihead_attn.out_proj'), f'{layer}.norm2')
        hidden = linear(x, f'{layer}.linear1').clamp(min=0)
        outputs.append(norm(x + linear(hidden, f'{layer}.linear2'), f'{layer}.norm3'))
    return torch.stack(outputs)


def expected(head, features, vectors, group_size=1, learnable_queries=False, classifier=None):
    """Logits of a word-query head, class by class: section 2.3.3, and appendix B equations 10 and 11."""
    p, count = head.state_dict(), len(vectors)
    groups = [vectors[start : start + group_size] for start in range(0, count, group_size)]
    if learnable_queries:
        queries = p['queries.weight'][: len(groups)]
    elif group_size == 1:
        queries = vectors if WIDTH == 16 else (vectors @ p['queries.proj.weight'].T + p['queries.proj.bias'])
        queries = queries.clamp(min=0)
    else:
        queries = torch.zeros(len(groups), 16, dtype=torch.float64)
        share = math.ceil(16 / group_size)
        for k, group in enumerate(groups):
            for i in range(group_size):
                vector = group[i] if i < len(group) else torch.zeros(WIDTH, dtype=torch.float64)
                piece = p['queries.proj.weight'] @ vector + p['queries.proj.bias']
                place = queries[k, i * share : (i + 1) * share]
                place[:] = piece[: len(place)]
    out = decode(p, features, queries)
    weight = {
        'shared': lambda c: p['group_fc.weight'][:, c % group_size],
        'word': lambda c: p['group_fc.weight'] @ vectors[c],
        'learned': lambda c: p['group_fc.weight'][c // group_size, :, c % group_size],
    }[classifier or ('shared' if group_size == 1 else 'word')]
    logits = [out[:, c // group_size] @ weight(c) + p['group_fc.bias'] for c in range(count)]
    return torch.stack(logits, dim=1)


WAYS = {
    'full': dict(),
    'full, a learned query a class': dict(learnable_queries=True),
    'full, factorised': dict(classifier='word'),
    'groups': dict(group_size=3),
    'groups that do not divide the width': dict(group_size=5),
    'text query, learned pooling': dict(group_size=3, classifier='learned'),
    'learned query, text pooling': dict(group_size=3, learnable_queries=True),
    'learned query, learned pooling': dict(group_size=3, learnable_queries=True, classifier='learned'),
    'groups, shared pooling': dict(group_size=3, classifier='shared'),
}


@pytest.mark.parametrize('way', WAYS)
def test_word_queries_equal_the_reference_before_and_after_the_classes_change(way):
    head = build(11, word_embeddings=words(11), **WAYS[way])
    x = torch.randn(2, 12, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(head(x), expected(head, x, words(11), **WAYS[way]), atol=1e-10, rtol=0)
    for count in (4, 1, 9):
        others = words(count, seed=count)
        head.set_word_embeddings(others)
        assert head.num_classes == count
        torch.testing.assert_close(head(x), expected(head, x, others, **WAYS[way]), atol=1e-10, rtol=0)


def test_label_embeddings_of_the_width_of_the_head_are_not_projected():
    head = build(5, word_embeddings=words(5, width=16))
    assert not any(name.startswith('queries') for name in head.state_dict())
    x = torch.randn(2, 12, 2, 2, dtype=torch.float64)
    outputs = decode(head.state_dict(), x, words(5, width=16).clamp(min=0))
    torch.testing.assert_close(head(x), outputs @ head.weight[:, 0] + head.bias, atol=1e-10, rtol=0)


def test_number_of_groups_decides_the_group_size():
    head = build(11, 4, word_embeddings=words(11))
    assert head.group_fc.group_size == 3
    x = torch.randn(2, 12, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(head(x), expected(head, x, words(11), group_size=3), atol=1e-10, rtol=0)


def test_permuted_classes_permute_the_logits_and_added_ones_leave_them():
    head, x = build(9, word_embeddings=words(9)), torch.randn(2, 12, 2, 2, dtype=torch.float64)
    logits, order = head(x), torch.randperm(9)
    parameters = {name: value.clone() for name, value in head.named_parameters()}
    head.set_word_embeddings(words(9)[order])
    torch.testing.assert_close(head(x), logits[:, order], atol=1e-12, rtol=0)
    for count in range(1, 10):
        head.set_word_embeddings(words(9)[:count])
        torch.testing.assert_close(head(x), logits[:, :count], atol=1e-12, rtol=0)
    for name, value in head.named_parameters():
        assert torch.equal(value, parameters[name])


def test_initialization_of_the_shared_pooling_is_the_published_one():
    torch.manual_seed(0)
    head = MLDecoder(3, decoder_embedding=768, word_embeddings=torch.randn(3, 300))
    assert head.weight.shape == (768, 1) and head.bias.shape == (1,) and not head.bias.any()
    assert head.weight.std().item() == pytest.approx(math.sqrt(2 / 769), rel=0.1)


def test_leaky_memory_activation_equals_the_reference():
    head, x = build(5, 2, memory_activation='leaky_relu'), torch.randn(2, 12, 2, 2, dtype=torch.float64)
    p = head.state_dict()
    out = decode(p, x, p['queries.weight'], slope=0.2)
    logits = [out[:, c // 3] @ p['group_fc.weight'][c // 3, :, c % 3] + p['group_fc.bias'][c] for c in range(5)]
    torch.testing.assert_close(head(x), torch.stack(logits, dim=1), atol=1e-10, rtol=0)


@pytest.mark.parametrize('scale', [1.0, 23.0])
def test_cosine_classifier_equals_the_reference(scale):
    head, x = build(7, 3, classifier='cosine', cosine_scale=scale), torch.randn(2, 12, 2, 2, dtype=torch.float64)
    p = head.state_dict()
    out, columns = decode(p, x, p['queries.weight']), p['group_fc.weight']
    for c in range(7):
        column, output = columns[c // 3, :, c % 3], out[:, c // 3]
        cosine = output @ column / (output.norm(dim=1) * column.norm())
        torch.testing.assert_close(head(x)[:, c], scale * (cosine + p['group_fc.bias'][c]), atol=1e-10, rtol=0)


def test_query_augmentations_act_in_training_only():
    options = dict(word_embeddings=words(7), random_queries=3, query_noise=0.1)
    plain, head = build(word_embeddings=words(7)), build(**options)
    x = torch.randn(2, 12, 2, 2, dtype=torch.float64)
    assert torch.equal(head(x), plain(x))
    torch.manual_seed(0)
    first, second = head.train()(x), head(x)
    assert first.shape == (2, 10) and not torch.equal(first, second), 'drawn anew each time'

    # the seen classes are asked as ever if there is no noise, however many random queries there are
    head.vocabulary.query_noise = 0.0
    torch.testing.assert_close(head(x)[:, :7], plain(x), atol=1e-12, rtol=0)
    # the noise is as strong as it says, relative to the embeddings
    head.vocabulary.query_noise, scale = 0.1, words(7).square().mean().sqrt()
    draws = torch.stack([head.vocabulary() for _ in range(2000)])
    assert (draws[:, :7] - words(7)).std().item() == pytest.approx(0.1 * scale.item(), rel=0.05)
    assert draws[:, 7:].std().item() == pytest.approx(scale.item(), rel=0.05)
    assert torch.equal(head.vocabulary.embeddings, words(7))


def test_query_cutout_sets_entries_of_classes_to_zero_in_training_only():
    head = build(word_embeddings=words(7), query_cutout=0.25, random_queries=3)
    assert torch.equal(head.vocabulary(), words(7))
    torch.manual_seed(0)
    draws = torch.stack([head.train().vocabulary() for _ in range(500)])
    cut = draws[:, :7] == 0
    assert cut.double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(draws[:, :7], words(7) * ~cut), 'the other entries stay as they are'
    assert draws[:, 7:].all(), 'random queries stay whole'
    logits = head(torch.randn(2, 12, 2, 2, dtype=torch.float64))
    logits.sum().backward()
    assert logits.shape == (2, 10) and head.queries.proj.weight.grad.any()


def test_random_queries_in_groups_share_the_last_group_and_get_the_gradient():
    head = build(7, word_embeddings=words(7), group_size=3, random_queries=4).train()
    logits = head(torch.randn(2, 12, 2, 2, dtype=torch.float64))
    assert logits.shape == (2, 11)
    logits[:, 7:].sum().backward()
    assert head.weight.grad.any() and head.queries.proj.weight.grad.any()


NAN = words(3).index_fill(0, torch.tensor([1]), math.nan)


@pytest.mark.parametrize('options, message', [
    (dict(word_embeddings=words(6)), '6 classes, num_classes is 7'),
    (dict(word_embeddings=torch.zeros(7)), 'must be floats'),
    (dict(word_embeddings=torch.zeros(7, 3, dtype=torch.long)), 'must be floats'),
    (dict(word_embeddings=0), 'width E of at least 1'),
    (dict(word_embeddings=words(7), class_names=list('abcabca')), r"repeated: \['a', 'b', 'c'\]"),
    (dict(word_embeddings=words(7), class_names=['a', 'b']), '7 class names are needed'),
    (dict(word_embeddings=words(7), class_names=[*'abcdef', 'x\ny']), r"\['x\\ny'\]"),
    (dict(word_embeddings=6, class_names=list('abc')), '7 class names are needed'),
    (dict(class_names=list('abcdefg')), 'give word_embeddings'),
    (dict(query_noise=0.1), 'give word_embeddings'),
    (dict(query_cutout=0.1), 'give word_embeddings'),
    (dict(word_embeddings=words(7), query_noise=-1), 'at least 0'),
    (dict(word_embeddings=words(7), query_cutout=1.0), r'query_cutout.*1.0'),
    (dict(group_size=2), 'group_size'),
    (dict(word_embeddings=words(7), group_size=17), 'group_size must be in 1 to'),
    (dict(word_embeddings=words(7), group_size=2, groups=3, learnable_queries=True), '7 classes do not fit 3 groups'),
    (dict(word_embeddings=words(7), learnable_queries=True, random_queries=1), 'random_queries'),
    (dict(word_embeddings=words(7), classifier='group'), "one of .*'learned', 'shared', 'word'.* with text queries"),
    (dict(classifier='word'), "one of .*'cosine', 'group'.* with fixed"),
    (dict(memory_activation='gelu'), "one of .*'leaky_relu', 'relu'.*'gelu'"),
    (dict(cosine_scale=3.0), "needs classifier='cosine'"),
    (dict(classifier='cosine', cosine_scale=0.0), 'above 0'),
])  # fmt: skip
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_classes_that_cannot_be_set_are_named_and_leave_the_head_as_it_was():
    head = build(3, word_embeddings=words(3), class_names=['zebra', 'tram', 'sky'])
    for vectors, names, message in [
        (words(4, width=5), None, 'width 6.* got 5'),
        (NAN, ['zebra', 'tram', 'sky'], r"not finite: \['tram'\]"),
        (NAN, None, r'not finite: \[1\]'),
        (words(3), ['a', 'b', 'a'], r"repeated: \['a'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            head.set_word_embeddings(vectors, names)
    assert head.class_names == ['zebra', 'tram', 'sky'] and torch.equal(head.vocabulary.embeddings, words(3))
    with pytest.raises(ValueError, match='classes of this head are fixed'):
        build().set_word_embeddings(words(3))
    with pytest.raises(ValueError, match='8 classes do not fit the 6'):
        build(6, word_embeddings=words(6), group_size=3, classifier='learned').set_word_embeddings(words(8))
    with pytest.raises(RuntimeError, match='does not have its classes'):
        build(3, word_embeddings=WIDTH)(torch.zeros(1, 12, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize('layers', [1, 2])
def test_self_attention_makes_the_layers_those_of_a_transformer_decoder(layers):
    head = build(7, 3, self_attention=True, num_layers=layers).train()
    theirs = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0, batch_first=True, dtype=torch.float64), layers
    )
    theirs.load_state_dict({f'layers.{name}': tensor for name, tensor in head.layers.state_dict().items()})
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    tokens = torch.relu(head.embed(x))
    expected = head.group_fc(theirs(head.queries().expand(2, -1, -1), tokens))
    torch.testing.assert_close(head(x), expected, atol=1e-10, rtol=0)
    ours = torch.autograd.grad(head(x).square().sum(), list(head.layers.parameters()))
    # the same order of names on both sides
    parameters = dict(theirs.layers.named_parameters())
    wanted = torch.autograd.grad(expected.square().sum(), [parameters[n] for n, _ in head.layers.named_parameters()])
    for mine, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


def test_without_projections_and_feed_forward_the_layer_is_attention_and_two_norms():
    head = build(7, 3, dim_feedforward=0, attention_projections=False, learnable_queries=True)
    p, x = dict(head.named_parameters()), torch.randn(2, 5, 12, dtype=torch.float64)
    assert {name for name in p if name.startswith('layers')} == {
        f'layers.0.{norm}.{kind}' for norm in ('norm1', 'norm2') for kind in ('weight', 'bias')
    }

    def norm(x, name):
        return nn.functional.layer_norm(x, (16,), p[f'layers.0.{name}.weight'], p[f'layers.0.{name}.bias'])

    queries = norm(2 * p['queries.weight'], 'norm1')
    for image, logits in zip(x, head(x), strict=True):
        tokens = torch.relu(image @ p['embed.weight'].T + p['embed.bias'])
        attended = [
            torch.softmax(queries[:, part] @ tokens[:, part].T / 2, dim=1) @ tokens[:, part]
            for part in torch.arange(16).chunk(4)
        ]
        output = norm(queries + torch.cat(attended, dim=1), 'norm2')
        expected = [output[c // 3] @ p['group_fc.weight'][c // 3, :, c % 3] + p['group_fc.bias'][c] for c in range(7)]
        torch.testing.assert_close(logits, torch.stack(expected), atol=1e-10, rtol=0)


EVERY_KIND = {
    **{way: dict(word_embeddings=WIDTH, **options) for way, options in WAYS.items()},
    'published': {},
    'cosine': dict(classifier='cosine'),
    'learned queries, two layers': dict(learnable_queries=True, num_layers=2),
    'self-attention': dict(self_attention=True),
    'several scales': dict(initial_num_features=(12, 5)),
    'no projections, no feed-forward': dict(attention_projections=False, dim_feedforward=0),
}


@pytest.mark.parametrize('kind', EVERY_KIND)
def test_reset_parameters_fills_every_tensor_of_a_head_built_on_the_meta_device(kind):
    options = {**SMALL, **EVERY_KIND[kind]}
    head = MLDecoder(11, **options, device='meta').to_empty(device='cpu')
    tensors = [*head.parameters(), *head.buffers()]
    for tensor in tensors:
        if tensor.is_floating_point():
            nn.init.constant_(tensor, math.nan)
    head.reset_parameters()
    direct = MLDecoder(11, **options).state_dict()
    for name, tensor in head.state_dict().items():
        assert tensor.shape == direct[name].shape and tensor.isfinite().all(), name
        assert tensor.unique().numel() > 1 or torch.equal(tensor, direct[name]), f'{name} is drawn or the constant'


def test_reset_parameters_keeps_the_label_embeddings_of_known_classes():
    head = build(5, word_embeddings=words(5), class_names=list('abcde'))
    before = head.queries.proj.weight.clone()
    head.reset_parameters()
    assert head.class_names == list('abcde') and torch.equal(head.vocabulary.embeddings, words(5))
    assert not torch.equal(head.queries.proj.weight, before)
    with pytest.raises(RuntimeError, match='does not have its classes'):
        head.to('meta').to_empty(device='cpu')(torch.zeros(1, 12, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('learnable_queries', 'false'),
        ('self_attention', None),
        ('num_of_groups', 2.5),
        ('num_of_groups', True),
        ('decoder_embedding', 64.0),
        ('num_heads', '8'),
        ('num_classes', 2.0),
    ],
)
def test_an_option_of_a_wrong_type_is_named(name, value):
    with pytest.raises(TypeError, match=f'{name} must be of type (int|bool), got {value!r}'):
        MLDecoder(**{'num_classes': 3, 'initial_num_features': 8, name: value})
    assert MLDecoder(np.int64(3), initial_num_features=8, learnable_queries=1).config.learned_queries
