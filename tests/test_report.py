"""The report of validate.py: its numbers are scikit-learn's, and names stay text within the folder."""

import csv
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_folders import write_images
from PIL import Image
from runs import call
from sklearn import metrics

from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import parse_validate
from timm_mldecoder.metrics import MultiLabelEvaluator
from timm_mldecoder.validate import report_page
from timm_mldecoder.validate.report import report_folder
from timm_mldecoder.validate.report_scores import POINTS, MultiLabelScores, curve_points
from validate import main as validate

MODEL = '--model test_resnet --img-size 32 --device cpu -j 0 -b 4 --use-ml-decoder-head 1 --decoder-embedding 32'
MODEL += ' --ml-decoder-kwargs num_heads=4 dim_feedforward=64 --no-prefetcher'
HEAD = dict(decoder_embedding=32, num_heads=4, dim_feedforward=64)
EVIL = '<script>alert("x")</script>'
HOSTILE = ['=1+1', EVIL, '../../up', '@a, b']


class Page(HTMLParser):
    """The rows of the tables of each section, the points of each curve, and every reference and script."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.curves, self.references, self.tags = {}, [], [], []
        self._section, self._cell = '', None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.references += [attributes[name] for name in ('src', 'href', 'srcset', 'data') if name in attributes]
        if tag == 'section':
            self._section = attributes['id']
            self.tables[self._section] = []
        elif tag == 'tr':
            self.tables[self._section].append([])
        elif tag in ('td', 'th'):
            self._cell = ''
        elif tag == 'polyline':
            self.curves.append([tuple(map(float, point.split(','))) for point in attributes['points'].split()])

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag):
        if tag in ('td', 'th'):
            self.tables[self._section][-1].append(self._cell)
            self._cell = None


def read(folder):
    text = (folder / 'index.html').read_text(encoding='utf-8')
    with (folder / 'scores.csv').open(newline='', encoding='utf-8') as file:
        return Page(text), list(csv.DictReader(file))


def number(text):
    return float(text or 'nan')


def percent(values):
    return pytest.approx([100 * value for value in values], abs=0.0051, nan_ok=True)


def save_weights(path, num_classes):
    """Write random weights that tell images apart, and return the path."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=num_classes, ml_decoder=HEAD)
    with torch.no_grad():
        for _ in range(5):
            model.train()(torch.randn(8, 3, 32, 32))  # BatchNorm statistics
        model.get_classifier().group_fc.weight.mul_(4)
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """The report of a single-label split with an unreadable image, by random weights."""
    folder = tmp_path_factory.mktemp('single')
    write_images(folder / 'data', train=1, validation=7)
    (folder / 'data/validation/class_1/002.png').write_text('broken')
    (folder / 'data/validation/class_0/006.png').rename(folder / 'data/validation/class_0' / os.fsdecode(b'\xff.png'))
    flags = [str(folder / 'data'), *MODEL.split(), '--num-classes', '3', '--bad-image', 'skip']
    flags += ['--checkpoint', save_weights(folder / 'weights.pth', 3)]
    validate([*flags, '--report', str(folder / 'report')])
    return folder, flags


def test_single_label_numbers_are_those_of_scikit_learn(digits):
    found, rows = read(digits[0] / 'report')
    names = ['class_0', 'class_1', 'class_2']
    assert len(rows) == 20 and not any(row['image'].endswith('class_1/002.png') for row in rows)
    assert [row['image'] for row in rows if '\\' in row['image']] == ['class_0/\\udcff.png'], 'not UTF-8'
    assert [row['label'] for row in rows] == [row['image'].split('/')[-2] for row in rows]
    target, predicted = [row['label'] for row in rows], [row['predicted'] for row in rows]
    every = np.array([[float(row[f'score {name}']) for name in names] for row in rows])
    assert every.sum(1) == pytest.approx(1, abs=1e-5)
    assert [names[index] for index in every.argmax(1)] == predicted
    assert [float(row['score']) for row in rows] == pytest.approx(every.max(1))

    head, *body = found.tables['confusion']
    assert head[1:] == names and [row[0] for row in body] == names
    matrix = metrics.confusion_matrix(target, predicted, labels=names)
    assert [[int(cell) for cell in row[1:]] for row in body] == matrix.tolist()
    pairs = {(row[0], row[1]): int(row[2]) for row in found.tables['pairs'][1:]}
    wrong = {(names[i], names[j]): n for (i, j), n in np.ndenumerate(matrix) if i != j and n}
    assert pairs == wrong and list(pairs.values()) == sorted(wrong.values(), reverse=True)
    table = found.tables['classes'][1:]
    scores = metrics.precision_recall_fscore_support(target, predicted, labels=names, zero_division=np.nan)
    for column, values in zip((3, 4, 5), scores[:3], strict=True):
        assert [number(row[column]) for row in table] == percent(values)
    assert [int(row[1]) for row in table] == scores[3].tolist()


def test_the_page_needs_nothing_from_elsewhere_and_shows_attention(digits):
    found, rows = read(digits[0] / 'report')
    pictures = [reference for reference in found.references if reference.startswith('data:image/jpeg')]
    wrong = sum(row['label'] != row['predicted'] for row in rows)
    assert wrong and len(pictures) == 3 * wrong == len(found.references), 'the image, and two classes of each error'
    assert found.tags.count('script') == 1 and 'link' not in found.tags
    text = (digits[0] / 'report/index.html').read_text()
    assert not re.search(r'(src|href)="?(http|//)|@import|url\(', text)


@pytest.mark.slow
def test_two_ranks_write_the_same_report(digits):
    folder, flags = digits
    process = call('validate.py', *flags, '--report', folder / 'two', processes=2)
    assert process.returncode == 0, process.stderr
    (one, rows), (two, others) = read(folder / 'report'), read(folder / 'two')
    assert [row['image'] for row in rows] == [row['image'] for row in others]
    assert one.tables == two.tables and len(one.references) == len(two.references)
    for row, other in zip(rows, others, strict=True):
        assert float(row['label_score']) == pytest.approx(float(other['label_score']), abs=2e-6)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """The report of a multi-label split with ignored labels, and names that are formulas, paths and HTML."""
    folder = tmp_path_factory.mktemp('multi')
    random = np.random.RandomState(0)
    (folder / 'data').mkdir()
    (folder / 'data/classes.txt').write_text('\n'.join(HOSTILE) + '\n')
    rows = []
    for index in range(24):
        name = ['=2+2 .png', "<b>'bold'.png", 'line\u2028break.png'][index % 3]
        name = f'{index}/{name}' if index > 2 else name
        path = folder / 'data' / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.randint(256, size=(32, 32, 3)).astype(np.uint8)).save(path)
        labels = [HOSTILE[i] for i in range(3) if random.rand() < 0.5]  # the last class has no positive
        ignored = [name for name in HOSTILE[1:3] if name not in labels and random.rand() < 0.3]
        rows.append([name, ';'.join(labels), ';'.join(ignored)])
    with (folder / 'data/validation.csv').open('w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([['path', 'labels', 'ignored'], *rows])
    flags = [str(folder / 'data'), *MODEL.split(), '--dataset', 'csv', '--task', 'multilabel', '--num-classes', '4']
    flags += ['--checkpoint', save_weights(folder / 'data' / 'weights.pth', 4)]
    validate([*flags, '--multilabel-threshold', '0.48', '--report', str(folder / 'report')])
    return folder, rows, flags


def test_multi_label_numbers_are_those_of_scikit_learn(scenes):
    folder, listed, _ = scenes
    found, rows = read(folder / 'report')
    assert len(rows) == len(listed)
    columns = list(rows[0])[4:]
    scores = np.array([[float(row[column]) for column in columns] for row in rows])
    table = {row[0]: row[1:] for row in found.tables['classes'][1:]}
    curves = sorted(table, key=lambda name: number(table[name][2]) if table[name][2] else np.inf)
    assert list(table) == HOSTILE and table[HOSTILE[3]][0] == '0' and len(found.curves) == 3
    for index, name in enumerate(HOSTILE[:3]):
        keep = np.array([name not in ignored.split(';') for _, _, ignored in listed])
        target = np.array([name in labels.split(';') for _, labels, _ in listed])[keep]
        score = scores[keep, index]
        positives, predictions, ap, threshold, precision, recall, f1 = map(number, table[name])
        assert (positives, predictions, threshold) == (target.sum(), (score >= 0.48).sum(), 0.48)
        assert [ap] == percent([metrics.average_precision_score(target, score)])
        expected = metrics.precision_recall_fscore_support(target, score >= 0.48, average='binary')
        assert [precision, recall, f1] == percent(expected[:3])
        points = metrics.precision_recall_curve(target, score)
        expected = list(zip(points[1][-2::-1], points[0][-2::-1], strict=True))  # recall, precision; from the highest
        curve = found.curves[curves.index(name)]
        assert len(curve) == len(expected)
        assert np.array(curve) == pytest.approx(np.array(expected), abs=1e-4)


def test_names_stay_text_in_the_folder_of_the_report(scenes):
    folder, listed, _ = scenes
    text = (folder / 'report/index.html').read_text(encoding='utf-8')
    assert EVIL not in text and '&lt;script&gt;alert' in text and '<b>' not in text
    assert sorted(path.name for path in (folder / 'report').iterdir()) == ['index.html', 'scores.csv']
    assert sorted(path.name for path in folder.iterdir()) == ['data', 'report']
    with (folder / 'report/scores.csv').open(newline='', encoding='utf-8') as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert "'=2+2 .png" in cells and not [cell for cell in cells if cell[:1] in tuple('=+-@\t\r')]
    assert any('\u2028' in cell for cell in cells), 'a line separator, which CSV files may have, stays in its cell'


def test_tuned_thresholds_are_the_chosen_ones():
    evaluator, generator = MultiLabelEvaluator(), torch.Generator().manual_seed(0)
    logits, target = torch.randn(40, 3, generator=generator), torch.randint(-1, 2, (40, 3), generator=generator)
    evaluator.update(logits, target)
    evaluator.compute()
    evaluator.use_thresholds(evaluator.tune_thresholds())
    scores = MultiLabelScores(evaluator)
    scores.finish(['a', 'b', 'c'], 40, World(torch.device('cpu')))
    table = Page(''.join(scores.sections())).tables['classes'][1:]
    assert [number(row[4]) for row in table] == pytest.approx(evaluator.tune_thresholds().tolist(), abs=5e-5)
    for index, row in enumerate(table):
        keep = target[:, index] >= 0
        scores = logits[keep, index].sigmoid()
        precision, recall, _ = metrics.precision_recall_curve(target[keep, index], scores)
        best = (2 * precision * recall / (precision + recall).clip(1e-9)).max()
        assert [number(row[7])] == percent([best])


def test_a_long_curve_is_thinned_and_keeps_its_end():
    generator = torch.Generator().manual_seed(0)
    points = curve_points(torch.rand(5000, generator=generator), torch.rand(5000, generator=generator) < 0.3)
    assert len(points) <= POINTS + 1 and points[-1][0] == 1
    assert curve_points(torch.tensor([0.5, 0.5, 0.2]), torch.tensor([True, False, True])) == [(0.5, 0.5), (1, 2 / 3)]


def test_every_text_of_the_page_is_escaped():
    mistake = report_page.Mistake(EVIL, EVIL, [report_page.Picture(Image.new('L', (2, 2)), EVIL)])
    contents = [
        report_page.table({EVIL: None}, [[EVIL]]),
        report_page.confusion_matrix([EVIL, EVIL], {(0, 1): 3}),
        report_page.curves([report_page.Curve(EVIL, 1.0, [(0, 1)], 0.5, None)]),
        report_page.gallery([mistake]),
    ]
    text = report_page.render(
        EVIL, {EVIL: EVIL}, [report_page.section(EVIL, EVIL, content, 'a') for content in contents]
    )
    assert EVIL not in text and Page(text).tags.count('script') == 1


def test_the_folders_of_several_models_are_within_the_folder(tmp_path):
    names = ['../../x.pth', '/etc/y', '..', 'hf-hub:a/b', 'a\nb']
    folders = [report_folder(str(tmp_path / 'all'), name) for name in names]
    assert all(folder.resolve().parent == tmp_path / 'all' and folder.name.isprintable() for folder in folders)
    assert len(set(folders)) == len(names)


@pytest.mark.parametrize('place', ['file', 'missing/report'])
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path, place):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='--report'):
        parse_validate(['.', '--report', str(Path(tmp_path, place))])
