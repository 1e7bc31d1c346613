"""What `validate.py --report` finds out: confusions, precision-recall curves, classes, and the images scored worst.

Scores stay on the rank that saw the image. Rank 0 gets sums over images, the curves of a few classes, the pictures of
the worst images, and the rows of `scores.csv` a few thousand at a time.
"""

import heapq
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.task import ClassificationEvaluator
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from timm_mldecoder.engine.eval import page
from timm_mldecoder.engine.eval.evaluate import create_autocast
from timm_mldecoder.engine.flags import Options
from timm_mldecoder.engine.input.images import EvalLoader, image_path
from timm_mldecoder.engine.input.loaders import DataConfig, create_eval_loader
from timm_mldecoder.engine.predict.parts import write_csv
from timm_mldecoder.engine.predict.pictures import attention_overlay, denormalise, thumbnail
from timm_mldecoder.engine.runtime.distributed import World
from timm_mldecoder.engine.runtime.files import write_atomically
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.metrics import MultiLabelEvaluator
from timm_mldecoder.models.attention_maps import attention_maps

_logger = logging.getLogger(__name__)

PAGE, SCORES = 'index.html', 'scores.csv'
MATRIX = 50  # classes up to which there is a confusion matrix
COLUMNS = 100  # classes up to which scores.csv has the score of each
PAIRS = 30  # most confused pairs
CURVES = 30  # precision-recall curves
POINTS = 300  # of a curve
WORST = 24  # images
MAPS = 3  # attention maps per image
SIDE = 160  # of a picture, in pixels
ROUND = 4096  # rows of scores.csv that a rank sends at once


class Entry(NamedTuple):
    """One class of an image that was scored wrongly: a label that was missed, or a wrong prediction."""

    index: int
    score: float
    missed: bool


class Worst(NamedTuple):
    """An image that was scored wrongly, by its index in the dataset; sorts by its loss."""

    loss: float
    index: int
    name: str
    entries: list[Entry]


class Report:
    """Sees the scores of an evaluation, and writes its page and `scores.csv` once all are there.

    Args:
        options: Options of validate.py.
        dataset: The split.
        names: Class names of the dataset, None if it does not report them.
        evaluator: Evaluator of the same scores; a `MultiLabelEvaluator` for the multi-label task.
        loader: Loader of the split.
        max_samples: Number of images of this rank that are not padding, None for all.
        world: This rank and the others.
    """

    def __init__(
        self,
        options: Options,
        dataset: Dataset,
        names: list[str] | None,
        evaluator: ClassificationEvaluator,
        loader: EvalLoader,
        max_samples: int | None,
        world: World,
    ) -> None:
        self._options = options
        self._dataset = dataset
        self._names = names or []
        self._loader = loader
        self._max_samples = max_samples
        self._world = world
        self._scores = _MultiLabel(evaluator) if isinstance(evaluator, MultiLabelEvaluator) else _SingleLabel()
        if options.write_thresholds:
            self._scores.tune = True

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in logits [B, C] and targets."""
        self._scores.update(output, target)

    def write(self, model: nn.Module, config: DataConfig, metrics: dict[str, float]) -> None:
        """Write the page and `scores.csv`; a collective call, after the metrics were computed.

        Args:
            model: The model as it was built, neither compiled nor wrapped.
            config: Data configuration.
            metrics: Metrics of the split.
        """
        folder, world, scores = Path(self._options.report), self._world, self._scores
        num_classes = max(world.all_gather(scores.num_classes))
        names = [_text(name) for name in self._names[:num_classes]]
        names += [str(index) for index in range(len(names), num_classes)]
        indices = self._indices()
        scores.finish(names, len(indices), world)
        if world.primary:
            folder.mkdir(exist_ok=True)
        rows = self._rows(scores.header(), scores.rows(), indices)
        if world.primary:
            write_csv(folder / SCORES, rows)
        else:
            for _ in rows:
                pass
        sections = scores.sections()
        mistakes = self._mistakes(model, config, names, indices)
        if not world.primary:
            return
        if mistakes:
            text = 'The images with the highest loss among those with a wrong prediction or a missed label.'
            sections.append(page.section('Worst errors', text, page.gallery(mistakes), 'errors'))
        o = self._options
        facts = {'Dataset': _text(f'{o.dataset or ""} {o.data_dir or ""} {o.split}'.strip())}
        facts |= {'Checkpoint': _text(o.checkpoint)} if o.checkpoint else {}
        facts |= {name: f'{value:.3f}' if isinstance(value, float) else str(value) for name, value in metrics.items()}
        html = page.render(f'Results of {_text(o.model)}', facts, sections)
        write_atomically(folder / PAGE, lambda file: file.write(html.encode()))
        _logger.info(f'Report written: {folder / PAGE} and {folder / SCORES}')

    def _indices(self) -> Sequence[int]:
        """Return the dataset index of each image of this rank that was scored; consecutive numbers for a stream."""
        if isinstance(self._dataset, IterableDataset):
            number = self._scores.num_images if self._max_samples is None else self._max_samples
            return range(self._world.rank, number * self._world.size, self._world.size)
        sampler = self._loader.sampler
        indices = range(len(self._dataset)) if sampler is None else list(sampler)[: self._max_samples]
        bad = {image.path for image in self._loader.bad_images}
        return [index for index in indices if image_path(self._dataset, index) not in bad] if bad else indices

    def _name(self, index: int) -> str:
        if isinstance(self._dataset, IterableDataset) or not hasattr(self._dataset, 'filename'):
            return f'image {index} of the dataset'
        return _text(str(self._dataset.filename(index)))

    def _rows(self, header: list[str], rows: Iterator[list], indices: Sequence[int]) -> Iterator[Sequence[Any]]:
        """Yield the rows of `scores.csv` in the order of the dataset on rank 0; a collective iterator."""
        yield header
        size = max((max(found) + 1 for found in self._world.all_gather(indices[-1:]) if found), default=0)
        own = zip(indices, rows, strict=False)
        index, row = next(own, (size, None))
        for end in range(ROUND, size + ROUND, ROUND):
            chunk = []
            while row is not None and index < end:
                chunk.append((index, [self._name(index), *row]))
                index, row = next(own, (size, None))
            every = self._world.all_gather(chunk)
            if self._world.primary:
                yield from (values for _, values in sorted((pair for part in every for pair in part), key=_first))

    def _mistakes(
        self, model: nn.Module, config: DataConfig, names: list[str], indices: Sequence[int]
    ) -> list[page.Mistake]:
        """Return the worst images, with the attention of what was wrong where the head has it; a collective call."""
        if isinstance(self._dataset, IterableDataset):
            _logger.info('no pictures of errors: a stream cannot be read at an image again')
            return []
        own = heapq.nlargest(WORST, (pair for pair in self._scores.losses()))
        found = [Worst(loss, indices[row], self._name(indices[row]), self._scores.entries(row)) for loss, row in own]
        worst = sorted((item for part in self._world.all_gather(found) for item in part), reverse=True)[:WORST]
        pictures = self._pictures(model, config, names, worst)
        every = {place: item for part in self._world.all_gather(pictures) for place, item in part.items()}
        return [
            page.Mistake(item.name, f'loss {item.loss:.3f}', every[place])
            for place, item in enumerate(worst)
            if place in every
        ]

    def _pictures(
        self, model: nn.Module, config: DataConfig, names: list[str], worst: list[Worst]
    ) -> dict[int, list[page.Picture]]:
        """Return the pictures of some of the worst images; the ranks share them."""
        if not worst:
            return {}
        chosen = _Chosen(self._dataset, [item.index for item in worst])
        options = self._options.replace(workers=0)
        crop = dict(bad_image='skip', remedy='', crop_border_pixels=options.crop_border_pixels)
        loader = create_eval_loader(options, chosen, config, self._world, batch_size=1, **crop)
        autocast = create_autocast(options, self._world.device)
        attends = any(isinstance(module, MLDecoder) for module in model.modules())
        found = {}
        model.eval()
        for images, place in loader.batches():
            item = worst[place.item()]
            entries = item.entries[:MAPS]
            pixels = denormalise(images[0].float().cpu(), config['mean'], config['std'])
            captions = [f'{"missed" if e.missed else "wrong"}: {names[e.index]} {e.score:.2f}' for e in entries]
            kinds = ['missed' if entry.missed else 'wrong' for entry in entries]
            maps: Sequence[Tensor] = []
            if attends:
                classes = torch.tensor([entry.index for entry in entries], device=images.device)
                try:
                    with autocast():
                        maps = attention_maps(model, images.expand(len(entries), -1, -1, -1), classes).float().cpu()
                except ValueError as error:  # features of several scales, or tokens without a grid
                    _logger.info(f'no attention in the report: {error}')
                    attends = False
            shown = [page.Picture(thumbnail(pixels, SIDE), '' if len(maps) else ', '.join(captions))]
            shown += [
                page.Picture(attention_overlay(pixels, attention, SIDE), caption, kind)
                for attention, caption, kind in zip(maps, captions, kinds, strict=False)
            ]
            found[place.item()] = shown
        return found


class _Chosen(Dataset):
    """Some images of a dataset, with their place among them for a target."""

    def __init__(self, dataset: Any, indices: list[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        return self.dataset[self.indices[place]][0], place

    def filename(self, place: int, absolute: bool = False) -> str:
        return image_path(self.dataset, self.indices[place])

    def __setattr__(self, name: str, value: Any) -> None:
        # the loader sets the transform, which belongs to the dataset that reads the images
        setattr(self.dataset, name, value) if name == 'transform' else super().__setattr__(name, value)


class _SingleLabel:
    """Labels, predictions and probabilities of the images of this rank."""

    tune = False

    def __init__(self) -> None:
        self._labels: list[Tensor] = []  # int64 label and prediction, [2, B]
        self._probabilities: list[Tensor] = []  # float32 of label and prediction, [2, B]
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
        self._counts = sum(world.all_gather(own), Counter())

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
        images, predictions = Counter(), Counter()
        for (label, predicted), count in counts.items():
            images[label] += count
            predictions[predicted] += count
        found = []
        if len(names) <= MATRIX:
            text = 'Number of images by label (rows) and prediction (columns); the colour is the share of the row.'
            found.append(page.section('Confusion matrix', text, page.confusion_matrix(names, counts), 'confusion'))
        pairs = [
            (names[label], names[predicted], count, 100 * count / images[label])
            for count, (label, predicted) in wrong[:PAIRS]
        ]
        content = page.table({'label': None, 'predicted': None, 'images': 0, '% of the label': 2}, pairs)
        text = f'{len(pairs)} of {len(wrong)} confusions, the most frequent first.'
        found = [page.row(*found, page.section('Most confused pairs', text, content, 'pairs'))]
        rows = []
        for index, name in enumerate(names):
            right = counts[index, index]
            values = _ratios(right, predictions[index], images[index])
            rows.append((name, images[index], predictions[index], *values))
        columns = {'class': None, 'images': 0, 'predictions': 0, 'precision': 2, 'recall': 2, 'F1': 2}
        text = 'Precision, recall and F1 of the first prediction, in percent. Click a column to sort.'
        found.append(page.section('Classes', text, page.table(columns, rows), 'classes'))
        return found


class _MultiLabel:
    """Scores of the images of this rank, which the evaluator holds, and what they give for each class."""

    tune = False  # whether thresholds are those with the best F1 on this split

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
        thresholds = evaluator.tune_thresholds(world.distributed) if self.tune else evaluator.threshold
        self._thresholds = thresholds.float().cpu().expand(len(names))
        own_counts, own_curves = {}, {}
        ap = evaluator.class_ap
        for columns, logits, target in evaluator.class_chunks(world.distributed):
            thresholds = self._thresholds[columns].to(logits.device)
            annotated, positive = target >= 0, target == 1
            predicted = (logits.sigmoid() >= thresholds) & annotated
            counts = torch.stack([(predicted & positive).sum(0), predicted.sum(0), positive.sum(0)])
            own_counts[columns.start] = counts.cpu()
            order = sorted(range(logits.shape[1]), key=lambda index: ap[columns.start + index].item())
            for index in [index for index in order if counts[2, index]][:CURVES]:
                keep = annotated[:, index]
                points = curve_points(logits[keep, index], positive[keep, index])
                own_curves[columns.start + index] = points
        every = {start: part for parts in world.all_gather(own_counts) for start, part in parts.items()}
        self._counts = torch.cat([every[start] for start in sorted(every)], dim=1)
        curves = {index: points for part in world.all_gather(own_curves) for index, points in part.items()}
        self._curves = {index: curves[index] for index in sorted(curves, key=lambda index: ap[index].item())[:CURVES]}

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
                found = [Entry(index, scores[row, index].item(), positive[index].item()) for index in wrong]
                return sorted(found, key=lambda entry: -abs(entry.missed - entry.score))[:MAPS]
            row -= len(logits)
        raise AssertionError('no such image')

    def _predict(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities, and what is predicted and not ignored, both [B, C]."""
        scores = logits.sigmoid()
        return scores, (scores >= self._thresholds) & (target >= 0)

    def sections(self) -> list[str]:
        names, thresholds, counts = self._names, self._thresholds.tolist(), self._counts.T.tolist()
        ap = self._evaluator.class_ap.tolist()
        kind = 'those with the best F1 on this split' if self.tune else 'those of the metrics above'
        shown = []
        for index, points in self._curves.items():
            right, predicted, positives = counts[index]
            chosen = (right / positives, right / predicted) if predicted else None
            shown.append(page.Curve(names[index], ap[index], points, thresholds[index], chosen))
        text = f'Recall to the right, precision upwards, lowest average precision first. Dots: thresholds, {kind}.'
        if len(shown) < len(names):
            text += f' {len(shown)} of {len(names)} classes; those without a positive have no curve.'
        rows = []
        for index, (right, predicted, positives) in enumerate(counts):
            value = ap[index] if positives else None
            rows.append((names[index], positives, predicted, value, thresholds[index],
                         *_ratios(right, predicted, positives)))  # fmt: skip
        columns = {'class': None, 'positives': 0, 'predictions': 0, 'AP': 2, 'threshold': 4}
        table = page.table({**columns, 'precision': 2, 'recall': 2, 'F1': 2}, rows)
        note = f'Precision, recall and F1 at the thresholds, {kind}, in percent. Click a column to sort.'
        return [
            page.section('Precision and recall', text, page.curves(shown), 'curves'),
            page.section('Classes', note, table, 'classes'),
        ]


def curve_points(scores: Tensor, positive: Tensor) -> list[tuple[float, float]]:
    """Return recall and precision at each distinct score [N] of one class, from the highest, at most `POINTS`."""
    ranked, order = scores.sort(descending=True)
    ends = torch.cat([ranked[1:] != ranked[:-1], ranked.new_ones(1, dtype=torch.bool)])
    right = positive[order].cumsum(0)
    predicted = torch.arange(1, len(ranked) + 1, device=scores.device)
    points = torch.stack([right / right[-1], right / predicted], dim=1)[ends].tolist()
    step = max(1, -(-len(points) // POINTS))
    return points if step == 1 else [*points[:-1:step], points[-1]]


def image_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of each image over its annotated classes, [B]."""
    annotated = target >= 0
    losses = F.binary_cross_entropy_with_logits(logits, (target == 1).float(), reduction='none')
    return losses.masked_fill(~annotated, 0).sum(1) / annotated.sum(1).clamp(min=1)


def report_folder(folder: str, name: str) -> Path:
    """Return the folder of one of several models, which is in `folder` whatever its name is; creates `folder`."""
    Path(folder).mkdir(exist_ok=True)
    return Path(folder, ''.join(c if c.isalnum() or c in '-_.' else '_' for c in name).strip('.') or '_')


def _ratios(right: int, predicted: int, positives: int) -> tuple[float | None, float | None, float | None]:
    """Return precision, recall and F1 in percent, None where nothing is divided by."""
    counts = (right, predicted), (right, positives), (2 * right, predicted + positives)
    return tuple(100 * over / under if under else None for over, under in counts)


def _text(name: Any) -> str:
    """Return a name as text that UTF-8 can hold: bytes of file names that are not UTF-8 become escapes."""
    return str(name).encode('utf-8', 'backslashreplace').decode()


def _first(pair: tuple[int, list]) -> int:
    return pair[0]
