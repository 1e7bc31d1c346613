"""What is wrong with the arguments or the files of weights of a model, in a line that names the user's flag."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timm_mldecoder.checkpoint.read import read_checkpoint, weights_of
from timm_mldecoder.flags import Options
from timm_mldecoder.runtime.errors import one_line

# What timm's models raise for an argument that they do not have, or for a value that is not what they expect.
_REFUSALS = (TypeError, AssertionError, AttributeError, LookupError, ArithmeticError)


@contextmanager
def refuse(options: Options) -> Iterator[None]:
    """Turn what timm raises for wrong arguments, and for weights that are missing or do not fit, into a ValueError."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # a file does not load or does not fit, or there are no weights
        raise _name_file(options, error) from error
    except _REFUSALS as error:
        refused = _refused_file(options) if isinstance(error, AttributeError) else None  # timm takes its entries as is
        if refused:
            raise refused from error
        given = _unchecked(options, error)
        if not (given or isinstance(error, (TypeError, AssertionError))):
            raise
        reason = one_line(error, 300) if str(error) and not isinstance(error, LookupError) else repr(error)
        raise ValueError(f'--model {options.model}: {reason}{given}') from error


def check_loaded(options: Options, model: nn.Module) -> None:
    """Refuse a file of `--pretrained-path` of which the model has nothing: timm loads what fits, be it nothing.

    The values are compared, since timm renames the tensors of some files.
    """
    if not options.pretrained_path:
        return
    try:
        content = read_checkpoint(options.pretrained_path, whole=False)
    except ValueError:  # a format that only timm reads, such as .npz
        return
    stored: dict[torch.Size, list[Tensor]] = {}
    for tensor in _tensors(content):
        stored.setdefault(tensor.shape, []).append(tensor)
    learned = (value for value in model.parameters() if value.numel() and value.min() < value.max())
    if not any(torch.equal(own, tensor.to(own)) for own in learned for tensor in stored.get(own.shape, ())):
        raise ValueError(
            f'--pretrained-path {options.pretrained_path}: holds no weights of --model {options.model}; pass a file of '
            'that model'
        )


def _tensors(content: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in content.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


def _unchecked(options: Options, error: Exception) -> str:
    """Return the flags whose values timm's models get unchecked, in parentheses, if there are any."""
    values = options.to_dict()
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    given = [
        f'{options.flag(name)} {key}={value}'
        for name in ('model_kwargs', 'pretrained_cfg_overlay')
        for key, value in values.get(name, {}).items()
    ]
    if found and found[1] in options.given:
        given = [f'{options.flag(found[1])} {values[found[1]]}']
    return f' ({", ".join(given)})' if given else ''


def _weight_files(options: Options) -> dict[str, str]:
    """Return the user's files of weights by the flag that names each."""
    values = options.to_dict()
    names = ('initial_checkpoint', 'pretrained_path')
    return {f'--{name.replace("_", "-")}': values[name] for name in names if values.get(name)}


def _refused_file(options: Options) -> ValueError | None:
    """Return the error of the user's first file of weights that has no valid weights, None if all have."""
    for flag, path in _weight_files(options).items():
        try:
            weights_of(read_checkpoint(path))
        except ValueError as reason:
            text = str(reason)
            return ValueError(f'{flag}: {text if path in text else f"{path}: {text}"}')
    return None


def _name_file(options: Options, error: Exception) -> ValueError:
    """Return an error that names the user's file of weights, if there is one."""
    files = ', '.join(f'{flag} {path}' for flag, path in _weight_files(options).items())
    source = files or f'--model {options.model}'
    text = f'{source}: {one_line(error, 300)}{_unchecked(options, error)}'
    if isinstance(error, RuntimeError) and '--initial-checkpoint' in _weight_files(options):
        path = options.initial_checkpoint
        text += (
            f'. --initial-checkpoint takes all weights of the same model. For other classes or another head pass '
            f'--pretrained --pretrained-path {path} (the backbone), or make a folder of it with python -m '
            'timm_mldecoder.convert and pass --pretrained --model local-dir:FOLDER'
        )
    return _refused_file(options) or ValueError(text)
