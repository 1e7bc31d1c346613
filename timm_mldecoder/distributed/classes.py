"""The classes of a rank where the groups of a head are divided over ranks (`--head-parallel`).

Each rank has the logits of its own classes for the images of all ranks, [N, own classes]. Logits are not sent: targets
come to the ranks of the classes; `losses.py` and `metrics.py` work with numbers per image or per class.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ClassPart:
    """The classes of a rank."""

    num_classes: int  # of all ranks, C
    width: int  # classes of each rank; the last has what is left
    rank: int
    ranks: int  # number of ranks R

    @property
    def own(self) -> slice:
        """This rank's classes."""
        start = self.rank * self.width
        return slice(start, min(start + self.width, self.num_classes))

    @property
    def size(self) -> int:
        """Number of this rank's classes."""
        return self.own.stop - self.own.start

    def targets(self, target: Tensor) -> Tensor:
        """Return the targets of all ranks' images: class indices [B] as [R B], others [B, C] of the own classes."""
        return gather(target) if target.dim() == 1 else self.to_classes(target)

    def to_classes(self, entries: Tensor) -> Tensor:
        """Exchange entries [B, C] of own images for those [R B, own classes] of own classes."""
        entries = F.pad(entries, (0, self.ranks * self.width - self.num_classes))
        return _all_to_all(torch.cat(entries.chunk(self.ranks, dim=1)))[:, : self.size]

    def to_images(self, entries: Tensor) -> Tensor:
        """Exchange entries [R B, own classes] of own classes for those [B, C] of own images."""
        parts = _all_to_all(F.pad(entries, (0, self.width - self.size)))
        return torch.cat(parts.chunk(self.ranks), dim=1)[:, : self.num_classes]

    def join(self, values: Tensor) -> Tensor:
        """Return values [..., own classes] of all classes, [..., C]."""
        padded = F.pad(values, (0, self.width - self.size)).movedim(-1, 0)
        return gather(padded)[: self.num_classes].movedim(0, -1)

    def place(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns of classes in the own logits, 0 for those of other ranks, and which are own."""
        is_own = (classes >= self.own.start) & (classes < self.own.stop)
        return torch.where(is_own, classes - self.own.start, 0), is_own

    def highest(self, scores: Tensor, k: int) -> Tensor:
        """Return the classes of the k highest of all scores of each image, [N, k], from scores [N, own classes].

        Where scores are -inf, the number may be C or above, no class.
        """
        values, classes = scores.topk(min(k, self.size))
        missing = (0, min(k, self.width) - values.shape[1])
        values = F.pad(values, missing, value=-torch.inf)
        classes = F.pad(classes + self.own.start, missing, value=self.num_classes)
        values, classes = (torch.cat(gather(part).chunk(self.ranks), dim=1) for part in (values, classes))
        return classes.gather(1, values.topk(min(k, self.num_classes)).indices)


def gather(x: Tensor) -> Tensor:
    """Return the tensors [n, ...] of all ranks, [R n, ...]."""
    whole = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous())
    return whole


def _all_to_all(x: Tensor) -> Tensor:
    """Send a part of the rows to each rank, and return the parts that the ranks sent."""
    parts = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(parts, x.contiguous())
    return parts


def all_reduce(x: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """Return the sum of the tensors of all ranks, or what `op` makes of them."""
    x = x.clone()
    dist.all_reduce(x, op)
    return x
