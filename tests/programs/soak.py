"""Kill training runs at random moments, resume them, and compare them with undisturbed ones.

`soak.py FOLDER GROUP SEED [NAME ...]` runs the configurations of a group of `soak_runs.py`, or those named, and prints
a line of JSON for each.

This process imports everything once and forks a child per run: starting Python with torch takes longer than the run.
It trains nothing itself, so that no thread is alive when it forks.
"""

import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # what the first optimizer step imports
from image_folders import write_images
from runs import assert_same_run
from soak_runs import GROUPS, flags
from test_train_data import write_shards

import train
from benchmarks import shapes
from timm_mldecoder import label_graph
from timm_mldecoder.checkpoint.files import newest, shards_of
from timm_mldecoder.checkpoint.read import RUN, read_checkpoint
from timm_mldecoder.distributed.read_sharded import PREFIX
from timm_mldecoder.runtime.errors import run_command

KILLS = 4  # of each run, unless it ends before
PATIENCE = 300


def write_data(root: Path) -> None:
    write_images(root / 'single', train=8, validation=5)
    shutil.copytree(root / 'single', root / 'damaged')
    for path in ('train/class_1/003.png', 'validation/class_0/002.png'):
        (root / 'damaged' / path).write_bytes(b'no image')
    shapes.write_shapes(root / 'several', 48, 24)
    label_graph.main([str(root / 'several'), '--dataset', 'csv', '--out', str(root / 'graph.safetensors')])
    write_shards(root / 'shards', lambda index: {'cls': str(index % 3).encode()})


def fork(call: Callable[[], int], log: Path) -> int:
    """Call a function in a child, the leader of a process group; its output goes to a file."""
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)  # here too: it may be killed before it has done so
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = call()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(('localhost', 0))
        return found.getsockname()[1]


def start(arguments: list[str], ranks: int, log: Path) -> list[int]:
    """Start the ranks of a run, and return their processes."""
    port = free_port()

    def rank_main(rank: int) -> int:
        if ranks > 1:
            names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR='localhost', MASTER_PORT=port)
            os.environ.update({name: str(value) for name, value in names.items()})
        return run_command(lambda: train.main(arguments))

    return [fork(lambda rank=rank: rank_main(rank), log) for rank in range(ranks)]


def wait(processes: list[int], enough: Callable[[], bool]) -> list[int]:
    """Wait for processes until all have ended or it is enough, and return the exit codes of those that ended."""
    codes, left = [], list(processes)
    while left and not enough():
        time.sleep(0.005)
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                codes.append(os.waitstatus_to_exitcode(status))
    return codes


def after(seconds: float) -> Callable[[], bool]:
    """Return whether a time has passed since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def after_saving(folder: Path, seconds: float) -> Callable[[], bool]:
    """Return whether a time has passed since a checkpoint was written that is not there now."""

    def files() -> set[tuple[str, int]]:
        return {(entry.name, entry.inode()) for entry in os.scandir(folder)} if folder.exists() else set()

    before, passed = files(), None

    def enough() -> bool:
        nonlocal passed
        if passed is None and any(name.endswith('.pth.tar') for name, _ in files() - before):
            passed = after(seconds)
        return passed is not None and passed()

    return enough


def kill(processes: list[int]) -> None:
    for pid in processes:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for pid in processes:
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            continue


def without_token(name: str) -> str:
    """Return the name of a file or folder; of a folder of tensors, what is the same in each run."""
    return name.rpartition('-')[0] if name.startswith(PREFIX) else name


def progress(content: dict) -> tuple[int, int]:
    return content[RUN]['epoch'], content[RUN]['batch']


def soak(group: str, name: str, folder: Path, chance: random.Random) -> dict:
    """Kill one run, and return what became of it."""
    ranks = 2 if name.startswith('2 ranks') else 1
    arguments = flags(group, name, str(folder / 'data'))
    undisturbed, killed = folder / 'undisturbed', folder / 'killed'
    for path in (undisturbed, killed):
        shutil.rmtree(path, ignore_errors=True)
    log = folder / 'log'
    log.write_text('')
    result = dict(name=name, kills=0, resumed=0, writing=0, lost=0, unreadable=0, equal=False, left='', error='')

    def run(output: Path, *more: str) -> list[int]:
        return start([*arguments, '--output', str(output), '--experiment', 'run', *more], ranks, log)

    begin = time.monotonic()
    processes = run(undisturbed)
    if wait(processes, after(PATIENCE)) != [0] * ranks:
        kill(processes)
        return {**result, 'error': f'undisturbed: {log.read_text()[-2000:]}'}
    seconds = time.monotonic() - begin

    reached = (0, 0)
    while True:
        last_try = result['kills'] == KILLS
        processes = run(killed, '--resume', 'auto', '--recovery-interval', '1')
        delay = chance.uniform(0, 0.4) * seconds
        moment = after(delay) if chance.random() < 0.25 else after_saving(killed / 'run', delay)
        if last_try:
            moment = after(PATIENCE)
        codes = wait(processes, moment)
        if len(codes) == ranks or last_try:
            if codes != [0] * ranks:
                kill(processes)
                return {**result, 'error': f'resumed: {codes} {log.read_text()[-2000:]}'}
            break
        kill(processes)
        result['kills'] += 1
        paths = list((killed / 'run').glob('*.pth.tar'))
        for path in paths:
            try:
                read_checkpoint(path)
            except ValueError:
                result['unreadable'] += 1
        result['writing'] += bool(set((killed / 'run').glob(f'{PREFIX}*')) - set(map(shards_of, paths)))
        _, content = newest(killed / 'run') if paths else (None, {})
        found = progress(content) if content else (0, 0)
        result['lost'] += found < reached
        result['resumed'] += bool(content)
        reached = found
    try:
        assert_same_run(killed / 'run', undisturbed / 'run')
        result['equal'] = True
    except AssertionError as error:
        result['error'] = f'differs: {error!s:.1000}'
    ours, theirs = (
        Counter(without_token(path.name) for path in (output / 'run').iterdir()) for output in (killed, undisturbed)
    )
    result['left'] = ' '.join(sorted((ours - theirs) + (theirs - ours)))
    return result


def import_what_a_run_imports(folder: Path) -> None:
    """Import the modules that a run loads late, so that each child need not."""

    def list_modules() -> int:
        known = set(sys.modules)
        single = flags('optimizers', '--opt adamw', str(folder / 'data'))
        code = run_command(lambda: train.main([*single, '--output', str(folder), '--experiment', 'first']))
        (folder / 'modules').write_text('\n'.join(sorted(set(sys.modules) - known)))
        return code

    wait([fork(list_modules, folder / 'log')], after(PATIENCE))
    for name in (folder / 'modules').read_text().split():
        try:
            importlib.import_module(name)
        except ImportError:  # a name that is no module
            continue


def main() -> None:
    folder, group, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    write_data(folder / 'data')
    import_what_a_run_imports(folder)
    for name in sys.argv[4:] or GROUPS[group]:
        print(json.dumps(soak(group, name, folder, random.Random(f'{seed} {name}'))), flush=True)


if __name__ == '__main__':
    main()
