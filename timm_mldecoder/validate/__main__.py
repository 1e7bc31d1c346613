"""Evaluate a timm image classifier, with an ML-Decoder head or its own.

    python -m timm_mldecoder.validate DATA --checkpoint output/train/EXPERIMENT/model_best.pth.tar
    python -m timm_mldecoder.validate DATA --model resnet50.a2_in1k --pretrained

A checkpoint of train.py is evaluated as it was trained, except for the flags given here. The flags are those of timm's
own script, with the same defaults; `--help` lists them.
"""

import sys
from collections.abc import Sequence

from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import parse_validate
from timm_mldecoder.runtime.errors import run_command
from timm_mldecoder.validate.checkpoints import validate


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate with the options of a command line.

    Raises:
        ValueError: For a user's mistake.
    """
    options = parse_validate(argv)
    with join_world(options.device) as world:
        validate(options, world)


if __name__ == '__main__':
    sys.exit(run_command(main))
