"""Shared fixtures."""

import getpass
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # train.py and validate.py


@pytest.fixture(autouse=True, scope='session')
def _one_thread():
    torch.set_num_threads(1)  # small models gain nothing from more, and lose a lot where cores are shared


@pytest.fixture(autouse=True, scope='session')
def _temporary_folder(tmp_path_factory):
    """What torchrun, trackers and other programs leave in the temporary folder goes with the session."""
    tmp_path_factory.getbasetemp()  # that of pytest stays outside: it keeps what failed tests wrote
    compiled = os.path.join(tempfile.gettempdir(), f'torchinductor_{getpass.getuser()}')  # torch's default, which lasts
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        patch.setenv('TMPDIR', folder)
        patch.setenv('TORCHINDUCTOR_CACHE_DIR', os.environ.get('TORCHINDUCTOR_CACHE_DIR', compiled))
        patch.setattr(tempfile, 'tempdir', folder)
        yield


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """A script sets up logging for its process; called within a test, that must not outlast the test's stderr."""
    level = logging.root.level
    yield
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler:  # pytest's own are of derived classes
            logging.root.removeHandler(handler)
    logging.root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """The images of `runs.write_data`, written anew for each file."""
    from runs import write_data

    return write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def device(request) -> str:
    """Each device: a test that takes it runs on both."""
    return request.param


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker('cuda'):
            item.add_marker(pytest.mark.skip(reason='no CUDA device'))


@pytest.fixture
def program(tmp_path):
    """Run a file of tests/programs in a new interpreter, in an empty folder; keywords are environment variables."""

    def run(name: str, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        return _run([str(ROOT / 'tests' / 'programs' / name), *arguments], tmp_path, check, environment)

    return run


@pytest.fixture
def python(tmp_path):
    """Run code in a new interpreter, in an empty folder: ``python(code, **environment)`` returns the process."""

    def run(code: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        return _run(['-c', code], tmp_path, check, environment)

    return run


def _run(arguments: list[str], folder: Path, check: bool, environment: dict[str, str]) -> subprocess.CompletedProcess:
    # as with -c, modules of the folder come first
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get('PYTHONPATH')]))
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or process.returncode == 0, process.stderr
    return process
