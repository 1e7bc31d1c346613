"""Imports run in one direction, without circles; no function is long."""

import ast
from pathlib import Path

import pytest
from runs import ROOT

from timm_mldecoder.flags.options import GROUPS, Options, flags

PACKAGE = 'timm_mldecoder'
# What the files of each room may import of ours, beside the room itself.
ALLOWED = {
    'head': set(),
    'losses': set(),
    'metrics': set(),
    'models': {'head', 'checkpoint', 'data'},  # files of label embeddings
    'runtime': set(),
    'data': {'head', 'runtime'},  # the checks of label embeddings, atomic files
}
# The rooms that know flags, each of which may import those before it.
ROOMS = ['runtime', 'flags', 'distributed', 'loading', 'checkpoint', 'modeling']
ROOMS += ['evaluation', 'predict', 'validate', 'check', 'train', 'export', 'probe', 'api']


def modules() -> dict[str, Path]:
    """Return the files of the package by module name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob('*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of ours that a file imports, anywhere in it."""
    found = set()
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                base = '.'.join([*package.split('.')[: len(package.split('.')) + 1 - node.level], *base.split('.')])
                base = base.strip('.')
            for alias in node.names:
                whole = f'{base}.{alias.name}'
                found.add(whole if whole in known else base)
    return {module for module in found if module in known and module != name}


@pytest.fixture(scope='module')
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def subpackage(name: str) -> str:
    """Return the first part below the package: its subpackage, or the module at the root."""
    return name.split('.')[1] if '.' in name else ''


def test_packages_import_only_what_is_below_them(graph):
    wrong = [
        f'{name} imports {other}'
        for name, others in graph.items()
        for other in others
        if subpackage(name) in ALLOWED and subpackage(other) not in ALLOWED[subpackage(name)] | {subpackage(name)}
    ]
    assert not wrong


def test_rooms_import_only_those_before_them(graph):
    for name, others in graph.items():
        for other in others:
            room, used = subpackage(name), subpackage(other)
            if room in ROOMS and used in ROOMS:
                assert ROOMS.index(used) <= ROOMS.index(room), f'{name} imports {other}'


def test_modules_do_not_import_each_other_in_a_circle(graph):
    """Importing from a package runs its `__init__`, which is part of the graph where it is named."""
    done, path = set(), []

    def visit(name):
        assert name not in path, ' -> '.join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


# The modules whose functions see all options of a script: the commands', which build its parts, and the loading of a
# model as it was trained. Any other function takes the groups that it uses, or values.
DOORS = {
    *('check.__main__', 'modeling.load'),
    *('probe.options', 'probe.report', 'probe.sweep'),
    *('train.build_run', 'validate.checkpoints', 'validate.score'),
}


def test_all_options_are_seen_by_the_functions_that_build_a_command_alone():
    """By annotations, of arguments, fields and results; mypy checks that a function uses its own groups only."""
    whole = set()
    for name, path in modules().items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        hints = [node.annotation for node in nodes if isinstance(node, (ast.arg, ast.AnnAssign))]
        hints += [node.returns for node in nodes if isinstance(node, ast.FunctionDef)]
        parts = [part for hint in hints if hint for part in ast.walk(hint)]
        if subpackage(name) != 'flags' and any(isinstance(part, ast.Name) and part.id == 'Options' for part in parts):
            whole.add(name.removeprefix(f'{PACKAGE}.'))
    assert whole == DOORS


def test_rooms_of_the_library_import_groups_of_options_and_no_parsing(graph):
    """What loads data and reads checkpoints knows the types of its options only."""
    parsing = {f'{PACKAGE}.flags.{name}' for name in ('parse', 'config')}
    for name, others in graph.items():
        if subpackage(name) in ('head', 'models', 'losses', 'metrics', 'data', 'loading', 'checkpoint'):
            assert not others & parsing, name


def test_no_function_is_over_60_lines():
    paths = [*modules().values(), ROOT / 'train.py', ROOT / 'validate.py']
    nodes = [(path.name, node) for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    functions = [(name, node) for name, node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [f'{name}: {node.name}' for name, node in functions if node.end_lineno - node.lineno >= 60]


@pytest.mark.parametrize('script', ['train', 'validate'])
def test_each_option_is_a_typed_field_of_one_group_with_a_help_text(script):
    own = [set(group.__annotations__) for group in GROUPS]
    assert sum(map(len, own)) == len(set().union(*own)) > 200
    rows, options = flags(script), Options(script=script)
    for name, row in rows.items():
        assert row.help, name
        assert row.type in (str, int, float, bool, dict), name
        for need in row.needs:  # no condition asks for an option that is not there
            assert need.holds(options) in (True, False), name
