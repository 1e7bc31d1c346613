"""What validate.py writes beside metrics: tuned thresholds, class priors, a table of classes."""

import csv
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_mldecoder.checkpoint.folders import store_thresholds
from timm_mldecoder.data.priors import write_priors
from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import Options
from timm_mldecoder.metrics import MeanProbability, MultiLabelEvaluator
from timm_mldecoder.runtime.files import write_atomically
from timm_mldecoder.validate.report_scores import ratios

_logger = logging.getLogger(__name__)


@dataclass
class MultiLabelOutputs:
    """Sees the scores of an evaluation, and writes what the options request once all are there."""

    options: Options
    evaluator: MultiLabelEvaluator  # of the same scores
    class_names: list[str]
    max_samples: int | None  # images of this rank that are not padding, None for all
    world: World

    def __post_init__(self) -> None:
        self._priors = MeanProbability(len(self.class_names), self.world.device, max_samples=self.max_samples)

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in logits [B, C]."""
        if self.options.write_class_priors:
            self._priors.update(output)

    def write(self, content: dict[str, Any]) -> None:
        """Write what was requested, given what the checkpoint holds; a collective call, after the metrics.

        All are at the thresholds of the evaluator, which are the tuned ones with `--write-thresholds`.
        """
        options, distributed = self.options, self.world.distributed
        priors = self._priors.compute(distributed) if options.write_class_priors else None
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
