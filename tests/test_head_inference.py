"""`MLDecoder.fold`: the query side computed once, in eager mode and in exported programs."""

import copy

import pytest
import torch

from timm_mldecoder import MLDecoder

# weights are cut into query, key and value, transposed and expanded by views
VIEWS = {'expand', 'slice', 'alias', 'view', 'permute', 'transpose', 'split_with_sizes', 'getitem'}
SMALL = dict(decoder_embedding=16, initial_num_features=12, num_heads=4, dim_feedforward=24)
EMBEDDINGS = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
KINDS = {
    'published': {},
    'two layers': dict(num_layers=2, learnable_queries=True),
    'self-attention': dict(self_attention=True),
    'no projections, no feed-forward': dict(attention_projections=False, dim_feedforward=0),
    'text queries': dict(word_embeddings=EMBEDDINGS),
    'text queries in groups': dict(word_embeddings=EMBEDDINGS, group_size=3),
}


def computed_constants(program: torch.export.ExportedProgram) -> set[str]:
    """The operators before the attention that compute something which is the same for every input."""
    (user_input,) = program.graph_signature.user_inputs
    depends, constant = set(), set()
    for node in program.graph.nodes:
        if any(name in str(node.target) for name in ('scaled_dot_product', 'softmax')):
            return {name for name in constant if name.removeprefix('aten.').partition('.')[0] not in VIEWS}
        if node.name == user_input or any(argument in depends for argument in node.all_input_nodes):
            depends.add(node)
        elif node.op == 'call_function':
            constant.add(str(node.target))
    raise AssertionError('the graph has no attention')


@pytest.fixture
def x():
    return torch.randn(2, 12, 3, 3, generator=torch.Generator().manual_seed(0))


def build(kind='published') -> MLDecoder:
    torch.manual_seed(0)
    return MLDecoder(7, **{**SMALL, **KINDS[kind]}).eval()


@pytest.mark.parametrize('kind', KINDS)
def test_a_folded_head_gives_the_same_logits_without_running_the_query_side(kind, x):
    head = build(kind)
    logits, weights, names = head(x), head.attention_weights(x), list(head.state_dict())
    head.fold()
    runs = []
    head.queries.register_forward_hook(lambda *args: runs.append('queries'))
    head.layers[0].norm1.register_forward_hook(lambda *args: runs.append('norm1'))
    torch.testing.assert_close(head(x), logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(head.attention_weights(x), weights, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(head)(x), logits, rtol=1e-6, atol=1e-6)
    assert not runs
    assert list(head.state_dict()) == names
    head.eval()(x)
    assert not runs, 'eval() leaves the head folded'


def test_an_exported_head_that_is_not_folded_computes_its_queries_in_every_pass(x):
    assert computed_constants(torch.export.export(build(), (x,))) >= {'aten.layer_norm.default', 'aten.linear.default'}


def double(head: MLDecoder) -> None:
    head.load_state_dict({name: 2 * tensor for name, tensor in head.state_dict().items()})


CHANGES = {
    'train': lambda head: head.train().eval(),
    'unfold': lambda head: head.unfold(),
    'loading': double,
    'loading as part of a model': lambda head: torch.nn.Sequential(head).load_state_dict(
        {f'0.{name}': 2 * tensor for name, tensor in head.state_dict().items()}
    ),
    'casting': lambda head: head.to(torch.float64),
    'moving': lambda head: head.to('cpu'),
    'new classes': lambda head: head.set_word_embeddings(EMBEDDINGS[:3]),
    'initialization': lambda head: head.reset_parameters(),
}


@pytest.mark.parametrize('change', CHANGES)
def test_folding_is_undone_by_what_changes_the_query_side(change, x):
    head = build('text queries').fold()
    CHANGES[change](head)
    dtype = head.weight.dtype
    fresh = MLDecoder(head.num_classes, **SMALL, word_embeddings=head.vocabulary.embeddings.float()).to(dtype).eval()
    fresh.load_state_dict(head.state_dict())
    assert head.folded_queries is None
    torch.testing.assert_close(head(x.to(dtype)), fresh(x.to(dtype)))


def test_folding_in_training_mode_is_an_error():
    with pytest.raises(ValueError, match='eval'):
        build().train().fold()


@pytest.mark.parametrize('kind', KINDS)
def test_an_exported_folded_head_computes_nothing_on_queries_before_attention(kind, x):
    head = build(kind).fold()
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(head, (x,), dynamic_shapes=({0: batch},))
    assert not computed_constants(program)
    more = torch.randn(5, 12, 3, 3)
    torch.testing.assert_close(program.module()(more), head(more))
