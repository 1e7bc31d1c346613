"""What pip installs: a wheel and an sdist, in an environment without the source tree."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from image_folders import write_images

ROOT = Path(__file__).parents[1]
TRAIN = '--model test_resnet --img-size 32 --num-classes 2 --device cpu -j 0 -b 4 --epochs 1 --use-ml-decoder-head 1'


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """The folder of a wheel and an sdist."""
    folder = tmp_path_factory.mktemp('built')
    source = folder / 'source'
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('needs a git clone, to build from its files alone')
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = 'from setuptools import build_meta as b; b.build_wheel(".."); b.build_sdist("..")'
    subprocess.run([sys.executable, '-c', build], cwd=source, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_the_wheel_trains_an_epoch_by_its_installed_commands(built, tmp_path):
    venv.create(tmp_path / 'venv', with_pip=False)
    python = tmp_path / 'venv' / 'bin' / 'python'
    site = next((tmp_path / 'venv' / 'lib').glob('python*/site-packages'))
    (wheel,) = built.glob('*.whl')
    install = [sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', wheel]
    subprocess.run(install, check=True, capture_output=True)
    (site / 'dependencies.pth').write_text(sysconfig.get_paths()['purelib'])  # torch and timm; not this source tree
    write_images(tmp_path / 'data', train=4, validation=4, classes=2)

    def run(*command):
        alone = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
        result = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    place = run(python, '-c', 'import timm_mldecoder; print(timm_mldecoder.__file__)')
    assert place.startswith(str(site))
    scripts = tmp_path / 'venv' / 'bin'
    options = f'data --config imagenet/resnet50_mldecoder_a3 {TRAIN} --output output --experiment one'
    run(python, scripts / 'timm-mldecoder', 'train', *options.split())
    assert (tmp_path / 'output' / 'one' / 'model_best.pth.tar').is_file()
    run(python, scripts / 'timm-mldecoder', 'validate', 'data', '--checkpoint', 'output/one/model_best.pth.tar')


def test_wheel_and_sdist_hold_what_a_user_needs(built):
    (wheel,), (sdist,) = built.glob('*.whl'), built.glob('*.tar.gz')
    names = zipfile.ZipFile(wheel).namelist()
    packaged = {name for name in names if name.startswith('timm_mldecoder/') and not name.endswith('.yaml')}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / 'timm_mldecoder').rglob('*.py')}
    assert packaged == sources | {'timm_mldecoder/py.typed'}
    recipes = {str(path.relative_to(ROOT)) for path in (ROOT / 'hparams').rglob('*.yaml')}
    assert recipes == {name.removeprefix('timm_mldecoder/') for name in names if name.endswith('.yaml')}
    with tarfile.open(sdist) as archive:
        members = {name.partition('/')[2] for name in archive.getnames()}
    assert recipes | {'tests/conftest.py', 'train.py', 'validate.py', 'Makefile', 'docs/head.md'} <= members
