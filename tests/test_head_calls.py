"""How a head is called: layouts of features, masks, query outputs, queries per call, what the classifier reads."""

import pytest
import timm
import torch
from torch import nn

from timm_mldecoder import MLDecoder

F, D, K, C, N = 12, 16, 3, 7, 6  # width of features, width of the head, queries, classes, tokens
SMALL = dict(decoder_embedding=D, num_heads=4, dim_feedforward=32, num_layers=2)


def head(**options):
    torch.manual_seed(0)
    return MLDecoder(C, K, initial_num_features=F, **{**SMALL, **options}).eval()


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# Features


@pytest.mark.parametrize('shape', [(6,), (2, 3), (1, 2, 3), (3, 1, 2, 1)])
@pytest.mark.parametrize('last', [True, False])
def test_features_are_recognized_by_their_width(shape, last):
    ours, x = head(), torch.randn(2, *shape, F)
    close(ours(x if last else x.movedim(-1, 1)), ours(x.flatten(1, -2)))


def test_pooled_features_are_one_token_and_a_list_of_one_scale_is_this_scale():
    ours, x = head(), torch.randn(2, F)
    close(ours(x), ours(x.unsqueeze(1)))
    close(ours([x]), ours(x))


def test_as_many_tokens_as_channels_are_ambiguous():
    x = torch.randn(2, F, F)
    with pytest.raises(ValueError, match=r'\[B, N, F\] or \[B, F, N\].*channels_first=False'):
        head()(x)
    longer = torch.cat([x, x[:, :1]], dim=1)  # a token twice, so that the shape says what it is
    mask = torch.arange(F + 1).expand(2, -1) < F
    close(head(channels_first=False)(x), head()(longer, mask=mask))
    close(head(channels_first=True)(x.transpose(1, 2)), head()(longer, mask=mask))


def test_a_map_as_wide_as_its_channels_is_read_as_published():
    x = torch.randn(2, F, 2, F)
    close(head()(x), head()(x.flatten(2).transpose(1, 2)))
    close(head(channels_first=False)(x), head()(x.flatten(1, 2)))


def test_a_timm_model_says_what_its_tokens_are():
    model = timm.create_model('test_vit', img_size=128, num_classes=C, ml_decoder=SMALL).eval()
    assert model.head.embed.in_features == 64  # 8 x 8 tokens
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, C)


# Masks


@pytest.mark.parametrize('name', ['mask', 'key_padding_mask'])
def test_padding_tokens_are_left_out(name):
    ours, x = head(), torch.randn(2, N, F)
    keep = torch.tensor([[True] * 4 + [False] * 2] * 2)
    given = {name: keep if name == 'mask' else ~keep}
    close(ours(x, **given), ours(x[:, :4]))
    close(ours.decode(x, **given), ours.decode(x[:, :4]))
    close(ours.attention_weights(x, **given)[..., :4], ours.attention_weights(x[:, :4]))
    assert not ours.attention_weights(x, **given)[..., 4:].any()
    close(ours.fold()(x, **given), ours(x[:, :4]))


@pytest.mark.parametrize(
    'masks, message',
    [
        (dict(mask=torch.ones(N, 2, dtype=torch.bool)), r'mask must be bool \[B, N\] = \[2, 6\], got .* \[6, 2\]'),
        (dict(mask=torch.ones(2, N)), 'mask must be bool .* got torch.float32'),
        (dict(key_padding_mask=torch.ones(2, N, dtype=torch.uint8)), 'key_padding_mask must be bool'),
        (dict(key_padding_mask=torch.tensor([[False] * N, [True] * N])), 'image 1 has padding tokens only'),
        (dict(mask=torch.tensor([[False] * N, [True] * N])), 'image 0 has padding tokens only'),
        (dict.fromkeys(['mask', 'key_padding_mask'], torch.ones(2, N, dtype=torch.bool)), 'not both'),
    ],
)
def test_wrong_masks_are_named(masks, message):
    for call in (head(), head().decode, head().attention_weights):
        with pytest.raises(ValueError, match=message):
            call(torch.randn(2, N, F), **masks)


# Query outputs, queries, attention


def test_the_classifier_reads_what_decode_returns():
    ours, x = head(), torch.randn(2, N, F)
    outputs = ours.decode(x)
    assert outputs.shape == (2, K, D)
    close(ours.group_fc(outputs), ours(x))


@pytest.mark.parametrize('self_attention', [False, True])
def test_queries_of_a_call(self_attention):
    ours, other, x = head(self_attention=self_attention), torch.randn(2, K, D), torch.randn(2, N, F)
    own = ours.queries.weight.clone()
    expected = []
    for image in range(2):
        ours.queries.weight = other[image]
        expected.append(ours(x)[image])
        close(head(self_attention=self_attention)(x, queries=other[image]), ours(x))
    ours.queries.weight = own
    close(ours(x, queries=other), torch.stack(expected))
    close(ours.fold()(x, queries=other), torch.stack(expected))
    close(ours.group_fc(ours.decode(x, queries=other)), torch.stack(expected))
    close(ours.attention_weights(x, queries=own), ours.attention_weights(x))
    assert not torch.allclose(ours.attention_weights(x, queries=other), ours.attention_weights(x))


def test_queries_of_a_call_get_gradients_and_dropout():
    ours, x = head().train(), torch.randn(2, N, F)
    queries = torch.randn(K, D, requires_grad=True)
    ours(x, queries=queries).sum().backward()
    assert queries.grad.abs().sum() > 0
    assert not torch.equal(*ours.decode(x[:1].expand(2, -1, -1), queries=queries))


def test_wrong_queries_are_named():
    x = torch.randn(2, N, F)
    for queries in (torch.randn(K + 1, D), torch.randn(3, K, D), torch.randn(K)):
        with pytest.raises(ValueError, match=r'queries must be \[K, D\] = \[3, 16\]'):
            head()(x, queries=queries)
    text = MLDecoder(C, initial_num_features=F, word_embeddings=torch.randn(C, 5), **SMALL)
    with pytest.raises(ValueError, match='set_word_embeddings'):
        text(x, queries=torch.randn(C, D))


def test_attention_weights_of_each_head_are_those_of_torch():
    ours, x = head(num_layers=1), torch.randn(2, N, F)
    layer = ours.layers[0]
    torchs = nn.MultiheadAttention(D, 4, batch_first=True)
    torchs.load_state_dict(layer.multihead_attn.state_dict())
    tokens = torch.relu(ours.embed(x))
    queries = layer.norm1(2 * ours.queries.weight).expand(2, -1, -1)
    _, expected = torchs(queries, tokens, tokens, average_attn_weights=False)
    found = ours.attention_weights(x, average_heads=False)
    assert found.shape == (2, 4, K, N)
    close(found, expected)
    close(found.mean(dim=1), ours.attention_weights(x))


# What the classifier reads


def test_dropout_in_front_of_the_classifier(tmp_path):
    ours, x = head(classifier_dropout=0.5, dropout=0.0), torch.randn(2, N, F)
    close(ours(x), head()(x))
    ours.group_fc = nn.Identity()  # the logits are the query outputs
    ours.group_fc.forward = lambda outputs, label_embeddings: outputs
    dropped = ours.train()(x)
    assert 0.2 < (dropped == 0).float().mean() < 0.8
    close(dropped[dropped != 0], 2 * ours.decode(x)[dropped != 0])
    with pytest.raises(ValueError, match=r'classifier_dropout must be in \[0, 1\)'):
        head(classifier_dropout=1.0)
    model = timm.create_model('test_resnet', num_classes=C, ml_decoder=dict(classifier_dropout=0.5))
    timm.models.save_for_hf(model, tmp_path / 'folder')
    again = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True)
    assert again.fc.classifier_dropout.p == 0.5


@pytest.mark.parametrize('classifier', ['group', 'cosine'])
def test_a_class_token_beside_each_query(classifier):
    ours, x, token = head(class_token_width=5, classifier=classifier), torch.randn(2, N, F), torch.randn(2, 5)
    assert ours.group_fc.weight.shape == (K, D + 5, 3)
    outputs = torch.cat([ours.decode(x), token[:, None].expand(-1, K, -1)], dim=-1)
    close(ours(x, class_token=token), ours.group_fc(outputs))
    for wrong in (None, torch.randn(2, 4), torch.randn(1, 5)):
        with pytest.raises(ValueError, match=r'class_token must be \[B, class_token_width\] = \[2, 5\]'):
            ours(x, class_token=wrong)
    with pytest.raises(ValueError, match='class_token_width'):
        MLDecoder(C, initial_num_features=F, word_embeddings=5, class_token_width=5)
