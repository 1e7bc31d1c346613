"""Recipes: each is found on the page of the papers' tables, parses, holds the published settings, and trains."""

import csv
import fnmatch
import logging
import re
import shlex
import subprocess
from dataclasses import dataclass

import pytest
import recipe_data
import timm
import torch
import yaml
from image_folders import write_images
from runs import ROOT, command, environment
from torch.optim.optimizer import register_optimizer_step_post_hook

import train
from timm_mldecoder.flags import parse_train

HPARAMS = ROOT / 'hparams'
RECIPES = {str(path.relative_to(HPARAMS)): path for path in sorted(HPARAMS.glob('**/*.yaml'))}
# "unchanged except for the launcher"
AUTHORS_A2 = shlex.split(
    '--amp -b=256 --epochs=300 --drop-path=0.05 --opt=lamb --weight-decay=0.02 --sched=cosine --lr=4e-3 '
    '--warmup-epochs=5 --model=resnet50 --aa=rand-m7-mstd0.5-inc1 --reprob=0.0 --remode=pixel --mixup=0.1 --cutmix=1.0 '
    '--aug-repeats 3 --bce-target-thresh 0.2 --smoothing=0 --bce-loss --train-interpolation=bicubic '
    '--use-ml-decoder-head=1'
)
# what makes a recipe small: not what it trains, but how much of it
SMALL = shlex.split(
    '--device cpu -j 0 --epochs 5 --warmup-epochs 2 --stop-epoch 2 --cooldown-epochs 0 '
    '--model test_resnet --model-kwargs "" --img-size 64 --decoder-embedding 32 --experiment run'
)


@dataclass(frozen=True)
class Row:
    """A row of a table of docs/recipes.md."""

    name: str
    published: str
    recipe: str
    flags: str

    def __str__(self) -> str:
        return f'{self.recipe.removesuffix(".yaml")} {self.flags}'


def read_page() -> tuple[list[Row], list[tuple[list[str], dict]]]:
    """The rows that name a recipe, and the published settings of sets of recipes."""
    rows, settings = [], []
    for line in (ROOT / 'docs' / 'recipes.md').read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')] if line.startswith('|') else []
        if len(cells) == 4 and cells[2].endswith('.yaml`'):
            rows.append(Row(cells[0], cells[1], cells[2].strip('`'), cells[3].strip('`')))
        if len(cells) == 3 and cells[1].startswith('`{'):
            names = fnmatch.filter(RECIPES, cells[0].strip('`'))
            settings.append((names, yaml.safe_load(cells[1].strip('`'))))
    return rows, settings


ROWS, SETTINGS = read_page()
RUNS = {str(row): row for row in ROWS}  # rows of several tables that are one run
# one of each kind: heads, losses, optimizers, datasets
FAST = {
    'coco/tresnet_l_448_mldecoder_aam ',
    'nus_wide/tresnet_m_224_full ',
    'voc/efficientnetv2_s_448_graph_aam ',
    'imagenet/resnet50_mldecoder_a2_authors ',
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return recipe_data.write_all(tmp_path_factory.mktemp('data'))


def parse(data, recipe, flags=''):
    """The options of a recipe, with the files that its header makes."""
    own = [*recipe_data.flags(data, recipe)]
    kept = [flag for flag in own[1:] if flag not in ('-b', '--num-classes') and not flag.isdigit()]
    flags = shlex.split(flags.replace('WORDS', str(data / 'words.safetensors')))
    return parse_train([own[0], '--config', str(RECIPES[recipe]), '--device', 'cpu', *kept, *flags])


def test_every_recipe_is_on_the_page_and_every_recipe_of_the_page_exists():
    assert {row.recipe for row in ROWS} == set(RECIPES)
    assert set(RUNS) >= FAST


@pytest.mark.parametrize('row', RUNS.values(), ids=str)
def test_a_row_of_the_page_parses_and_its_figure_is_in_the_recipe(row, data):
    assert parse(data, row.recipe, row.flags)
    header = RECIPES[row.recipe].read_text().split('\n\n')[0]
    for same in ROWS:
        if str(same) == str(row):
            assert all(figure in header for figure in re.findall(r'\d+\.\d+', same.published))


@pytest.mark.parametrize(('names', 'settings'), SETTINGS, ids=[' '.join(names) for names, _ in SETTINGS])
def test_recipes_hold_the_published_settings_of_the_page(names, settings, data):
    assert names
    for name in names:
        options = parse(data, name)
        assert {option: getattr(options, option) for option in settings} == settings, name


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_says_how_it_is_run_and_has_no_flag_without_effect(name, data, caplog, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    header = RECIPES[name].read_text().split('\n\n')[0]
    assert all(line.startswith('#') for line in header.splitlines())
    assert all(f'# {word:<11}' in header for word in ('Command', 'Hardware', 'Time', 'Published', 'Source', 'Here'))
    assert f'--config hparams/{name}' in header
    assert '# Here       not run' in header or name.startswith('finetune/')
    with caplog.at_level(logging.WARNING):
        options = parse(data, name)
    assert not [record for record in caplog.records if 'No effect' in record.message]
    if options.sched == 'onecycle':  # as torch's: the first learning rate, and the last
        first, last = (100, 1e3) if name.endswith('aam.yaml') else (25, 1e4)
        assert options.warmup_epochs == 0.2 * options.epochs
        assert options.lr / options.warmup_lr == pytest.approx(first)
        assert options.warmup_lr / options.min_lr == pytest.approx(last)


MODELS = {}  # by what is built: a recipe and flags that build it
for _row in RUNS.values():
    _values = yaml.safe_load(RECIPES[_row.recipe].read_text())
    _chosen = [flag for flag in re.findall(r'--\S+ [^-]\S*', _row.flags) if flag.startswith('--model')]
    MODELS.setdefault((_values['model'], str(_values.get('model_kwargs')), *_chosen), _row)


@pytest.mark.slow
@pytest.mark.parametrize('row', MODELS.values(), ids=[' '.join(key) for key in MODELS])
def test_the_model_of_a_recipe_exists_in_timm(row, data):
    options = parse(data, row.recipe, row.flags)
    with torch.device('meta'):
        model = timm.create_model(options.model, num_classes=7, ml_decoder=True, **options.model_kwargs)
    assert model.num_classes == 7


@pytest.fixture
def without_torchvisions_checksums(monkeypatch):
    """torchvision knows CIFAR's files by their checksums; these small ones have others."""
    from torchvision.datasets import CIFAR100

    monkeypatch.setattr(CIFAR100, '_check_integrity', lambda self: True)
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda *args: True)
    monkeypatch.setattr(CIFAR100, 'train_list', [['train', '']])
    monkeypatch.setattr(CIFAR100, 'test_list', [['test', '']])


@pytest.mark.parametrize(
    'row', [pytest.param(row, id=key, marks=[] if key in FAST else pytest.mark.slow) for key, row in RUNS.items()]
)
def test_a_row_makes_two_optimizer_steps_on_small_data(row, data, tmp_path, without_torchvisions_checksums):
    config = tmp_path / 'recipe.yaml'
    text = RECIPES[row.recipe].read_text().replace('pretrained: true', 'pretrained: false')
    # a few images may have an mAP of 100 after the first epoch, which ends a run
    config.write_text('\n'.join(line for line in text.splitlines() if not line.startswith('early_stop')))
    flags = shlex.split(row.flags.replace('WORDS', str(data / 'words.safetensors')))
    steps = []
    hook = register_optimizer_step_post_hook(lambda *args: steps.append(args))
    try:
        own = recipe_data.flags(data, row.recipe)
        train.main([own[0], '--config', str(config), *flags, *own[1:], *SMALL, '--output', str(tmp_path)])
    finally:
        hook.remove()
    assert len(steps) == 2
    with (tmp_path / 'run' / 'summary.csv').open(newline='') as file:
        losses = [float(line['train_loss']) for line in csv.DictReader(file)]
    assert len(losses) == 2 and all(0 < loss < float('inf') for loss in losses)


def test_the_authors_recipe_is_their_command(data):
    name = 'imagenet/resnet50_mldecoder_a2_authors.yaml'
    ours, theirs = parse(data, name), parse(data, name, shlex.join(AUTHORS_A2))
    given = {flag.lstrip('-').partition('=')[0].replace('-', '_') for flag in AUTHORS_A2 if flag.startswith('-')}
    options = {'batch_size' if option == 'b' else option for option in given}
    assert {option: getattr(ours, option) for option in options} == {o: getattr(theirs, o) for o in options}


def run_on_two(tmp_path, *flags):
    process = subprocess.run(
        command('train.py', *flags, '--output', tmp_path, '--experiment', 'run', processes=2),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))


@pytest.mark.slow
def test_the_authors_command_runs_on_two_ranks_and_the_loss_falls(tmp_path):
    """Unchanged but for the data, the device, the epochs, and the batch size, which the small data does not fill."""
    data = write_images(tmp_path / 'images', train=24, validation=3)
    small = '--device cpu --epochs 2 --warmup-epochs 0 -b 6 --img-size 32 -j 1 --num-classes 3'
    rows = run_on_two(tmp_path, data, *AUTHORS_A2, *small.split())
    assert len(rows) == 2
    assert float(rows[1]['train_loss']) < float(rows[0]['train_loss'])


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', [*(name for name in RECIPES if name.startswith('imagenet')), 'voc/efficientnetv2_s_448_graph_aam.yaml']
)
def test_a_recipe_runs_an_epoch_on_two_ranks(name, data, tmp_path):
    own = recipe_data.flags(data, name)
    # three images in two shares of two
    rows = run_on_two(tmp_path, own[0], '--config', RECIPES[name], *own[1:], *SMALL, '-b', '2')
    assert all(float(row['train_loss']) > 0 for row in rows)
