"""train.py, with every trained image recorded: `record_images.py RECORDS FLAGS...` appends to `RECORDS.RANK`.

A line has the epoch, the batch and a hash of the image as the model gets it, which depends on the sample and on what is
drawn for it.
"""

import hashlib
import sys

import torch
from torch import Tensor, nn

from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import parse_train
from timm_mldecoder.runtime.errors import run_command
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import fit


def main() -> None:
    records, *flags = sys.argv[1:]
    options = parse_train(flags)
    with join_world(options.device) as world:
        run = build_run(options, world)

        def record(task: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
            with open(f'{records}.{world.rank}', 'a') as file:
                for image in inputs[0]:
                    digest = hashlib.sha256(image.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
                    file.write(f'{run.state.epoch} {run.state.batch - 1} {digest}\n')

        run.state.task.register_forward_pre_hook(record)
        fit(run)


if __name__ == '__main__':
    sys.exit(run_command(main))
