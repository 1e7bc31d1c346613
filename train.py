#!/usr/bin/env python3
"""Train a timm image classifier, with an ML-Decoder head or its own.

    python train.py DATA --model resnet50 --use-ml-decoder-head 1
    torchrun --nproc_per_node=8 train.py DATA --config hparams/imagenet/resnet50_mldecoder_a2.yaml

The flags are those of timm's own script, with the same defaults; `--help` lists them.
"""

import sys
from collections.abc import Sequence

from timm_mldecoder.engine.flags import parse_train
from timm_mldecoder.engine.runtime import cli
from timm_mldecoder.engine.runtime.distributed import join_world
from timm_mldecoder.engine.train.loop import fit
from timm_mldecoder.engine.train.setup import set_up


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says.

    Raises:
        ValueError: For a user's mistake.
    """
    options = parse_train(argv)
    with join_world(options) as world:
        fit(set_up(options, world))


if __name__ == '__main__':
    sys.exit(cli.run(main))
