"""An ML-Decoder head whose groups are divided over ranks (`--head-parallel`).

Groups are independent: each rank holds K / ranks of the group fully-connected weights [K, D, group_size] and of learned
queries, with gradients, optimizer state and EMA weights; these weights are never sent. The embedded tokens of all ranks
are gathered, and each rank decodes its own queries for the images of all ranks; see `classes.py`. All else in the head
is small, and FSDP2 has it as other modules.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.func import functional_call
from torch.nn import functional as F

from timm_mldecoder.distributed.classes import ClassPart, gather
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.head.layers import GroupFullyConnected
from timm_mldecoder.head.queries import Queries


class ParallelMLDecoder(MLDecoder):
    """The head of one rank; made of an `MLDecoder` by `divide_groups`."""

    def forward(self, x, mask: Tensor | None = None) -> Tensor:
        """Return the logits [R B, own classes] of the images of all R ranks; every rank has B of them."""
        tokens = _Gather.apply(self._embed_tokens(x))
        mask = None if mask is None else _Gather.apply(mask)
        first, *others = self.layers
        queries = functional_call(self.queries, {'weight': self._own(self.queries.weight)}, (None,)).unsqueeze(0)
        if self.training and self.dropout > 0:
            queries = queries.expand(len(tokens), -1, -1)
        queries = first(queries, tokens, mask)
        for layer in others:
            queries = layer(queries, tokens, mask)
        padding = self.config.num_queries * self.config.group_size - self.num_classes
        own = dict(weight=self._own(self.group_fc.weight), bias=self._own(F.pad(self.group_fc.bias, (0, padding))))
        logits = functional_call(self.group_fc, own, (self.classifier_dropout(queries), None))
        size = self.part.size
        return logits if size == logits.shape[1] else logits[:, :size].clone()  # FSDP2 wants no view

    @property
    def part(self) -> ClassPart:
        """This rank's classes."""
        ranks, config = dist.get_world_size(), self.config
        width = config.num_queries // ranks * config.group_size
        return ClassPart(self.num_classes, width, dist.get_rank(), ranks)

    def _own(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of a tensor over groups or classes."""
        if isinstance(tensor, DTensor):
            return _MeanGradient.apply(tensor.to_local())
        return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def holds_groups(module: nn.Module, name: str) -> bool:
    """Return whether a parameter of a module is one that `divide_groups` divides."""
    return isinstance(module, (Queries, GroupFullyConnected)) and name == 'weight'


def divide_groups(head: MLDecoder, mesh: DeviceMesh) -> list[nn.Parameter]:
    """Divide the groups of a head on the meta device over ranks, in place.

    Returns:
        The parameters that the ranks have parts of from now on, and that FSDP2 must leave alone.

    Raises:
        ValueError: If the ranks do not divide the groups, the groups are not independent, or a rank has no class.
    """
    if not isinstance(head, MLDecoder) or head.vocabulary is not None:
        raise ValueError('--head-parallel needs an ML-Decoder head with fixed or learned queries')
    if any(layer.self_attn is not None for layer in head.layers):
        raise ValueError('--head-parallel does not work with self_attention=True: there each query needs all others')
    ranks, queries = mesh.size(), head.config.num_queries
    if queries % ranks:
        raise ValueError(f'--head-parallel: {ranks} ranks must divide --num-of-groups {queries}')
    width = queries // ranks * head.config.group_size
    if (ranks - 1) * width >= head.num_classes:
        raise ValueError(
            f'--head-parallel: with --num-of-groups {queries} the last of {ranks} ranks has none of the '
            f'{head.num_classes} classes; choose another number'
        )
    head.__class__ = ParallelMLDecoder
    for module in (head.queries, head.group_fc):
        if isinstance(module.weight, nn.Parameter):
            whole = module.weight
            own = whole.detach()[: queries // ranks]
            placements = [Shard(0)] * mesh.ndim
            part = DTensor.from_local(own, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
            module.weight = nn.Parameter(part, requires_grad=whole.requires_grad)
    return [module.weight for module in (head.queries, head.group_fc) if isinstance(module.weight, nn.Parameter)]


class _Gather(torch.autograd.Function):
    """Concatenate the batches of all ranks; the gradient of each returns to its rank, summed."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        own = grad.new_empty(len(grad) // dist.get_world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


class _MeanGradient(torch.autograd.Function):
    """Pass a part of a weight on; its gradient, a sum over the batches of all ranks, becomes their mean."""

    @staticmethod
    def forward(ctx, part: Tensor) -> Tensor:
        return part.view_as(part)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad / dist.get_world_size()
