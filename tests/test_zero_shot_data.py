"""Data of zero-shot runs: class splits, the files of NUS-WIDE, label embeddings and the synthetic shapes."""

import json
import math
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from benchmarks import shapes
from timm_mldecoder.data import create_dataset, embed
from timm_mldecoder.data.class_split import read_class_split, select_classes
from timm_mldecoder.data.formats import nus_wide
from timm_mldecoder.data.word_embeddings import read_word_embeddings, write_word_embeddings
from timm_mldecoder.runtime.errors import run_command

NUS_ROWS = [
    ('a/1.jpg', 'sky, clouds', 'train'),
    ('a/2.jpg', 'zebra', 'train'),
    ('b/3.jpg', 'clouds, zebra, traffic light', 'val'),
    ('b/4.jpg', '', 'val'),
    ('b/5.jpg', 'sky', 'train'),
]
NUS_CLASSES = ['clouds', 'sky', 'traffic light', 'zebra']


@pytest.fixture
def nus(tmp_path):
    """A small dataset in the files of the reference repository."""
    lines = ['path,labels,split', *(f'{path},"[{labels}]",{split}' for path, labels, split in NUS_ROWS)]
    (tmp_path / 'data.csv').write_text('\n'.join(lines) + '\n')
    split = {'train class': ['clouds', 'zebra'], 'test class': ['traffic light']}
    (tmp_path / 'benchmark_81_v0.json').write_text(json.dumps(split))
    torch.save(torch.arange(12.0).view(3, 4), tmp_path / 'wordvec_array.pth')
    for path, *_ in NUS_ROWS:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new('RGB', (8, 8)).save(tmp_path / path)
    return tmp_path


def test_nus_wide_is_read_as_distributed(nus):
    train, validation = (create_dataset('nuswide', str(nus), split) for split in ('train', 'val'))
    assert train.class_names == validation.class_names == NUS_CLASSES
    assert train.filenames() == ['a/1.jpg', 'a/2.jpg', 'b/5.jpg']
    assert [train[index][1].tolist() for index in range(3)] == [[1, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    assert [validation[index][1].tolist() for index in range(2)] == [[1, 0, 1, 1], [0, 0, 0, 0]]


def test_seen_and_unseen_classes_of_nus_wide(nus):
    annotations = nus_wide.read_nus_wide(nus, 'train')
    split = read_class_split(nus / 'benchmark_81_v0.json', annotations.class_names)
    assert split.seen == ['clouds', 'zebra'] and split.unseen == ['traffic light']
    assert split.all == ['clouds', 'zebra', 'traffic light']

    seen = select_classes(annotations, split.seen, only_positive=True)
    assert [seen.path(index) for index in range(len(seen))] == ['a/1.jpg', 'a/2.jpg'], 'none of sky alone'
    assert [seen.target(index).tolist() for index in range(2)] == [[1, 0], [0, 1]]
    every = select_classes(nus_wide.read_nus_wide(nus, 'validation'), split.all)
    assert [every.target(index).tolist() for index in range(2)] == [[1, 1, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match='giraffe, okapi'):
        select_classes(annotations, ['okapi', 'zebra', 'giraffe'])
    with pytest.raises(ValueError, match='no image'):
        select_classes(annotations, ['traffic light'], only_positive=True)


def test_word_vectors_of_nus_wide_get_their_names(nus, tmp_path):
    embed.main([str(nus), str(tmp_path / 'words.safetensors'), '--nus-wide'])
    embeddings, names = read_word_embeddings(tmp_path / 'words.safetensors')
    assert names == NUS_CLASSES
    assert torch.equal(embeddings, torch.arange(12.0).view(3, 4).T)
    torch.save(torch.zeros(3, 5), nus / 'wordvec_array.pth')
    with pytest.raises(ValueError, match=r'wordvec_array.pth.*4\].*\[3, 5\].* 1 images without labels'):
        nus_wide.read_word_vectors(nus)


@pytest.mark.parametrize('text, message', [
    ('path,labels\n', 'data.csv, line 1'),
    ('path,labels,split\na.jpg,[sky],train\nb.jpg,sky,train\n', "data.csv, line 3.*'sky'"),
    ('path,labels,split\na.jpg,[sky],test\n', "data.csv, line 2.*'test'"),
])  # fmt: skip
def test_malformed_nus_wide_is_named(tmp_path, text, message):
    (tmp_path / 'data.csv').write_text(text)
    with pytest.raises(ValueError, match=message):
        nus_wide.read_nus_wide(tmp_path, 'train')
    with pytest.raises(ValueError, match="'test'.*train.*validation"):
        nus_wide.read_nus_wide(tmp_path, 'test')


@pytest.mark.parametrize('content, message', [
    ('{', 'split.json'),
    ('[]', 'split.json.*list'),
    ('{}', 'split.json.*seen.*unseen'),
    ('{"seen": "a"}', 'split.json.*train class'),
    ('{"seen": ["a", "x", "y"], "unseen": ["b"]}', 'split.json.*x, y'),
    ('{"seen": ["a", "b"], "unseen": ["b"]}', 'split.json.*twice: b'),
    ('{"seen": ["a", "b", "c"]}', 'split.json.*unseen'),
])  # fmt: skip
def test_wrong_split_files_are_named(tmp_path, content, message):
    (tmp_path / 'split.json').write_text(content)
    with pytest.raises(ValueError, match=message):
        read_class_split(tmp_path / 'split.json', ['a', 'b', 'c'])


def test_names_of_the_benchmark_that_the_dataset_lacks_are_left_out(tmp_path, caplog):
    (tmp_path / 'split.json').write_text('{"train class": ["a", "x", "a"], "test class": ["b", "y"]}')
    split = read_class_split(tmp_path / 'split.json', ['a', 'b', 'c'])
    assert split.all == ['a', 'b'] and 'x, y' in caplog.text
    assert '1 classes of the dataset are in neither part, and left out: c' in caplog.text
    (tmp_path / 'split.json').write_text('{"train class": ["a", "b"], "test class": ["b"]}')
    with pytest.raises(ValueError, match='twice: b'):
        read_class_split(tmp_path / 'split.json', ['a', 'b', 'c'])


def test_the_part_that_a_split_leaves_out_is_all_other_classes(tmp_path):
    (tmp_path / 'split.json').write_text('{"test class": ["c", "a"]}')
    split = read_class_split(tmp_path / 'split.json', ['a', 'b', 'c'])
    assert split.seen == ['b'] and split.unseen == ['a', 'c']


def test_label_embeddings_survive_writing_and_reading(tmp_path):
    embeddings = torch.randn(2, 3)
    write_word_embeddings(tmp_path / 'a.safetensors', embeddings, ['Ärmel', 'b c'], made_by='hand', rule='none')
    torch.save({'embeddings': embeddings, 'class_names': ['Ärmel', 'b c']}, tmp_path / 'a.pth')
    torch.save(embeddings, tmp_path / 'bare.pt')
    for name in ('a.safetensors', 'a.pth'):
        read, names = read_word_embeddings(tmp_path / name)
        assert torch.equal(read, embeddings) and names == ['Ärmel', 'b c']
        read, names = read_word_embeddings(tmp_path / name, ['b c'])
        assert torch.equal(read, embeddings[1:]) and names == ['b c']
    decomposed = unicodedata.normalize('NFD', 'Ärmel')
    assert torch.equal(read_word_embeddings(tmp_path / 'a.pth', [decomposed])[0], embeddings[:1])
    assert read_word_embeddings(tmp_path / 'bare.pt')[1] is None
    assert read_word_embeddings(tmp_path / 'bare.pt', ['x', 'y'])[1] == ['x', 'y']


def test_wrong_label_embedding_files_are_named(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    for name, content, message in [
        ('code.pth', {'embeddings': Evil()}, 'code.pth'),
        ('list.pth', [1, 2], 'list.pth.*list'),
        ('flat.pth', torch.zeros(3), r'flat.pth.*\[C, E\]'),
        ('twice.pth', {'embeddings': torch.zeros(2, 3), 'class_names': ['a', 'a']}, r"twice.pth.*\['a'\]"),
        ('nan.pth', {'embeddings': torch.tensor([[0.0], [math.nan]]), 'class_names': ['a', 'b']}, r"nan.pth.*\['b'\]"),
    ]:
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            read_word_embeddings(tmp_path / name)
    assert not (tmp_path / 'ran').exists()
    (tmp_path / 'odd.safetensors').write_bytes(b'odd')
    with pytest.raises(ValueError, match='odd.safetensors'):
        read_word_embeddings(tmp_path / 'odd.safetensors')
    with pytest.raises(ValueError, match='none.safetensors'):
        read_word_embeddings(tmp_path / 'none.safetensors')


VECTORS = """6 2
light 1 0
traffic 0 1
New_York 4 4
zebra 2 2
a 9 9
dining-table 5 6
"""


def make(tmp_path, names, *flags):
    (tmp_path / 'names.txt').write_text(names)
    embed.main([str(tmp_path / 'names.txt'), str(tmp_path / 'out.safetensors'), *flags])
    return read_word_embeddings(tmp_path / 'out.safetensors')


def test_command_embeds_by_the_rule_for_text_vectors(tmp_path, caplog):
    (tmp_path / 'vectors.txt').write_text(VECTORS)
    names = 'Zebra\ntraffic light\nNew York\ndining table\nstreet/light\ntv\tlight\n'
    embeddings, read = make(tmp_path, names, '--text-vectors', str(tmp_path / 'vectors.txt'))
    assert read == ['Zebra', 'traffic light', 'New York', 'dining table', 'street/light', 'tv']
    assert embeddings.tolist() == [[2, 2], [0.5, 0.5], [4, 4], [5, 6], [1, 0], [1, 0]]
    assert 'street of street/light' in caplog.text
    with safe_open(tmp_path / 'out.safetensors', framework='pt') as file:
        metadata = file.metadata()
    assert metadata['made_by'] == 'vectors.txt' and 'mean of the words' in metadata['rule']
    assert json.loads(metadata['texts']) == {'tv': 'light'}


def test_command_lists_what_it_cannot_embed(tmp_path, capsys):
    (tmp_path / 'vectors.txt').write_text(VECTORS)
    vectors = ['--text-vectors', str(tmp_path / 'vectors.txt')]
    assert "['okapi', 'gnu']" in refused(tmp_path, capsys, 'okapi\nzebra\ngnu\n', *vectors)
    (tmp_path / 'vectors.txt').write_text('zebra 1 two\n')
    assert 'vectors.txt, line 1' in refused(tmp_path, capsys, 'zebra\n', *vectors)


def refused(tmp_path, capsys, names, *flags, out='out.safetensors'):
    """The last line of the command's error, which must end with status 2 and write nothing."""
    (tmp_path / 'names.txt').write_text(names)
    code = run_command(lambda: embed.main([str(tmp_path / 'names.txt'), str(tmp_path / out), *map(str, flags)]))
    assert code == 2 and not (tmp_path / out).is_file()
    return capsys.readouterr().err.splitlines()[-1]


def test_command_refuses_mistakes_in_one_line(tmp_path, capsys):
    (tmp_path / 'vectors.txt').write_text(VECTORS)
    vectors = ['--text-vectors', tmp_path / 'vectors.txt']
    assert 'nowhere' in refused(tmp_path, capsys, 'zebra\n', '--text-vectors', 'absent', out='nowhere/out.safetensors')
    assert 'out.npz' in refused(tmp_path, capsys, 'zebra\n', *vectors, out='out.npz')
    assert 'names.txt' in refused(tmp_path, capsys, '', *vectors)
    assert "['zebra']" in refused(tmp_path, capsys, 'zebra\nzebra\n', *vectors)
    assert "'absent'" in refused(tmp_path, capsys, 'zebra\n', '--clip', 'RN50', '--clip-weights', 'absent')
    assert '--clip-weights' in refused(tmp_path, capsys, 'zebra\n', '--clip', 'RN50')
    assert '--template' in refused(tmp_path, capsys, 'zebra\n', *vectors, '--template', 'a photo')
    assert str(tmp_path) in refused(tmp_path, capsys, 'zebra\n', '--nus-wide')
    (tmp_path / 'empty').mkdir()
    pytest.importorskip('sentence_transformers')
    assert 'empty' in refused(tmp_path, capsys, 'zebra\n', '--sentence-transformer', tmp_path / 'empty')


@pytest.mark.slow
def test_command_refuses_files_that_are_not_clip_weights(tmp_path, capsys):
    pytest.importorskip('open_clip')
    for name, content in (('odd.pt', b'odd'), ('empty.pt', b'')):
        (tmp_path / name).write_bytes(content)
        message = refused(tmp_path, capsys, 'zebra\n', '--clip', 'RN50', '--clip-weights', tmp_path / name)
        assert name in message
    torch.save({'other': torch.zeros(2)}, tmp_path / 'other.pt')
    assert 'other.pt' in refused(tmp_path, capsys, 'zebra\n', '--clip', 'RN50', '--clip-weights', tmp_path / 'other.pt')
    assert 'zzz' in refused(tmp_path, capsys, 'zebra\n', '--clip', 'zzz', '--clip-weights', tmp_path / 'other.pt')


def test_command_takes_a_sentence_transformer_from_disk(tmp_path):
    sentence_transformers = pytest.importorskip('sentence_transformers')
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (tmp_path / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'zebra', 'light']))
    tokenizer = BertTokenizerFast(str(tmp_path / 'vocab.txt'))
    config = BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    tokenizer.save_pretrained(tmp_path / 'bert')
    BertModel(config).save_pretrained(tmp_path / 'bert')
    part = Transformer(str(tmp_path / 'bert'))
    model = sentence_transformers.SentenceTransformer(modules=[part, Pooling(8)], device='cpu')
    model.save(str(tmp_path / 'model'))
    embeddings, names = make(tmp_path, 'zebra\nlight\n', '--sentence-transformer', str(tmp_path / 'model'))
    expected = torch.from_numpy(np.asarray(model.encode(['zebra', 'light'])))
    torch.testing.assert_close(embeddings, expected)
    assert names == ['zebra', 'light'] and not torch.equal(embeddings[0], embeddings[1])


@pytest.mark.slow
def test_command_takes_a_clip_text_tower_from_disk(tmp_path):
    open_clip = pytest.importorskip('open_clip')
    model = open_clip.create_model('RN50', pretrained=None).eval()
    torch.save(model.state_dict(), tmp_path / 'clip.pt')
    embeddings, _ = make(tmp_path, 'zebra\nlight\n', '--clip', 'RN50', '--clip-weights', str(tmp_path / 'clip.pt'))
    tokens = open_clip.get_tokenizer('RN50')(['a photo of a zebra', 'a photo of a light'])
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(embeddings, expected)


def test_shapes_are_deterministic_and_no_training_scene_shows_an_unseen_class(tmp_path):
    for name in ('first', 'second'):
        shapes.write_shapes(tmp_path / name, 20, 10, seed=3)
    files = sorted(path.relative_to(tmp_path / 'first') for path in (tmp_path / 'first').rglob('*.*'))
    files.remove(Path('words.safetensors'))  # the order of metadata in safetensors varies
    assert len(files) == 20 + 10 + 4
    for file in files:
        assert (tmp_path / 'first' / file).read_bytes() == (tmp_path / 'second' / file).read_bytes(), file
    train = create_dataset('csv', str(tmp_path / 'first'), 'train')
    split = read_class_split(tmp_path / 'first' / 'split.json', train.class_names)
    assert len(split.seen) == 60 and len(split.unseen) == 15
    assert {word for name in split.unseen for word in name.split()} <= {w for name in split.seen for w in name.split()}
    assert not select_targets(train, split.unseen).any() and select_targets(train, split.seen).any(dim=1).all()
    embeddings, names = read_word_embeddings(tmp_path / 'first' / 'words.safetensors', train.class_names)
    first, second = (names.index(name) for name in ('plain red disc', 'plain blue disc'))
    width = shapes.ATTRIBUTE_WIDTH
    shared = [torch.equal(embeddings[first, i : i + width], embeddings[second, i : i + width]) for i in (0, width, 32)]
    assert shared == [True, False, True]


def select_targets(dataset, names):
    return torch.stack([dataset[index][1] for index in range(len(dataset))])[
        :, [dataset.class_names.index(name) for name in names]
    ]
