"""Metrics of logits whose classes are divided over ranks; see `classes.py`. No rank holds the scores of all classes."""

import torch
import torch.distributed as dist
from timm.task import ClassificationEvaluator
from torch import Tensor

from timm_mldecoder.distributed.classes import ClassPart, all_reduce
from timm_mldecoder.distributed.losses import SoftmaxLoss
from timm_mldecoder.metrics import MultiLabelEvaluator


class _DividedEvaluator(ClassificationEvaluator):
    """An evaluator that takes logits of the own classes of all ranks' images; made by `divide_evaluator`."""

    part: ClassPart
    limits: list[int | None]  # number of images of each rank that are no padding
    seen = 0  # images of each rank

    def _of_all_ranks(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and targets of all ranks' images, without the padding of samplers."""
        images = len(target)
        target = self.part.targets(target)
        valid = [images if limit is None else min(max(0, limit - self.seen), images) for limit in self.limits]
        self.seen += images
        if min(valid) == images:
            return output, target
        kept = [rank * images + row for rank, number in enumerate(valid) for row in range(number)]
        return output[kept], target[kept]


class DividedClassificationEvaluator(_DividedEvaluator):
    """timm's loss and top-k accuracies. Every rank counts all images, which leaves means as they are."""

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor) -> None:
        output, target = self._prepare(*self._of_all_ranks(output, target))
        if not len(output):
            return
        losses = all_reduce(self.criterion.per_image(output, target)) / self.part.ranks
        self._accumulate_loss(losses.mean(), len(output))
        correct = self.part.highest(output, 5).eq(target[:, None])
        self.counts[1] += correct[:, 0].sum()
        self.counts[2] += correct.any(dim=-1).sum()


class DividedMultiLabelEvaluator(_DividedEvaluator, MultiLabelEvaluator):
    """Multi-label metrics: each rank has the scores of its own classes for all images."""

    def update(self, output: Tensor, target: Tensor) -> None:
        super().update(*self._of_all_ranks(output, target))

    def _highest(self, scores: Tensor, k: int) -> Tensor:
        column, is_own = self.part.place(self.part.highest(scores, k))
        found = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        return found.scatter_(1, torch.where(is_own, column, scores.shape[1]), True)[:, :-1]

    def _of_all_classes(self, counts: Tensor) -> Tensor:
        return all_reduce(counts)

    def _of_all_images(self, counts: Tensor, distributed: bool) -> Tensor:
        return self.part.join(counts).cpu()

    def per_class(self, function, distributed: bool = False) -> Tensor:
        return self.part.join(super().per_class(function).to(self.device)).cpu()


EVALUATORS = {
    ClassificationEvaluator: DividedClassificationEvaluator,
    MultiLabelEvaluator: DividedMultiLabelEvaluator,
}


def divide_evaluator(evaluator: ClassificationEvaluator, part: ClassPart) -> None:
    """Make an evaluator of all classes one of logits of the own classes, in place; a collective call."""
    limits = [None] * part.ranks
    dist.all_gather_object(limits, evaluator.max_samples)
    evaluator.__class__ = EVALUATORS[type(evaluator)]
    evaluator.part, evaluator.limits, evaluator.max_samples = part, limits, None
    evaluator.criterion = SoftmaxLoss(part).to(evaluator.device)
