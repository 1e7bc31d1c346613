"""One row per flag: a field of a group, with its default, help, values allowed, conditions and scripts."""

import argparse
import math
import os
import re
import types
import typing
from collections.abc import Callable, Container, Iterable, Mapping
from copy import copy
from dataclasses import Field, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from timm.utils import ParseKwargs
from timm.utils.distributed import world_info_from_env

from timm_mldecoder.flags.group import REMOVED, closest
from timm_mldecoder.runtime.errors import CommandParser

_LARGEST_INT = 2**53
_METAVARS = {int: 'N', float: 'X', str: 'NAME', dict: 'KEY=VALUE'}


class Range:
    """An interval of numbers in mathematical notation, such as `[0, 1)`; NaN and infinities are in none."""

    def __init__(self, text: str) -> None:
        low, high = text[1:-1].split(',')
        self._low, self._high = float(low), float(high)
        self._low_open, self._high_open = text[0] == '(', text[-1] == ')'

    def __contains__(self, value: float) -> bool:
        above = value > self._low if self._low_open else value >= self._low
        below = value < self._high if self._high_open else value <= self._high
        return above and below and (abs(value) <= _LARGEST_INT if isinstance(value, int) else math.isfinite(value))

    def __str__(self) -> str:
        if math.isfinite(self._high):
            return f'{self._low:.10g} to {"below " if self._high_open else ""}{self._high:.10g}'
        return f'{"above" if self._low_open else "at least"} {self._low:.10g}' if math.isfinite(self._low) else ''


FINITE = Range('(-inf, inf)')


def number(kind: type, interval: str) -> Callable[[str], Any]:
    """Return the argparse type of numbers in an interval such as `[0, 1)`, for commands that have no rows."""
    allowed = Range(interval)

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value not in allowed:
            raise argparse.ArgumentTypeError(f'{" ".join(text.split())}: must be {allowed}')
        return value

    return parse


class Need(NamedTuple):
    """The condition under which a flag has an effect, and its wording: what the flag needs."""

    holds: Callable[[Any], bool]  # of all options: their class is made of the rows, and so is none of their types
    text: str


def given(*names: str) -> Need:
    """Need one of several options to be set."""
    text = ' or '.join(f'--{name.replace("_", "-")}' for name in names)
    return Need(lambda options: any(options[name] for name in names), text)


@dataclass(frozen=True)
class Flag:
    """One flag of train.py, validate.py or both."""

    default: Any  # value of the option where the flag is not given
    help: str
    names: tuple[str, ...] = ()  # names on the command line; a name without dashes is a positional argument
    dest: str = ''  # name of the option: the field of its group and the key of a YAML file
    # of the field: `str`, `int`, `float`, `bool` (a switch, which also gets a `--no-` form) or `dict` (KEY=VALUE pairs)
    type: type = str
    nargs: str | int | None = None  # as in argparse
    const: Any = None  # value of a flag with `nargs='?'` that is given without one
    metavar: str | None = None  # placeholder of the value in `--help`
    choices: tuple[Any, ...] | None = None
    range: Range = FINITE
    # `file`, `dataset file` (may also be relative to the dataset folder), `file or folder`: it must exist; `output`: a
    # file can be written there; `output folder`: a folder can. Empty for options that are not paths
    path: str = ''
    # the conditions under which the flag has an effect; a warning names the first that does not hold
    needs: tuple[Need, ...] = ()
    scripts: tuple[str, ...] = ('train',)
    inherited: bool = False  # whether validate.py takes the value from a checkpoint of train.py
    in_validate: Mapping[str, Any] = field(default_factory=dict)  # the attributes that differ in validate.py

    @property
    def label(self) -> str:
        """The first long name, as messages show it."""
        return next((name for name in self.names if name.startswith('--')), self.names[0])

    def of(self, entry: Field, script: str) -> 'Flag':
        """The row of a field as it holds in a script: name, type and number of values are those of the field."""
        hint: Any = typing.get_args(entry.type)[0] if isinstance(entry.type, types.UnionType) else entry.type
        origin = typing.get_origin(hint)
        return replace(
            self,
            names=self.names or (f'--{entry.name.replace("_", "-")}',),
            dest=entry.name,
            type=typing.get_args(hint)[0] if origin is list else origin or hint,
            nargs=self.nargs or {list: '+', dict: '*'}.get(origin),
            **(self.in_validate if script == 'validate' else {}),
        )

    def add_to(self, parser: Any) -> None:
        """Add the flag to an argparse parser or group."""
        settings: dict[str, Any] = dict(default=self.default, help=self._help())
        if self.names[0].startswith('-'):
            settings['dest'] = self.dest
        if self.type is bool:
            parser.add_argument(*self.names, action=_Switch, **settings)
            return
        metavar = self.metavar or ('FILE' if self.path else _METAVARS[self.type])
        if self.choices:
            metavar = '{' + ','.join(str(choice) or '""' for choice in self.choices) + '}'
            settings['choices'] = self.choices
        settings |= dict(nargs=self.nargs, const=self.const, metavar=metavar)
        settings |= dict(action=Pairs) if self.type is dict else dict(type=self.type)
        parser.add_argument(*self.names, **settings)

    def _help(self) -> str:
        notes = []
        if self.default not in (None, '', {}, []) and self.type is not bool:
            shown = self.default if isinstance(self.default, list) else [self.default]
            notes.append(f'default: {" ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in shown)}')
        if self.type in (int, float) and not self.choices and str(self.range):
            notes.append(str(self.range))
        return (self.help + (f' ({"; ".join(notes)})' if notes else '')).replace('%', '%%')

    def check(self, value: Any, label: str, folder: str | None) -> None:
        """Check a value against the row; `label` is the flag as the user spelled it, `folder` that of the dataset.

        Raises:
            ValueError: If a number is not finite or not in range, or a path does not fit.
        """
        for number in _numbers(value):
            if number not in self.range:
                raise ValueError(f'{label} {show(value)}: must be {str(self.range) or "a finite number"}')
        if self.path and value:
            self._check_path(value, label, folder)

    def _check_path(self, path: str, label: str, folder: str | None) -> None:
        if self.path == 'output':  # written at the end of the run, which is too late for an error
            parent = os.path.dirname(path) or '.'
            writable = os.path.isfile(path) or not os.path.exists(path)
            if not writable or not os.path.isdir(parent) or not os.access(parent, os.W_OK):
                raise ValueError(f'{label} {path}: cannot write a file there')
            return
        if self.path == 'output folder':
            place = path if os.path.exists(path) else os.path.dirname(os.path.abspath(path))
            if not os.path.isdir(place) or not os.access(place, os.W_OK):
                raise ValueError(f'{label} {path}: cannot write a folder there')
            return
        places = [path, os.path.join(folder, path)] if self.path == 'dataset file' and folder else [path]
        if any(os.path.isfile(place) for place in places):
            return
        if not os.path.exists(path):
            raise ValueError(f'{label} {path}: no such {self.path}')
        if not (self.path == 'file or folder' and os.path.isdir(path)):
            raise ValueError(f'{label} {path}: not a regular file')


def flag(default: Any, help: str, *, names: str = '', range: str = '(-inf, inf)', needs: Any = (), **row: Any) -> Any:
    """A field of a group, and its flag; see `Flag`.

    The names of the flag, separated by spaces, are given where they are more than that of the field. `range` is text,
    `needs` is one `Need` or several.
    """
    needs = (needs,) if isinstance(needs, Need) else tuple(needs)
    described = Flag(default, help, tuple(names.split()), range=Range(range), needs=needs, **row)
    return field(default_factory=partial(copy, default), metadata={'flag': described})


#: A row begins with the scripts that have the flag.
train = partial(flag, scripts=('train',))
validate = partial(flag, scripts=('validate',))
both = partial(flag, scripts=('train', 'validate'))

# fmt: off
#: Conditions of flags in several groups.
DISTRIBUTED = Need(lambda o: world_info_from_env()[2] > 1, 'more than one rank')
ON_ACCELERATOR = Need(lambda o: not o.device.startswith('cpu'), 'a device other than the CPU')
VALIDATES = Need(lambda o: bool(o.val_split), 'a validation split: --val-split')
NO_HEAD = Need(lambda o: not o.use_ml_decoder_head, '--use-ml-decoder-head 0')
# fmt: on


class _Switch(argparse.Action):
    """A flag without a value: `--x` is true, `--no-x` false. A name that starts with `no-` has no second form."""

    def __init__(self, option_strings: list[str], dest: str, **settings: Any) -> None:
        self._off = [f'--no-{name[2:]}' for name in option_strings if name[:2] == '--' and name[:5] != '--no-']
        super().__init__([*option_strings, *self._off], dest, nargs=0, **settings)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string not in self._off)


class Pairs(ParseKwargs):
    """KEY=VALUE pairs, as timm reads them, with one line for what is not a pair or not a value."""

    def __init__(self, option_strings: list[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, **{**settings, 'nargs': '*'})

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if not values:
            raise argparse.ArgumentError(self, "expected KEY=VALUE pairs, got none; '' clears those of a file")
        values = [value for value in values if value]
        for value in values:
            if not re.match(r'\w+=', value):
                raise argparse.ArgumentError(self, f'expected KEY=VALUE, got {value!r}')
        try:
            super().__call__(parser, namespace, values, option_string)
        except (RecursionError, MemoryError, TypeError) as error:  # what ast.literal_eval raises for odd expressions
            raise argparse.ArgumentError(self, f'cannot read a value: {error or type(error).__name__}') from error


class _Help(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **settings)

    def __call__(self, parser: Any, *_: Any) -> None:
        for action in parser._actions:
            if action.option_strings and action.dest not in parser.common:
                action.help = argparse.SUPPRESS  # argparse leaves groups of such flags out
        parser.print_help()
        parser.exit()


class Parser(CommandParser):
    """A parser of rows: `--help` shows the `common` flags, `--help-all` every one."""

    def __init__(self, description: str, groups: Mapping[str, list[Flag]], common: Container[str]) -> None:
        super().__init__(None, description, usage='%(prog)s [DIR] [--flag value ...]', add_help=False)
        self.common = common
        self.add_argument('-h', '--help', action=_Help, help='show the flags that most runs need and exit')
        self.add_argument('--help-all', action='help', help='show all flags and exit')
        self._negative_number_matcher = re.compile(r'^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$', re.I)  # argparse's lacks -1e-3
        for title, rows in groups.items():
            group = self.add_argument_group(title)
            for row in rows:
                row.add_to(group if row.names[0].startswith('-') else self)

    def read(self, argv: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
        """The options that `argv` gives, without defaults, and the flag that gave each, as it was spelled."""
        unset = object()
        namespace = argparse.Namespace(
            **{action.dest: unset for action in self._actions if action.default != argparse.SUPPRESS}
        )
        _, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            name = unknown[0].partition('=')[0]
            if name in REMOVED:
                raise ValueError(f'{name} was removed: {REMOVED[name]}')
            hint = closest(name, self._option_string_actions)
            if name == '--ml-decoder' and '--use-ml-decoder-head' in self._option_string_actions:  # as in create_model
                hint = ', did you mean --use-ml-decoder-head 1?'
            raise ValueError(f'unknown argument {unknown[0]}{hint}')
        # argparse sets a positional argument that is not given to None
        values = {name: value for name, value in vars(namespace).items() if value is not unset and value is not None}
        actions = self._option_string_actions
        spelled = {actions[name].dest: name for token in argv if (name := token.partition('=')[0]) in actions}
        return values, {name: spelled.get(name, '') for name in values}


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    return ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
