"""One pass over a split, with metrics that are exact for any number of processes."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from timm.task import ClassificationEvaluator
from torch import Tensor, nn


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    evaluator: ClassificationEvaluator,
    *,
    autocast: Callable[[], AbstractContextManager],
    distributed: bool = False,
    views: int = 0,
    classes: Tensor | None = None,
    on_batch: Callable[[int, Tensor, Tensor], None] | None = None,
) -> OrderedDict[str, float]:
    """Run a model over the batches of a split.

    Args:
        model: The model, put into eval mode.
        batches: Pairs of images and targets.
        evaluator: What turns outputs into metrics.
        autocast: The context of the forward pass.
        distributed: Whether to add up the counts of all processes.
        views: Successive outputs that are averaged into one prediction, where above 1.
        classes: Indices of the outputs that count, all if None.
        on_batch: Called after each batch with its index, its outputs and its targets.

    Returns:
        The metrics of the split, accuracies in percent.
    """
    model.eval()
    for index, (images, target) in enumerate(batches):
        with autocast():
            output = model(images)
        if isinstance(output, (tuple, list)):
            output = output[0]
        if views > 1:
            output = output.unfold(0, views, views).mean(dim=2)
            target = target[::views]
        if classes is not None:
            output = output[:, classes]
        evaluator.update(output, target)
        if on_batch is not None:
            on_batch(index, output, target)
    return evaluator.compute(distributed=distributed)
