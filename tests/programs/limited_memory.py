"""A script with so many megabytes more than its imports take: `limited_memory.py MEGABYTES {train,validate} FLAGS`."""

import resource
import sys
from importlib import import_module

from timm_mldecoder.runtime.errors import run_command

if __name__ == '__main__':
    megabytes, script, *flags = sys.argv[1:]
    main = import_module(script).main
    with open('/proc/self/statm') as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(megabytes) * 2**20,) * 2)
    sys.exit(run_command(lambda: main(flags)))
