"""The most memory that a rank takes to begin and to save runs of train.py, in MiB: `memory_of_ranks.py FILE`.

FILE is JSON: a list of command lines; the first is not measured, but imports everything. Rank 0 prints a line of JSON
for each other: `first` and `begin`, what creating the model, loading and resuming take beside the memory of the process
before, on rank 0 and at most on the others; `save`, the most that a checkpoint takes beside the run on any rank, after
an epoch. A run that is resumed is not trained, and saves nothing.
"""

import ctypes
import gc
import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import parse_train
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import fit_epoch

LIBC = ctypes.CDLL('libc.so.6')
MMAP_THRESHOLD = -3  # of mallopt: larger blocks return to the system when they are freed, and do not hide later ones


def peak_of(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return how much the memory of this process grows at most in a call, and what the call returns.

    Pages of a mapped file are not counted: the system drops them when it needs memory.
    """
    gc.collect()
    LIBC.malloc_trim(0)
    before = peak = own_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = call()
    finally:
        done.set()
        thread.join()
    return peak - before, result


def own_memory() -> float:
    return int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024


def main(file: str) -> None:
    LIBC.mallopt(MMAP_THRESHOLD, 2**17)
    with join_world('cpu') as world:
        for number, command in enumerate(json.loads(Path(file).read_text())):
            begin, run = peak_of(lambda command=command: build_run(parse_train(command), world))
            save = 0.0
            if not run.options.resume:
                fit_epoch(run)
                run.layout.wait()
                save, _ = peak_of(lambda run=run: (run.save_recovery(), run.layout.wait()))
            run.close()
            del run
            found = world.all_gather((begin, save))
            if world.primary and number:
                begins, saves = zip(*found, strict=True)
                print(json.dumps(dict(first=begins[0], begin=max(begins[1:]), save=max(saves))), flush=True)


if __name__ == '__main__':
    main(sys.argv[1])
