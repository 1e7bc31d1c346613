"""Train a timm image classifier, with an ML-Decoder head or its own.

    python -m timm_mldecoder.train DATA --model resnet50 --use-ml-decoder-head 1
    torchrun --nproc_per_node=8 -m timm_mldecoder.train DATA --config hparams/imagenet/resnet50_mldecoder_a2.yaml

The flags are those of timm's own script, with the same defaults; `--help` lists them.
"""

import sys
from collections.abc import Sequence

from timm_mldecoder.checkpoint.files import print_result
from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import parse_train
from timm_mldecoder.runtime.errors import run_command
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import fit
from timm_mldecoder.train.lr_find import find_lr


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the options of a command line.

    Raises:
        ValueError: For a user's mistake.
    """
    options = parse_train(argv)
    with join_world(options.device, options.device_modules or ()) as world:
        run = build_run(options, world)
        if options.lr_find:
            find_lr(run)
            return
        fit(run)
        if world.primary:
            print_result(run.state.rows, run.eval_metric, run.state.checkpoints.decreasing)


if __name__ == '__main__':
    sys.exit(run_command(main))
