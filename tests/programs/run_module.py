"""Runs a module as ``python -m`` does: its name, then its arguments."""

import runpy
import sys

sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name='__main__')
