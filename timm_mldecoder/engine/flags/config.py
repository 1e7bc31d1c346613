"""YAML files of options, held against the parser: unknown keys, wrong types and wrong choices are errors."""

import contextlib
import difflib
from argparse import Action, ArgumentParser
from typing import Any

import yaml
from timm.utils import ParseKwargs


def read_config(path: str, parser: ArgumentParser) -> dict[str, Any]:
    """The options that a YAML file sets, as the parser would have read them.

    Raises:
        ValueError: If the file cannot be read or is no mapping; if a key is no option, or its value not one that the
            option takes.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ValueError(f'--config {path}: {error.strerror}') from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'--config {path} is not readable YAML: {" ".join(str(error).split())}') from error
    if not isinstance(content, dict):
        raise ValueError(f'--config {path} holds {type(content).__name__}, not a mapping of options')

    actions = {action.dest: action for action in parser._actions if action.dest not in ('help', 'config')}
    options = {}
    for key, value in content.items():
        if key not in actions:
            close = difflib.get_close_matches(str(key), actions, n=1)
            hint = f'; did you mean {close[0]!r}?' if close else ''
            raise ValueError(f'--config {path}: {key!r} is no option{hint}')
        try:
            options[key] = _read_value(value, actions[key])
        except ValueError as error:
            raise ValueError(f'--config {path}: {key}: {error}') from error
    return options


def _read_value(value: Any, action: Action) -> Any:
    """One value of the file, converted and checked against its option."""
    if value is None and not action.default:
        return action.default  # what args.yaml holds for an option that was not given
    if action.nargs == 0:
        return _expect(value, bool, 'true or false')
    if isinstance(action, ParseKwargs):
        return _expect(value, dict, 'a mapping')
    if action.nargs not in (None, '?'):
        values = [_read_scalar(item, action) for item in _expect(value, list, 'a list')]
        if isinstance(action.nargs, int) and len(values) != action.nargs:
            raise ValueError(f'expects {action.nargs} values, got {len(values)}')
        return values
    return _read_scalar(value, action)


def _read_scalar(value: Any, action: Action) -> Any:
    kind = action.type or str
    if kind is float and isinstance(value, str):  # YAML 1.1 takes 3e-4 for text
        with contextlib.suppress(ValueError):  # other text fails the check below
            value = float(value)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and isinstance(value, bool):
        raise ValueError(f'expects int, got {value!r}')
    value = _expect(value, kind, kind.__name__)
    if action.choices and value not in action.choices:
        raise ValueError(f'{value!r} is not one of {", ".join(map(str, action.choices))}')
    return value


def _expect(value: Any, kind: type, wording: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f'expects {wording}, got {value!r}')
    return value
