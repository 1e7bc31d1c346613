"""How a command-line flag is written down: one row a flag, one table a group."""

from argparse import ArgumentParser, Namespace
from typing import Any, NoReturn

from timm.utils import ParseKwargs

#: A flag: its names and the keyword arguments of `ArgumentParser.add_argument`.
Flag = tuple[tuple[str, ...], dict[str, Any]]
#: The title of a group of flags and its rows.
Group = tuple[str, list[Flag]]


def flag(*names: str, **settings: Any) -> Flag:
    """One row of a table; `settings` go to `ArgumentParser.add_argument`, with a default of None."""
    settings.setdefault('default', None)
    return names, settings


def switch(*names: str, help: str) -> Flag:
    """A flag without a value, off unless given."""
    return names, dict(action='store_true', default=False, help=help)


def pairs(*names: str, help: str) -> Flag:
    """A flag that reads any number of KEY=VALUE pairs into a dictionary."""
    return names, dict(nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help=help)


class OneLineParser(ArgumentParser):
    """Tells a mistake in one line; the usage, which argparse puts before it, has some two hundred flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message}\n')


def build_parser(description: str, groups: list[Group]) -> ArgumentParser:
    """An argument parser with every row of `groups`; a default that says something is shown in `--help`."""
    parser = OneLineParser(description=description)
    for title, rows in groups:
        group = parser.add_argument_group(title)
        for names, settings in rows:
            settings = dict(settings)
            if settings['default'] not in (None, '', False, {}, []):
                settings['help'] += ' (default: %(default)s)'
            # argparse lists a positional only where it belongs to the parser itself
            (group if names[0].startswith('-') else parser).add_argument(*names, **settings)
    return parser


def parse_explicit(parser: ArgumentParser, argv: list[str] | None) -> tuple[Namespace, dict[str, Any]]:
    """Parse `argv`, keeping apart what the user wrote from what argparse filled in.

    Returns:
        All options, and the explicit ones alone as a dictionary.
    """
    unset = object()
    options = Namespace(**{action.dest: unset for action in parser._actions if action.dest != 'help'})
    parser.parse_args(argv, options)
    # argparse sets an optional positional to None where it is not given
    explicit = {name: value for name, value in vars(options).items() if value is not unset and value is not None}
    for name in vars(options).keys() - explicit.keys():
        setattr(options, name, parser.get_default(name))
    return options, explicit
