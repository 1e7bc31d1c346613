"""The probe where no file can be larger than some bytes, as on a full disk: `limited_probe.py BYTES FLAGS`."""

import resource
import sys

from timm_mldecoder.probe.__main__ import main
from timm_mldecoder.runtime.errors import run_command

if __name__ == '__main__':
    size, *flags = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size),) * 2)
    sys.exit(run_command(lambda: main(flags)))
