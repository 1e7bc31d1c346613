"""Every flag of every command with values that are wrong, odd or huge; every checkpoint entry with wrong contents.

A command takes a value or ends with exit code 1 or 2, one line that names the flag or the value, and no file written.
"""

import argparse
import csv
import importlib
import logging
import shutil
import signal
import sys
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import huggingface_hub
import pytest
import torch
from image_folders import write_images
from runs import last, train
from test_docs import parser_of
from test_reliability_checkpoints import WRONG

from benchmarks import digits, shapes
from timm_mldecoder import app
from timm_mldecoder.checkpoint.read import ENTRIES, RUN, RUN_ENTRIES
from timm_mldecoder.flags import parse_train, parse_validate
from timm_mldecoder.flags.parse import flags
from timm_mldecoder.runtime.errors import run_command

FOLDER, ZERO, FULL = '{place}/folder', '{place}/zero', '{place}/full'  # a folder, and links to devices
VALUES = [
    *('', ' ', 'text', '1e30', str(10**30), '-1', '-1e30', '0', '1', '0.5', 'nan', 'inf', '-inf', 'a=b', '[1'),
    *('missing/file', FOLDER, ZERO, FULL, 'x' * 10_000, 'ü\n\u2028ñ', '\udcff', '../../..', '1,,2', '{}', '%s'),
]
EVERY = 29  # the tests that are not slow try every 29th case; a prime, so that all values and flags have their turn
SECONDS = 60  # a case that takes longer hangs


@contextmanager
def time_limit(case):
    def stop(*_):
        raise AssertionError(f'no end after {SECONDS} s: {case}')

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Place:
    """A folder to fuzz in: `work` is the working folder, empty before each case; nothing beside it may change."""

    def __init__(self, root: Path) -> None:
        self.root, self.work = root, root / 'some/where/deep/work'  # the folder three above has no images
        (root / 'folder').mkdir(parents=True)
        for suffix in ('', '.csv', '.npz', '.png', '.safetensors', '.jsonl'):
            for device in ('zero', 'full'):
                (root / f'{device}{suffix}').symlink_to(f'/dev/{device}')  # a rename replaces a link, not the device
        self.clear()

    def clear(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def files(self) -> set[Path]:
        return {path for path in self.root.rglob('*') if path.name != '__pycache__'}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    """Images, a tiny trained model with an ML-Decoder head, and the other inputs of the commands."""
    root = tmp_path_factory.mktemp('inputs')
    data = write_images(root / 'data', train=2, validation=1)
    head = ['--use-ml-decoder-head', '1', '--num-of-groups', '2', '--decoder-embedding', '8']
    trained = train(data, root / 'trained', '--epochs', '1', *head)
    torch.save(last(trained)['state_dict'], root / 'plain.pth')
    photos = shutil.copytree(data / 'validation' / 'class_0', root / 'photos')
    (root / 'names.txt').write_text('one\ntwo\n')
    (root / 'vectors.txt').write_text('one 1 2\ntwo 3 4\n')
    listed = root / 'csv'
    shutil.copytree(photos, listed / 'train')
    (listed / 'classes.txt').write_text('a\nb\n')
    with (listed / 'train.csv').open('w', newline='') as file:
        csv.writer(file).writerows([('path', 'labels'), ('train/000.png', 'a;b')])
    return dict(root=root, data=data, run=trained, checkpoint=trained / 'last.pth.tar', photos=photos, csv=listed)


#: The arguments that one replaces by a value: positional ones by their name, then flags.
BASES = {
    'predict': 'images={photos} --checkpoint={checkpoint} --out=out.csv --device=cpu --workers=0',
    'convert': 'file={root}/plain.pth folder=out --model=test_resnet --input-size=32',
    'export': 'source={checkpoint} out=out --format=safetensors',
    'probe': 'data={data} --model=test_resnet --img-size=32 --heads=linear --lrs=1e-3 --seeds=1 --epochs=1 '
    '--batch-size=2 --workers=0 --device=cpu --output=probe --num-classes=3',
    'app': 'models={checkpoint} --device=cpu',
    'plot': 'runs={run} --output=curves.png',
    'label_graph': 'data={csv} --dataset=csv --out=graph.safetensors',
    'data.embed': 'names={root}/names.txt out=out.safetensors --text-vectors={root}/vectors.txt',
    'benchmarks.digits': 'folder=out',
    'benchmarks.shapes': 'folder=out',
}


class Page:
    """The page of the app, which no one serves."""

    def launch(self, **_):
        return None, 'http://localhost', None

    def block_thread(self):
        pass


@pytest.fixture
def short(monkeypatch):
    """What a command does with values that it takes is cut short."""
    compose, load = digits.scenes, digits.load_split
    monkeypatch.setattr(digits, 'scenes', lambda split, count, *rest: islice(compose(split, count, *rest), 1))
    monkeypatch.setattr(digits, 'load_split', lambda split: tuple(part[:10] for part in load(split)))
    draw = shapes.draw_scenes
    monkeypatch.setattr(shapes, 'draw_scenes', lambda classes, count, rng: draw(classes, 1, rng))
    monkeypatch.setattr(app, 'build', lambda *_: Page())


def module_of(command: str) -> str:
    """Return the module that holds the `main` of a command."""
    if command.startswith('benchmarks.'):
        return command
    room = Path(__file__).parent.parent / 'timm_mldecoder' / command / '__main__.py'
    return f'timm_mldecoder.{command}' + '.__main__' * room.exists()


def variants(action: argparse.Action, usual: str) -> list[list[str]]:
    """Return the arguments for each value of a flag."""
    name = next((name for name in action.option_strings if name[:2] == '--'), '')
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return [[f'{name}=x'], [f'{name}=']]
    suffix = Path(usual).suffix
    values = [*VALUES, *(value + suffix for value in VALUES if suffix and value[:1] not in ('', '0', '1'))]
    if isinstance(action.nargs, int):
        return [[name, *[value] * action.nargs] for value in values] + [[name]]
    return [[f'{name}={value}'] if name else [value] for value in values]


def cases(command: str, inputs: dict, place: Path):
    """Yield the flag and the arguments of every case of a command."""
    parser = parser_of(module_of(command))
    base = dict(pair.split('=', 1) for pair in BASES[command].format(**inputs).split())
    exclusive = [{action.dest for action in group._group_actions} for group in parser._mutually_exclusive_groups]
    for action in parser._actions:
        if action.dest == 'help':
            continue
        others = set().union({action.dest}, *(group for group in exclusive if action.dest in group))
        kept = {key: value for key, value in base.items() if key.lstrip('-').replace('-', '_') not in others}
        usual = base.get(max(action.option_strings, key=len, default=action.dest), SUFFIXES.get(action.dest, ''))
        positional = [other.dest for other in parser._actions if not other.option_strings] or ['data']
        for changed in variants(action, usual):
            changed = [text.replace('{place}', str(place)) for text in changed]
            named = [text for key, text in kept.items() if key in positional]
            if not action.option_strings:
                named.insert(positional.index(action.dest), changed[0])
            flagged = [f'{key}={value}' for key, value in kept.items() if key not in positional]
            extra = ['--scenes'] if command == 'benchmarks.digits' and action.dest not in ('folder', 'scenes') else []
            yield [*flagged, *extra, *(changed if action.option_strings else []), '--', *named], changed, action


SUFFIXES = dict(scores='x.npz', features='x.npz', word_embeddings='x.safetensors')


def assert_survives(main, argv: list[str], named: list[str], place: Place, capsys) -> str:
    """Run a command, and return what is wrong with how it ends, empty if nothing."""
    place.clear()
    before = place.files()
    case = f'{" ".join(argv)!r:.300}'
    capsys.readouterr()
    sys.stderr.reconfigure(errors='backslashreplace')  # as Python sets it up, and capsys does not
    sys.stdout.reconfigure(errors='backslashreplace')
    try:
        with time_limit(case):
            code = main(argv) if main.__module__.startswith('benchmarks') else run_command(lambda: main(argv))
    except SystemExit as end:  # argparse ends the process itself
        code = end.code
    except Exception as error:
        return f'{type(error).__name__}: {error!s:.200}: {case}'
    finally:
        for handler in logging.root.handlers[:]:
            if type(handler) is logging.StreamHandler:
                logging.root.removeHandler(handler)
    if not code:
        return ''
    lines = capsys.readouterr().err.splitlines()
    if code not in (1, 2) or 'Traceback' in ''.join(lines) or not lines or ': error: ' not in lines[-1]:
        return f'exit code {code}, {lines[-3:]!r:.500}: {case}'
    if named and not any(name in lines[-1] for name in named):
        return f'does not name {named!r:.100}: {lines[-1]:.300}: {case}'
    written = place.files() ^ before
    return f'wrote {sorted(written)}: {lines[-1]:.200}: {case}' if written else ''


def report(problems: list[str], count: int) -> str:
    return '\n'.join([f'{len(problems)} of {count}:', *problems])


def spellings(value: str) -> list[str]:
    """Return how a message may show a value; an empty one shows as anything."""
    escaped = value.encode(errors='backslashreplace').decode()
    return [text[:100] for text in (str(Path(value)), ' '.join(escaped.split()), repr(value)[1:])]


def fuzz(command, inputs, tmp_path, capsys, every):
    place = Place(tmp_path / 'place')
    main = importlib.import_module(module_of(command)).main
    problems, count = [], 0
    for number, (argv, changed, action) in enumerate(cases(command, inputs, place.root)):
        if number % every:
            continue
        count += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place.work)
            value = changed[0].partition('=')[2] if action.option_strings else changed[0]
            named = [*action.option_strings, action.dest, *spellings(value)]
            problem = assert_survives(main, argv, named, place, capsys)
        problems += [problem] if problem else []
    with capsys.disabled():
        print(f' {command}: {count} cases', end='')
    assert not problems, report(problems, count)


@pytest.mark.parametrize('command', ['predict', 'convert', 'export', 'plot', 'label_graph', 'data.embed'])
def test_some_values_of_the_flags_of_a_command_end_in_one_line(command, inputs, short, tmp_path, capsys):
    fuzz(command, inputs, tmp_path, capsys, every=EVERY)


@pytest.mark.slow
@pytest.mark.parametrize('command', BASES)
def test_every_value_of_every_flag_of_a_command_ends_in_one_line(command, inputs, short, tmp_path, capsys):
    fuzz(command, inputs, tmp_path, capsys, every=1)


#: What the values of the flags of a script are added to.
SCRIPTS = {
    'train': '{data} --model test_resnet --img-size 32 --num-classes 3 --device cpu -b 2 -j 0 --epochs 2 '
    '--stop-epoch 1',
    'validate': '{data} --checkpoint {checkpoint} --device cpu -j 0 -b 2',
}
PARTS = 6  # of the flags of a script, so that none takes minutes
ORDINARY = ('0', '1', '0.5')  # values that other tests run with: here they are parsed only


def script_cases(script, inputs, place):
    """Yield the flag, its value and the arguments of every case of a script."""
    base = SCRIPTS[script].format(**inputs).split()
    for row in flags(script).values():
        for value in VALUES:
            value = value.replace('{place}', str(place.root))
            argv = [f'{row.label}={value}'] if row.nargs in (None, '?') else [row.label, value, value]
            if row.names[0][0] != '-':
                yield row, value, [*base[1:], '--', value]
            else:
                yield row, value, [*(base[1:] if row.dest == 'data_dir' else base), *argv]


def fuzz_script(script, inputs, tmp_path, capsys, every=1, part=slice(None)):
    """Run a script with every value; a failed run may leave its folder, as a real one does."""
    place = Place(tmp_path / 'place')
    main, parse = importlib.import_module(script).main, dict(train=parse_train, validate=parse_validate)[script]
    problems, found = [], list(script_cases(script, inputs, place))[part]
    for row, value, argv in found[::every]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place.work)
            run = parse if value in ORDINARY else main
            problem = assert_survives(run, argv, [*row.names, *spellings(value)], place, capsys)
        problems += [problem] if problem else []
    with capsys.disabled():
        print(f' {script}.py: {len(found[::every])} cases', end='')
    assert not problems, report(problems, len(found))


@pytest.mark.parametrize('script', SCRIPTS)
def test_some_values_of_the_flags_of_a_script_are_taken_or_named(script, inputs, tmp_path, capsys):
    fuzz_script(script, inputs, tmp_path, capsys, every=11 * EVERY)


@pytest.mark.slow
@pytest.mark.parametrize('part', range(PARTS))
@pytest.mark.parametrize('script', SCRIPTS)
def test_every_value_of_every_flag_of_a_script_is_taken_or_named(script, part, inputs, tmp_path, capsys):
    fuzz_script(script, inputs, tmp_path, capsys, part=slice(part, None, PARTS))


#: How a command is given the checkpoint `{checkpoint}`: its module, and its arguments.
HEAD = '--use-ml-decoder-head 1 --num-of-groups 2 --decoder-embedding 8'
READERS = {
    **{name: (module_of(name), BASES[name]) for name in ('predict', 'export', 'app')},
    'convert': ('timm_mldecoder.convert', 'file={checkpoint} folder=out'),
    'probe': ('timm_mldecoder.probe.__main__', BASES['probe'] + ' --initial-checkpoint={checkpoint}'),
    'validate.py': ('validate', SCRIPTS['validate']),
    'train.py --resume': ('train', f'{SCRIPTS["train"]} {HEAD} --resume={{checkpoint}}'),
    'train.py --initial-checkpoint': ('train', f'{SCRIPTS["train"]} {HEAD} --initial-checkpoint={{checkpoint}}'),
    'train.py --pretrained-path': ('train', f'{SCRIPTS["train"]} {HEAD} --pretrained --pretrained-path={{checkpoint}}'),
}


def fuzz_checkpoint(reader, inputs, tmp_path, capsys, every):
    """Read a checkpoint with a wrong value in each entry of the schema; some values are valid for some entries."""
    place = Place(tmp_path / 'place')
    path, content = place.root / 'wrong.pth.tar', last(inputs['run'])
    module, arguments = READERS[reader]
    main = importlib.import_module(module).main
    named = [text if text[:1] == '-' else text.partition('=')[2] or text for text in arguments.split()]
    argv = [text.format(**{**inputs, 'checkpoint': path}) for text in named]
    wrong = [(name, value) for name in (*ENTRIES, *RUN_ENTRIES) for value in WRONG][::every]
    problems = []
    for name, value in wrong:
        changed = {RUN: {**content[RUN], name: value}} if name in RUN_ENTRIES else {name: value}
        torch.save({**content, **changed}, path)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place.work)
            problem = assert_survives(main, argv, [str(path)], place, capsys)
        problems += [f'{name}={value!r:.60}: {problem}'] if problem else []
    with capsys.disabled():
        print(f' {reader}: {len(wrong)} cases', end='')
    assert not problems, report(problems, len(wrong))


@pytest.mark.parametrize('reader', ['predict', 'convert'])
def test_some_wrong_entries_of_a_checkpoint_end_in_one_line(reader, inputs, short, tmp_path, capsys):
    fuzz_checkpoint(reader, inputs, tmp_path, capsys, every=EVERY)


@pytest.mark.slow
@pytest.mark.parametrize('reader', READERS)
def test_every_wrong_entry_of_a_checkpoint_ends_in_one_line(reader, inputs, short, tmp_path, capsys):
    fuzz_checkpoint(reader, inputs, tmp_path, capsys, every=1)
