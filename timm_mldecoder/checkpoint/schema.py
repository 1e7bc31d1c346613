"""The checkpoint file: every key, who writes it and who reads it.

The layout is timm's, whose `load_checkpoint` and `--resume` read these files, with what timm has no place for under one
key more. docs/checkpoints.md has the same table.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from timm_mldecoder.distributed.read_sharded import SHARDS

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
