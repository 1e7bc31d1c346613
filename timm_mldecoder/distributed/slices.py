"""Create a model of which a rank holds only its slices (`--parallel fsdp`).

timm creates the model and reads pretrained weights as ever, but what is written into a parameter goes to the slice of
the rank alone: no parameter is whole in memory, and files of weights are mapped into it. Random numbers are drawn for
all entries, so that the slices of all ranks are together what one rank would have created.
"""

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from os import PathLike
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
# torch draws the entries of a contiguous CPU tensor in order; normal numbers in blocks of 16.
_DRAWS = {_aten.uniform_.default, _aten.normal_.default}
_PIECE = 2**20  # entries that are drawn at once
_FILLS = {_aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default, _aten.copy_.default}


#: Module and the name of its parameter to the number of this rank's slice, and the number of slices.
SliceOf = Callable[[nn.Module, str], tuple[int, int]]


def create_sliced(create: Callable[[], nn.Module], slice_of: SliceOf) -> tuple[nn.Module, dict[str, Tensor]]:
    """Create a model on the meta device, and the slices of its parameters along their first dimension.

    A parameter that the code computes from others, or reads, is created a second time, as a whole. Buffers are whole.

    Args:
        create: Creates the model on the CPU.
        slice_of: Chooses the slices.

    Returns:
        The model, and the slices by the names of the parameters.
    """
    state, whole = torch.get_rng_state(), set()
    while True:
        mode = _Slicing(slice_of, whole)
        torch.set_rng_state(state)
        try:
            with mode:
                model = create()
        except Exception:  # of code that read a parameter whose entries are not there
            if not mode.read:
                raise
        if not mode.read:
            break
        whole |= mode.read
    values = {
        f'{path}.{name}' if path else name: mode.read_slice(module, name, parameter)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    empty = {parameter: _meta(parameter) for parameter in model.parameters()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            module._parameters[name] = empty[parameter]
    return model, values


def _meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to('meta'), requires_grad=parameter.requires_grad)


def rows_of_rank(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """Return a view of the rows of a tensor that a rank holds, those that torch.chunk gives it; there may be none."""
    parts = tensor.chunk(ranks) if tensor.dim() else [tensor] * ranks
    return parts[rank] if rank < len(parts) else tensor[:0]


class _Slice(NamedTuple):
    """A parameter: its number, itself, the first of the entries that this rank holds, and these."""

    number: int
    parameter: Tensor  # as the model has it; its memory is not touched
    first: int
    entries: Tensor


class _Slicing(TorchDispatchMode):
    """Keeps the slices of the parameters that modules register.

    Args:
        slice_of: Chooses the slices.
        whole: Numbers, in the order of registration, of the parameters to leave alone.

    Attributes:
        read: Numbers of the parameters whose entries were read or changed in ways that a slice does not allow.
    """

    def __init__(self, slice_of: SliceOf, whole: set[int]) -> None:
        super().__init__()
        self._slice_of, self._whole = slice_of, whole
        self._registered = 0
        self._slices: dict[int, _Slice] = {}  # by storage
        self._patches = ExitStack()
        # for numbers of any dtype; freed after each piece, the allocator would create parameters there
        self._scratch = torch.empty(2 * _PIECE, dtype=torch.complex128)
        self.read: set[int] = set()

    def __enter__(self) -> '_Slicing':
        register, load = nn.Module.register_parameter, torch.load

        def register_sliced(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None:
                self._add(module, name, parameter)
            register(module, name, parameter)

        def load_mapped(file: Any, *args: Any, **kwargs: Any) -> Any:
            mapped = isinstance(file, (str, PathLike)) and zipfile.is_zipfile(file)
            return load(file, *args, **{'mmap': mapped or None, **kwargs})

        self._patches.enter_context(patch.object(nn.Module, 'register_parameter', register_sliced))
        self._patches.enter_context(patch.object(torch, 'load', load_mapped))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def read_slice(self, module: nn.Module, name: str, parameter: Tensor) -> Tensor:
        """Return this rank's slice of a parameter, with the shape that torch.chunk gives it."""
        found = self._find(parameter)
        if found is not None:
            return found.entries.view(-1, *parameter.shape[1:])
        return rows_of_rank(parameter.detach(), *self._slice_of(module, name)).clone()

    def _add(self, module: nn.Module, name: str, parameter: Tensor) -> None:
        """Begin to keep the slice of a parameter, unless it is kept already."""
        found = self._find(parameter)
        if found is not None:
            if found.parameter.shape != parameter.shape:  # two parameters in one storage
                self.read.add(found.number)
            return
        self._registered += 1
        plain = parameter.device.type == 'cpu' and parameter.dim() and parameter.is_contiguous()
        if not plain or self._registered in self._whole:
            return
        whole, (rank, ranks) = parameter.detach(), self._slice_of(module, name)
        first = sum(part.numel() for part in whole.chunk(ranks)[:rank])
        entries = rows_of_rank(whole, rank, ranks).clone().view(-1)
        self._slices[_storage(parameter)] = _Slice(self._registered, whole, first, entries)

    def _find(self, value: Any) -> _Slice | None:
        return self._slices.get(_storage(value)) if isinstance(value, Tensor) else None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = [own for leaf in tree_leaves((args, kwargs)) if (own := self._find(leaf))]
        if not found or function.is_view:
            return function(*args, **kwargs)
        if len(found) == 1 and self._find(args[0]) and self._update(found[0], function, *args, **kwargs):
            return args[0]
        self.read |= {slice_.number for slice_ in found}
        return function(*args, **kwargs)

    def _update(self, own: _Slice, function: Any, target: Tensor, *others: Any, **kwargs: Any) -> bool:
        """Change the entries of the slice as a function changes those of a parameter, or of a part of it.

        Returns:
            Whether that is possible.
        """
        drawn = function in _DRAWS and kwargs.get('generator') is None
        in_place = function._schema.name.endswith('_')
        by_entry = function in _FILLS or (in_place and torch.Tag.pointwise in function.tags)
        if not (drawn or by_entry) or not target.is_contiguous():
            return False
        begin = target.storage_offset() - own.parameter.storage_offset() - own.first
        part = slice(max(begin, 0), max(0, min(begin + target.numel(), len(own.entries))))
        if drawn:
            for start, size in _pieces(target.numel()):
                piece = function(self._scratch.view(target.dtype)[:size], *others, **kwargs)
                kept = slice(max(begin + start, 0), max(0, min(begin + start + size, len(own.entries))))
                first = begin + start
                own.entries[kept] = piece[kept.start - first :][: len(own.entries[kept])]
            return True
        rows = slice(part.start - begin, max(part.stop, part.start) - begin)
        others = [_flat(other, target.shape, rows) if isinstance(other, Tensor) else other for other in others]
        function(own.entries[part], *others, **kwargs)
        return True


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """Yield starts and sizes: multiples of 16, and at the end at least 16 entries, unless there are fewer at all."""
    start = 0
    while size - start >= 2 * _PIECE:
        yield start, _PIECE
        start += _PIECE
    yield start, size - start


def _flat(tensor: Tensor, shape: torch.Size, part: slice) -> Tensor:
    """Return a part of the entries of a tensor that is broadcast to a shape; of others at most a row is read."""
    if not tensor.dim() or not shape:
        return tensor
    width = max(1, math.prod(shape[1:]))
    first, last = part.start // width, -(-part.stop // width)
    rows = tensor.expand(shape)[first:last].reshape(-1)
    return rows[part.start - first * width : part.stop - first * width]
