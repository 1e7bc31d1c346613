"""Predict: images in, labels out, by a checkpoint, a saved folder, or classes that were never trained on."""

import csv
import json
import shlex
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.models import save_for_hf

from timm_mldecoder.data.word_embeddings import write_word_embeddings
from timm_mldecoder.predict import main as predict
from train import main as train

NAMES = ['sky', 'zebra', 'traffic light']
HEAD = dict(decoder_embedding=32, num_heads=4, dim_feedforward=64)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    for name in ('b.png', 'a.jpg', 'deeper/c.png'):
        pixels = torch.randint(256, (40, 30, 3), generator=generator, dtype=torch.uint8)
        Path('images', name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(Path('images', name))
    Path('images/notes.txt').write_text('no image')


def save_folder(**options):
    model = timm.create_model('test_resnet', num_classes=3, ml_decoder={**HEAD, **options}).eval()
    save_for_hf(model, 'folder', model_config={'label_names': NAMES})
    return model


def expected(model, name):
    transform = create_transform(**{**timm.data.resolve_model_data_config(model), 'is_training': False})
    with torch.no_grad():
        return model(transform(Image.open(Path('images', name)).convert('RGB'))[None])[0]


def read(path):
    with open(path, newline='') as file:
        return [(row['image'], row['label'], float(row['score'])) for row in csv.DictReader(file)]


def test_labels_of_a_folder_by_threshold_and_by_rank():
    model = save_folder()
    every = {name: expected(model, name).sigmoid() for name in ('a.jpg', 'b.png', 'deeper/c.png')}
    threshold = torch.stack(list(every.values())).median().item() + 1e-6
    predict(['images', '--model', 'local-dir:folder', '--threshold', str(threshold), '--out', 'labels.csv'])
    wanted = []
    for name, scores in every.items():
        order = sorted(range(3), key=lambda index: -scores[index])
        wanted += [(name, NAMES[index], scores[index].item()) for index in order if scores[index] >= threshold]
    found = read('labels.csv')
    assert len(wanted) == 4 and [row[:2] for row in found] == [row[:2] for row in wanted]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in wanted], abs=1e-4)

    predict(['images', '--model', 'local-dir:folder', '--top-k', '2', '--out', 'labels.json', '-b', '2'])
    content = json.loads(Path('labels.json').read_text())
    assert list(content) == ['a.jpg', 'b.png', 'deeper/c.png'] and all(len(labels) == 2 for labels in content.values())
    predict(['images/a.jpg', '--model', 'local-dir:folder', '--single-label', '--out', 'one.json'])
    (one,) = json.loads(Path('one.json').read_text())['a.jpg']
    best = expected(model, 'a.jpg').softmax(0).max(0)
    assert (one['label'], one['score']) == (NAMES[best.indices], pytest.approx(best.values.item(), abs=1e-4))


def test_open_vocabulary_asks_for_the_classes_of_the_command_line():
    vectors = {name: torch.randn(6) for name in [*NAMES, 'tram']}
    write_word_embeddings('words.safetensors', torch.stack(list(vectors.values())), list(vectors))
    model = save_folder(word_embeddings=torch.randn(3, 6), class_names=['x', 'y', 'z'])
    base = ['images/a.jpg', '--model', 'local-dir:folder', '--top-k', '9', '--out', 'labels.csv']
    words = ['--word-embeddings', 'words.safetensors']
    for flags, names in [
        (['--classes', 'traffic light, tram', *words], ['traffic light', 'tram']),
        (words, list(vectors)),
    ]:
        predict([*base, *flags])
        model.get_classifier().set_word_embeddings(torch.stack([vectors[name] for name in names]))
        scores = dict(zip(names, expected(model, 'a.jpg').sigmoid().tolist(), strict=True))
        assert {row[1]: row[2] for row in read('labels.csv')} == pytest.approx(scores, abs=1e-4)
    for flags, names in [(['--classes', 'z,x'], {'z', 'x'}), ([], {'x', 'y', 'z'})]:
        predict([*base, *flags])
        assert {row[1] for row in read('labels.csv')} == names


def test_a_checkpoint_is_used_as_it_was_trained_and_draws_what_labels_look_at():
    for split in ('train', 'validation'):
        lines = ['path,labels', *(f'{name},{";".join(NAMES[i % 2 : 3])}' for i, name in enumerate(['a.jpg', 'b.png']))]
        Path('images', f'{split}.csv').write_text('\n'.join(lines) + '\n')
    train(
        shlex.split("""images --dataset csv --task multilabel --model test_resnet --num-classes 3 --img-size 64
        --device cpu -j 0 -b 2 --epochs 4 --warmup-epochs 0 --lr 0.1 --no-aug --use-ml-decoder-head 1
        --decoder-embedding 32 --ml-decoder-kwargs num_heads=4 --model-ema --model-ema-decay 0.5
        --output out --experiment run""")
    )
    base = ['images', '--checkpoint', 'out/run/last.pth.tar', '--top-k', '1', '--out', 'labels.csv']
    predict([*base, '--pictures', 'pictures'])
    assert {row[1] for row in read('labels.csv')} <= set(NAMES)
    trained = Path('labels.csv').read_text()
    predict([*base, '--use-ema'])
    assert Path('labels.csv').read_text() != trained, 'the averaged weights have other scores'
    content = torch.load('out/run/last.pth.tar', weights_only=False)
    torch.save({**content, 'thresholds': torch.full((5,), 0.5)}, 'other.pth.tar')  # tuned on other classes
    with pytest.raises(SystemExit):
        predict(['images', '--checkpoint', 'other.pth.tar'])
    predict(['images', '--checkpoint', 'other.pth.tar', '--threshold', '0.5'])
    for name in ('a.png', 'b.png', 'deeper/c.png'):
        assert Image.open(Path('pictures', name)).width > 300


@pytest.mark.parametrize('flags, message', [
    ('images --model local-dir:folder --classes zebra', 'classes of this model are fixed'),
    ('empty --model local-dir:folder', 'no image there'),
    ('images --checkpoint none.pth', 'no such file'),
    ('images --model local-dir:folder --use-ema', 'of a --checkpoint'),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(flags, message, capsys):
    save_folder()
    Path('empty').mkdir()
    with pytest.raises(SystemExit) as exit_:
        predict(flags.split())
    assert exit_.value.code == 2 and message in capsys.readouterr().err
