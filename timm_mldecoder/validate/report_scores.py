"""The numbers of `validate.py --report`: confusions or precision-recall curves, classes, and the loss of each image."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_mldecoder.distributed.world import World
from timm_mldecoder.metrics import MultiLabelEvaluator
from timm_mldecoder.validate import report_page

MATRIX = 50  # classes up to which there is a confusion matrix
COLUMNS = 100  # classes up to which scores.csv has the score of each
PAIRS = 30  # most confused pairs
CURVES = 30  # precision-recall curves
POINTS = 300  # of a curve


class Entry(NamedTuple):
    """One class of an image that was scored wrongly: a label that was missed, or a wrong prediction."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    score: float
    missed: bool


class SingleLabelScores:
    """Labels, predictions and probabilities of the images of this rank."""

    def __init__(self) -> None:
        self._labels: Any = []  # int64 label and prediction, [2, B] per batch; [2, N] once finished
        self._probabilities: Any = []  # float32 of them, likewise
        self._all: list[Tensor] = []  # float32 [B, C], for few classes
        self.num_classes = 0

    @property
    def num_images(self) -> int:
        return sum(labels.shape[1] for labels in self._labels)

    def update(self, output: Tensor, target: Tensor) -> None:
        self.num_classes = output.shape[1]
        scores = output.float().softmax(dim=1)
        labels = torch.stack([target, scores.argmax(dim=1)])
        self._labels.append(labels.cpu())
        self._probabilities.append(scores.gather(1, labels.T).T.cpu())
        if self.num_classes <= COLUMNS:
            self._all.append(scores.cpu())

    def finish(self, names: list[str], number: int, world: World) -> None:
        """Leave padding out, and count confusions on all ranks; a collective call."""
        self._names = names
        empty = torch.zeros(2, 0, dtype=torch.int64)
        self._labels = torch.cat([empty, *self._labels], dim=1)[:, :number]
        self._probabilities = torch.cat([empty.float(), *self._probabilities], dim=1)[:, :number]
        own = Counter(zip(*self._labels.tolist(), strict=True))
        self._counts: Counter = sum(world.all_gather(own), Counter())

    def header(self) -> list[str]:
        every = [f'score {name}' for name in self._names] if len(self._names) <= COLUMNS else []
        return ['image', 'label', 'predicted', 'score', 'label_score', *every]

    def rows(self) -> Iterator[list]:
        every = (row for batch in self._all for row in batch.tolist())
        labels, scores = self._labels.T.tolist(), self._probabilities.T.tolist()
        for (label, predicted), (label_score, score) in zip(labels, scores, strict=True):
            named = [self._names[label], self._names[predicted]]
            yield [*named, *(f'{value:.6f}' for value in (score, label_score, *next(every, ())))]

    def losses(self) -> Iterator[tuple[float, int]]:
        """Yield the loss of each wrong image, and its row."""
        losses = -self._probabilities[0].clamp(min=1e-30).log()
        wrong = (self._labels[0] != self._labels[1]).nonzero()[:, 0].tolist()
        yield from ((losses[row].item(), row) for row in wrong)

    def entries(self, row: int) -> list[Entry]:
        (label, predicted), (label_score, score) = self._labels[:, row].tolist(), self._probabilities[:, row].tolist()
        return [Entry(predicted, score, missed=False), Entry(label, label_score, missed=True)]

    def sections(self) -> list[str]:
        names, counts = self._names, self._counts
        wrong = sorted(((n, pair) for pair, n in counts.items() if pair[0] != pair[1]), key=lambda x: (-x[0], x[1]))
        images: Counter = Counter()
        predictions: Counter = Counter()
        for (label, predicted), count in counts.items():
            images[label] += count
            predictions[predicted] += count
        found = []
        if len(names) <= MATRIX:
            text = 'Number of images by label (rows) and prediction (columns); the colour is the share of the row.'
            found.append(
                report_page.section('Confusion matrix', text, report_page.confusion_matrix(names, counts), 'confusion')
            )
        pairs = [
            (names[label], names[predicted], count, 100 * count / images[label])
            for count, (label, predicted) in wrong[:PAIRS]
        ]
        content = report_page.table({'label': None, 'predicted': None, 'images': 0, '% of the label': 2}, pairs)
        text = f'{len(pairs)} of {len(wrong)} confusions, the most frequent first.'
        found = [report_page.row(*found, report_page.section('Most confused pairs', text, content, 'pairs'))]
        rows = []
        for index, name in enumerate(names):
            right = counts[index, index]
            values = ratios(right, predictions[index], images[index])
            rows.append((name, images[index], predictions[index], *values))
        columns = {'class': None, 'images': 0, 'predictions': 0, 'precision': 2, 'recall': 2, 'F1': 2}
        text = 'Precision, recall and F1 of the first prediction, in percent. Click a column to sort.'
        found.append(report_page.section('Classes', text, report_page.table(columns, rows), 'classes'))
        return found


class MultiLabelScores:
    """Scores of the images of this rank, which the evaluator holds, and what they give at its thresholds."""

    def __init__(self, evaluator: MultiLabelEvaluator) -> None:
        self._evaluator = evaluator
        self.num_classes = 0

    @property
    def num_images(self) -> int:
        return self._evaluator.num_samples

    def update(self, output: Tensor, target: Tensor) -> None:
        self.num_classes = output.shape[1]

    def finish(self, names: list[str], number: int, world: World) -> None:
        """Count predictions and compute curves on all ranks; a collective call."""
        evaluator, self._names = self._evaluator, names
        self._thresholds = evaluator.threshold.cpu().expand(len(names))
        self._counts = evaluator.class_counts(self._thresholds, world.distributed)
        assert evaluator.class_ap is not None  # once computed
        lowest = sorted(range(len(names)), key=evaluator.class_ap.tolist().__getitem__)
        chosen = [index for index in lowest if self._counts[2, index]][:CURVES]
        own = {}
        for columns, logits, target in evaluator.class_chunks(world.distributed):
            for index in (index for index in chosen if columns.start <= index < columns.stop):
                labels, scores = target[:, index - columns.start], logits[:, index - columns.start]
                own[index] = curve_points(scores[labels >= 0], labels[labels >= 0] == 1)
        curves = {index: points for part in world.all_gather(own) for index, points in part.items()}
        self._curves = {index: curves[index] for index in chosen}

    def header(self) -> list[str]:
        every = [f'score {name}' for name in self._names] if len(self._names) <= COLUMNS else []
        return ['image', 'labels', 'predicted', 'loss', *every]

    def rows(self) -> Iterator[list]:
        names = self._names
        for logits, target in self._evaluator.samples():
            scores, predicted = self._predict(logits, target)
            for row, loss in enumerate(image_losses(logits, target).tolist()):
                labels = [names[index] for index in (target[row] == 1).nonzero()[:, 0].tolist()]
                found = [names[index] for index in predicted[row].nonzero()[:, 0].tolist()]
                values = [f'{score:.6f}' for score in scores[row].tolist()] if len(names) <= COLUMNS else []
                yield ['; '.join(labels), '; '.join(found), f'{loss:.6f}', *values]

    def losses(self) -> Iterator[tuple[float, int]]:
        """Yield the loss of each image with a wrong entry, and its row."""
        first = 0
        for logits, target in self._evaluator.samples():
            wrong = ((self._predict(logits, target)[1] != (target == 1)) & (target >= 0)).any(dim=1)
            losses = image_losses(logits, target)
            yield from ((losses[row].item(), first + row) for row in wrong.nonzero()[:, 0].tolist())
            first += len(logits)

    def entries(self, row: int) -> list[Entry]:
        for logits, target in self._evaluator.samples():
            if row < len(logits):
                scores, predicted = self._predict(logits, target)
                positive = target[row] == 1
                wrong = ((predicted[row] != positive) & (target[row] >= 0)).nonzero()[:, 0].tolist()
                found = [Entry(index, scores[row, index].item(), bool(positive[index])) for index in wrong]
                return sorted(found, key=lambda entry: -abs(entry.missed - entry.score))
            row -= len(logits)
        raise AssertionError('no such image')

    def _predict(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities, and what is predicted and not ignored, both [B, C]."""
        scores = logits.sigmoid()
        return scores, (scores >= self._thresholds) & (target >= 0)

    def sections(self) -> list[str]:
        names, thresholds, counts = self._names, self._thresholds.tolist(), self._counts.T.tolist()
        assert self._evaluator.class_ap is not None
        ap = self._evaluator.class_ap.tolist()
        shown = []
        for index, points in self._curves.items():
            right, predicted, positives = counts[index]
            chosen = (right / positives, right / predicted) if predicted else None
            shown.append(report_page.Curve(names[index], ap[index], points, thresholds[index], chosen))
        text = (
            'Recall to the right, precision upwards, lowest average precision first. Dots: thresholds of the metrics.'
        )
        if len(shown) < len(names):
            text += f' {len(shown)} of {len(names)} classes; those without a positive have no curve.'
        rows = []
        for index, (right, predicted, positives) in enumerate(counts):
            value = ap[index] if positives else None
            rows.append((names[index], positives, predicted, value, thresholds[index],
                         *ratios(right, predicted, positives)))  # fmt: skip
        columns = {'class': None, 'positives': 0, 'predictions': 0, 'AP': 2, 'threshold': 4}
        table = report_page.table({**columns, 'precision': 2, 'recall': 2, 'F1': 2}, rows)
        note = 'Precision, recall and F1 at the thresholds of the metrics, in percent. Click a column to sort.'
        return [
            report_page.section('Precision and recall', text, report_page.curves(shown), 'curves'),
            report_page.section('Classes', note, table, 'classes'),
        ]


def curve_points(scores: Tensor, positive: Tensor) -> list[tuple[float, float]]:
    """Return recall and precision at each distinct score [N] of one class, from the highest, at most `POINTS`."""
    ranked, order = scores.sort(descending=True)
    ends = torch.cat([ranked[1:] != ranked[:-1], ranked.new_ones(1, dtype=torch.bool)])
    right = positive[order].cumsum(0)
    predicted = torch.arange(1, len(ranked) + 1, device=scores.device)
    right = right.double()
    points = [tuple(point) for point in torch.stack([right / right[-1], right / predicted], dim=1)[ends].tolist()]
    step = max(1, -(-len(points) // POINTS))
    return points if step == 1 else [*points[:-1:step], points[-1]]


def image_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of each image over its annotated classes, [B]."""
    annotated = target >= 0
    losses = F.binary_cross_entropy_with_logits(logits, (target == 1).float(), reduction='none')
    return losses.masked_fill(~annotated, 0).sum(1) / annotated.sum(1).clamp(min=1)


def ratios(right: int, predicted: int, positives: int) -> tuple[float | None, float | None, float | None]:
    """Return precision, recall and F1 in percent, None where nothing is divided by."""
    counts = (right, predicted), (right, positives), (2 * right, predicted + positives)
    precision, recall, f1 = (100 * over / under if under else None for over, under in counts)
    return precision, recall, f1
