"""Losses of logits whose classes are divided over ranks; see `classes.py`.

The mean of a divided loss over ranks is that of DistributedDataParallel, as is the mean of its gradients.
"""

from copy import deepcopy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.loss import (
    AsymmetricLossMultiLabel,
    BinaryCrossEntropy,
    LabelSmoothingCrossEntropy,
    PolyBinaryCrossEntropy,
    SoftTargetCrossEntropy,
)
from torch import Tensor, nn

from timm_mldecoder.distributed.classes import ClassPart, all_reduce, gather
from timm_mldecoder.losses import (
    AngularMarginLoss,
    AsymmetricLoss,
    BinaryCrossEntropyLoss,
    ClassAwareSelectiveLoss,
    HillLoss,
    MultiLabelLoss,
    SelfPacedCorrectionLoss,
    automatic_scale,
)


def _sums_classes(loss: nn.Module) -> bool:
    return isinstance(loss, BinaryCrossEntropy) and loss.sum_classes


def _reduction(loss: nn.Module) -> str:
    return 'batchmean' if _sums_classes(loss) else loss.reduction


class EntryLoss(nn.Module):
    """A loss that is a sum over images and classes: each rank adds up its own classes.

    Args:
        loss: The loss of all classes.
        part: Classes of this rank.
    """

    def __init__(self, loss: nn.Module, part: ClassPart) -> None:
        super().__init__()
        self.reduction = _reduction(loss)
        self.part = part
        self.loss = deepcopy(loss)
        self.loss.reduction = 'sum'
        if _sums_classes(loss):
            self.loss.sum_classes = False
        for name, buffer in loss.named_buffers(remove_duplicate=False):
            if buffer.shape == (part.num_classes,):
                setattr(self.loss, name, buffer[part.own])
        if isinstance(loss, AngularMarginLoss) and loss.scale is None:
            self.loss.scale = automatic_scale(part.num_classes)
        if isinstance(loss, ClassAwareSelectiveLoss):
            self.loss.__class__, self.loss.part = _SelectiveLoss, part

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return this rank's part of the loss, times the number of ranks.

        Args:
            logits: Logits of the own classes, [R B, own classes].
            target: Targets of the own images, [B] or [B, C].
        """
        part, images = self.part, len(target)
        target = part.targets(target)
        if target.dim() == 1:  # smoothed as by timm
            off = self.loss.smoothing / part.num_classes
            column, is_own = part.place(target)
            target = torch.full_like(logits, off, requires_grad=False)
            on = torch.full_like(target[:, 0], 1 - self.loss.smoothing + off).masked_fill(~is_own, off)
            target.scatter_(1, column[:, None], on[:, None])
        if self.reduction == 'mean' and isinstance(self.loss, MultiLabelLoss):
            return self._mean(*self.loss.entries(logits, target))
        divisor = {'sum': 1, 'batchmean': images, 'mean': images * part.num_classes}[self.reduction]
        return self.loss(logits, target) / divisor

    def _mean(self, losses: Tensor, counts: Tensor) -> Tensor:
        """Return a number whose mean over ranks is that of the means over the entries that count of each rank."""
        losses, counts = (entries.view(self.part.ranks, -1).sum(1) for entries in (losses, counts))
        return (losses / all_reduce(counts).clamp(min=1)).sum()


class _SelectiveLoss(ClassAwareSelectiveLoss):
    """CSL of the classes of a rank; made of a `ClassAwareSelectiveLoss` by `EntryLoss`."""

    part: ClassPart

    def number_annotated(self, unannotated: Tensor) -> Tensor:
        return all_reduce(super().number_annotated(unannotated))

    def likeliest(self, scores: Tensor) -> Tensor:
        """Return which scores [R B, own classes] are among the highest of the images of their rank."""
        part = self.part
        batches = scores.reshape(part.ranks, -1)  # [R, B x own classes]
        images = len(scores) // part.ranks
        count = min(self.likelihood_topk * images, images * part.num_classes)
        if not count:
            return torch.zeros_like(scores, dtype=torch.bool)
        values = batches.topk(min(count, batches.shape[1])).values
        values = gather(F.pad(values, (0, count - values.shape[1]), value=-torch.inf))
        values = torch.cat(values.chunk(part.ranks), dim=1)  # candidates of all ranks, [R, R x count]
        return (batches >= values.topk(count).values[:, -1:]).view_as(scores)


class SoftmaxLoss(nn.Module):
    """Cross-entropy of a softmax over the classes of all ranks.

    Args:
        part: Classes of this rank.
        weight: Weight of each class, [C].
        smoothing: Label smoothing of class indices.
    """

    def __init__(self, part: ClassPart, weight: Tensor | None = None, smoothing: float = 0.0) -> None:
        super().__init__()
        self.part = part
        self.smoothing = smoothing
        self.register_buffer('weight', torch.ones(part.num_classes) if weight is None else weight, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return a number whose mean over ranks is the loss; see `EntryLoss.forward`."""
        target = self.part.targets(target)
        losses = self.per_image(logits, target)
        weights = self.weight[target] if target.dim() == 1 else torch.ones_like(losses)
        losses, weights = (values.view(self.part.ranks, -1).sum(1) for values in (losses, weights))
        return (losses / weights).mean()

    def per_image(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return numbers [N] whose means over ranks are the losses of the images, for the targets of all ranks.

        The loss is -sum_c q_c log p_c. Of the weights q the own ones are `spread`, and `amount` more in `column`.
        """
        part, smoothing, logits = self.part, self.smoothing, logits.float()
        weight = self.weight.to(logits)
        own_weight = weight[part.own]
        if target.dim() == 2:
            spread = (target * (1 - smoothing) + smoothing / part.num_classes) * own_weight
            return _SoftmaxLosses.apply(logits, all_reduce(spread.sum(1)), spread, None, None)
        column, is_own = part.place(target)
        amount = (1 - smoothing) * weight[target]
        spread = smoothing / part.num_classes * own_weight[None] if smoothing else None
        total = amount + smoothing * weight.mean()
        return _SoftmaxLosses.apply(logits, total, spread, column[:, None], (amount * is_own)[:, None])


class _SoftmaxLosses(torch.autograd.Function):
    """What `SoftmaxLoss.per_image` returns; its gradient is computed in one tensor of the size of the logits."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, total: Tensor, spread: Tensor | None, column: Tensor | None, amount: Tensor | None
    ):
        highest = all_reduce(logits.amax(1, keepdim=True), dist.ReduceOp.MAX)
        log_sum = all_reduce((logits - highest).exp_().sum(1, keepdim=True)).log()
        product = 0 if spread is None else ((logits - highest) * spread).sum(1)
        if column is not None:
            product = product + ((logits.gather(1, column) - highest) * amount)[:, 0]
        ctx.save_for_backward(logits, total, spread, column, amount, highest, log_sum)
        return total * log_sum[:, 0] - dist.get_world_size() * product

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, total, spread, column, amount, highest, log_sum = ctx.saved_tensors
        grad = dist.get_world_size() * grad[:, None]  # the other ranks have the same one
        result = (logits - highest).sub_(log_sum).exp_().mul_(grad * total[:, None])
        if spread is not None:
            result.addcmul_(spread, grad, value=-1)
        if column is not None:
            result.scatter_add_(1, column, -grad * amount)
        return result, None, None, None, None


class ExchangedLoss(nn.Module):
    """Any loss: the logits for all classes return to the ranks that the images came from."""

    def __init__(self, loss: nn.Module, part: ClassPart) -> None:
        super().__init__()
        self.loss = loss
        self.part = part

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of the own images; see `EntryLoss.forward`."""
        return self.loss(_ToImages.apply(logits, self.part), target)


class _ToImages(torch.autograd.Function):
    """`ClassPart.to_images`, with its gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor, part: ClassPart) -> Tensor:
        ctx.part = part
        return part.to_images(logits)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.part.to_classes(grad), None


#: How a loss is divided; those of other classes exchange logits.
LOSSES = {
    **dict.fromkeys((BinaryCrossEntropyLoss, AsymmetricLoss, ClassAwareSelectiveLoss, AngularMarginLoss), EntryLoss),
    **dict.fromkeys((HillLoss, SelfPacedCorrectionLoss), EntryLoss),
    **dict.fromkeys((BinaryCrossEntropy, AsymmetricLossMultiLabel, PolyBinaryCrossEntropy), EntryLoss),
    nn.CrossEntropyLoss: lambda loss, part: SoftmaxLoss(part, loss.weight, loss.label_smoothing),
    LabelSmoothingCrossEntropy: lambda loss, part: SoftmaxLoss(part, smoothing=loss.smoothing),
    SoftTargetCrossEntropy: lambda loss, part: SoftmaxLoss(part),
}


def divide_loss(loss: nn.Module, part: ClassPart) -> nn.Module:
    """Return a loss of logits of the own classes and targets of the own images, see `EntryLoss.forward`."""
    divide = LOSSES.get(type(loss), ExchangedLoss)
    if divide is EntryLoss and _reduction(loss) == 'none':
        divide = ExchangedLoss
    if isinstance(loss, nn.CrossEntropyLoss) and (loss.reduction, loss.ignore_index) != ('mean', -100):
        divide = ExchangedLoss
    return divide(loss, part)
