"""Classes that an evaluation always or never predicts, which a mean over classes does not show."""

from collections.abc import Sequence

import torch
from timm.task import ClassificationEvaluator
from torch import Tensor

from timm_mldecoder.distributed.world import World
from timm_mldecoder.metrics import MultiLabelEvaluator

SHOWN = 8  # names per line


class PredictedClasses:
    """Counts for how many images each class is predicted, and finds those of all and of none.

    Args:
        evaluator: Evaluator of the same scores; of multi-label data it has the counts.
        names: Class names; None to show indices.
        max_samples: Images of this rank that are not padding, None for all.
    """

    def __init__(
        self, evaluator: ClassificationEvaluator, names: Sequence[str] | None, max_samples: int | None, world: World
    ) -> None:
        self._evaluator, self._names, self._left, self._world = evaluator, names, max_samples, world
        self._pairs: list[Tensor] = []  # predicted class and label of each image, [2, B]; counted at the end
        self._classes = 0

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in logits [B, C] and targets."""
        if isinstance(self._evaluator, MultiLabelEvaluator):
            return
        if self._left is not None:
            output, target = output[: self._left], target[: self._left]
            self._left -= len(output)
        self._classes = output.shape[1]
        self._pairs.append(torch.stack([output.argmax(1), target.argmax(1) if target.ndim == 2 else target]))

    def lines(self) -> list[str]:
        """Return what to warn of, over the images of all ranks; a collective call."""
        if isinstance(self._evaluator, MultiLabelEvaluator):
            _, predicted, positive = self._evaluator.class_counts(distributed=self._world.distributed)
            images = sum(self._evaluator._extent(self._world.distributed)[0])
        else:
            own = torch.cat(self._pairs, 1).cpu() if self._pairs else torch.zeros(2, 0, dtype=torch.int64)
            pairs = torch.cat(self._world.all_gather(own), 1)
            pairs, images = pairs[:, pairs[1] >= 0], pairs.shape[1]  # some labels of a class map are unknown
            classes = max(self._world.all_gather(self._classes))
            predicted, positive = (torch.bincount(part, minlength=classes) for part in pairs)
        lines = []
        if never := ((predicted == 0) & (positive > 0)).nonzero().flatten().tolist():
            lines.append(f'predicted for no image, though some show them: {self._shown(never)}')
        if always := ((predicted == images) & (positive < images)).nonzero().flatten().tolist():
            lines.append(f'predicted for every image, though some do not show them: {self._shown(always)}')
        return lines

    def _shown(self, classes: list[int]) -> str:
        names = [self._names[index] if self._names and index < len(self._names) else str(index) for index in classes]
        return f'{len(names)} classes: {", ".join(names[:SHOWN])}{", ..." if len(names) > SHOWN else ""}'
