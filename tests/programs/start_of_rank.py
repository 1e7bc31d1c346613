"""Build a run; each rank saves what it starts from in FILE.RANK: `start_of_rank.py FLAGS... FILE`."""

import sys

import torch
from timm.task import DistillationTeacher
from torch.nn.parallel import DistributedDataParallel

from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import parse_train
from timm_mldecoder.train.build_run import build_run


def main() -> None:
    *flags, file = sys.argv[1:]
    options = parse_train(flags)
    with join_world(options.device) as world:
        run = build_run(options, world)
        task = run.state.task
        exchanged = task.get_trainable_module()
        assert isinstance(exchanged, DistributedDataParallel)
        assert not any(isinstance(module, DistillationTeacher) for module in exchanged.modules())
        start = dict(model=exchanged.module.state_dict(), ema=task.get_trainable_module(ema=True).module.state_dict())
        torch.save(start, f'{file}.{world.rank}')
        run.close()


if __name__ == '__main__':
    main()
