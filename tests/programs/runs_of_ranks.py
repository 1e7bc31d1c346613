"""Several runs of train.py, one after the other in the same ranks: `runs_of_ranks.py FILE`.

FILE is JSON: a list of command lines. Written to FILE.losses: the loss of each step of each run, the mean of all ranks.
"""

import json
import sys

import torch

from timm_mldecoder.engine.flags import parse_train
from timm_mldecoder.engine.runtime.distributed import join_world
from timm_mldecoder.engine.train.build_run import build_run
from timm_mldecoder.engine.train.loop import fit


def main(file: str) -> None:
    with open(file) as lines:
        commands = json.load(lines)
    losses = []
    with join_world('cpu') as world:
        for command in commands:
            own = []
            run = build_run(parse_train(command), world)
            run.state.task.register_forward_hook(lambda _, __, result, own=own: own.append(result['loss'].detach()))
            fit(run)
            losses.append((world.all_reduce_sum(torch.stack(own).double()) / world.size).tolist())
    if world.primary:
        with open(f'{file}.losses', 'w') as lines:
            json.dump(losses, lines)


if __name__ == '__main__':
    main(sys.argv[1])
