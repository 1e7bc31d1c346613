"""Small training runs, in this process or in others, and what is left of them."""

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from image_folders import write_images

from timm_mldecoder.checkpoint.read import read_checkpoint
from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import parse_train
from timm_mldecoder.runtime.signals import SIGNALS, Stopped
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import fit
from timm_mldecoder.train.run import Run

PATIENCE = 240  # seconds: each of several processes takes a few to start, many where cores are shared
DEADLINE = 30  # seconds: what a scheduler gives a process between SIGTERM and SIGKILL
ROOT = Path(__file__).resolve().parents[1]
BATCHES = 6  # an epoch of MODEL on `write_data`
MODEL = shlex.split('--model test_resnet --img-size 32 --num-classes 3 --device cpu -b 4 -j 0 --log-interval 1')
#: A run in which everything changes that a resumed run needs: moments, EMA weights, schedule, all kinds of draws.
MOVING = shlex.split("""
    --epochs 3 --opt adamw --lr 1e-2 --warmup-epochs 0 --model-ema --model-ema-decay 0.8
    --mixup 0.2 --cutmix 1 --reprob 0.3 --aa rand-m5 --drop 0.1
""")


def write_data(folder: Path) -> Path:
    """24 training and 15 validation images of three classes."""
    return write_images(folder, train=8, validation=5)


def build(data: Path, output: Path, *flags: str) -> Run:
    """Build a run in this process, which is the only rank."""
    options = parse_train([str(data), *MODEL, '--output', str(output), '--experiment', 'run', *flags])
    with join_world(options.device) as world:
        run = build_run(options, world)
    run.folder_lock.close()  # another run of the test may use the folder before this one is collected
    return run


def train(data: Path, output: Path, *flags: str) -> Path:
    """Train in this process, and return the folder of the run."""
    fit(build(data, output, *flags))
    return output / 'run'


def fit_until_stopped(run: Run) -> int:
    """Train until a signal stops the run, and return its exit code."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        fit(run)
    except Stopped as stopped:
        return stopped.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise AssertionError('the run was not stopped')


def environment(threads: int = 1) -> dict[str, str]:
    """Return the environment of a process that finds the package where these tests do."""
    return {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'}


def command(script: str, *flags: str | Path, processes: int = 1, restarts: int = 0) -> list[str]:
    """Return the command of a script in one process or, by torchrun, in several."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += [
            *shlex.split('-m torch.distributed.run --standalone'),
            f'--nproc-per-node={processes}',
            f'--max-restarts={restarts}',
            '--monitor-interval=0.1',
        ]
    return [*launcher, str(ROOT / script), *map(str, flags)]  # an absolute path stays what it is


def start(script: str, *flags: str | Path, log: Path, **launch: int) -> subprocess.Popen:
    """Start a script whose output goes to `log`."""
    with log.open('w') as file:
        return subprocess.Popen(
            command(script, *flags, **launch),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(),
            cwd=log.parent,
            start_new_session=True,
        )


def wait_for(pattern, log, process):
    """Wait until a pattern is in the log of a process."""
    end = time.monotonic() + PATIENCE
    while not re.search(pattern, log.read_text()):
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def pid_of_rank(launcher, rank):
    """The process id of a rank that torchrun has started."""
    children = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()
    return next(int(pid) for pid in children if f'\0RANK={rank}\0' in Path(f'/proc/{pid}/environ').read_text())


def processes_of(session):
    """Return the live processes of a session, by id."""
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            state, _, _, own = folder.joinpath('stat').read_text().rpartition(')')[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if int(own) == session and state != 'Z':
            found.append(int(folder.name))
    return found


def wait_until_gone(session):
    end = time.monotonic() + DEADLINE
    while processes_of(session):
        assert time.monotonic() < end, 'processes are left'
        time.sleep(0.2)


def call(
    script: str, *flags: str | Path, folder: Path | None = None, timeout: int = 400, **launch: int
) -> subprocess.CompletedProcess:
    """Run a script to its end, in `folder` or the working folder."""
    arguments = command(script, *flags, **launch)
    return subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=timeout, cwd=folder)


def last(folder: Path) -> dict[str, Any]:
    return read_checkpoint(folder / 'last.pth.tar')


def summary(folder: Path) -> list[dict[str, str]]:
    with (folder / 'summary.csv').open() as file:
        return list(csv.DictReader(file))


def assert_same(ours: Any, theirs: Any, where: str = '') -> None:
    """Compare to the last bit, whatever the type."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f'{where}.{key}')
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f'{where}[{index}]')
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_same_run(folder: Path, other: Path) -> None:
    """Compare `summary.csv` and, but for the flags, the last and the best checkpoints of two runs."""
    rows = [(path / 'summary.csv').read_text() for path in (folder, other)]
    assert rows[0] == rows[1], f'summary.csv: {rows[0]!r}, {rows[1]!r}'
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        contents = [read_checkpoint(path / name) for path in (folder, other)]
        for content in contents:
            del content['args']
        assert_same(*contents, where=name)
