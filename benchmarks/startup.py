"""Start-up: what the plug-in adds to `import torch` and `import timm`.

    python -m benchmarks.startup

Each run is a fresh Python, and times are of the processor. To `import torch` the plug-in adds the load and the call of
its entry point, timed alone: the import takes a second that varies by more. To `import timm` it adds that and the hook
on timm's factory: the median difference of paired runs, one of them with the plug-in's own switch off.
"""

import os
import subprocess
import sys
from importlib import metadata
from statistics import median

from benchmarks.measure import markdown, parser

IMPORT = """
import time
start = time.process_time()
import {module}
print(time.process_time() - start)
"""
ENTRY_POINT = """
import os
os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'
import torch, importlib.metadata, time
point, = importlib.metadata.entry_points(group='torch.backends', name='timm_mldecoder')
start = time.process_time()
point.load()()
print(time.process_time() - start)
"""
HEADER = ('import', 'without, ms', 'added, ms', 'added, %')


def main(argv: list[str] | None = None) -> str:
    args = parser(__doc__, rounds=9).parse_args(argv)
    if 'timm_mldecoder' not in metadata.entry_points(group='torch.backends').names:
        raise SystemExit('the entry point is not installed: pip install -e . first')
    torch_pairs, timm_pairs = ([], [])
    for _ in range(args.rounds):
        torch_pairs.append((_seconds(IMPORT.format(module='torch'), False), _seconds(ENTRY_POINT, True)))
        without, with_plugin = (_seconds(IMPORT.format(module='timm'), on) for on in (False, True))
        timm_pairs.append((without, with_plugin - without))
    return markdown(HEADER, [_row('torch', torch_pairs), _row('timm', timm_pairs)])


def _row(module: str, pairs: list[tuple[float, float]]) -> list:
    without, added = (1e3 * median(times) for times in zip(*pairs, strict=True))
    return [f'`import {module}`', without, added, 100 * added / without]


def _seconds(program: str, plugin: bool) -> float:
    """What a program prints, in a new process with the plug-in or without."""
    environment = os.environ | {'TIMM_MLDECODER_AUTOLOAD': str(int(plugin))}
    return float(
        subprocess.run(
            [sys.executable, '-c', program], env=environment, capture_output=True, text=True, check=True
        ).stdout
    )


if __name__ == '__main__':
    print(main())
