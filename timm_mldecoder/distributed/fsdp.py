"""Shard a timm model over ranks with torch's FSDP2 (`--parallel fsdp`), one unit per block of the model.

Every rank keeps a shard of each parameter (a DTensor, sharded along its first dimension), and of its gradient,
optimizer state and EMA weights. A unit is gathered for its forward and backward pass, and freed after each.
"""

import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from timm.models import group_parameters
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from timm_mldecoder.distributed.world import World, local
from timm_mldecoder.flags.model import DeviceOptions
from timm_mldecoder.flags.options import LayoutOptions

_logger = logging.getLogger(__name__)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BUCKET_BYTES = 256 * 2**20  # as DistributedDataParallel


def create_mesh(options: DeviceOptions, world: World) -> DeviceMesh:
    """Return all ranks in one dimension, or with `--hsdp N` in two: copies of the model, and the N ranks of a copy.

    Raises:
        ValueError: If N does not divide the number of ranks.
    """
    kind, ranks = world.device.type, options.hsdp or world.size
    if ranks == world.size:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=('shard',))
    if world.size % ranks:
        raise ValueError(f'--hsdp {ranks}: must divide the number of ranks, {world.size}')
    return init_device_mesh(kind, (world.size // ranks, ranks), mesh_dim_names=('replicate', 'shard'))


def create_skeleton(create: Callable[[], nn.Module]) -> nn.Module:
    """Create a model on the meta device, where its tensors have no values and take no memory.

    A model that reads values while it is created, or keeps tensors beside its parameters and buffers, is created on the
    CPU first.
    """
    try:
        with torch.device('meta'):
            model = create()
        attributes = [value for module in model.modules() for value in vars(module).values()]
        complete = not any(isinstance(value, Tensor) for value in attributes)
    except Exception:  # also for arguments that the model does not have, which raise it again
        complete = False
    return model if complete else create().to('meta')


def shard(
    model: nn.Module, heads: Sequence[nn.Module], mesh: DeviceMesh, options: LayoutOptions, world: World
) -> nn.Module | None:
    """Shard a model in place, with the parameters and buffers of rank 0.

    Args:
        model: The model; on ranks but the first that of `create_skeleton`.
        heads: Its classifier, a unit of its own; two for a distilled model.
        mesh: The ranks, as `create_mesh` returns them.

    Returns:
        A sharded copy for the EMA weights, None if the options request none.

    Raises:
        ValueError: If FSDP2 does not take the model.
    """
    _check(model)
    names = [type(module).__name__ for module in units(model, heads)]
    paths = {id(module): path for path, module in model.named_modules()}
    head_paths = [paths[id(head)] for head in heads]
    weights = model.state_dict() if world.primary else {}
    buffers = [buffer for _, buffer in model.named_buffers(remove_duplicate=False)]
    model.to('meta')
    average = deepcopy(model) if options.model_ema else None

    _shard_units(model, heads, mesh, options)
    model.to_empty(device=world.device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    if world.primary:
        for own, buffer in zip(model.buffers(), buffers, strict=True):
            own.copy_(buffer)  # those too that a state dict leaves out
    broadcast_buffers(model)
    _allocate(model)
    if average is not None:
        _shard_units(average, [average.get_submodule(path) for path in head_paths], mesh, options)
        average.to_empty(device=world.device)
        average.load_state_dict(model.state_dict())
        for own, buffer in zip(average.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
        _allocate(average)
    held = sum(local(parameter).numel() for parameter in model.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    _logger.info(f'FSDP: {len(names)} units ({", ".join(dict.fromkeys(names))}); {held} of {total} parameters per rank')
    return average


def _check(model: nn.Module) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    if scalars := [name for name, parameter in named.items() if not parameter.dim()]:
        raise ValueError(f'--parallel fsdp cannot shard parameters without dimensions: {", ".join(scalars)}')
    if len(named) != len(list(model.parameters())):
        raise ValueError('--parallel fsdp cannot shard a model whose modules share parameters')


def units(model: Any, heads: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules that are gathered on their own, inner ones first: the head, and the layers of the model.

    The layers are those of timm's `group_matcher`, by which it decays learning rates. What is in none of them (stem,
    final norm, a layer of several modules) is gathered with the model as a whole.
    """
    own = [head for head in heads if next(head.parameters(), None) is not None]
    inside = {id(module) for head in own for module in head.modules()}
    found = []
    for names in group_parameters(model, model.group_matcher(coarse=False)).values():
        path = _common_path(names)
        if path:
            found += _called(model.get_submodule(path))
    found = [module for module in found if id(module) not in inside and next(module.children(), None) is not None]
    depth = {id(module): path.count('.') for path, module in model.named_modules()}
    distinct = {id(module): module for module in (*own, *found)}
    return sorted(distinct.values(), key=lambda module: -depth[id(module)])


def _common_path(names: Sequence[str]) -> str:
    """Return the path of the innermost module that has all of some parameters."""
    parts = [name.split('.')[:-1] for name in names]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return '.'.join(common)


def _called(module: nn.Module) -> list[nn.Module]:
    """Return the module, or what it contains: timm's models iterate over containers instead of calling them."""
    if not isinstance(module, _CONTAINERS):
        return [module]
    return [called for child in module.children() for called in _called(child)]


def _shard_units(model: nn.Module, heads: Sequence[nn.Module], mesh: DeviceMesh, options: DeviceOptions) -> None:
    """Apply `fully_shard` to each unit of a model, and to the model."""
    for module in units(model, heads):
        narrow = not any(module is head for head in heads)
        fully_shard(module, mesh=mesh, mp_policy=precision(options, module if narrow else None))
    fully_shard(model, mesh=mesh, mp_policy=precision(options, None))


def precision(options: DeviceOptions, block: nn.Module | None) -> MixedPrecisionPolicy:
    """Return the dtypes of a unit: gradients are summed in float32, and with `--amp` blocks are gathered in bfloat16.

    Blocks with buffers of floating point (BatchNorm statistics) are gathered in float32: their kernels take parameters
    in the dtype of the buffers. Autocast converts these, as it does under DistributedDataParallel.
    """
    narrow = options.amp and block is not None and not any(b.is_floating_point() for b in block.buffers())
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16 if narrow else None, reduce_dtype=torch.float32)


def _allocate(model: nn.Module) -> None:
    """Create what FSDP2 gathers into: created in a first pass in inference mode, it could not be trained with."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, as DistributedDataParallel does before the first batch of a step."""
    buffers, group = list(model.buffers()), dist.group.WORLD
    if buffers and group is not None:
        dist._broadcast_coalesced(group, buffers, _BUCKET_BYTES, 0)


class ShardedEma(ModelEmaV3):
    """timm's EMA weights, of a sharded model: each rank averages its shards.

    Args:
        module: The model that holds the average, sharded as the trained one.
    """

    def __init__(self, module: nn.Module, device: torch.device, **options: Any) -> None:
        super().__init__(nn.Linear(1, 1, device=device), **options)  # it would copy the model, which FSDP2 refuses
        self.module = module.eval()

    def _foreach_lerp_(self, ema_values: list[Tensor], model_values: list[Tensor], weight: float) -> None:
        super()._foreach_lerp_([*map(local, ema_values)], [*map(local, model_values)], weight)
