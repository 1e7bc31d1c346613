"""The checkpoint file: read without executing anything in it, every key, and the weights that it offers.

The layout is timm's, whose `load_checkpoint` and `--resume` read these files, with what timm has no place for under one
key more: see `ENTRIES`, with the writers and readers of each. docs/checkpoints.md has the same table.
"""

import argparse
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor

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


RUN = 'timm_mldecoder'  # what train.py keeps beside timm's keys
VERSION = 2  # timm's: 'epoch' is the epoch that ended


class Entry(NamedTuple):
    """One key of a checkpoint."""

    check: Callable[[Any], bool]  # returns whether a value is valid
    expected: str  # what a valid value is, for the error message
    meaning: str  # what the entry holds, with its writer and readers


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _count(value: Any) -> bool:
    return _is(int)(value) and value >= 0


def _positive(value: Any) -> bool:
    return _is(int)(value) and value >= 1


def _tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _rows(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, Mapping) and _names(list(row)) and _count(row.get('epoch')) and _numbers(list(row.values()))
        for row in value
    )


def _numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_is(float, int)(item) for item in value)


def _data_config(value: Any) -> bool:
    checks = {
        'input_size': lambda size: _numbers(size) and len(size) == 3 and all(map(_positive, size)),
        'interpolation': _is(str),
        'mean': _numbers,
        'std': _numbers,
        'crop_pct': _is(float, int),
        'crop_mode': _is(str),
    }
    return isinstance(value, Mapping) and all(name in checks and checks[name](item) for name, item in value.items())


def _model_config(value: Any) -> bool:
    """Return whether a value is what `config.json` of a model folder may hold."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value, Mapping) and _is(str)(value.get('architecture'))


def _thresholds(value: Any) -> bool:
    numbers = isinstance(value, Mapping) and all(_is(float)(item) and 0 <= item <= 1 for item in value.values())
    return numbers and _names(list(value))


def _start(value: Any) -> bool:
    fields = {'position', 'batch', 'order_ranks', 'end_position'}
    return (
        isinstance(value, Mapping)
        and value.keys() == fields
        and all(item is None or _count(item) for item in value.values())
    )


def _train_data(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() == {'images', 'digest'}
        and _optional(_count)(value['images'])
        and _is(str)(value['digest'])
    )


def _sum(value: Any) -> bool:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return pair and _is(float, int)(value[0]) and math.isfinite(value[0]) and _count(value[1])


def _ranks(value: Any) -> bool:
    fields = {'loss': _is(float, int), 'samples': _count, 'bad_images': _is(list), 'buffers': _is(Mapping)}
    return isinstance(value, list) and all(
        isinstance(rank, Mapping) and all(name in rank and check(rank[name]) for name, check in fields.items())
        for rank in value
    )


def _saver(value: Any) -> bool:
    files = value.get('checkpoint_files') if isinstance(value, Mapping) else None
    pairs = isinstance(files, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in files)
    number = _optional(_is(float, int))
    return (
        pairs
        and all(_is(str)(name) and number(metric) for name, metric in files or ())
        and number(value.get('best_metric'))
        and _optional(_is(str))(value.get('metric'))
    )


def is_folder_name(value: Any) -> bool:
    return _is(str)(value) and value not in ('', '.', '..') and Path(value).name == value


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


# fmt: off
ENTRIES = {
    'epoch': Entry(_is(int), 'an integer', 'epoch that ended last, -1 before any; timm, resume'),
    'arch': Entry(_is(str), 'a name', 'name of the timm model; convert'),
    'version': Entry(_is(int), 'an integer', "version of timm's layout; timm, resume"),
    'args': Entry(_is(argparse.Namespace), 'a namespace', 'options of the run; validate.py, predict, convert'),
    'state_dict': Entry(_tensors, 'tensors by name', 'weights; all readers'),
    'state_dict_ema': Entry(_tensors, 'tensors by name', 'EMA weights (--model-ema); all readers'),
    'task_state': Entry(_is(Mapping), 'a mapping', "state of timm's task beside the model; resume"),
    'task_state_ema': Entry(_is(Mapping), 'a mapping', 'the same of the EMA model; resume'),
    'optimizer': Entry(_is(Mapping), 'a state dict', 'state of the optimizer; resume'),
    'amp_scaler': Entry(_is(Mapping), 'a state dict', 'loss scaler (--amp in float16); resume'),
    'metric': Entry(_is(float, int), 'a number', 'metric of the epoch that ended; timm'),
    'saver': Entry(_saver, "the ranking of timm's saver", 'ranking of the checkpoints of the run; resume'),
    'class_names': Entry(_names, 'a list of names', 'class names in the order of the outputs; all readers'),
    'thresholds': Entry(_thresholds, 'a probability per class name', 'thresholds of validate.py --write-thresholds; '
                        'validate.py, predict'),
    SHARDS: Entry(is_folder_name, 'the name of a folder', 'folder beside the file with the sharded tensors (--parallel '
                  'fsdp); all readers'),
    RUN: Entry(_is(Mapping), 'a mapping', 'the entries below; resume, validate.py, predict, convert'),
}
RUN_ENTRIES = {
    'epoch': Entry(_count, 'a number of epochs', 'epoch under way, or the next one'),
    'batch': Entry(_count, 'a number of batches', 'batches of it that are trained'),
    'start': Entry(_start, 'an epoch start', 'from where this epoch is trained (position, batch, order_ranks, '
                   'end_position)'),
    'restart': Entry(_optional(_start), 'an epoch start', 'from where other ranks or another batch size continue'),
    'skipped': Entry(_count, 'a number of steps', 'optimizer steps skipped in a row as non-finite'),
    'gradient_norm': Entry(_sum, 'a sum and a number of steps',
                           'of the norms of the epoch so far; 0, 0 without --clip-grad'),
    'rows': Entry(_rows, 'metrics per epoch', 'rows of summary.csv'),
    'schedule': Entry(_optional(_is(Mapping)), 'a mapping', 'plateau schedule; others are functions of the epoch'),
    'ranks': Entry(_ranks, 'a list of mappings', 'loss sum, samples, unreadable images and buffers of each rank'),
    'world_size': Entry(_positive, 'a number of ranks', 'number of ranks'),
    'batch_size': Entry(_positive, 'a batch size', 'batch size per rank'),
    'grad_accum_steps': Entry(_positive, 'a number of batches', 'batches per optimizer step'),
    'optimizer_generator': Entry(_optional(_is(Tensor)), 'a tensor', 'RNG state that the optimizer owns, if any'),
    'early_stop': Entry(_optional(_is(Mapping)), 'a mapping', 'state of --early-stop'),
    'model_config': Entry(_optional(_model_config), 'a configuration with an architecture',
                          'config.json of the folder of --model local-dir:'),
    'train_data': Entry(_optional(_train_data), 'a number of images and a digest',
                        'training images (none for a stream) and a digest of their names and labels'),
    'held_out': Entry(_optional(_is(Tensor)), 'a tensor',
                      'digests of the names of the images that --val-fraction held out'),
    'data_config': Entry(_data_config, "timm's data configuration", 'size, crop, normalization of evaluation images'),
}
# fmt: on


OPTIONAL = {'gradient_norm', 'model_config', 'train_data', 'held_out'}  # older checkpoints have none


def check_entries(content: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError for the first entry of a train.py checkpoint that is missing or invalid."""
    _check(content, ENTRIES, path, required={'epoch', 'arch', 'args', 'state_dict', 'optimizer', 'saver', RUN})
    _check(content[RUN], RUN_ENTRIES, f'{path}: {RUN}', required=RUN_ENTRIES.keys() - OPTIONAL)
    run, position = content[RUN], content[RUN]['start']
    if run['batch'] < position['batch'] or len(run['ranks']) != run['world_size']:
        raise ValueError(f'{path}: {RUN}: batch, start, ranks and world_size contradict each other')


def _check(content: Mapping[str, Any], entries: Mapping[str, Entry], path: str | Path, required: Any) -> None:
    for name, entry in entries.items():
        if name not in content:
            if name in required:
                raise ValueError(f'{path} has no entry {name!r} of a train.py checkpoint')
        elif not entry.check(content[name]):
            raise ValueError(f'{path}: {name} must be {entry.expected}, got {content[name]!r:.100}')
