"""The graph branch: label graph, gate, classifier, the authors' layout, and the command that makes a label graph."""

import copy
import json
import math
from itertools import product

import numpy as np
import pytest
import timm
import torch
from marks import few
from multilabel_data import write_coco, write_csv, write_voc
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.utils import ModelEmaV3

from timm_mldecoder.checkpoint.published_graph import convert_graph_state_dict
from timm_mldecoder.data.formats.voc import CLASSES as VOC_CLASSES
from timm_mldecoder.data.label_graph import read_label_graph, write_label_graph
from timm_mldecoder.data.word_embeddings import write_word_embeddings
from timm_mldecoder.label_graph import main as label_graph
from timm_mldecoder.models.graph import (
    GraphClassifier,
    add_graph_classifier,
    empty_graph_classifier,
    graph_options,
    label_edges,
    propagation_matrix,
    weighted_adjacency,
)
from timm_mldecoder.runtime.errors import run_command
from train import main as train

CLASSES, WIDTH, SCALE = 6, 10, 17.0
NAMES = ['zebra', 'apple', 'mouse', 'Bus', 'car', 'kite']
# VOC 2007 trainval by instances, at threshold 0.4
VOC_EDGES = [
    ('bicycle', 'person'),
    ('diningtable', 'person'),
    ('horse', 'person'),
    ('motorbike', 'person'),
    ('diningtable', 'chair'),
]


def label_graph_of(seed=0, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    adjacency = torch.rand(classes, classes, generator=generator).fill_diagonal_(0)
    adjacency[0, 1] = 0.9  # an edge in one direction
    adjacency[1, 0] = 0.1
    return adjacency, torch.randn(classes, WIDTH, generator=generator)


def build(layer='gcn', name='test_resnet', **options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    return add_graph_classifier(model, *label_graph_of(), layer=layer, **options).eval()


def images(number=2, size=32):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


# ---- an independent computation, class by class in float64


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


def plain_gate(a, words, layers):
    """The gate of A [C, C] (before normalization), words [C, E] and layers of (W,) or (W, a)."""
    a, x = np.asarray(a, dtype=np.float64), np.asarray(words, dtype=np.float64)
    d = np.diag(a.sum(1) ** -0.5)
    normalised = (a @ d).T @ d
    for weight, *attention in layers:
        h = x @ np.asarray(weight, dtype=np.float64)
        if attention:
            vector = np.asarray(attention[0], dtype=np.float64)[:, 0]
            first, second = vector[: h.shape[1]], vector[h.shape[1] :]
            rows = []
            for i in range(len(h)):
                neighbours = [j for j in range(len(h)) if normalised[i, j] > 0]
                e = [leaky(first @ h[i] + second @ h[j]) for j in neighbours]
                share = np.exp(e - np.max(e)) / np.exp(e - np.max(e)).sum()
                row = sum(part * h[j] for part, j in zip(share, neighbours, strict=True))
                rows.append(np.where(row > 0, row, np.expm1(np.minimum(row, 0))))
            x = leaky(np.stack(rows))
        else:
            x = leaky(normalised @ h)
    return 1 / (1 + np.exp(-x.max(axis=0)))


def plain_a(adjacency, threshold=0.4, weight=0.25):
    classes = len(adjacency)
    edge = [[float(adjacency[i, j] >= threshold) for j in range(classes)] for i in range(classes)]
    column = [sum(edge[i][j] for i in range(classes)) for j in range(classes)]
    return np.array(
        [[weight * edge[i][j] / (column[j] + 1e-6) + (i == j) for j in range(classes)] for i in range(classes)]
    )


def plain_cosine(features, weight, scale):
    features, weight = np.asarray(features, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    lengths = np.linalg.norm(features, axis=1)[:, None] * np.linalg.norm(weight, axis=1)
    return scale * (features @ weight.T) / lengths


def layers_of(graph):
    tensors = {name: value.detach().numpy() for name, value in graph.named_parameters()}
    return [[value for name, value in tensors.items() if name.startswith(f'{layer}.')] for layer in ('gc1', 'gc2')]


def pooled(model, x):
    return model.forward_head(model.forward_features(x), pre_logits=True).detach()


# ---- label graph


def test_the_label_graph_of_voc_has_the_published_values():
    row = {name: index for index, name in enumerate(VOC_CLASSES)}
    adjacency = torch.zeros(20, 20)
    for one, other in VOC_EDGES:
        adjacency[row[one], row[other]] = 0.4
    adjacency[row['sofa'], row['chair']] = 0.39
    edges = label_edges(adjacency)
    assert edges.sum() == 5
    a, p = weighted_adjacency(edges), propagation_matrix(edges)

    def entry(matrix, one, other):
        return matrix[row[one], row[other]].item()

    assert entry(a, 'bicycle', 'person') == pytest.approx(0.0625, abs=1e-6)
    assert entry(a, 'diningtable', 'chair') == pytest.approx(0.25, abs=1e-6)
    assert a[row['diningtable']].sum().item() == pytest.approx(1.3125, abs=1e-6)
    assert entry(p, 'person', 'bicycle') == pytest.approx(0.0606, abs=5e-5)
    assert entry(p, 'bicycle', 'bicycle') == pytest.approx(0.9412, abs=5e-5)
    assert entry(p, 'chair', 'diningtable') == pytest.approx(0.2182, abs=5e-5)
    assert entry(p, 'bicycle', 'person') == 0, 'an edge has a direction'


def test_without_weight_the_graph_has_no_loops_and_stays_finite():
    adjacency = torch.zeros(3, 3)
    adjacency[0, 1] = adjacency[1, 0] = 1
    p = propagation_matrix(label_edges(adjacency), weight=0.0)
    assert torch.equal(p, adjacency)


def test_a_change_of_dtype_moves_no_edge():
    adjacency, words = label_graph_of()
    adjacency[2, 3] = 0.4  # below 0.4 in float16
    model = add_graph_classifier(timm.create_model('test_resnet', num_classes=CLASSES), adjacency, words)
    before = model.get_classifier().edges.clone()
    assert before[2, 3] == 1
    assert torch.equal(model.half().get_classifier().edges, before)


# ---- gate and classifier


@pytest.mark.parametrize('layer', ['gcn', 'gat'])
@pytest.mark.parametrize('weight', [0.25, 0.6])
def test_logits_equal_a_plain_computation(layer, weight):
    model, x = build(layer, weight=weight, threshold=0.6), images()
    graph = model.get_classifier()
    adjacency, words = label_graph_of()
    gate = plain_gate(plain_a(adjacency, 0.6, weight), words, layers_of(graph))
    assert gate.std() > 0.01
    np.testing.assert_allclose(graph.gate().detach(), gate, rtol=2e-5)
    expected = plain_cosine(pooled(model, x).numpy() * gate, graph.weight.detach(), SCALE)
    np.testing.assert_allclose(model(x).detach(), expected, rtol=2e-5, atol=2e-5 * SCALE)


@pytest.mark.parametrize('layer', ['gcn', 'gat'])
def test_a_linear_classifier_keeps_its_weights_and_bias(layer):
    model = timm.create_model('test_resnet', num_classes=CLASSES).eval()
    torch.nn.init.normal_(model.fc.bias)
    linear, x = copy.deepcopy(model.fc), images()
    add_graph_classifier(model, *label_graph_of(), layer=layer, classifier='linear')
    graph = model.get_classifier()
    torch.testing.assert_close(model(x), linear(pooled(model, x) * graph.gate()))
    assert torch.equal(graph.bias, linear.bias)


@pytest.mark.parametrize(
    ('name', 'slot'), [('test_resnet', 'fc'), ('test_efficientnet', 'classifier'), ('test_vit', 'head')]
)
def test_it_takes_the_place_of_a_models_classifier(name, slot):
    size = 160 if name == 'test_vit' else 32
    model = build(name=name)
    assert isinstance(model.get_submodule(slot), GraphClassifier)
    assert model.get_classifier() is model.get_submodule(slot)
    assert model(images(size=size)).shape == (2, CLASSES)
    model.reset_classifier(3)
    assert type(model.get_classifier()) is torch.nn.Linear


@pytest.mark.parametrize('layer', ['gcn', 'gat'])
def test_an_optimizer_step_moves_both_layers_and_neither_words_nor_graph(layer):
    model = build(layer).train()
    before = {name: tensor.clone() for name, tensor in model.get_classifier().state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(images()).square().mean().backward()
    optimizer.step()
    after = model.get_classifier().state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == set(after) - {'words', 'edges'}
    assert {name.partition('.')[0] for name in moved} == {'gc1', 'gc2', 'classifier'}


def test_attention_has_dropout_in_training_only():
    graph = build('gat').get_classifier()
    assert torch.equal(graph.gate(), graph.gate())
    graph.train()
    assert not torch.equal(graph.gate(), graph.gate())


@pytest.mark.parametrize('layer', ['gcn', 'gat'])
def test_folded_equals_unfolded_and_train_unfolds(layer):
    model, x = build(layer), images()
    graph, expected = model.get_classifier(), model(x)
    names = set(model.state_dict())
    graph.fold()
    assert torch.equal(model(x), expected) and set(model.state_dict()) == names
    with torch.no_grad():
        graph.gc2.weight.mul_(-1)
    assert torch.equal(model(x), expected), 'the gate is a constant now'
    model.train().eval()
    assert not torch.allclose(model(x), expected)
    with pytest.raises(ValueError, match='eval'):
        model.train().get_classifier().fold()


@pytest.mark.parametrize('layer', ['gcn', 'gat'])
def test_the_gate_is_in_float32_whatever_the_features_are(layer):
    model = build(layer)
    graph, expected = model.get_classifier(), model.get_classifier().gate()
    seen = []
    for module in (graph.gc1, graph.gc2):
        module.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(graph.gate(), expected), 'autocast changes nothing'
        assert model(images()).isfinite().all()
    model.bfloat16()
    assert graph.gate().dtype == torch.float32
    assert model(images().bfloat16()).dtype == torch.bfloat16
    assert set(seen) == {torch.float32} and len(seen) == 8


# ---- what carries a model


@pytest.mark.parametrize('layer', ['gcn', 'gat'])
def test_copies_and_ema_weights_have_the_graph(layer):
    model, x = build(layer), images()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    ema = ModelEmaV3(model, decay=0.5)
    before = {name: tensor.clone() for name, tensor in model.get_classifier().state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    ema.update(model)
    average = ema.module.get_classifier()
    assert torch.equal(average.words, before['words']) and torch.equal(average.edges, before['edges'])
    torch.testing.assert_close(average.gc1.weight, before['gc1.weight'] + 0.05)
    assert ema.module(x).isfinite().all()


@pytest.mark.parametrize('layer', ['gcn', 'gat'])
@pytest.mark.parametrize('classifier', ['cosine', 'linear'])
def test_a_model_is_rebuilt_from_its_options_and_its_tensors(layer, classifier):
    options = dict(scale=9.0) if classifier == 'cosine' else {}
    model = build(layer, classifier=classifier, weight=0.5, threshold=0.7, **options)
    noted = graph_options(model.get_classifier())
    assert json.loads(json.dumps(noted)) == noted
    assert noted == dict(
        num_classes=CLASSES, width=WIDTH, layer=layer, threshold=0.7, weight=0.5, classifier=classifier, **options
    )
    other = empty_graph_classifier(timm.create_model('test_resnet', num_classes=CLASSES), **noted).eval()
    with pytest.raises(RuntimeError, match='load a checkpoint'):
        other(images())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), model(images()))
    assert graph_options(other.get_classifier()) == noted


@pytest.mark.parametrize('layer', ['gcn', 'gat'])
def test_it_compiles_and_exports(layer):
    model, x = build(layer), images()
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(x), expected)
    model.get_classifier().fold()
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    used = {node.target for node in exported.graph.nodes if node.op == 'call_function'}
    assert torch.ops.aten.sigmoid.default not in used, 'the folded gate is a constant'


def test_it_runs_on_the_meta_device():
    model = build('gat').to('meta')
    assert model(torch.empty(2, 3, 32, 32, device='meta')).shape == (2, CLASSES)
    assert 'layer=gat' in repr(model)
    with torch.device('meta'):
        other = empty_graph_classifier(
            timm.create_model('test_resnet', num_classes=CLASSES), **graph_options(model.get_classifier())
        )
    other.load_state_dict(build('gat').state_dict(), assign=True)
    assert torch.equal(other.eval()(images()), build('gat')(images()))


# ---- the authors' layout


def authors_file(model, layer, wrapped, kind='cosine', weight=0.25, seed=3):
    """A file of classes in sorted order, with random values, and the same values for the plain computation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    width = model.num_features
    prefix = 'backbone.model.' if wrapped else 'backbone.'
    backbone = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if wrapped or name.partition('.')[0] not in ('fc', 'classifier')  # the wrapper leaves timm's classifier on
    }
    tensors = {f'{prefix}{name}': tensor for name, tensor in backbone.items()}
    if wrapped:
        tensors[f'{prefix}classifier.weight'] = draw(width, CLASSES)
        tensors[f'{prefix}act2.weight'] = torch.tensor([0.25])
    adjacency = torch.rand(CLASSES, CLASSES, generator=generator).fill_diagonal_(0)
    tensors['A'] = torch.from_numpy(plain_a(adjacency, weight=weight)).float()
    tensors['inp'] = draw(CLASSES, WIDTH)
    tensors['head.weight'] = draw(width, CLASSES) if kind == 'cosine' else draw(CLASSES, width) / width
    if kind == 'linear':
        tensors['head.bias'] = draw(CLASSES)
    for module, wide in (('gc1', WIDTH), ('gc2', width)):
        tensors[f'{module}.{"weight" if layer == "gcn" else "W"}'] = draw(wide, width) / math.sqrt(width)
        if layer == 'gat':
            tensors[f'{module}.a'] = draw(2 * width, 1) / math.sqrt(width)
    return tensors


@pytest.mark.parametrize(
    ('name', 'layer', 'wrapped'),
    few(
        product(['test_resnet', 'efficientnetv2_rw_t'], ['gcn', 'gat'], [False, True]),
        [('test_resnet', 'gcn', True), ('test_resnet', 'gat', False)],
    ),
)
def test_a_file_of_the_authors_gives_the_logits_of_a_plain_computation(name, layer, wrapped):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=CLASSES).eval()
    tensors, x = authors_file(plain, layer, wrapped), images(size=64)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    model = timm.create_model(name, num_classes=CLASSES).eval()
    add_graph_classifier(model, *label_graph_of(), layer=layer)
    model.load_state_dict(convert_graph_state_dict(tensors, model, class_names=NAMES))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items())

    keys = ['weight'] if layer == 'gcn' else ['W', 'a']
    gate = plain_gate(tensors['A'], tensors['inp'], [[tensors[f'{m}.{key}'] for key in keys] for m in ('gc1', 'gc2')])
    features = pooled(plain, x).numpy() * gate
    logits = plain_cosine(features, tensors['head.weight'].T, SCALE)
    order = [sorted(NAMES).index(name) for name in NAMES]
    np.testing.assert_allclose(model(x).detach(), logits[:, order], rtol=2e-5, atol=2e-5 * SCALE)

    converted = convert_graph_state_dict({**tensors, 'gc_weights': torch.from_numpy(gate)}, model)
    model.load_state_dict(converted)
    np.testing.assert_allclose(model(x).detach(), logits, rtol=2e-5, atol=2e-5 * SCALE)


def test_a_linear_head_of_the_authors_converts():
    plain = timm.create_model('test_resnet', num_classes=CLASSES).eval()
    tensors, x = authors_file(plain, 'gcn', False, kind='linear', weight=0.5), images()
    model = timm.create_model('test_resnet', num_classes=CLASSES).eval()
    add_graph_classifier(model, *label_graph_of(), classifier='linear', weight=0.5)
    model.load_state_dict(convert_graph_state_dict(tensors, model))
    gate = plain_gate(tensors['A'], tensors['inp'], [[tensors['gc1.weight']], [tensors['gc2.weight']]])
    expected = (pooled(plain, x).numpy() * gate) @ tensors['head.weight'].double().numpy().T
    np.testing.assert_allclose(model(x).detach(), expected + tensors['head.bias'].numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (lambda t: t.pop('gc2.weight'), 'fc.gc2.weight'),
        (lambda t: t.pop('inp'), 'fc.words'),
        (lambda t: t.update({'gc3.weight': torch.ones(2)}), 'gc3.weight'),
        (lambda t: t.update(inp=torch.ones(5, WIDTH)), r'inp .*\[5, 10\]'),
        (lambda t: t.update(A=torch.ones(CLASSES, CLASSES)), 'A .*0.25'),
        (lambda t: (t.pop('gc1.weight'), t.update({'gc1.W': torch.ones(2)})), 'gat'),
        (lambda t: t.pop('gc1.weight'), 'gc1.weight nor gc1.W'),
        (lambda t: t.update({'backbone.act2.weight': torch.tensor([0.3])}), 'act2.weight'),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, named):
    model = build()
    tensors = authors_file(timm.create_model('test_resnet', num_classes=CLASSES), 'gcn', False)
    change(tensors)
    with pytest.raises(ValueError, match=named):
        convert_graph_state_dict(tensors, model)


def test_a_model_without_a_graph_classifier_is_named():
    with pytest.raises(ValueError, match='add_graph_classifier'):
        convert_graph_state_dict({}, timm.create_model('test_resnet', num_classes=CLASSES))
    with pytest.raises(ValueError, match='distinct'):
        convert_graph_state_dict({'gc1.weight': torch.ones(1)}, build(), class_names=['a'] * CLASSES)


# ---- mistakes


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (dict(adjacency=torch.zeros(CLASSES, 5)), r'\[6, 5\]'),
        (dict(adjacency=torch.zeros(5, 5), words=torch.ones(5, 3)), '5 classes, the model has 6'),
        (dict(adjacency=torch.full((6, 6), math.nan)), 'nan'),
        (dict(adjacency=torch.eye(6)), 'diagonal'),
        (dict(words=torch.full((6, 3), math.inf)), 'not finite'),
        (dict(words=torch.ones(6)), r'\[C, E\]'),
        (dict(layer='gan'), "'gcn', 'gat'.*'gan'"),
        (dict(classifier='group'), "'cosine', 'linear'.*'group'"),
        (dict(threshold=0.0), '0.0'),
        (dict(classifier='linear', scale=9.0), '9.0'),
    ],
)
def test_mistakes_are_named_and_leave_the_model_as_it_is(change, named):
    model = timm.create_model('test_resnet', num_classes=CLASSES)
    adjacency, words = label_graph_of()
    options = dict(adjacency=adjacency, words=words) | change
    with pytest.raises(ValueError, match=named):
        add_graph_classifier(model, options.pop('adjacency'), options.pop('words'), **options)
    assert type(model.fc) is torch.nn.Linear


def test_a_model_without_one_linear_classifier_is_refused():
    for model in (timm.create_model('test_resnet', num_classes=CLASSES, ml_decoder=True), build()):
        with pytest.raises(ValueError, match=type(model.get_classifier()).__name__):
            add_graph_classifier(model, *label_graph_of())


def test_classes_without_others_are_named_once(caplog):
    adjacency, words = label_graph_of()
    adjacency[2] = adjacency[4] = 0
    model = add_graph_classifier(timm.create_model('test_resnet', num_classes=CLASSES), adjacency, words).eval()
    assert len(caplog.records) == 1 and '[2, 4]' in caplog.text
    assert model(images()).isfinite().all()


# ---- the command


def run(*flags):
    return run_command(lambda: label_graph([str(flag) for flag in flags]))


def write_objects(root):
    """COCO with dog, dog, cat | dog | cat, cat, cat, dog and a class without objects."""
    write_coco(root)
    path = root / 'annotations' / 'instances_train2014.json'
    content = json.loads(path.read_text())
    content['categories'] += [dict(id=99, name='toad')]
    shown = {11: [18, 18, 17], 12: [18], 13: [17, 17, 17, 18]}
    content['annotations'] = [
        dict(id=10 * image + number, image_id=image, category_id=category)
        for image, categories in shown.items()
        for number, category in enumerate(categories)
    ]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ('counts', 'dogs', 'cats'), [(None, 2 / 4, 2 / 4), ('instances', 2 / 4, 2 / 4), ('images', 2 / 3, 2 / 2)]
)
def test_a_label_graph_counts_objects_or_images(tmp_path, capsys, caplog, counts, dogs, cats):
    write_objects(tmp_path)
    file = tmp_path / 'graph.safetensors'
    flags = [] if counts is None else ['--counts', counts]
    assert run(tmp_path, '--dataset', 'coco2014', '--out', file, *flags) == 0
    adjacency, names = read_label_graph(file)
    assert names == ['dog', 'cat', 'toad']
    torch.testing.assert_close(adjacency, torch.tensor([[0, dogs, 0], [cats, 0, 0], [0, 0, 0]]))
    with safe_open(file, framework='pt') as content:
        metadata = content.metadata()
    assert metadata['dataset'] == 'coco2014' and metadata['counts'] == (counts or 'instances')
    assert sum('toad' in record.message for record in caplog.records) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if 'graph' in path.name) == ['graph.safetensors']


def test_a_dataset_of_tags_counts_images(tmp_path):
    write_csv(tmp_path)
    assert run(tmp_path, '--dataset', 'csv', '--split', 'validation', '--out', tmp_path / 'graph.safetensors') == 0
    adjacency, names = read_label_graph(tmp_path / 'graph.safetensors', ['dog', 'cat'])
    assert names == ['dog', 'cat']
    torch.testing.assert_close(adjacency, torch.tensor([[0, 1 / 2], [1, 0]]))  # ignored labels do not count


@pytest.mark.parametrize(
    ('flags', 'named'),
    [
        (['--dataset', 'voc2007', '--split', 'tests'], 'tests'),
        (['--dataset', 'csv', '--counts', 'instances'], 'csv'),
        (['--dataset', 'coco2014', '--counts', 'images'], 'instances_train2014.json'),
    ],
)
def test_a_mistake_is_one_line_and_overwrites_nothing(tmp_path, capsys, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    write_voc(tmp_path)
    file = tmp_path / 'graph.safetensors'
    file.write_bytes(b'old')
    counts = [] if '--counts' in flags else ['--counts', 'images']
    assert run(tmp_path, '--out', file, *flags, *counts) == 2
    error = capsys.readouterr().err
    assert named in error and error.count('\n') == 1
    assert file.read_bytes() == b'old'


def test_a_label_graph_is_read_in_the_order_of_the_classes(tmp_path):
    adjacency, _ = label_graph_of()
    write_label_graph(tmp_path / 'graph.safetensors', adjacency, NAMES, counts='images')
    order = [3, 0, 5, 1, 4, 2]
    read, names = read_label_graph(tmp_path / 'graph.safetensors', [NAMES[index] for index in order])
    assert names == [NAMES[index] for index in order]
    for i, one in enumerate(order):
        for j, other in enumerate(order):
            assert read[i, j] == adjacency[one, other]
    with pytest.raises(ValueError, match=r"missing \['dog'\], unknown \['Bus', 'zebra'\]"):
        read_label_graph(tmp_path / 'graph.safetensors', ['dog', *set(NAMES) - {'Bus', 'zebra'}])


@pytest.mark.parametrize(
    ('tensors', 'metadata', 'named'),
    [
        ({'adjacency': torch.ones(2, 2)}, {}, 'class_names'),
        ({'adjacency': torch.ones(2, 2)}, {'class_names': '["a", "a"]'}, 'distinct'),
        ({'adjacency': torch.ones(2, 3)}, {'class_names': '["a", "b"]'}, r'\[2, 3\]'),
        ({'adjacency': torch.tensor([[0, math.nan], [0, 0]])}, {'class_names': '["a", "b"]'}, "'a'"),
        ({'embeddings': torch.ones(2, 2)}, {'class_names': '["a", "b"]'}, 'adjacency'),
    ],
)
def test_a_file_that_is_no_label_graph_is_refused(tmp_path, tensors, metadata, named):
    save_file(tensors, tmp_path / 'graph.safetensors', metadata=metadata)
    with pytest.raises(ValueError, match=named):
        read_label_graph(tmp_path / 'graph.safetensors')


@pytest.mark.parametrize('classifier', ['cosine', 'linear'])
def test_a_graph_classifier_survives_save_for_hf_and_create_model(classifier, tmp_path):
    torch.manual_seed(0)
    adjacency = (torch.rand(4, 4) * 0.9).fill_diagonal_(0)
    model = timm.create_model('test_resnet', num_classes=4)
    add_graph_classifier(model, adjacency, torch.randn(4, 6), classifier=classifier).eval()
    save_for_hf(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(again(image), model(image))
    with pytest.raises(ValueError, match='weight is 0.5'):
        options = {**graph_options(model.get_classifier()), 'weight': 0.5}
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, graph_classifier=options)
    plain = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, graph_classifier=False)
    assert type(plain.get_classifier()) is torch.nn.Linear
    torch.testing.assert_close(plain.conv1[0].weight, model.conv1[0].weight)


@pytest.mark.parametrize(
    ('classes', 'words', 'named'),
    [
        (VOC_CLASSES[:19], VOC_CLASSES, 'tvmonitor'),
        (VOC_CLASSES, VOC_CLASSES[1:], 'aeroplane'),
        ([], VOC_CLASSES, 'graph'),
    ],
)
def test_a_graph_run_on_other_classes_ends_with_one_line_and_writes_nothing(tmp_path, capsys, classes, words, named):
    write_voc(tmp_path)
    graph, vectors = tmp_path / 'graph.safetensors', tmp_path / 'words.safetensors'
    graph.write_text('none')
    if classes:
        write_label_graph(graph, torch.zeros(len(classes), len(classes)), classes)
    write_word_embeddings(vectors, torch.randn(len(words), 4), list(words))
    flags = (
        '--dataset voc2007 --task multilabel --model test_resnet --num-classes 20 --img-size 32 -b 2 -j 0 --epochs 1'
    )
    flags = [
        str(tmp_path),
        *flags.split(),
        '--device',
        'cpu',
        '--output',
        str(tmp_path / 'out'),
        '--val-split',
        'train',
    ]
    assert run_command(lambda: train([*flags, '--graph', str(graph), '--word-embeddings', str(vectors)])) == 2
    assert named in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / 'out').exists()
