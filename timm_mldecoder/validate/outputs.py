"""What validate.py computes and writes beside metrics: ReaL labels, F1, tuned thresholds, class priors, a table."""

import csv
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import RealLabelsImagenet
from torch import Tensor
from torch.utils.data import Dataset

from timm_mldecoder.checkpoint.folders import store_thresholds
from timm_mldecoder.data.class_files import write_priors
from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags.options import ReportOptions
from timm_mldecoder.metrics import MultiLabelEvaluator
from timm_mldecoder.runtime.files import write_atomically
from timm_mldecoder.validate.report_scores import ratios

_logger = logging.getLogger(__name__)


@dataclass
class MultiLabelOutputs:
    """Writes what the options request of an evaluation's scores."""

    options: ReportOptions
    evaluator: MultiLabelEvaluator  # holds the scores
    class_names: list[str]
    world: World

    def write(self, content: dict[str, Any]) -> None:
        """Write what was requested, given what the checkpoint holds; a collective call, after the metrics.

        All are at the thresholds of the evaluator, which are the tuned ones with `--write-thresholds`.
        """
        options, distributed = self.options, self.world.distributed
        priors = None
        if options.write_class_priors:
            priors = self.evaluator.per_class(lambda logits, _: logits.sigmoid().double().mean(0), distributed)
        counts = self.evaluator.class_counts(distributed=distributed) if options.class_report else None
        if not self.world.primary:
            return
        thresholds = self.evaluator.threshold.cpu().expand(len(self.class_names))
        if options.write_thresholds:
            named = dict(zip(self.class_names, thresholds.tolist(), strict=True))
            if options.checkpoint:
                content = {**content, 'thresholds': {**content.get('thresholds', {}), **named}}
                write_atomically(Path(options.checkpoint), lambda file: torch.save(content, file))
            else:
                store_thresholds(options.model, named)
            where = options.checkpoint or options.model
            _logger.info(f'Stored a threshold for each of {len(thresholds)} classes in {where}')
        if priors is not None:
            write_priors(options.write_class_priors, self.class_names, priors)
        if counts is not None:
            self._write_classes(Path(options.class_report), thresholds, counts)

    def _write_classes(self, path: Path, thresholds: Tensor, counts: Tensor) -> None:
        """Write a row per class, with precision, recall and F1 at its threshold, in percent."""
        assert self.evaluator.class_ap is not None  # once computed
        class_ap = self.evaluator.class_ap.where(counts[2] > 0, torch.nan)
        columns = (column.tolist() for column in (counts.T, class_ap, thresholds))
        with path.open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(['class', 'positives', 'ap', 'threshold', 'precision', 'recall', 'f1'])
            for name, numbers, ap, threshold in zip(self.class_names, *columns, strict=True):
                writer.writerow([name, numbers[2], '' if ap != ap else ap, threshold, *ratios(*numbers)])


def create_extra_metrics(options: ReportOptions, dataset: Dataset, max_samples: int | None, world: World) -> list[Any]:
    """Return the measures that the options request, each with `update(output, target)` and `compute()`."""
    real = [RealLabels(dataset, options.real_labels, world)] if options.real_labels else []
    return real + ([PrecisionRecall(options.metrics_avg, max_samples, world)] if options.metrics_avg else [])


class RealLabels:
    """Accuracy on the reassessed labels of ImageNet's validation split (arXiv 2006.07159)."""

    def __init__(self, dataset: Any, path: str, world: World) -> None:
        if world.distributed:
            raise ValueError('--real-labels matches images by their order: run it on a single rank')
        try:
            self._labels = RealLabelsImagenet(dataset.filenames(basename=True), real_json=path)
        except (AssertionError, ValueError) as error:  # timm asserts that there is one list of labels per image
            raise ValueError(f'--real-labels {path}: not one entry for each of the {len(dataset)} images') from error

    def update(self, output: Tensor, target: Tensor) -> None:
        self._labels.add_result(output)

    def compute(self) -> dict[str, float]:
        """Return accuracies in percent, which replace those on the original labels."""
        return {'top1': self._labels.get_accuracy(k=1), 'top5': self._labels.get_accuracy(k=5)}


@dataclass
class PrecisionRecall:
    """Precision, recall and F1 of the first prediction, from scikit-learn."""

    average: str  # 'micro', 'macro' or 'weighted'
    max_samples: int | None  # images of this rank that are not padding, None for all
    world: World
    pairs: list[Tensor] = field(default_factory=list)

    def update(self, output: Tensor, target: Tensor) -> None:
        self.pairs.append(torch.stack([output.argmax(dim=1), target]).cpu())

    def compute(self) -> dict[str, float]:
        """Return percentages over the images of all ranks, under timm's names."""
        from sklearn.metrics import precision_recall_fscore_support

        own = torch.cat(self.pairs, dim=1)[:, : self.max_samples]
        predicted, target = torch.cat(self.world.all_gather(own), dim=1).numpy()
        scores = precision_recall_fscore_support(target, predicted, average=self.average, zero_division=0)
        names = ('precision', 'recall', 'f1_score')
        return {f'{self.average}_{name}': 100 * value for name, value in zip(names, scores, strict=False)}
