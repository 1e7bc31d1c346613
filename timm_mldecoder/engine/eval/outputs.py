"""What validate.py derives from multi-label scores beside its metrics: thresholds, class priors, a table of classes."""

import csv
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from timm_mldecoder.data.priors import write_priors
from timm_mldecoder.engine.checkpoint.files import write_atomically
from timm_mldecoder.engine.input.dataset_checks import class_to_index
from timm_mldecoder.engine.runtime.distributed import World
from timm_mldecoder.metrics import MeanProbability, MultiLabelEvaluator

_logger = logging.getLogger(__name__)


class MultiLabelReport:
    """Takes in scores beside an evaluator, and writes what the options ask for once all are there.

    Args:
        options: `write_thresholds`, `write_class_priors` and `class_report` are read.
        evaluator: Sees the same scores.
        dataset: Knows the names of the classes.
        max_samples: Images of this process that are no padding, None for all.
        world: This process and the others.

    Raises:
        ValueError: If the options ask for what the task or the data cannot give.
    """

    def __init__(
        self,
        options: Namespace,
        evaluator: MultiLabelEvaluator,
        dataset: Dataset,
        max_samples: int | None,
        world: World,
    ):
        asked = [name for name in ('write_thresholds', 'write_class_priors', 'class_report') if getattr(options, name)]
        flags = ', '.join(f'--{name.replace("_", "-")}' for name in asked)
        if asked and options.task != 'multilabel':
            raise ValueError(f'{flags}: for --task multilabel only')
        if options.write_thresholds and not options.checkpoint:
            raise ValueError('--write-thresholds stores them in the --checkpoint, and there is none')
        self._options, self._evaluator, self._world = options, evaluator, world
        names = class_to_index(dataset) or range(options.num_classes)
        self._class_names = [str(name) for name in names]
        self._priors = None
        if options.write_class_priors:
            self._priors = MeanProbability(options.num_classes, world.device, max_samples=max_samples)

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in logits [B, C]."""
        if self._priors is not None:
            self._priors.update(output)

    def write(self, checkpoint: dict[str, Any] | None) -> None:
        """Write what was asked for; a collective call, after the metrics were computed."""
        options, distributed = self._options, self._world.distributed
        thresholds = self._evaluator.tune_thresholds(distributed) if options.write_thresholds else None
        priors = self._priors.compute(distributed) if self._priors is not None else None
        if not self._world.primary:
            return
        if thresholds is not None:
            content = {**checkpoint, 'thresholds': thresholds.float()}
            write_atomically(Path(options.checkpoint), lambda file: torch.save(content, file))
            _logger.info(f'Stored a threshold for each of {len(thresholds)} classes in {options.checkpoint}')
        if priors is not None:
            write_priors(options.write_class_priors, self._class_names, priors)
        if options.class_report:
            self._write_classes(Path(options.class_report))

    def _write_classes(self, path: Path) -> None:
        thresholds = self._evaluator.threshold.cpu().expand(len(self._class_names))
        with path.open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(['class', 'ap', 'threshold'])
            writer.writerows(
                zip(self._class_names, self._evaluator.class_ap.tolist(), thresholds.tolist(), strict=True)
            )
