"""The probe where no file can be larger than some bytes, as on a full disk: `limited_probe.py BYTES FLAGS`."""

import resource
import sys

from timm_mldecoder.engine.runtime.errors import run_command
from timm_mldecoder.probe import main

if __name__ == '__main__':
    size, *flags = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size),) * 2)
    sys.exit(run_command(lambda: main(flags)))
