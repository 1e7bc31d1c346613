"""Read a checkpoint file without executing anything in it, and choose the weights that it offers."""

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor

from timm_mldecoder.checkpoint.schema import RUN, check_entries, is_folder_name
from timm_mldecoder.distributed.read_sharded import SHARDS, check_folder, fill

# Keys of the weights, timm's first. EMA weights under `ema` are not the main ones: no rule says that their program
# evaluates with them.
RAW, EMA = ('state_dict', 'model', 'model_state_dict', 'net'), ('state_dict_ema', 'model_ema', 'ema')
MAIN_EMA = EMA[:2]

# What files hold beside tensors and plain values: options and scores of a run. Building these executes no code of a
# file.
_numpy_scalar = np.float64().__reduce__()[0]
_numpy_array = np.empty(0).__reduce__()[0]
ALLOWED_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    *{type(np.dtype(kind)) for kind in ('bool', 'int32', 'int64', 'float32', 'float64', 'str')},
    (_numpy_scalar, 'numpy.core.multiarray.scalar'),  # as numpy 1 wrote it, and as numpy 2 does
    (_numpy_scalar, 'numpy._core.multiarray.scalar'),
    (_numpy_array, 'numpy.core.multiarray._reconstruct'),
    (_numpy_array, 'numpy._core.multiarray._reconstruct'),
]


def read_checkpoint(path: str | Path, whole: bool = True) -> dict[str, Any]:
    """Read a ``.safetensors`` or ``torch.save`` file, onto the CPU.

    Beside tensors and plain values only ``argparse.Namespace`` and numpy's numbers and arrays are accepted; nothing in
    the file is executed. The entries of a checkpoint of train.py are checked against the schema.

    Args:
        path: Path of the file.
        whole: Whether to read the tensors of a sharded checkpoint; otherwise their folder is only
            checked, they stay on the meta device, and those of other files are mapped into memory.

    Raises:
        ValueError: If the file does not exist, holds anything else, is damaged, or has an invalid entry.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'{path}: no such file')
    if path.suffix == '.safetensors':
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f'{path} is not a complete safetensors file: {error}') from error
    try:
        with torch.serialization.safe_globals(ALLOWED_GLOBALS):
            mapped = not whole and zipfile.is_zipfile(path)
            content = torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
    except Exception as error:  # damaged bytes make the unpickler raise anything
        blocked = re.search(r'GLOBAL (\S+)', str(error))
        # torch's message goes on to recommend a load that may execute code
        detail = f'{type(error).__name__}: {error}'.splitlines()[0].partition('. ')[0][:200]
        reason = f'it holds {blocked[1]}, which could execute code' if blocked else f'it is damaged ({detail})'
        raise ValueError(f'{path} is refused: {reason}; only files of weights are read') from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f'{path} holds a {type(content).__name__}, not tensors or entries by name')
    content = dict(content)
    if RUN in content:
        check_entries(content, path)
    if is_folder_name(content.get(SHARDS)):
        check_folder(path, content[SHARDS])
        if whole:
            fill(content, path)
    return content


def has_ema(content: Mapping[str, Any]) -> bool:
    """Return whether a file holds EMA weights."""
    return any(_holds_tensors(content, key) for key in EMA)


def ranked_by_ema(content: Mapping[str, Any]) -> bool:
    """Return whether the EMA weights are a file's main ones.

    They are if there are any under a key of `MAIN_EMA`, unless the training run ranked the epoch by the raw weights:
    they scored higher (`--better-of-ema`), or it scored no others (`--model-ema-force-cpu`).
    """
    rows = content[RUN]['rows'] if RUN in content else []
    main = any(_holds_tensors(content, key) for key in MAIN_EMA)
    return main and bool(rows[-1].get('eval_ema', True) if rows else True)


def weights_of(content: Mapping[str, Any], ema: bool | None = None) -> dict[str, Tensor]:
    """Return the weights that a file offers, without the prefixes that DistributedDataParallel and torch.compile add.

    This is the one rule for validate.py, predict, convert and the Python API.

    Args:
        content: What the file holds: a state dict, or a mapping with one under a key of `RAW` or `EMA`.
        ema: Whether to take the EMA weights; None takes the file's main ones, see `ranked_by_ema`.

    Raises:
        ValueError: If EMA weights are requested and there are none, or an entry is not a tensor.
    """
    if ema and not has_ema(content):
        raise ValueError('the checkpoint holds no EMA weights: leave --use-ema out')
    keys = EMA if (ranked_by_ema(content) if ema is None else ema) else RAW
    keys += EMA if ema is None else ()  # a file with nothing else
    tensors = next((content[key] for key in keys if _holds_tensors(content, key)), content)
    others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        raise ValueError(
            f'no weights found: {", ".join(map(str, others[:5])) or "the file"} is not a tensor; weights are read from '
            f'the top level and from {", ".join((*RAW, *EMA))}'
        )
    return without_split_bn(clean_state_dict(dict(tensors)))


def _holds_tensors(content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key)
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def without_split_bn(tensors: Mapping[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """Leave out what `--split-bn` adds; after training, only the BatchNorm of the first split is used."""
    return {name: tensor for name, tensor in tensors.items() if '.aux_bn.' not in name}
