"""Bad input of graph runs and their datasets: one line that names file and entry, exit code 2, nothing written."""

import json
import logging

import pytest
import torch
from multilabel_data import write_text
from recipe_data import write_json, write_voc

import train
from timm_mldecoder.data.formats.voc import CLASSES
from timm_mldecoder.data.label_graph import read_label_graph, write_label_graph
from timm_mldecoder.data.word_embeddings import write_word_embeddings
from timm_mldecoder.label_graph import main as label_graph
from timm_mldecoder.runtime.errors import run_command

XML = 'VOCdevkit/VOC2007/Annotations/000012.xml'
ENTITIES = '<!DOCTYPE a [<!ENTITY b "c">]><annotation><object><name>&b;</name></object></annotation>'
YETI = '<annotation><object><name>dog</name></object><object><name>yeti</name></object></annotation>'


@pytest.fixture
def voc(tmp_path):
    """The data of a graph run; the graph and the words are those of the data."""
    write_voc(tmp_path)
    write_json(tmp_path)
    write_label_graph(tmp_path / 'graph.safetensors', torch.zeros(20, 20), CLASSES)
    write_word_embeddings(tmp_path / 'words.safetensors', torch.randn(20, 4), list(CLASSES))
    return tmp_path


def run_train(root, dataset='voc2007', *flags):
    graph = ['--graph', root / 'graph.safetensors', '--word-embeddings', root / 'words.safetensors']
    small = '--task multilabel --model test_resnet --num-classes 20 --img-size 32 -b 2 -j 0 --epochs 1 --device cpu'
    run = [*small.split(), '--output', root / 'out', '--experiment', 'run', '--val-split', 'train']
    command = [root, '--dataset', dataset, *run, *graph, *flags]
    return run_command(lambda: train.main([str(flag) for flag in command]))


def graph_of(classes):
    return lambda root: write_label_graph(root / 'graph.safetensors', torch.zeros(len(classes), len(classes)), classes)


def words_of(classes):
    return lambda root: write_word_embeddings(root / 'words.safetensors', torch.randn(len(classes), 4), list(classes))


def text(path, content):
    return lambda root: write_text(root / path, content)


@pytest.mark.parametrize(
    ('spoil', 'flags', 'named'),
    [
        (graph_of(CLASSES[:19]), [], ['graph.safetensors', 'tvmonitor']),
        (graph_of([*CLASSES[:19], 'yeti']), [], ['graph.safetensors', 'tvmonitor', 'yeti']),
        (text('graph.safetensors', 'no graph'), [], ['graph.safetensors']),
        (words_of(CLASSES[1:]), [], ['words.safetensors', 'aeroplane']),
        (text(XML, ENTITIES), ['--voc-difficult', 'positive'], ['000012.xml', 'document type']),
        (text(XML, YETI), ['--voc-difficult', 'negative'], ['000012.xml', 'object 2', 'yeti']),
    ],
)
def test_a_graph_run_ends_with_one_line_and_writes_nothing(voc, capsys, spoil, flags, named):
    spoil(voc)
    assert run_train(voc, 'voc2007', *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(name in error for name in named), error
    assert not (voc / 'out').exists()


@pytest.mark.parametrize(
    ('content', 'named'),
    [
        ('{"classes": ["cat"], "images": [', ['train.json', 'JSON']),
        ('{"classes": ["cat"], "images": [["a.jpg", ["cat"]], ["b.jpg", ["yeti"]]]}', ['images[1]', 'b.jpg', 'yeti']),
        ('{"classes": ["cat"], "images": [["a.jpg"]]}', ['train.json', 'images[0]']),
    ],
)
@pytest.mark.parametrize('command', ['train', 'label_graph'])
def test_malformed_json_ends_with_one_line_and_overwrites_nothing(voc, capsys, command, content, named):
    (voc / 'train.json').write_text(content)
    graph = (voc / 'graph.safetensors').read_bytes()
    if command == 'train':
        assert run_train(voc, 'json') == 2
    else:
        flags = [str(voc), '--dataset', 'json', '--out', str(voc / 'graph.safetensors')]
        assert run_command(lambda: label_graph(flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(name in error for name in named), error
    assert not (voc / 'out').exists() and (voc / 'graph.safetensors').read_bytes() == graph


@pytest.mark.parametrize(('content', 'named'), [(ENTITIES, ['000012.xml']), (YETI, ['000012.xml', 'object 2', 'yeti'])])
def test_a_bad_annotation_file_leaves_the_label_graph_as_it_is(voc, capsys, content, named):
    write_text(voc / XML, content)
    graph = (voc / 'graph.safetensors').read_bytes()
    flags = [str(voc), '--dataset', 'voc2007', '--split', 'trainval', '--out', str(voc / 'graph.safetensors')]
    assert run_command(lambda: label_graph(flags)) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in named) and error.count('\n') == 1
    assert (voc / 'graph.safetensors').read_bytes() == graph


def test_a_class_without_occurrences_has_a_row_of_zeros_and_is_named_once(voc, caplog):
    content = {'classes': ['cat', 'dog', 'toad'], 'images': [['a.jpg', ['cat', 'dog']]]}
    (voc / 'train.json').write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        label_graph([str(voc), '--dataset', 'json', '--out', str(voc / 'other.safetensors')])
    adjacency, names = read_label_graph(voc / 'other.safetensors')
    assert adjacency[names.index('toad')].tolist() == [0, 0, 0] and adjacency.isfinite().all()
    assert sum('toad' in record.getMessage() for record in caplog.records) == 1
