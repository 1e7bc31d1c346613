#!/usr/bin/env python3
"""Train a timm image classifier, with an ML-Decoder head or its own.

    python train.py DATA --model resnet50 --use-ml-decoder-head 1
    torchrun --nproc_per_node=8 train.py DATA --config hparams/imagenet/resnet50_mldecoder_a2.yaml

The flags are those of timm's own script, with the same defaults; `--help` lists them.
"""

import sys

from timm_mldecoder.runtime.errors import run_command
from timm_mldecoder.train.__main__ import main

if __name__ == '__main__':
    sys.exit(run_command(main))
