"""Start-up: what the plug-in's entry point adds to `import torch` and `import timm`.

    python -m benchmarks.startup

Each run is a fresh Python; `without` has torch look for no entry points at all. Install the package first.
"""

import os
import subprocess
import sys
from importlib import metadata
from statistics import median

from benchmarks.measure import markdown, parser

TIMED = """
import time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""
MODULES = ('torch', 'timm')
HEADER = ('import', 'without, ms', 'with, ms', 'added, ms', 'added, %')


def main(argv: list[str] | None = None) -> str:
    args = parser(__doc__, rounds=9).parse_args(argv)
    if 'timm_mldecoder' not in metadata.entry_points(group='torch.backends').names:
        raise SystemExit('the entry point is not installed: pip install -e . first')
    return markdown(HEADER, [_row(module, args.rounds) for module in MODULES])


def _row(module: str, rounds: int) -> list:
    _import_time(module, '1')  # the files come from the disk once
    pairs = [(_import_time(module, '0'), _import_time(module, '1')) for _ in range(rounds)]
    without, with_plugin = (1e3 * median(times) for times in zip(*pairs, strict=True))
    added = 1e3 * median(after - before for before, after in pairs)
    return [f'`import {module}`', without, with_plugin, added, 100 * added / without]


def _import_time(module: str, autoload: str) -> float:
    """Seconds, in a new process with torch's own switch for entry points."""
    environment = os.environ | {'TORCH_DEVICE_BACKEND_AUTOLOAD': autoload}
    program = [sys.executable, '-c', TIMED.format(module=module)]
    return float(subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout)


if __name__ == '__main__':
    print(main())
