"""Values of a YAML file or a program, turned into arguments that argparse converts and checks."""

import logging
import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import yaml

from timm_mldecoder.flags.flag import Flag, Parser
from timm_mldecoder.flags.group import REMOVED, closest

_logger = logging.getLogger(__name__)

_MAX_DEPTH, _MAX_NODES = 20, 10_000
_FLOAT = re.compile(r'[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+', re.I)  # YAML 1.1 reads 3e-4 as text


ARGS = 'args.yaml'  # options of a run, in its folder
DEFAULT_OUTPUT = './output/train'
FOLDER = {'data', 'data_dir'}  # two names of one option
# where recipes are: in a clone, and where pip puts them
RECIPES = (Path(__file__).parents[2] / 'hparams', Path(__file__).parents[1] / 'hparams')


def find_recipe(name: str | None) -> str | None:
    """Return the file that `--config` names: a path, or a recipe by its name as in `imagenet/resnet50_mldecoder_a2`."""
    if not name or os.path.exists(name):
        return name
    relative = Path(name.removeprefix('hparams/')).with_suffix('.yaml')
    return next((str(folder / relative) for folder in RECIPES if os.path.isfile(folder / relative)), name)


# options of a run that were for one start of it, or are its own
_NOT_RESUMED = {'config', 'experiment', 'lr_find', 'no_resume_opt', 'output', 'resume', 'start_epoch', 'stop_epoch'}


def read_resumed(given: Mapping[str, Any], rows: Mapping[str, Flag], parser: Parser) -> dict[str, Any]:
    """Return the options of the run that `--resume auto --experiment NAME` continues, if it is there."""
    path = Path(given.get('output') or DEFAULT_OUTPUT) / (given.get('experiment') or '') / ARGS
    if given.get('resume') != 'auto' or not given.get('experiment') or not path.is_file():
        return {}
    skip = _NOT_RESUMED | (FOLDER if given.keys() & FOLDER else set())
    values = read_config(str(path), rows, parser, skip)
    _logger.info(f'flags that are not given are those of {path}')
    return values


def read_config(path: str, rows: Mapping[str, Flag], parser: Parser, skip: Container[str]) -> dict[str, Any]:
    """The options that a YAML file gives, but for those to `skip`, converted as arguments are.

    Raises:
        ValueError: If the file cannot be read, is not a mapping or is nested too deeply; if a key is not an option, or
            its value not one that the option takes.
    """
    values: dict[str, Any] = {}
    for key, value in _read(path).items():
        if (flag := f'--{key.replace("_", "-")}') in REMOVED:
            if value:
                raise ValueError(f'--config {path}: {key} was removed: {REMOVED[flag]}')
            continue
        if key not in rows:
            raise ValueError(f'--config {path}: {key!r} is not an option{closest(key, rows)}')
        if key == 'config' and value:
            raise ValueError(f'--config {path}: a file cannot name another one by config: {value}')
        if key in skip:
            continue
        try:
            values |= parser.read(as_arguments(rows[key], value))[0]
        except ValueError as error:
            raise ValueError(f'--config {path}: {key}: {error}') from error
    if Path(path).name == ARGS and values.get('lr'):  # a run wrote the rate that it computed of these
        values = {name: value for name, value in values.items() if not name.startswith('lr_base')}
    return values


def as_arguments(row: Flag, value: Any) -> list[str]:
    """The arguments that set an option to a value; none for the value of an option that is not given.

    Raises:
        ValueError: If the value is not of the kind that the flag takes.
    """
    name = '--data-dir' if row.dest == 'data' else row.label
    if value is None and not row.default or value == row.default and value in ([], {}):
        return []
    if row.type is bool or row.nargs == '?' and isinstance(value, bool):
        if not isinstance(value, bool):
            raise ValueError(f'expects true or false, got {value!r}')
        # --no-x does not exist for a name that begins with "no": false is its default
        return [name] if value else [f'--no-{name[2:]}'] if row.type is bool and name[:5] != '--no-' else []
    if row.type is dict:
        row.check(_expect(value, dict, 'a mapping'), name, None)
        return [name, *(f'{key}={_as_literal(item)}' for key, item in value.items())] if value else [name, '']
    if row.nargs not in (None, '?'):
        values = [_as_text(row, item) for item in _expect(value, (list, tuple), 'a list')]
        return [f'{name}={values[0]}'] if len(values) == 1 else [name, *values]
    return [f'{name}={_as_text(row, value)}']


def _as_text(row: Flag, value: Any) -> str:
    if isinstance(value, bool) and row.choices and {0, 1} == {*row.choices}:
        return str(int(value))
    if value is None or isinstance(value, (bool, list, tuple, dict)):
        raise ValueError(f'expects a value of type {row.type.__name__}, got {value!r}')
    return str(value)


def _as_literal(value: Any) -> str:
    return value if isinstance(value, str) and _FLOAT.fullmatch(value) else repr(value)


def _expect(value: Any, kind: Any, wording: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f'expects {wording}, got {value!r}')
    return value


class _Loader(yaml.SafeLoader):
    """YAML's safe types, in a document of limited depth and size without repeated keys."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.YAMLError(f'more than {_MAX_DEPTH} levels')
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """Compose the document, and count its nodes with every alias expanded."""
        node = super().get_single_node()
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f'{key!r} is there {keys.count(key)} times')
        waiting, count = [node] if node is not None else [], 0
        while waiting:
            node_, count = waiting.pop(), count + 1
            if count > _MAX_NODES:
                raise yaml.YAMLError(f'more than {_MAX_NODES} values once its aliases are expanded')
            if isinstance(node_, yaml.MappingNode):
                waiting += [child for pair in node_.value for child in pair]
            elif isinstance(node_, yaml.SequenceNode):
                waiting += node_.value
        return node


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding='utf-8') as file:
            content = yaml.load(file, _Loader)
    except OSError as error:
        raise ValueError(f'--config {path}: {error.strerror}') from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an impossible date
        raise ValueError(f'--config {path} is not readable YAML: {" ".join(str(error).split())}') from error
    if not isinstance(content, dict):
        raise ValueError(f'--config {path} holds {type(content).__name__}, not a mapping of options')
    return {str(key): value for key, value in content.items()}
