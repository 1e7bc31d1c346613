"""train.py, which prints how often the ranks exchanged gradients."""

import sys

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import parse_train
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import fit


def main() -> None:
    exchanges = 0

    def count(state, bucket):
        nonlocal exchanges
        exchanges += bucket.is_last()
        return allreduce_hook(state, bucket)

    options = parse_train(sys.argv[1:])
    with join_world(options.device) as world:
        run = build_run(options, world)
        (model,) = (module for module in run.state.task.modules() if isinstance(module, DistributedDataParallel))
        model.register_comm_hook(None, count)
        fit(run)
        if world.primary:
            print('exchanges', exchanges)


if __name__ == '__main__':
    main()
