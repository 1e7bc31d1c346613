"""A loss for heads with random text queries."""

import torch.nn.functional as F
from torch import Tensor, nn


class RandomQueryLoss(nn.Module):
    """A multi-label loss for a head that adds random text queries in training (arXiv 2111.12933, section 2.3.3).

    Their logits follow those of the classes, and their target is positive.

    Args:
        loss: A loss of logits and targets of one shape.
    """

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits [B, C + random queries] for targets [B, C]."""
        return self.loss(logits, F.pad(target, (0, logits.shape[1] - target.shape[1]), value=1.0))
