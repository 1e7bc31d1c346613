"""Shared fixtures."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # train.py and validate.py


@pytest.fixture(autouse=True, scope='session')
def _one_thread():
    torch.set_num_threads(1)  # small models gain nothing from more, and lose a lot where cores are shared


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


@pytest.fixture
def python(tmp_path):
    """Run a program in a new interpreter, in an empty folder: ``python(code, **environment)`` gives the process."""

    def run(code: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        process = subprocess.run(
            [sys.executable, '-c', code],
            cwd=tmp_path,
            env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or process.returncode == 0, process.stderr
        return process

    return run
