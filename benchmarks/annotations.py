"""Seconds and memory to read CSV annotations: the first time, and from the cache of compact arrays.

    python -m benchmarks.annotations [--images 1000000] [--labels 3] [--classes 500] [--only pyarrow cache]

Each reader has a process of its own. Seconds are of the processor. Peak memory is what the process holds more than
before, at its peak, with `import pyarrow`; private memory is what it shares with no other process afterwards
(Private_Clean and Private_Dirty of Linux). The first figures are of reading alone. Those of `all labels` are of what
follows in train.py once: which files are listed twice, the summary, and the weights of `--sampler balanced`, which are
8 bytes per image. `worker` is the private memory once two processes have read 200,000 targets in any order.
"""

import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.measure import MIB, markdown, parser
from timm_mldecoder.data import MultiLabelDataset, summarize
from timm_mldecoder.data.annotation_cache import FOLDER
from timm_mldecoder.data.formats import csv_list
from timm_mldecoder.data.formats.csv_list import read_csv
from timm_mldecoder.data.same_files import merge_same_files
from timm_mldecoder.loading.create_loaders import balanced_weights

HEADER = ('read', 'images', 'labels', 'seconds', 'peak MiB', 'private MiB', 'all labels, s', 'peak MiB', 'private MiB',
          'worker, private MiB')  # fmt: skip
TARGETS = 200_000


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=1)
    flags.add_argument('--images', type=int, default=1_000_000)
    flags.add_argument('--labels', type=int, default=3, help='per image')
    flags.add_argument('--classes', type=int, default=500)
    flags.add_argument('--only', choices=list(READERS), nargs='+', default=list(READERS), help='(default: all)')
    flags.add_argument('--folder', help='where to write the file; default: a temporary folder')
    args = flags.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        _write(Path(folder, 'train.csv'), args.images, args.labels, args.classes)
        rows = []
        for label in args.only:
            prepare, cached = READERS[label]
            if not cached:
                shutil.rmtree(Path(folder, FOLDER), ignore_errors=True)
            with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
                found = pool.submit(_measure, prepare, folder).result()
            rows.append([label, args.images, args.labels, *found, _worker(folder)])
    return markdown(HEADER, rows)


def _write(path: Path, images: int, labels: int, classes: int) -> None:
    draw = random.Random(0)
    names = [f'tag_{index:05d}' for index in range(classes)]
    with path.open('w') as file:
        file.write('path,labels\n')
        for index in range(images):
            file.write(f'images/{index % 1000:04d}/photo_{index:08d}.jpg,{";".join(draw.choices(names, k=labels))}\n')


def _measure(prepare: Callable[[], None], folder: str) -> list[float]:
    prepare()
    before, private, found = _peak(), _private(), []
    start = time.process_time()
    annotations = read_csv(Path(folder), 'train')
    found += [time.process_time() - start, _peak() - before, _private() - private]
    start = time.process_time()
    dataset = MultiLabelDataset(merge_same_files(annotations, folder), folder)
    assert summarize(dataset).images == len(annotations)
    weights = balanced_weights(dataset)
    assert len(weights) == len(annotations)
    return [*found, time.process_time() - start, _peak() - before, _private() - private]


def _worker(folder: str) -> float:
    """Private memory of one of two processes that have read targets."""
    context = get_context('spawn')
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_read_targets, args=(folder, seed, barrier, queue)) for seed in range(2)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return max(found)


def _read_targets(folder: str, seed: int, barrier: Any, queue: 'multiprocessing.Queue[float]') -> None:
    private = _private()
    annotations = read_csv(Path(folder), 'train')
    for index in random.Random(seed).choices(range(len(annotations)), k=TARGETS):
        assert annotations.path(index) and len(annotations.labels(index)[0])
    barrier.wait()
    queue.put(_private() - private)
    barrier.wait()  # the pages that both have mapped are shared for as long as both live


def _nothing() -> None:
    pass


def _without_pyarrow() -> None:
    sys.modules['pyarrow'] = None


def _rows_alone() -> None:
    csv_list._read_plain = lambda *args: None


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def _private() -> float:
    lines = Path('/proc/self/smaps_rollup').read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith('Private')) * 1024 / MIB


# Reader -> what prepares its process, and whether it reads the cache of the one before it.
READERS = {
    'rows': (_rows_alone, False),
    'csv': (_without_pyarrow, False),
    'pyarrow': (_nothing, False),
    'cache': (_nothing, True),
}


if __name__ == '__main__':
    print(main())
