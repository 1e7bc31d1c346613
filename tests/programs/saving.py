"""Save small checkpoints into the working folder, while something fails: `saving.py {kill,fail}`."""

import errno
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from timm_mldecoder.checkpoint.files import CheckpointFolder
from timm_mldecoder.checkpoint.read import read_checkpoint


def save(checkpoints: CheckpointFolder, epoch: int, size: int = 1000) -> None:
    is_best, dropped = checkpoints.rank(epoch, epoch % 7)
    content = dict(epoch=epoch, weights=torch.full((size,), float(epoch)), saver=checkpoints.state_dict())
    checkpoints.save_epoch(epoch, content, is_best, dropped)


def load(name: str) -> int:
    content = read_checkpoint(name)
    assert (content['weights'] == content['epoch']).all()
    return content['epoch']


def kill() -> None:
    """Kill a process that saves at random moments; print the last epoch that it saved."""
    checkpoints = CheckpointFolder(Path(), max_history=3)
    save(checkpoints, 0)
    random.seed(0)
    reached = 0
    for _ in range(25):
        child = os.fork()
        if not child:
            for epoch in range(reached + 1, 10**9):
                save(checkpoints, epoch)
        time.sleep(random.uniform(0.005, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saver = read_checkpoint('last.pth.tar')['saver']
        assert load('last.pth.tar') >= reached
        reached = load('last.pth.tar')
        checkpoints.load_state_dict(saver, Path())
        assert checkpoints.ranked and all(load(name) >= 0 for name, _ in checkpoints.ranked)
        # the best may be of the next epoch already, which a resumed run saves again
        assert load('model_best.pth.tar') <= reached + 1
    print(reached)


def fail(name: str) -> None:
    """From now on, let a function of `os` fail in this process."""

    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    setattr(os, name, full)


def attempt(checkpoints: CheckpointFolder, fault: Callable[[], None]) -> str:
    """Save in a process of its own in which something fails; return the error, empty for none."""
    report = Path('report')
    report.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        fault()
        try:
            save(checkpoints, 6, size=100_000)
        except OSError as error:
            report.write_text(str(error))
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == int(report.exists())
    return report.read_text() if code else ''


def fail_steps() -> None:
    """Let each step of saving fail in turn: the old files stay, and nothing else."""
    checkpoints = CheckpointFolder(Path(), max_history=3)
    save(checkpoints, 5)
    names = ['checkpoint-5.pth.tar', 'last.pth.tar', 'model_best.pth.tar']
    faults = {
        'No space left': (lambda: fail('fsync'), lambda: fail('replace')),
        '': (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),),
    }
    for reason, steps in faults.items():
        for fault in steps:
            error = attempt(checkpoints, fault)
            assert error.startswith('could not write pending.pth.tar: ' + reason), error
            assert [load(name) for name in names] == [5, 5, 5]
            assert sorted(os.listdir()) == [*names, 'report']
    # a file system without hard links
    assert attempt(checkpoints, lambda: fail('link')) == ''
    assert load('last.pth.tar') == load('model_best.pth.tar') == load('checkpoint-6.pth.tar') == 6


if __name__ == '__main__':
    {'kill': kill, 'fail': fail_steps}[sys.argv[1]]()
