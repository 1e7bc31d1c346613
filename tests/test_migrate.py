"""Checkpoints of projects that carry a copy of the published head: loaded with equal logits, or refused with a reason.

The layers by which projects repaired the published one (issue Alibaba-MIIL/ML_Decoder#82) are written here from their
descriptions, one class each. They share no code with the package.
"""

import csv
import json
import random
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from image_folders import write_images
from marks import few
from runs import ROOT
from torch import nn
from torch.nn import functional as F

from timm_mldecoder import MLDecoder, add_ml_decoder_head, convert, convert_state_dict
from timm_mldecoder.checkpoint.folders import folder_settings
from timm_mldecoder.checkpoint.published import head_options, lacks_head_norm
from timm_mldecoder.checkpoint.read import weights_of
from timm_mldecoder.data.class_files import read_class_names, read_thresholds
from timm_mldecoder.export.__main__ import main as export
from timm_mldecoder.export.__main__ import read_metadata
from timm_mldecoder.flags import validate_options
from timm_mldecoder.modeling.load import load as load_source
from timm_mldecoder.modeling.load import load_model
from timm_mldecoder.models.attention_maps import attention_maps
from timm_mldecoder.predict.__main__ import main as predict
from train import main as train
from validate import main as validate

CLASSES, DIM, HIDDEN = 11, 32, 2048


class Published(nn.Module):
    """The published layer in evaluation mode: no self-attention, each query is added to itself."""

    def __init__(self, dim: int = DIM, heads: int = 8, hidden: int = HIDDEN):
        super().__init__()
        self.attention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def attention(self, dim, heads):
        self.multihead_attn = nn.MultiheadAttention(dim, heads, batch_first=True)

    def residual(self, queries):
        return queries

    def attend(self, queries, memory):
        return self.multihead_attn(queries, memory, memory)[0]

    def forward(self, queries, memory):
        queries = self.norm1(queries + self.residual(queries))
        queries = self.norm2(queries + self.attend(queries, memory))
        return self.norm3(queries + self.linear2(F.relu(self.linear1(queries))))


class Torch(nn.TransformerDecoderLayer):
    """(a) torch's own layer, with real self-attention."""

    def __init__(self, dim: int = DIM, heads: int = 8, hidden: int = HIDDEN):
        super().__init__(dim, heads, hidden, batch_first=True)


class Alias(Published):
    """(b) a second name for the cross-attention, which torch's decoder only reads."""

    def attention(self, dim, heads):
        super().attention(dim, heads)
        self.self_attn = self.multihead_attn


class Unused(Published):
    """(c) a subclass of torch's layer, whose self-attention is never called."""

    def attention(self, dim, heads):
        super().attention(dim, heads)
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)


class Reused(Unused):
    """(c) the same, where the cross-attention is called for self-attention too."""

    def residual(self, queries):
        return self.multihead_attn(queries, queries, queries)[0]


class Renamed(Published):
    """(d) the cross-attention is named self_attn, and there is no other."""

    def attention(self, dim, heads):
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)

    def attend(self, queries, memory):
        return self.self_attn(queries, memory, memory)[0]


class XFormersAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_container = nn.Module()
        for name in 'qkv':
            setattr(self.in_proj_container, f'{name}_proj', nn.Linear(dim, dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries, memory):
        inputs = dict(q=queries, k=memory, v=memory)
        q, k, v = (
            getattr(self.in_proj_container, f'{name}_proj')(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, x in inputs.items()
        )
        shares = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return self.proj((shares @ v).transpose(1, 2).flatten(2))


class XFormers(Published):
    """(d') xformers' attention, which has its own names."""

    def attention(self, dim, heads):
        self.multihead_attn = XFormersAttention(dim, heads)

    def attend(self, queries, memory):
        return self.multihead_attn(queries, memory)


# The repair -> what the user has to say about its files, None where they show it.
REPAIRS = {Published: None, Torch: 'use', Alias: None, Unused: 'ignore', Reused: 'reuse', Renamed: None, XFormers: None}


class Head(nn.Module):
    """The published head around one of these layers, one group after the other; the reference's tensor names."""

    def __init__(self, features, layer=Published, classes=CLASSES, queries=4, dim=DIM, layers=1, **options):
        super().__init__()
        group = -(-classes // queries)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(layer(dim, **options) for _ in range(layers))
        self.decoder.embed_standart = nn.Linear(features, dim)
        self.decoder.query_embed = nn.Embedding(queries, dim)
        self.decoder.duplicate_pooling = nn.Parameter(torch.randn(queries, dim, group))
        self.decoder.duplicate_pooling_bias = nn.Parameter(torch.randn(classes))

    def queries(self):
        return self.decoder.query_embed.weight

    def forward(self, tokens):
        memory = F.relu(self.decoder.embed_standart(tokens))
        queries = self.queries().expand(len(tokens), -1, -1)
        for layer in self.decoder.layers:
            queries = layer(queries, memory)
        logits = [queries[:, k] @ weight for k, weight in enumerate(self.decoder.duplicate_pooling)]
        return torch.cat(logits, dim=1)[:, : len(self.decoder.duplicate_pooling_bias)] + (
            self.decoder.duplicate_pooling_bias
        )


class TextHead(Head):
    """Zero-shot: queries from label embeddings [C, E], which the file holds; one weight for all classes."""

    def __init__(self, features, layer=Published, width=24, **options):
        super().__init__(features, layer, queries=CLASSES, **options)
        self.decoder.query_embed = nn.Parameter(torch.randn(CLASSES, width), requires_grad=False)
        self.wordvec_proj = nn.Linear(width, DIM) if width != DIM else nn.Identity()
        self.decoder.duplicate_pooling = nn.Parameter(torch.randn(DIM, 1))
        self.decoder.duplicate_pooling_bias = nn.Parameter(torch.randn(1))

    def queries(self):
        return F.relu(self.wordvec_proj(self.decoder.query_embed))

    def forward(self, tokens):
        pooling, self.decoder.duplicate_pooling = self.decoder.duplicate_pooling, None
        self.decoder._parameters['duplicate_pooling'] = pooling.expand(CLASSES, -1, -1)
        bias, self.decoder._parameters['duplicate_pooling_bias'] = (
            self.decoder.duplicate_pooling_bias,
            self.decoder.duplicate_pooling_bias.expand(CLASSES),
        )
        try:
            return super().forward(tokens)
        finally:
            self.decoder._parameters.update(duplicate_pooling=pooling, duplicate_pooling_bias=bias)


# Family -> timm's name, arguments that make it small, image size.
BACKBONES = {
    'resnet': ('test_resnet', {}, 64),
    'tresnet': ('tresnet_m', dict(layers=[1, 1, 1, 1], width_factor=0.5), 64),
    'efficientnet': ('test_efficientnet', {}, 64),
    'convnext': ('test_convnext', {}, 64),
    'davit': ('davit_tiny', dict(embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1)), 64),
    'maxvit': ('test_maxvit', {}, 160),
    'swin': (
        'swin_tiny_patch4_window7_224',
        dict(img_size=64, window_size=2, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
        64,
    ),
    'vit': ('test_vit', {}, 160),
    'vit_without_class_token': ('test_vit', dict(class_token=False, global_pool='avg', fc_norm=False), 160),
    'vit_with_fc_norm': ('test_vit', dict(class_token=False, global_pool='avg'), 160),
}
NORMED = {
    'convnext': 'head.norm',
    'davit': 'head.norm',
    'vit_with_fc_norm': 'fc_norm',
}  # between features and classifier
TOKENS = ('vit',)  # with a class token


def randomize(module):
    """Draw every tensor of trained size: norms and biases too, which start as constants."""
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if tensor.dim() == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5 if name.endswith('weight') else torch.randn_like(tensor) / 3)
    return module


class Client(nn.Module):
    """A project's model: a timm backbone and the head on its features.

    `norm` says what becomes of a norm between features and classifier: 'removed', 'applied', or 'kept' in the file and
    not applied. `tokens` says whether the head reads the class token.
    """

    def __init__(self, family, layer=Published, norm='removed', tokens=False, position=None, **options):
        super().__init__()
        self.family, self.norm, self.tokens, self.position = family, norm, tokens, position
        name, arguments, self.size = BACKBONES[family]
        self.model = timm.create_model(name, num_classes=0, **arguments)
        self.head = Head(self.model.num_features, layer, **options)
        randomize(self).eval()
        nn.init.normal_(self.head.decoder.embed_standart.weight, std=3 * self.model.num_features**-0.5)

    def forward(self, images):
        x = self.model.forward_features(images)
        if x.dim() == 4:
            x = x.permute(0, 3, 1, 2) if getattr(self.model, 'output_fmt', 'NCHW') == 'NHWC' else x
            x = self.normalize(x)
            x = x if self.position is None else x + self.position(x)
            x = x.flatten(2).transpose(1, 2)
        elif self.family in TOKENS and not self.tokens:
            x = x[:, 1:]
        else:
            x = self.normalize(x)
        return self.head(x)

    def normalize(self, x):
        applied = self.family in NORMED and self.norm == 'applied'
        return self.model.get_submodule(NORMED[self.family])(x) if applied else x

    def file(self, prefix='', backbone='model.', head='head.', timm_layout=False):
        """Return the tensors under the prefixes; `head` is below `backbone` if it starts with a dot."""
        head = f'{backbone}{head[1:]}' if head.startswith('.') else head
        tensors = {}
        for name, tensor in self.model.state_dict().items():
            if not (self.norm == 'removed' and name.startswith(('head.', 'fc_norm.'))):
                tensors[f'{prefix}{backbone}{name}'] = tensor
        for name, tensor in self.head.state_dict().items():
            if timm_layout and '.layers.' not in name:
                name = name.removeprefix('decoder.')
            tensors[f'{prefix}{head}{name}'] = tensor
        return tensors

    def build(self, **options):
        """Return a timm model with our head for the client's backbone."""
        name, arguments, _ = BACKBONES[self.family]
        classes = options.pop('num_classes', CLASSES)
        return timm.create_model(name, num_classes=classes, ml_decoder=options, **arguments)


@torch.no_grad()
def assert_same_logits(model, client):
    images = F.interpolate(torch.randn(2, 3, 4, 4, dtype=torch.double), size=(client.size, client.size))
    expected = client.double()(images)
    assert (expected[0] - expected[1]).abs().max() > 1e-4 * expected.abs().max()  # the backbone counts
    torch.testing.assert_close(model.double().eval()(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def load(client, file, options=None, **says):
    """Build the model that the file shows, with further options of the head, and load the file strictly."""
    shown = {**head_options(file, **{name: says[name] for name in says if name != 'ignore'}), **(options or {})}
    model = client.build(**shown)
    if 'head_norm' not in shown and lacks_head_norm(
        file, model, **{name: says[name] for name in says if name in ('head', 'ignore')}
    ):
        model = client.build(**shown, head_norm=False)
    model.load_state_dict(convert_state_dict(file, model, **says))
    return model


# Each repair, family, prefix and container


@pytest.mark.parametrize('timm_layout', [False, True])
@pytest.mark.parametrize('repair', REPAIRS)
def test_every_repair_loads_with_equal_logits_or_is_refused_until_the_user_has_chosen(repair, timm_layout):
    client = Client('resnet', repair, layers=2)
    file, choice = client.file(timm_layout=timm_layout), REPAIRS[repair]
    if choice:
        with pytest.raises(ValueError, match="'use'.*'ignore'.*'reuse'"):
            load(client, file, num_heads=8)
        with pytest.raises(ValueError, match="'use'.*'ignore'"):
            convert_state_dict(file, client.build(**head_options(file, self_attention=choice, num_heads=8)))
    assert_same_logits(load(client, file, self_attention=choice, num_heads=8), client)


@pytest.mark.parametrize('repair', [Published, Renamed, XFormers])
def test_a_choice_where_there_is_none_is_refused(repair):
    with pytest.raises(ValueError, match='no weights of self-attention'):
        head_options(Client('resnet', repair).file(), self_attention='use')
    with pytest.raises(ValueError, match='must be one of'):
        head_options(Client('resnet', repair).file(), self_attention='drop')


def test_a_cross_attention_that_is_reused_without_a_second_one():
    class OnlyOne(Published):
        residual = Reused.residual

    client = Client('resnet', OnlyOne, layers=2)
    assert_same_logits(load(client, client.file(), self_attention='reuse', num_heads=8), client)


@pytest.mark.parametrize('repair', few([Alias, Published, Renamed, XFormers], 1))
@pytest.mark.parametrize('family', BACKBONES)
def test_every_family(family, repair):
    for reads in (True, False) if family in TOKENS else (False,):
        client = Client(family, repair, tokens=reads)
        file = client.file(prefix='backbone.')
        if family in TOKENS:
            with pytest.raises(ValueError, match='prefix_tokens=True or prefix_tokens=False'):
                load(client, file)
        assert_same_logits(load(client, file, dict(prefix_tokens=reads) if family in TOKENS else None), client)


@pytest.mark.parametrize('family', few(NORMED, ['convnext', 'vit_with_fc_norm']))
@pytest.mark.parametrize(
    'norm, head, needed',
    [
        ('removed', 'head.', False),
        ('removed', '.head.', False),
        ('applied', '.head.fc.', False),
        ('applied', 'head.', True),
        ('kept', 'head.', True),
    ],
)
def test_the_norm_between_features_and_classifier(family, norm, head, needed):
    if family == 'vit_with_fc_norm':  # timm's own forward would pool in front of it, so the place shows nothing
        head, needed = head.replace('head.fc.', 'head.'), norm != 'removed'
    client = Client(family, norm=norm)
    file = client.file(head=head)
    options = dict(head_norm=norm == 'applied')
    if needed:  # its tensors are in the file, which does not show whether the head reads what it gives
        with pytest.raises(ValueError, match='head_norm=True or head_norm=False'):
            load(client, file)
        assert_same_logits(load(client, file, options), client)
    else:
        assert_same_logits(load(client, file), client)
    if norm == 'removed':
        with pytest.raises(ValueError, match=f'no {NORMED[family]}.weight, {NORMED[family]}.bias.*head_norm=False'):
            convert_state_dict(file, client.build(**head_options(file)))


@pytest.mark.parametrize('backbone, head', [('', '.fc.'), ('backbone.', 'mldecoder.'), ('backbone.model.', '.fc.')])
@pytest.mark.parametrize('prefix', few(['', 'module._orig_mod.', 'pl_module.model.', 'model.', 'net.'], 2))
def test_every_prefix(prefix, backbone, head):
    client = Client('resnet', Alias)
    assert_same_logits(load(client, client.file(prefix, backbone, head)), client)


CONTAINERS = {
    'state_dict': False,
    'model': False,
    'net': False,
    'model_state_dict': False,
    'ema': True,
    'model_ema': True,
    'state_dict_ema': True,
}


@pytest.mark.parametrize('container', few(CONTAINERS, ['model', 'ema', 'state_dict_ema']))
def test_every_container(container):
    client, other = Client('resnet', Alias), Client('resnet', Alias)
    assert_same_logits(load(client, {container: client.file(), 'epoch': 3}), client)
    if CONTAINERS[container]:  # beside raw weights
        file = {'model': other.file(), container: client.file()}
        assert_same_logits(load(client, weights_of(file, ema=True)), client)
        assert_same_logits(load(client, weights_of(file, ema=False)), other)


def test_ema_weights_of_a_file_that_no_rule_ranks_are_taken_on_request_only():
    raw, ema = ({'a': torch.full((1,), value)} for value in (1.0, 2.0))
    assert weights_of({'model': raw, 'ema': ema}) == raw
    assert weights_of({'model': raw, 'model_ema': ema}) == ema


# Every other way to load a file


def write(folder, client):
    torch.save({'model': client.file()}, folder / 'file.pth')
    return str(folder / 'file.pth')


def model_options(client, path, **flags):
    name, arguments, size = BACKBONES[client.family]
    sizes = dict(num_classes=CLASSES, use_ml_decoder_head=1, decoder_embedding=DIM, num_of_groups=4, img_size=size)
    return validate_options(data_dir='.', checkpoint=path, model=name, model_kwargs=arguments, **sizes, **flags)


@pytest.mark.parametrize('repair', [Published, XFormers])
def test_validate_loads_what_the_file_shows(repair, tmp_path):
    client = Client('resnet', repair)
    assert_same_logits(load_model(model_options(client, write(tmp_path, client))).model, client)


@pytest.mark.parametrize(
    'family, settings, options, message',
    [
        ('resnet', dict(layer=Torch), dict(self_attention=True), '--self-attention'),
        ('resnet', dict(layer=Unused), {}, '--self-attention'),
        ('resnet', dict(layer=Reused), dict(self_attention=True), '--self-attention'),
        ('resnet', dict(heads=4, layers=2), dict(num_layers=2), 'num_heads=8'),
        ('vit', dict(tokens=True), {}, 'prefix_tokens'),
        ('convnext', {}, {}, 'head_norm=False'),
        ('convnext', dict(norm='kept'), {}, 'head_norm'),
    ],
)
def test_no_other_way_loads_a_file_that_does_not_show_its_logits(family, settings, options, message, tmp_path):
    client = Client(family, **settings)
    path, (name, arguments, size) = write(tmp_path, client), BACKBONES[family]
    with pytest.raises(ValueError, match=message):
        load_model(model_options(client, path, ml_decoder_kwargs=options))
    head = dict(decoder_embedding=DIM, num_of_groups=4, **options)
    model = timm.create_model(name, num_classes=CLASSES, ml_decoder=head, **arguments)
    with pytest.raises(ValueError, match=message):
        timm.models.load_checkpoint(model, path, filter_fn=convert_state_dict)
    with pytest.raises(RuntimeError, match='fc.embed|head.embed'):
        timm.create_model(name, num_classes=CLASSES, ml_decoder=head, checkpoint_path=path, **arguments)
    with pytest.raises(RuntimeError, match='embed'):
        model.get_classifier().load_state_dict(client.head.state_dict())
    with pytest.raises(ValueError, match='does not say which model'):
        load_source(path)
    command = [path, str(tmp_path / 'out'), '--model', name, '--input-size', str(size)]
    if 'head_norm=False' in message:  # which convert finds itself
        convert.main(command)
        assert_same_logits(timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True), client)
        return
    with pytest.raises(ValueError, match=message):
        convert.main(command)


def test_training_does_not_start_from_such_a_file(tmp_path):
    data = write_images(tmp_path / 'data', train=2, validation=1, classes=CLASSES)
    client = Client('resnet', Torch)
    flags = '--model test_resnet --use-ml-decoder-head 1 --num-of-groups 4 --ml-decoder-kwargs self_attention=True'
    flags += f' --decoder-embedding {DIM} --img-size 64 --device cpu -j 0 -b 2 --epochs 1 --output {tmp_path / "out"}'
    with pytest.raises(ValueError, match='file.pth'):
        train([str(data), *flags.split(), '--initial-checkpoint', write(tmp_path, client)])


# Other things that a file has


def test_several_heads_are_listed_and_one_is_chosen():
    one, two = Client('resnet', Alias), Client('resnet')
    file = one.file(head='heads.a.') | {f'heads.b.{name}': value for name, value in two.head.state_dict().items()}
    with pytest.raises(ValueError, match=r'2 ML-Decoder heads.*--head NAME.*heads\.a, heads\.b'):
        load(one, file)
    with pytest.raises(ValueError, match="no ML-Decoder head 'heads.c'"):
        load(one, file, head='heads.c')
    assert_same_logits(load(one, file, head='heads.a'), one)
    two.model = one.model
    assert_same_logits(load(one, file, head='heads.b'), two)


def test_two_whole_models_in_a_file():
    """Student and teacher: the backbone is that of the head; with one head, the file does not show which."""
    one, two = Client('resnet'), Client('resnet')
    file = one.file('student.') | two.file('teacher.')
    assert_same_logits(load(one, file, head='student.head'), one)
    assert_same_logits(load(one, file, head='teacher.head.'), two)
    del two.head
    two.head = nn.Identity()
    file = one.file('student.', head='head.') | two.file('teacher.')
    with pytest.raises(ValueError, match='2 models that fit.*--ignore'):
        load(one, file)
    assert_same_logits(load(one, file, ignore=['teacher.']), one)


def test_a_part_that_the_model_does_not_have_is_an_error_and_not_left_out():
    client = Client('resnet')
    for name in ('projection.weight', 'model.projection.weight', 'head.decoder.norm.weight', 'head.gamma'):
        with pytest.raises(ValueError, match='projection|norm.weight|gamma') as caught:
            load(client, client.file() | {name: torch.ones(3)})
        assert '\n' not in str(caught.value) and len(str(caught.value)) <= 500


def test_an_error_says_in_one_line_what_the_misfits_have_in_common():
    client = Client('resnet')
    model = add_ml_decoder_head(timm.create_model('test_convnext'), **head_options(client.file()))
    with pytest.raises(ValueError, match=r'\d+ tensors') as caught:
        convert_state_dict(client.file('module.backbone.'), model)
    assert '\n' not in str(caught.value) and len(str(caught.value)) <= 500


@pytest.mark.parametrize('changed', [dict(layers=3), dict(hidden=64)])
def test_the_number_of_heads_must_be_given_where_constants_of_the_published_code_were_changed(changed):
    client = Client('resnet', heads=4, **changed)
    with pytest.raises(ValueError, match='num_heads=8 or another number'):
        load(client, client.file())
    with pytest.raises(ValueError, match='num_heads=8 or another number'):
        convert_state_dict(client.file(), client.build(**head_options(client.file(), num_heads=8)))
    with pytest.raises(ValueError, match='built with num_heads=4'):
        convert_state_dict(client.file(), client.build(**head_options(client.file(), num_heads=4)), num_heads=8)
    assert_same_logits(load(client, client.file(), num_heads=4), client)


@pytest.mark.parametrize('width', [24, DIM])
def test_label_embeddings_in_the_file(width):
    client = Client('resnet', Alias)
    client.head = randomize(TextHead(client.model.num_features, Alias, width=width))
    model = load(client, client.file(), dict(num_classes=CLASSES))
    assert_same_logits(model, client)
    model.get_classifier().set_word_embeddings(torch.randn(3, width))  # other classes
    assert model.double()(torch.randn(1, 3, 64, 64).double()).shape == (1, 3)


def test_queries_as_a_bare_parameter():
    client = Client('resnet')
    queries = client.head.decoder.query_embed.weight.detach()
    file = {name.replace('query_embed.weight', 'query_embed'): value for name, value in client.file().items()}
    assert_same_logits(load(client, file), client)
    assert torch.equal(load(client, file, dict(learnable_queries=True)).fc.queries.weight, queries.float())
    with pytest.raises(ValueError, match='query_embed has a projection'):
        load(client, file | {'head.wordvec_proj.weight': torch.zeros(DIM, DIM)})


def detr(x):
    """The encoding of DETR, number by number (arXiv 2005.12872)."""
    _, features, rows, columns = x.shape
    values = torch.empty(features, rows, columns, dtype=x.dtype)
    half = features // 2
    for channel in range(features):
        of_rows, index = channel < half, channel % half
        for i in range(rows):
            for j in range(columns):
                place = (i + 1) / (rows + 1e-6) if of_rows else (j + 1) / (columns + 1e-6)
                angle = torch.tensor(place * 2 * torch.pi / 10_000 ** (2 * (index // 2) / half), dtype=x.dtype)
                values[channel, i, j] = angle.cos() if index % 2 else angle.sin()
    return values


def penc(size, width):
    """PositionalEncoding2D(width) of the package positional-encodings, number by number: [x, y, channels]."""
    half = 2 * -(-width // 4)
    values = torch.empty(*size, 2 * half, dtype=torch.double)
    for i in range(size[0]):
        for j in range(size[1]):
            for channel in range(2 * half):
                place, index = (i, channel) if channel < half else (j, channel - half)
                angle = torch.tensor(place / 10_000 ** (2 * (index // 2) / half), dtype=torch.double)
                values[i, j, channel] = angle.cos() if index % 2 else angle.sin()
    return values


POSITIONS = {
    'sin2d': detr,
    'penc2d': lambda x: penc(x.shape[2:], x.shape[1])[..., : x.shape[1]].permute(2, 0, 1),
    'penc2d_nchw': lambda x: penc(x.shape[1:3], x.shape[1])[..., : x.shape[3]],
}


@pytest.mark.parametrize('family', few(['convnext', 'swin'], ['swin']))
@pytest.mark.parametrize('position', POSITIONS)
def test_positional_encodings_between_backbone_and_head(position, family, tmp_path):
    client = Client(family, position=POSITIONS[position])
    file = client.file()
    if position != 'sin2d':  # that of the package has a buffer
        file['pos_encoding.penc.inv_freq'] = torch.ones(client.model.num_features // 4)
        with pytest.raises(ValueError, match="position='penc2d_nchw'.*position='penc2d'"):
            load(client, file)
    model = load(client, file, dict(position=position))
    assert_same_logits(model, client)
    timm.models.save_for_hf(model.float(), tmp_path / 'folder')
    assert_same_logits(timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True), client)


def test_the_head_of_a_whole_model_alone():
    client = Client('convnext', Alias)
    head = MLDecoder(**head_options(client.file('backbone.')), initial_num_features=client.model.num_features)
    head.load_state_dict(convert_state_dict(client.file('backbone.'), head))
    tokens = torch.randn(2, 9, client.model.num_features)
    torch.testing.assert_close(head.eval()(tokens), client.head(tokens), rtol=1e-5, atol=1e-5)


def test_our_own_layout_with_self_attention_is_left_alone():
    """Also where its two attentions are equal, which in other layouts means that there is one."""
    model = timm.create_model('test_resnet', num_classes=CLASSES, ml_decoder=dict(self_attention=True))
    layer = model.fc.layers[0]
    for equal in (False, True):
        if equal:
            layer.self_attn.load_state_dict(layer.multihead_attn.state_dict())
        file = {name: value.clone() for name, value in model.state_dict().items()}
        options = head_options(file)
        assert options['self_attention'] is True
        again = add_ml_decoder_head(timm.create_model('test_resnet'), **options)
        again.load_state_dict(convert_state_dict(file, again))
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(again.eval()(images), model.eval()(images))
        with pytest.raises(ValueError, match='layout'):
            convert_state_dict(file, again, self_attention='ignore')


# What the head reads of the backbone, as options of a model


@pytest.mark.parametrize(
    'family, options', [('vit', dict(prefix_tokens=True)), ('convnext', dict(head_norm=False))], ids=['vit', 'convnext']
)
def test_the_options_are_stored_and_other_classifiers_load_the_backbone(family, options, tmp_path):
    name, arguments, size = BACKBONES[family]
    head = dict(decoder_embedding=DIM, **options)
    model = timm.create_model(name, num_classes=CLASSES, ml_decoder=head, **arguments).eval()
    timm.models.save_for_hf(model, tmp_path / 'folder')
    stored, images = f'local-dir:{tmp_path / "folder"}', torch.randn(2, 3, size, size)
    assert torch.equal(timm.create_model(stored, pretrained=True).eval()(images), model(images))
    other = timm.create_model(stored, pretrained=True, num_classes=3).eval()
    assert other.ml_decoder_options == model.ml_decoder_options and other(images).shape == (2, 3)
    ((option, value),) = options.items()
    with pytest.raises(ValueError, match=option):
        timm.create_model(stored, pretrained=True, ml_decoder={option: not value})
    assert timm.create_model(stored, pretrained=True, ml_decoder={option: value}).num_classes == CLASSES
    linear = timm.create_model(stored, pretrained=True, ml_decoder=False)
    for tensor, value in linear.state_dict().items():
        if not tensor.startswith('head.'):
            assert torch.equal(value, model.state_dict()[tensor]), tensor
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    maps = attention_maps(model, images, torch.tensor([0, 1]))
    for classes in ([1], [0, -1], [0, CLASSES], 1):
        with pytest.raises(ValueError, match='expected a class below'):
            attention_maps(model, images, torch.tensor(classes))
    with pytest.raises(ValueError, match='eval mode'):
        attention_maps(model.train(), images, torch.tensor([0, 1]))
    model.eval()
    assert maps.shape[1] == maps.shape[2] and torch.allclose(maps.sum(dim=(1, 2)), torch.ones(2))
    model.train()(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize('family', few(['vit', 'convnext'], 1))
def test_a_converted_folder_works_in_transformers_predict_and_export(family, tmp_path):
    transformers = pytest.importorskip('transformers')
    name, arguments, size = BACKBONES[family]
    client, folder = Client(family, Alias, tokens=True), str(tmp_path / 'folder')
    flags = f'--model {name} --input-size {size} --mean 0 0 0 --std 1 1 1'.split()
    says = ['--ml-decoder-kwargs', 'prefix_tokens=True'] if family in TOKENS else []
    convert.main([write(tmp_path, client), folder, *flags, *says])
    assert_same_logits(transformers.TimmWrapperForImageClassification.from_pretrained(folder).timm_model, client)
    assert_same_logits(load_source(folder).model, client)
    data = write_images(tmp_path / 'data', train=1, validation=1)
    export([folder, str(tmp_path / 'model.pt2'), '--format', 'torch-export', '--images', str(data)])  # which verifies
    predict([str(data), '--model', f'local-dir:{folder}', '--out', str(tmp_path / 'x.csv'), '-j', '0'])
    assert (tmp_path / 'x.csv').read_text().startswith('image,label,score')


@pytest.mark.parametrize(
    'family, options, message',
    [
        ('resnet', dict(prefix_tokens=True), 'no class or register tokens'),
        ('resnet', dict(head_norm=False), 'no norm between'),
        ('vit', dict(prefix_tokens=3), 'True or False'),
        ('resnet', dict(position='sin'), "one of .*'sin2d'"),
    ],
)
def test_options_that_do_not_fit_the_backbone_are_refused(family, options, message):
    name, arguments, _ = BACKBONES[family]
    model = timm.create_model(name, num_classes=CLASSES, **arguments)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_ml_decoder_head(model, **options)
    assert list(model.state_dict()) == names  # a wrong option leaves the model as it was


def test_a_positional_encoding_of_tokens_without_a_grid_is_refused():
    model = timm.create_model('test_vit', num_classes=CLASSES, ml_decoder=dict(position='sin2d'))
    with pytest.raises(ValueError, match=r'needs a feature map'):
        model(torch.randn(1, 3, 160, 160))


# No file loads strictly with other logits


def draw(random_):
    """Draw a client, its file, what must be said about it, and why it is refused without."""
    pick = random_.choice
    family, repair = pick(['resnet', 'convnext', 'vit', 'efficientnet', 'davit']), pick(list(REPAIRS))
    norm, tokens = pick(['removed', 'applied', 'kept']), pick([True, False])
    shape = pick([{}, {}, dict(layers=2), dict(hidden=64), dict(heads=4, layers=2), dict(queries=CLASSES, dim=64)])
    client = Client(family, repair, norm=norm, tokens=tokens, **shape)
    slot = {'resnet': '.fc.', 'efficientnet': '.classifier.', 'vit': '.head.'}.get(family, '.head.fc.')
    head = pick(['head.', 'mldecoder.', slot])
    if head == '.head.fc.' and norm == 'kept':
        head = 'head.'
    prefix, backbone = (
        pick(['', 'model.', 'module.', 'net._orig_mod.']),
        pick(['model.', 'backbone.', 'backbone.model.']),
    )
    says, options = {}, {}
    if REPAIRS[repair]:
        says['self_attention'] = REPAIRS[repair]
    if set(shape) & {'layers', 'hidden'}:
        says['num_heads'] = shape.get('heads', 8)
    if family == 'vit':
        options['prefix_tokens'] = tokens
    if family in NORMED and norm != 'removed' and head != '.head.fc.':
        options['head_norm'] = norm == 'applied'
    extra = pick([{}, {}, {'loss.weight': torch.ones(3)}])
    if extra:
        says['ignore'] = ['loss.']
    file = client.file(prefix, backbone, head, timm_layout=pick([True, False])) | extra
    wrap = pick([None, *CONTAINERS])
    return client, {wrap: file} if wrap else file, says, options


@pytest.mark.parametrize('seed', few(range(40), 6))
def test_a_random_file_loads_with_equal_logits_or_is_refused(seed):
    random_ = random.Random(seed)
    torch.manual_seed(seed)
    client, file, says, options = draw(random_)
    facts = [('says', name) for name in says] + [('options', name) for name in options]
    left_out = random_.sample(facts, random_.randint(1, len(facts))) if facts else []
    if left_out:
        partly = {name: value for name, value in says.items() if ('says', name) not in left_out}
        known = {name: value for name, value in options.items() if ('options', name) not in left_out}
        with pytest.raises(ValueError) as caught:
            load(client, file, known, **partly)
        assert len(str(caught.value)) <= 500 and '\n' not in str(caught.value)
        assert any(name in str(caught.value) for _, name in left_out)
    assert_same_logits(load(client, file, options, **says), client)


# A model leaves in working order


NAMES = [f';d {index}, =_=' for index in range(CLASSES)]  # of tags as they are


@pytest.mark.parametrize(
    'names',
    [NAMES, {str(index): name for index, name in enumerate(NAMES)}, {name: i for i, name in enumerate(NAMES)}, None],
)
def test_a_tagger_with_names_task_and_thresholds(names, tmp_path):
    client, thresholds = Client('resnet', XFormers), [0.05 + index / 20 for index in range(CLASSES)]
    named = tmp_path / ('class.json' if names else 'class.txt')
    named.write_text(json.dumps(names) if names else '\n'.join(NAMES))
    table = tmp_path / 'thresholds.csv'
    with table.open('w', newline='') as file:
        csv.writer(file).writerows([['class', 'ap', 'threshold'], *zip(NAMES, [1] * CLASSES, thresholds, strict=True)])
    flags = f'--model test_resnet --input-size 64 --class-names {named} --thresholds {table}'
    convert.main([write(tmp_path, client), str(tmp_path / 'folder'), *flags.split()])
    predictor = load_source(str(tmp_path / 'folder'))
    assert predictor.class_names == NAMES
    assert predictor.thresholds.tolist() == pytest.approx(thresholds)
    config = json.loads((tmp_path / 'folder/config.json').read_text())
    assert not {'a1_in1k', 'r160_in1k'} & set(json.dumps(config).split('"'))
    assert 'Converted from file.pth' in (tmp_path / 'folder/README.md').read_text()
    assert not config['pretrained_cfg'].get('license') and not config['pretrained_cfg'].get('hf_hub_id')


@pytest.mark.parametrize(
    'content, message',
    [
        (['a'], 'has 11 classes, the file 1 names'),
        (['a'] * CLASSES, '11 names, 1 of them distinct'),
        ({'a': 1}, 'indices of the names must be 0 to 10'),
        ({'names': ['a']}, 'indices'),
        ('a', 'expected a list'),
        ([1] * CLASSES, 'expected a list'),
    ],
)
def test_names_that_do_not_fit_are_refused(content, message, tmp_path):
    path = tmp_path / 'names.json'
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_class_names(path, CLASSES)


@pytest.mark.parametrize(
    'text, message',
    [
        ('a,0.5\n', "no threshold of class 'b'"),
        ('a,0.5\nb,x\n', "class 'b' must be a number, got 'x'"),
        ('a,0.5\nb,1.5\n', r'in \[0, 1\], got 1.5'),
        ('', "no threshold of class 'a'"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(text, message, tmp_path):
    (tmp_path / 'thresholds.csv').write_text(text)
    with pytest.raises(ValueError, match=message):
        read_thresholds(tmp_path / 'thresholds.csv', ['a', 'b'])


def test_thresholds_without_names_or_for_one_class_per_image_are_refused(tmp_path):
    client = Client('resnet')
    (tmp_path / 'thresholds.json').write_text(json.dumps([0.5] * CLASSES))
    command = [write(tmp_path, client), str(tmp_path / 'folder'), *['--model', 'test_resnet', '--input-size', '64']]
    command += ['--thresholds', str(tmp_path / 'thresholds.json')]
    with pytest.raises(ValueError, match='--class-names'):
        convert.main(command)
    (tmp_path / 'names.txt').write_text('\n'.join(map(str, range(CLASSES))))
    command += ['--class-names', str(tmp_path / 'names.txt')]
    with pytest.raises(ValueError, match='--task multilabel'):
        convert.main([*command, '--task', 'classification'])
    convert.main(command)
    assert folder_settings(f'local-dir:{tmp_path / "folder"}')['thresholds'] == dict.fromkeys(
        map(str, range(CLASSES)), 0.5
    )


def test_a_folder_is_exported_with_names_and_gets_thresholds_of_its_own(tmp_path):
    client = Client('resnet')
    folder, names = str(tmp_path / 'folder'), tmp_path / 'names.txt'
    names.write_text('\n'.join(f'class_{index:02}' for index in range(CLASSES)))
    convert.main([write(tmp_path, client), folder, *['--model', 'test_resnet', '--input-size', '64']])
    flags = ['--format', 'torch-export', '--class-names', str(names), '--images']
    data = write_images(tmp_path / 'data', train=1, validation=2, classes=CLASSES)
    export([folder, str(tmp_path / 'model.pt2'), *flags, str(data / 'validation')])
    assert read_metadata(tmp_path / 'model.pt2')['class_names'] == names.read_text().split()
    export([folder, str(tmp_path / 'named'), *flags, str(data / 'validation'), '--format', 'safetensors'])
    files = sorted((data / 'validation').rglob('*.png'))
    rows = [f'{file.relative_to(data)},class_{index % CLASSES:02}' for index, file in enumerate(files)]
    (data / 'validation.csv').write_text('\n'.join(['path,labels', *rows, '']))
    (data / 'classes.txt').write_text(names.read_text())
    command = f'{data} --dataset csv --model local-dir:{tmp_path / "named"} --pretrained -j 0 --device cpu'
    validate([*command.split(), '--write-thresholds'])
    stored = folder_settings(f'local-dir:{tmp_path / "named"}')['thresholds']
    assert list(stored) == names.read_text().split() and len(set(stored.values())) > 1
    assert_same_logits(timm.create_model(f'local-dir:{tmp_path / "named"}', pretrained=True), client)


# The page


def page(pattern):
    return re.findall(pattern, (ROOT / 'docs/migrate.md').read_text(), re.M | re.S)


def test_the_python_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published = Client('resnet', Alias, classes=80, queries=80, dim=768)
    published.model = timm.create_model('resnet18', num_classes=0)
    published.head = Head(512, Alias, classes=80, queries=80, dim=768)
    torch.save({'model': published.file('module.', '', '.fc.')}, 'published.pth')
    light = Client('convnext', Alias, classes=26, queries=26, dim=768)
    torch.save({'state_dict': light.file('backbone.') | {'loss.weight': torch.ones(26)}}, 'light.ckpt')
    names = {}
    for code in page(r'^```python\n(.*?)^```'):
        exec(code, names)
    assert_same_logits(names['module'], light)


def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    """With small models in place of theirs."""
    monkeypatch.chdir(tmp_path)
    light, tagger = Client('convnext', Alias), Client('resnet', Renamed)
    torch.save({'state_dict': light.file('backbone.') | {'loss.weight': torch.ones(CLASSES)}}, 'light.ckpt')
    torch.save({'model': tagger.file()}, 'tagger.pth')
    Path('class.json').write_text(json.dumps(NAMES))
    with open('thresholds.csv', 'w', newline='') as file:
        csv.writer(file).writerows((name, 1e-6) for name in NAMES)
    write_images(tmp_path / 'IMAGES', train=1, validation=0)
    small = {'convnext_tiny': 'test_convnext', '384': '64', 'resnet50': 'test_resnet', '448': '64'}
    programs = {'timm_mldecoder.convert': convert.main, 'timm_mldecoder.predict': predict}
    for line in '\n'.join(page(r'^    (python .*?[^\\\\])$')).replace('\\\n', ' ').splitlines():
        _, _, program, *arguments = shlex.split(line)
        programs[program]([small.get(argument, argument) for argument in arguments])
    assert_same_logits(timm.create_model('local-dir:folder', pretrained=True), light)
    (row, *_) = map(json.loads, Path('tags.jsonl').read_text().splitlines())
    assert {label['label'] for label in row['labels']} == set(NAMES)


class Averaged(nn.Module):
    """Three heads on one backbone, whose logits are averaged (LTCXNet)."""

    def __init__(self, make):
        super().__init__()
        self.model = timm.create_model('test_resnet', num_classes=0)
        self.heads = nn.ModuleList(make() for _ in range(3))
        self.size = 64
        self.eval()

    def forward(self, images):
        tokens = self.model.forward_features(images).flatten(2).transpose(1, 2)
        return torch.stack([head(tokens) for head in self.heads]).mean(dim=0)


@pytest.mark.parametrize('repair', [Alias, Torch])
def test_a_module_with_several_heads_gets_its_checkpoint(repair):
    client = randomize(Averaged(lambda: Head(96, repair)))
    ours = Averaged(lambda: MLDecoder(CLASSES, 4, DIM, 96, self_attention=repair is Torch))
    file = {f'backbone.{name}': value for name, value in client.state_dict().items()}
    if repair is Torch:
        with pytest.raises(ValueError, match="'use'.*'ignore'"):
            convert_state_dict(file, ours)
    ours.load_state_dict(convert_state_dict(file, ours, self_attention=REPAIRS[repair]))
    assert_same_logits(ours, client)
    with pytest.raises(ValueError, match='unexpected: loss.weight'):
        convert_state_dict(file | {'loss.weight': torch.ones(1)}, ours, self_attention=REPAIRS[repair])
    del file['backbone.heads.2.decoder.duplicate_pooling']
    with pytest.raises(ValueError, match='missing'):
        convert_state_dict(file, ours, self_attention=REPAIRS[repair])
