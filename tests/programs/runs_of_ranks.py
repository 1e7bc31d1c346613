"""Several runs of train.py, one after the other in the same ranks: `runs_of_ranks.py FILE DTYPE`.

FILE is JSON: a list of command lines. Written to FILE.losses: the loss of each step of each run, the mean of all ranks.
Weights and images are of type DTYPE; with float64, which train.py does not offer, sums too.
"""

import json
import sys

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from timm_mldecoder.distributed import fsdp
from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import parse_train
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import fit


def main(file: str, dtype: str) -> None:
    with open(file) as lines:
        commands = json.load(lines)
    if dtype == 'float64':
        fsdp.precision = lambda *_: MixedPrecisionPolicy()
        Tensor.float = Tensor.double
    losses = []
    with join_world('cpu') as world:
        for command in commands:
            own = []
            options = parse_train(command)
            run = build_run(options.replace(model_dtype=dtype), world)
            run.state.task.register_forward_hook(lambda _, __, result, own=own: own.append(result['loss'].detach()))
            fit(run)
            losses.append((world.all_reduce_sum(torch.stack(own).double()) / world.size).tolist())
    if world.primary:
        with open(f'{file}.losses', 'w') as lines:
            json.dump(losses, lines)


if __name__ == '__main__':
    main(*sys.argv[1:])
