"""Kill two ranks that save divided checkpoints into the working folder, at random moments; print the last epoch saved.

`saving_shards.py KILLS`
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from timm_mldecoder.checkpoint.files import CheckpointFolder, checkpoints_in, lock, shards_of
from timm_mldecoder.checkpoint.read import read_checkpoint
from timm_mldecoder.distributed.read_sharded import PREFIX
from timm_mldecoder.distributed.world import World
from timm_mldecoder.distributed.write_sharded import ShardWriter


def rank(number: int, store: Path, first: int, saver: dict, last: int | None = None) -> None:
    """Save one checkpoint after another from epoch `first` on."""
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=number, world_size=2)
    world = World(torch.device('cpu'), number, 2)
    mesh = init_device_mesh('cpu', (2,))
    checkpoints = CheckpointFolder(Path(), max_history=3)
    checkpoints.load_state_dict(saver, Path())
    writer = ShardWriter(Path(), world)
    epoch = first
    while last is None or epoch <= last:
        writer.wait()
        is_best, dropped = checkpoints.rank(epoch, epoch % 7)
        content = dict(
            epoch=epoch,
            state_dict={'weight': distribute_tensor(torch.full((1001, 3), float(epoch)), mesh, [Shard(0)])},
            optimizer=dict(state={}),
            saver=checkpoints.state_dict(),
        )
        writer.save(content, _commit(checkpoints, epoch, is_best, dropped), (epoch, 0))
        epoch += 1
    writer.wait()


def _commit(checkpoints: CheckpointFolder, epoch: int, is_best: bool, dropped: list[str]):
    return lambda content: checkpoints.save_epoch(epoch, content, is_best, dropped)


def start(attempt: int, *arguments) -> list[int]:
    """Start both ranks, each in a process of its own."""
    children = []
    for number in range(2):
        child = os.fork()
        if not child:
            try:
                rank(number, Path(f'store-{attempt}').resolve(), *arguments)
            finally:
                os._exit(0)
        children.append(child)
    return children


def load(path: Path) -> int:
    content = read_checkpoint(path)
    assert (content['state_dict']['weight'] == content['epoch']).all()
    return content['epoch']


def main(kills: int) -> None:
    for child in start(0, 0, {}, 0):
        os.waitpid(child, 0)
    random.seed(0)
    reached = 0
    for attempt in range(1, kills + 1):
        children = start(attempt, reached + 1, read_checkpoint('last.pth.tar')['saver'])
        begun, awaited = time.monotonic(), reached + random.randint(1, 3)
        while not set(Path().glob(f'{PREFIX}{awaited}-*')) and time.monotonic() - begun < 60:
            time.sleep(0.001)
        time.sleep(random.uniform(0.0, 0.15))
        for child in random.sample(children, 2):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        lock(Path()).close()
        assert load(Path('last.pth.tar')) >= reached
        reached = load(Path('last.pth.tar'))
        # the best may be of the next epoch already, which a resumed run saves again
        assert all(0 <= load(path) <= reached + 1 for path in checkpoints_in(Path()))
        assert set(Path().glob(f'{PREFIX}*')) == {shards_of(path) for path in checkpoints_in(Path())}
    print(reached)


if __name__ == '__main__':
    main(int(sys.argv[1]))
