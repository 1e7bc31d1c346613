"""train.py; each rank saves its model before and after, and its batches, in FILE.RANK: `sam_rank.py FLAGS... FILE`."""

import sys

import torch

from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import parse_train
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import fit


def main() -> None:
    *flags, file = sys.argv[1:]
    options = parse_train(flags)
    with join_world(options.device) as world:
        run = build_run(options, world)
        model, batches = run.eval_model, []
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        run.state.task.register_forward_pre_hook(lambda _, inputs: batches.append([x.clone() for x in inputs]))
        fit(run)
        torch.save(dict(before=before, after=model.state_dict(), batches=batches), f'{file}.{world.rank}')


if __name__ == '__main__':
    main()
