"""Further measures of validate.py: ReaL labels, and scikit-learn's precision, recall and F1."""

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import RealLabelsImagenet
from torch import Tensor
from torch.utils.data import Dataset

from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import Options


def create_extra_metrics(options: Options, dataset: Dataset, max_samples: int | None, world: World) -> list[Any]:
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
