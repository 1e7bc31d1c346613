"""What the pages name exists: files, flags, commands, imports, checkpoint entries, tests and recipes."""

import argparse
import ast
import csv
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from image_folders import write_images
from PIL import Image
from runs import ROOT, environment, summary
from test_flags import ADDED

from benchmarks.digits import write_digit_scenes
from timm_mldecoder.checkpoint.read import ENTRIES, RUN_ENTRIES
from timm_mldecoder.flags import train_parser, validate_parser
from timm_mldecoder.flags.parse import flags

PAGES = {str(path.relative_to(ROOT)): path for path in [*sorted(ROOT.glob('*.md')), *sorted(ROOT.glob('docs/*.md'))]}
TEXTS = {name: path.read_text(encoding='utf-8') for name, path in PAGES.items()}
# CHANGELOG.md names what is gone
CURRENT = {name: text for name, text in TEXTS.items() if name != 'CHANGELOG.md'}
# flags of torchrun, Slurm, pip, git and pytest
FOREIGN = {
    *('--nproc_per_node', '--nnodes', '--rdzv_backend', '--rdzv_endpoint', '--rdzv_id', '--max-restarts'),
    *('--nodes', '--ntasks-per-node', '--gpus-per-node', '--cpus-per-task', '--signal', '--help', '--local-rank'),
    *('--output_model', '--compress_to_fp16'),  # OpenVINO's ovc
}
# commands of timm-mldecoder whose module has another name
COMMAND_NAMES = {'embed': 'data.embed', 'label-graph': 'label_graph'}
FLAG = re.compile(r'(?<![\w-])--[a-z][\w-]*\w(?![\w-])')


def main_of(module: str) -> Callable[[list[str]], object]:
    """Return what a `python -m` command runs."""
    room = ROOT.joinpath(*module.split('.')) / '__main__.py'
    return importlib.import_module(f'{module}.__main__' if room.exists() else module).main


def parser_of(module: str) -> argparse.ArgumentParser:
    """Return the parser of a `python -m` command, taken when it is about to parse."""
    found = []

    class Found(BaseException):
        pass

    def take(parser, *_, **__):
        found.append(parser)
        raise Found

    main = main_of(module)
    original = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = take
    try:
        main([])
    except Found:
        pass
    finally:
        argparse.ArgumentParser.parse_known_args = original
    return found[0]


def is_command(path: Path) -> bool:
    return "__name__ == '__main__'" in path.read_text(encoding='utf-8')


def module_of(path: Path) -> str:
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__main__')


# the command that starts the others, and the scripts under another name
NOT_HERE = {'timm_mldecoder', 'timm_mldecoder.train', 'timm_mldecoder.validate'}
COMMANDS = [module_of(path) for path in sorted(ROOT.glob('timm_mldecoder/**/*.py')) if is_command(path)]
COMMANDS = [name for name in COMMANDS if name not in NOT_HERE]


@pytest.fixture(scope='module')
def options() -> dict[str, set[str]]:
    """The flags of each program: the two scripts, and the commands by module."""
    parsers = {'train.py': train_parser(), 'validate.py': validate_parser()}
    parsers |= {name: parser_of(name) for name in COMMANDS}
    found = {name: set(parser._option_string_actions) for name, parser in parsers.items()}
    for name in ('timm_mldecoder.probe', 'timm_mldecoder.check'):  # they read what is not their own as train.py does
        found[name] |= found['train.py']
    return found


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """Return the shell commands of a page, split into arguments: those of indented lines and of bash fences."""
    blocks = ['\n'.join(fences(text, 'bash')), '\n'.join(line[4:] for line in text.splitlines() if line[:4] == '    ')]
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    found = []
    for line in (line for line in lines if re.match(r'(python|torchrun|srun|timm-mldecoder)\b', line)):
        try:
            arguments = shlex.split(line.split('   #')[0])
            if arguments[0] == 'timm-mldecoder' and len(arguments) > 1:  # the same program under another name
                script = {'train': ['train.py'], 'validate': ['validate.py']}
                module = f'timm_mldecoder.{COMMAND_NAMES.get(arguments[1], arguments[1])}'
                arguments = ['python', *script.get(arguments[1], ['-m', module]), *arguments[2:]]
            found.append(arguments)
        except ValueError:
            raise AssertionError(f'cannot split {line}') from None
    return found


def program_of(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the program of ours that a command starts, '' if none, and its arguments."""
    for index, argument in enumerate(arguments):
        if argument in ('train.py', 'validate.py'):
            return argument, arguments[index + 1 :]
        if argument.startswith(('timm_mldecoder.', 'benchmarks.')) and arguments[index - 1] == '-m':
            return argument, arguments[index + 1 :]
    return '', []


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    return re.sub(r'[^\w\- ]', '', heading.lower().replace('`', '')).strip().replace(' ', '-')


@pytest.mark.parametrize('name', PAGES)
def test_links_lead_to_files_and_headings(name):
    for target in re.findall(r'\]\(([^)\s]+)\)', TEXTS[name]):
        if '://' in target or target.startswith('mailto:'):
            continue
        file, _, anchor = target.partition('#')
        path = (PAGES[name].parent / file).resolve() if file else PAGES[name]
        assert path.exists(), target
        if anchor:
            headings = re.findall(r'^#+ (.+)$', path.read_text(encoding='utf-8'), re.M)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize('name', CURRENT)
def test_every_flag_on_a_page_exists(name, options):
    known = set().union(FOREIGN, *options.values())
    for path in ROOT.glob('benchmarks/*.py'):
        known |= set(re.findall(r"add_argument\(\s*'(--[a-z-]+)'", path.read_text(encoding='utf-8')))
    assert set(FLAG.findall(CURRENT[name])) <= known


@pytest.mark.parametrize('name', CURRENT)
def test_every_command_on_a_page_has_the_flags_of_its_program(name, options):
    for arguments in commands(CURRENT[name]):
        program, rest = program_of(arguments)
        if program.startswith('benchmarks.'):
            assert (ROOT / f'{program.replace(".", "/")}.py').is_file(), program
        elif program:
            assert program in options, f'{program} is not a command'
            given = {argument.partition('=')[0] for argument in rest if FLAG.match(argument)}
            assert given <= options[program], ' '.join(arguments)


def test_every_flag_that_timm_lacks_is_on_a_page():
    text = '\n'.join(CURRENT.values())
    with (ROOT / 'tests/timm_flags.csv').open() as file:
        timm = {(row['script'], row['dest']) for row in csv.DictReader(file)}
    for script in ('train', 'validate'):
        for name, row in flags(script).items():
            if (script, name) not in timm and row.label not in ADDED[script].split():
                assert re.search(rf'{row.label}(?![\w-])', text), f'{row.label} is on no page'


FENCES = [(name, code) for name, text in CURRENT.items() for code in fences(text, 'python')]


@pytest.mark.parametrize(('name', 'code'), FENCES, ids=[name for name, _ in FENCES])
def test_python_code_compiles_and_its_imports_resolve(name, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.partition('.')[0] in ('timm', 'timm_mldecoder'):
            for alias in node.names:
                assert resolves(f'{node.module}.{alias.name}'), f'{node.module}.{alias.name}'


def resolves(dotted: str) -> bool:
    """Return whether a dotted name is a module, or an attribute of one."""
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return False
    return True


def entries_tables() -> str:
    """Return the tables of docs/checkpoints.md."""
    lines = ['| entry | value | meaning | read by |', '|---|---|---|---|']
    for name, entry in ENTRIES.items():
        meaning, _, readers = entry.meaning.rpartition('; ')
        lines.append(f'| `{name}` | {entry.expected} | {meaning} | {readers} |')
    lines += ['', '| entry of `timm_mldecoder` | value | meaning |', '|---|---|---|']
    lines += [f'| `{name}` | {entry.expected} | {entry.meaning} |' for name, entry in RUN_ENTRIES.items()]
    return '\n'.join(lines)


def test_the_entries_of_a_checkpoint_are_those_of_the_schema():
    assert entries_tables() in TEXTS['docs/checkpoints.md'], entries_tables()


@pytest.mark.parametrize('name', CURRENT)
def test_recipes_and_tests_that_a_page_names_exist(name):
    recipes = [str(path.relative_to(ROOT / 'hparams')) for path in ROOT.glob('hparams/*/*.yaml')]
    for recipe in re.findall(r'(?:hparams/|`)([\w*]+/[\w*]+\.yaml)', CURRENT[name]):
        assert any(fnmatch(known, recipe) for known in recipes), recipe
    for folder in re.findall(r'`hparams/(\w+)`', CURRENT[name]):
        assert (ROOT / 'hparams' / folder).is_dir(), folder
    files = {path.name: path.read_text(encoding='utf-8') for path in ROOT.glob('tests/*.py')}
    for test in set(re.findall(r'`(?:tests/)?(test_\w+(?:\.py)?)`', CURRENT[name])):
        assert test in files or any(f'def {test}(' in text for text in files.values()), test


# Documented commands, run as they are printed


def run(arguments: list[str], folder: Path) -> None:
    """Run a documented command in a folder."""
    scripts = {name: str(ROOT / name) for name in ('train.py', 'validate.py')}
    command = [sys.executable, *(scripts.get(argument, argument) for argument in arguments[1:])]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f'{" ".join(arguments)}\n{done.stderr[-3000:]}'


def run_page(text: str, folder: Path, more: dict[str, str], patch: pytest.MonkeyPatch) -> set[str]:
    """Run the commands of a page's text but for the app, which serves until it is ended; return the programs that ran.

    They run in this process: starting one costs more than the command, and other tests start each of them.
    """
    patch.chdir(folder)
    started = set()
    for arguments in commands(text):
        program, rest = program_of(arguments)
        if arguments[0] == 'python' and program and program not in ('timm_mldecoder.app', 'benchmarks.demo'):
            module = f'timm_mldecoder.{program[:-3]}' if program.endswith('.py') else program
            patch.setattr(sys, 'argv', [module, *rest, *shlex.split(more.get(program, ''))])
            main_of(module)(sys.argv[1:])
            started.add(program)
    return started


SHORT = '--no-pretrained --epochs 1 --img-size 64 --device cpu -j 0 -b 4'


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    """On small data, for one epoch of a small model without pretrained weights."""
    data = write_images(tmp_path / 'DATA', train=2, validation=2, classes=10)
    (tmp_path / 'IMAGES').symlink_to(data / 'validation')
    for split in ('train', 'validation'):  # the same images with several labels
        rows = ['path,labels', *(f'{split}/class_{i}/000.png,class_{i};class_{(i + 1) % 10}' for i in range(10)), '']
        (data / f'{split}.csv').write_text('\n'.join(rows))
    more = {'train.py': f'{SHORT} --model test_resnet --warmup-epochs 0', 'validate.py': '-j 0'}
    more |= {'timm_mldecoder.probe': f'{SHORT} --model test_resnet --num-classes 10'}
    started = run_page(TEXTS['README.md'], tmp_path, more, monkeypatch)
    assert started >= {'train.py', 'validate.py', 'timm_mldecoder.predict', 'timm_mldecoder.probe'}
    assert list(tmp_path.glob('pictures/*/*.png')) and (tmp_path / 'report/index.html').is_file()


def test_the_commands_of_the_tutorial_run(tmp_path, monkeypatch, capsys):
    """On its own data, 120 pictures of it, for one epoch of a small model without pretrained weights."""
    write_digit_scenes(tmp_path / 'photos', 90, 0, 30, size=96)
    more = {'train.py': f'{SHORT} --model test_resnet --warmup-epochs 0', 'validate.py': '-j 0'}
    more |= {'timm_mldecoder.probe': f'{SHORT} --model test_resnet'}
    text = TEXTS['docs/tutorial.md'].replace('python -m benchmarks.digits', '#')
    started = run_page(text, tmp_path, more, monkeypatch)
    assert started >= {
        'timm_mldecoder.check', 'timm_mldecoder.probe', 'train.py', 'validate.py', 'timm_mldecoder.predict',
        'timm_mldecoder.convert', 'timm_mldecoder.export',
    }  # fmt: skip
    for made in ('look/check.html', 'output/probe/heads/results.md', 'report/index.html', 'labels.csv', 'model.onnx'):
        assert (tmp_path / made).is_file(), made
    (code,) = fences(TEXTS['docs/tutorial.md'], 'python')
    short = "model='test_resnet', pretrained=False, epochs=1, device='cpu', workers=0, batch_size=4"
    code = code.replace("model='tf_efficientnet_lite0'", short)
    capsys.readouterr()
    exec(code, {})
    score, *labels = capsys.readouterr().out.splitlines()[-3:]
    assert float(score) > 0 and [line[0] for line in labels] == ['[', '[']


def test_the_code_of_the_page_for_python_runs(tmp_path, monkeypatch):
    """One after the other, with a smaller model, and what the page has from elsewhere: pictures and a loader."""
    monkeypatch.chdir(tmp_path)
    paths = sorted(write_images(tmp_path / 'data', train=12, validation=4).glob('train/*/*.png'))
    for name, path in zip(('one.jpg', 'two.jpg'), paths, strict=False):
        Image.open(path).save(name)
    batch = torch.randn(2, 3, 64, 64), torch.randint(2, (2, 80)).float()
    names = dict(image=Image.open(paths[0]), loader=[batch])
    for code in fences(TEXTS['docs/python.md'], 'python'):
        if 'transformers' in code:
            pytest.importorskip('transformers')
        short = "model='test_resnet', pretrained=False, epochs=1, warmup_epochs=0, img_size=64, device='cpu', workers=0"
        code = code.replace("model='resnet50'", short).replace("'resnet50'", "'test_resnet'")
        exec(code.replace('checkpoint=result.best', "checkpoint=result.best, device='cpu', workers=0"), names)
    assert 0 <= names['metrics']['top1'] <= 100 and (tmp_path / 'attention.png').is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('page', 'data', 'experiment', 'metric'),
    [
        ('docs/multilabel.md', 'digits', 'scenes', 'eval_map'),
        ('docs/multilabel.md', 'digits', 'cosine', 'eval_map'),
        ('docs/zero_shot.md', 'shapes', 'shapes', 'eval_zsl_map'),
    ],
)
def test_training_commands_of_a_page_reach_the_score_beside_them(page, data, experiment, metric, tmp_path):
    """The page prints the score as "Best NAME: SCORE"; another CPU may give a few points less."""
    printed = float(re.search(rf'Best `{experiment}`: ([\d.]+)', TEXTS[page])[1])
    for arguments in commands(TEXTS[page]):
        makes_data = arguments[1:3] == ['-m', f'benchmarks.{data}']
        if makes_data or experiment in arguments or f'output/train/{experiment}/model_best.pth.tar' in arguments:
            run(arguments, tmp_path)
    best = max(float(row[metric]) for row in summary(tmp_path / 'output/train' / experiment))
    print(f'{experiment}: {best:.1f}, printed {printed}')
    assert best > 0.8 * printed
    for path in tmp_path.glob('labels.csv'):  # of predict
        assert sum(bool(row['label']) for row in csv.DictReader(path.open())) > 100
