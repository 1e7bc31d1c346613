"""Divide a timm model over ranks with torch's FSDP2 (`--parallel fsdp`), one unit per block of the model.

Every rank keeps a slice of each parameter (a DTensor, divided along its first dimension), and of its gradient,
optimizer state and EMA weights. A unit is gathered for its forward and backward pass, and freed after each.
"""

import logging
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from timm.models import group_parameters
from timm.task import TrainingTask
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from timm_mldecoder.distributed.slices import SliceOf
from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import Options

_logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BUCKET_BYTES = 256 * 2**20  # as DistributedDataParallel


def is_sharded(options: Options, world: World) -> bool:
    """Return whether the run divides its model over ranks."""
    return options.parallel == 'fsdp' and world.distributed


def local(tensor: Tensor) -> Tensor:
    """Return the slice of a tensor that this rank holds; an ordinary tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def create_mesh(options: Options, world: World) -> DeviceMesh:
    """Return all ranks in one dimension, or with `--hsdp N` in two: copies of the model, and the N ranks of a copy.

    Raises:
        ValueError: If N does not divide the number of ranks.
    """
    kind, of_a_copy = world.device.type, _ranks_of_a_copy(options, world)
    if of_a_copy == world.size:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=('shard',))
    if world.size % of_a_copy:
        raise ValueError(f'--hsdp {of_a_copy}: must divide the number of ranks, {world.size}')
    shape = (world.size // of_a_copy, of_a_copy)
    return init_device_mesh(kind, shape, mesh_dim_names=('replicate', 'shard'))


def _ranks_of_a_copy(options: Options, world: World) -> int:
    return options.hsdp or world.size


def slices_of(options: Options, world: World) -> SliceOf:
    """Return the function that chooses which slices of the parameters this rank holds."""
    ranks = _ranks_of_a_copy(options, world)

    def slice_of(module: nn.Module, name: str) -> tuple[int, int]:
        return world.rank % ranks, ranks

    return slice_of


def shard_task(
    task: TrainingTask, slices: dict[str, Tensor], options: Options, world: World, heads: Sequence[nn.Module]
) -> None:
    """Divide the model of a task over ranks, and its EMA weights, which are created here.

    Args:
        task: The task, with a model of `create_sliced`.
        slices: This rank's slices of the parameters, by name; they are removed.
        options: Options of train.py.
        world: This rank and the others.
        heads: The classifier, a unit of its own; two for a distilled model.

    Raises:
        ValueError: If FSDP2 does not take the model.
    """
    model, mesh = task.get_trainable_module(), create_mesh(options, world)
    _check(model)
    names = [type(module).__name__ for module in units(model, heads)]
    average = deepcopy(model) if options.model_ema else None
    paths = {id(module): path for path, module in model.named_modules()}
    head_paths = [paths[id(head)] for head in heads]
    divide(model, heads, mesh, options)
    fill(model, slices, world)
    _allocate(model)
    if average is not None:
        divide(average, [average.get_submodule(path) for path in head_paths], mesh, options)
        fill(average, None, world)
        average.load_state_dict(model.state_dict())
        for own, buffer in zip(average.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)  # those too that a state dict leaves out
        _allocate(average)
        task.trainable_module_ema = ShardedEma(
            average, world.device, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup
        )
    held = sum(local(parameter).numel() for parameter in model.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    _logger.info(f'FSDP: {len(names)} units ({", ".join(dict.fromkeys(names))}); {held} of {total} parameters per rank')


def _check(model: nn.Module) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    if scalars := [name for name, parameter in named.items() if not parameter.dim()]:
        raise ValueError(f'--parallel fsdp cannot divide parameters without dimensions: {", ".join(scalars)}')
    if len(named) != len(list(model.parameters())):
        raise ValueError('--parallel fsdp cannot divide a model whose modules share parameters')


def units(model: nn.Module, heads: Sequence[nn.Module]) -> list[nn.Module]:
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


def divide(model: nn.Module, heads: Sequence[nn.Module], mesh: DeviceMesh, options: Options) -> None:
    """Apply `fully_shard` to each unit of a model, and to the model."""
    for module in units(model, heads):
        narrow = not any(module is head for head in heads)
        fully_shard(module, mesh=mesh, mp_policy=precision(options, module if narrow else None))
    fully_shard(model, mesh=mesh, mp_policy=precision(options, None))


def precision(options: Options, block: nn.Module | None) -> MixedPrecisionPolicy:
    """Return the dtypes of a unit: gradients are summed in float32, and with `--amp` blocks are gathered in bfloat16.

    Blocks with buffers of floating point (BatchNorm statistics) are gathered in float32: their kernels take parameters
    in the dtype of the buffers. Autocast converts these, as it does under DistributedDataParallel.
    """
    divided = options.amp and block is not None
    narrow = divided and not any(buffer.is_floating_point() for buffer in block.buffers())
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16 if narrow else None, reduce_dtype=torch.float32)


def fill(model: nn.Module, slices: dict[str, Tensor] | None, world: World) -> None:
    """Give the parameters of a divided model on the meta device their slices, which are removed; zeros without any."""
    filled = {}
    for name, parameter in model.named_parameters():
        own = parameter.to_local()
        if slices is None:
            slice_ = torch.zeros_like(own, device=world.device)
        else:
            slice_ = slices.pop(name).to(world.device, own.dtype)
            assert slice_.shape == own.shape, name
        tensor = DTensor.from_local(
            slice_,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        filled[name] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    model.load_state_dict(filled, assign=True, strict=False)


def _allocate(model: nn.Module) -> None:
    """Create what FSDP2 gathers into: created in a first pass in inference mode, it could not be trained with."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, as DistributedDataParallel does before the first batch of a step."""
    buffers = list(model.buffers())
    if buffers:
        dist._broadcast_coalesced(dist.group.WORLD, buffers, _BUCKET_BYTES, 0)


class ShardedEma(ModelEmaV3):
    """timm's EMA weights, of a divided model: each rank averages its slices.

    Args:
        module: The model that holds the average, divided as the trained one.
        device: Device of the slices.
        **options: Options of `ModelEmaV3`.
    """

    def __init__(self, module: nn.Module, device: torch.device, **options: Any) -> None:
        super().__init__(nn.Linear(1, 1, device=device), **options)  # it would copy the model, which FSDP2 refuses
        self.module = module.eval()

    def _foreach_lerp_(self, ema_values: list[Tensor], model_values: list[Tensor], weight: float) -> None:
        super()._foreach_lerp_([*map(local, ema_values)], [*map(local, model_values)], weight)
