"""Run train.py or validate.py on data of this rank: SCRIPT PREFIX FLAG..., with the rank after the prefix."""

import os
import sys

from timm_mldecoder.runtime.errors import run_command
from timm_mldecoder.train.__main__ import main as train
from timm_mldecoder.validate.__main__ import main as validate

script, prefix, *flags = sys.argv[1:]
main = {'train.py': train, 'validate.py': validate}[script]
sys.exit(run_command(lambda: main([prefix + os.environ['RANK'], *flags])))
