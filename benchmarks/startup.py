"""Start-up: what the plug-in adds to `import torch` and `import timm`, and train.py to its first optimizer step.

    python -m benchmarks.startup [--timm-script PATH]

Each run is a fresh Python, and times are of the processor. To `import torch` the plug-in adds the load and the call of
its entry point, timed alone: the import takes a second that varies by more. To `import timm` it adds that and the hook
on timm's factory: the median difference of paired runs, one of them with the plug-in's own switch off. With timm's
training script (train.py of its repository), both scripts start a run of ResNet-18 on 16 images, without workers.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from importlib import metadata
from pathlib import Path
from statistics import median

from benchmarks.measure import markdown, parser
from benchmarks.train_loop import write_images

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
FIRST_STEP = """
import time
start = time.process_time()
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

def end(*args):
    print(time.process_time() - start, flush=True)
    os._exit(0)

register_optimizer_step_post_hook(end)
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name='__main__')
"""
FLAGS = '--model resnet18 --num-classes 10 --img-size 64 -b 16 -j 0 --epochs 1 --warmup-epochs 0'
TRAIN = Path(__file__).parents[1] / 'train.py'
HEADER = ('start', 'without, ms', 'added, ms', 'added, %')


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=9)
    flags.add_argument('--timm-script', type=Path, help="timm's train.py, to start beside this one")
    args = flags.parse_args(argv)
    if 'timm_mldecoder' not in metadata.entry_points(group='torch.backends').names:
        raise SystemExit('the entry point is not installed: pip install -e . first')
    torch_pairs, timm_pairs = ([], [])
    for _ in range(args.rounds):
        torch_pairs.append((_seconds(IMPORT.format(module='torch'), False), _seconds(ENTRY_POINT, True)))
        without, with_plugin = (_seconds(IMPORT.format(module='timm'), on) for on in (False, True))
        timm_pairs.append((without, with_plugin - without))
    rows = [_row('`import torch`', torch_pairs), _row('`import timm`', timm_pairs)]
    if args.timm_script:
        rows.append(_row("train.py to its first step, over timm's", _script_pairs(args)))
    return markdown(HEADER, rows)


def _script_pairs(args: Namespace) -> list[tuple[float, float]]:
    with tempfile.TemporaryDirectory() as folder:
        for split in ('train', 'validation'):
            write_images(Path(folder), 16, 10, 64, split)
        programs = [
            FIRST_STEP.format(argv=[str(script), folder, *FLAGS.split(), '--device', args.device, '--output', output])
            for script, output in ((args.timm_script, f'{folder}/timm'), (TRAIN, f'{folder}/ours'))
        ]
        pairs = []
        for _ in range(args.rounds):
            timm_script = _seconds(programs[0], False)
            pairs.append((timm_script, _seconds(programs[1], True) - timm_script))
            shutil.rmtree(f'{folder}/ours')  # a run does not start over another one
    return pairs


def _row(label: str, pairs: list[tuple[float, float]]) -> list:
    without, added = (1e3 * median(times) for times in zip(*pairs, strict=True))
    return [label, without, added, 100 * added / without]


def _seconds(program: str, plugin: bool) -> float:
    """What a program prints, in a new process with the plug-in or without."""
    environment = os.environ | {'TIMM_MLDECODER_AUTOLOAD': str(int(plugin))}
    process = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stderr[-2000:])
    return float(process.stdout)


if __name__ == '__main__':
    print(main())
