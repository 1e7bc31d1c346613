"""What validate.py can measure beside its evaluators: ReaL labels, and precision, recall and F1."""

from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from timm.data import RealLabelsImagenet
from torch import Tensor
from torch.utils.data import Dataset


def create_measures(options: Namespace, dataset: Dataset, max_samples: int | None) -> list[Any]:
    """The further measures that the options ask for, each with `update(output, target)` and `compute()`."""
    measures: list[Any] = []
    if options.real_labels:
        measures.append(RealLabels(dataset, options.real_labels))
    if options.metrics_avg:
        measures.append(PrecisionRecall(options.metrics_avg, max_samples))
    return measures


class RealLabels:
    """Accuracy on the reassessed labels of ImageNet's validation split (https://arxiv.org/abs/2006.07159)."""

    def __init__(self, dataset: Any, path: str) -> None:
        if dist.is_initialized():
            raise ValueError('--real-labels matches images by their order: run it in a single process')
        try:
            self._labels = RealLabelsImagenet(dataset.filenames(basename=True), real_json=path)
        except AssertionError as error:  # timm asserts that there is one list of labels an image
            raise ValueError(f'--real-labels {path}: not one entry for each of the {len(dataset)} images') from error

    def update(self, output: Tensor, target: Tensor) -> None:
        self._labels.add_result(output)

    def compute(self) -> dict[str, float]:
        """Accuracies in percent, in place of those on the original labels."""
        return {'top1': self._labels.get_accuracy(k=1), 'top5': self._labels.get_accuracy(k=5)}


class PrecisionRecall:
    """Precision, recall and F1 of the first prediction, from scikit-learn.

    Args:
        average: micro, macro or weighted.
        max_samples: Images of this process that are no padding, None for all.
    """

    def __init__(self, average: str, max_samples: int | None) -> None:
        try:
            from sklearn.metrics import precision_recall_fscore_support
        except ImportError as error:
            raise ValueError('--metrics-avg needs scikit-learn: pip install scikit-learn') from error
        self._score = precision_recall_fscore_support
        self._average = average
        self._max_samples = max_samples
        self._pairs: list[Tensor] = []

    def update(self, output: Tensor, target: Tensor) -> None:
        self._pairs.append(torch.stack([output.argmax(dim=1), target]).cpu())

    def compute(self) -> dict[str, float]:
        """Percentages over the images of all processes, under the names that timm gives them."""
        pairs = torch.cat(self._pairs, dim=1)[:, : self._max_samples]
        if dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, pairs)
            pairs = torch.cat(parts, dim=1)
        predicted, target = pairs.numpy()
        precision, recall, f1, _ = self._score(target, predicted, average=self._average, zero_division=0)
        scores = {'precision': precision, 'recall': recall, 'f1_score': f1}
        return {f'{self._average}_{name}': 100 * value for name, value in scores.items()}
