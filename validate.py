#!/usr/bin/env python3
"""Evaluate a timm image classifier, with an ML-Decoder head or its own.

    python validate.py DATA --checkpoint output/train/EXPERIMENT/model_best.pth.tar
    python validate.py DATA --model resnet50.a2_in1k --pretrained

A checkpoint of train.py is evaluated as it was trained, except for the flags given here. The flags are those of timm's
own script, with the same defaults; `--help` lists them.
"""

import sys

from timm_mldecoder.runtime.errors import run_command
from timm_mldecoder.validate.__main__ import main

if __name__ == '__main__':
    sys.exit(run_command(main))
