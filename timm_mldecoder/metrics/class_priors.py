"""Class priors: the mean predicted probability of each class."""

import torch
import torch.distributed as dist
from torch import Tensor


class MeanProbability:
    """Mean predicted probability of each class over all images of all ranks: the class prior for CSL.

    Args:
        num_classes: Number of classes C.
        device: The device of the model's outputs.
        max_samples: Ignore predictions beyond this number of images (padding of distributed samplers).
    """

    def __init__(self, num_classes: int, device: torch.device | str | None = None, *, max_samples: int | None = None):
        self.sums = torch.zeros(num_classes + 1, dtype=torch.float64, device=device)  # the last counts images
        self.max_samples = max_samples
        self.num_samples = 0

    @torch.no_grad()
    def update(self, output: Tensor) -> None:
        """Add logits [B, C]."""
        if self.max_samples is not None:
            output = output[: max(0, self.max_samples - self.num_samples)]
        self.num_samples += len(output)
        self.sums[:-1] += output.float().sigmoid().sum(0, dtype=torch.float64)
        self.sums[-1] += len(output)

    def compute(self, distributed: bool = False) -> Tensor:
        """Return the means, float64 [C] on the CPU."""
        sums = self.sums.clone()
        if distributed:
            dist.all_reduce(sums)
        return (sums[:-1] / sums[-1]).cpu()
