"""What validate.py writes beside metrics: tuned thresholds, class priors, a table of classes."""

import csv
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_mldecoder.data.priors import write_priors
from timm_mldecoder.engine.flags import Options
from timm_mldecoder.engine.runtime.distributed import World
from timm_mldecoder.engine.runtime.files import write_atomically
from timm_mldecoder.metrics import MeanProbability, MultiLabelEvaluator

_logger = logging.getLogger(__name__)


class MultiLabelOutputs:
    """Sees the scores of an evaluation, and writes what the options request once all are there.

    Args:
        options: Options of validate.py.
        evaluator: Evaluator of the same scores.
        class_names: Name of each class.
        max_samples: Number of images of this rank that are not padding, None for all.
        world: This rank and the others.
    """

    def __init__(
        self,
        options: Options,
        evaluator: MultiLabelEvaluator,
        class_names: list[str],
        max_samples: int | None,
        world: World,
    ) -> None:
        self._options = options
        self._evaluator = evaluator
        self._world = world
        self._class_names = class_names
        self._priors = None
        if options.write_class_priors:
            self._priors = MeanProbability(len(class_names), world.device, max_samples=max_samples)

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in logits [B, C]."""
        if self._priors is not None:
            self._priors.update(output)

    def write(self, content: dict[str, Any]) -> None:
        """Write what was requested; a collective call, after the metrics were computed.

        Args:
            content: What the checkpoint holds.
        """
        options, distributed = self._options, self._world.distributed
        thresholds = self._evaluator.tune_thresholds(distributed) if options.write_thresholds else None
        priors = self._priors.compute(distributed) if self._priors is not None else None
        counts = self._evaluator.class_counts(thresholds, distributed) if options.class_report else None
        if not self._world.primary:
            return
        if thresholds is not None:
            named = dict(zip(self._class_names, thresholds.tolist(), strict=True))
            content = {**content, 'thresholds': {**content.get('thresholds', {}), **named}}
            write_atomically(Path(options.checkpoint), lambda file: torch.save(content, file))
            _logger.info(f'Stored a threshold for each of {len(thresholds)} classes in {options.checkpoint}')
        if priors is not None:
            write_priors(options.write_class_priors, self._class_names, priors)
        if options.class_report:
            used = self._evaluator.threshold.cpu() if thresholds is None else thresholds
            self._write_classes(Path(options.class_report), used.expand(len(self._class_names)), counts)

    def _write_classes(self, path: Path, thresholds: Tensor, counts: Tensor) -> None:
        """Write a row per class, with precision, recall and F1 at its threshold, in percent."""
        true_positives, predicted, positives = counts.double()
        columns = [
            positives.long(),
            self._evaluator.class_ap.where(positives > 0, torch.nan),
            thresholds,
            100 * true_positives / predicted,
            100 * true_positives / positives,
            200 * true_positives / (predicted + positives),
        ]
        with path.open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(['class', 'positives', 'ap', 'threshold', 'precision', 'recall', 'f1'])
            rows = zip(self._class_names, *(column.tolist() for column in columns), strict=True)
            writer.writerows([name, *('' if value != value else value for value in values)] for name, *values in rows)
