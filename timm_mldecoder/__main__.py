"""`python -m timm_mldecoder COMMAND ...`: see cli.py."""

import sys

from timm_mldecoder.cli import console

if __name__ == '__main__':
    sys.exit(console())
