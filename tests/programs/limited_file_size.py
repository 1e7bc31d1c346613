"""train.py where no file can be larger than some bytes, as on a full disk: `limited_file_size.py BYTES FLAGS`."""

import resource
import sys

from timm_mldecoder.runtime.errors import run_command
from train import main

if __name__ == '__main__':
    size, *flags = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size),) * 2)
    sys.exit(run_command(lambda: main(flags)))
