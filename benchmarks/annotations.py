"""Seconds and memory to read annotations: the first time, and from the cache of compact arrays.

    python -m benchmarks.annotations [--images 1000000] [--labels 3] [--classes 500] [--only pyarrow cache]
    python -m benchmarks.annotations --images 300000 --labels 22 --classes 5000 --only json cache coco cache

`rows`, `csv` and `pyarrow` read CSV; `cache` is that of the reader before it.

Each reader has a process of its own. Seconds are of the processor. Peak memory is what the process holds more than
before, at its peak, with `import pyarrow`; private memory is what it shares with no other process afterwards
(Private_Clean and Private_Dirty of Linux). The first figures are of reading alone. Those of `all labels` are of what
follows in train.py once: which files are listed twice, the summary, and the weights of `--sampler balanced`, which are
8 bytes per image. `worker` is the private memory once two processes have read 200,000 targets in any order.
"""

import json
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.measure import MIB, markdown, parser
from timm_mldecoder.data import Annotations, MultiLabelDataset, summarize
from timm_mldecoder.data.annotation_cache import FOLDER
from timm_mldecoder.data.formats import csv_list
from timm_mldecoder.data.formats.coco import read_coco
from timm_mldecoder.data.formats.csv_list import read_csv
from timm_mldecoder.data.formats.json_list import read_json
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
    flags.add_argument('--only', choices=list(READERS), nargs='+', default=['csv', 'pyarrow', 'cache'])
    flags.add_argument('--folder', help='where to write the file; default: a temporary folder')
    args = flags.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows, read = [], read_csv
        for label in args.only:
            prepare = _nothing
            if label != 'cache':
                prepare, write, read = READERS[label]
                with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
                    pool.submit(write, Path(folder), args.images, args.labels, args.classes).result()
                shutil.rmtree(Path(folder, FOLDER), ignore_errors=True)
            with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
                found = pool.submit(_measure, prepare, read, folder).result()
            rows.append([label, args.images, args.labels, *found, _worker(read, folder)])
    return markdown(HEADER, rows)


def _drawn(images: int, labels: int, classes: int) -> Iterator[tuple[str, list[str]]]:
    """Path and labels of each image."""
    draw = random.Random(0)
    names = [f'tag_{index:05d}' for index in range(classes)]
    for index in range(images):
        yield f'images/{index % 1000:04d}/photo_{index:08d}.jpg', draw.choices(names, k=labels)


def _write_csv(folder: Path, *size: int) -> None:
    with (folder / 'train.csv').open('w') as file:
        file.write('path,labels\n')
        file.writelines(f'{path},{";".join(labels)}\n' for path, labels in _drawn(*size))


def _write_json(folder: Path, *size: int) -> None:
    names = sorted({name for _, labels in _drawn(*size) for name in labels})
    with (folder / 'train.json').open('w') as file:
        file.write(f'{{"classes": {json.dumps(names)}, "images": [')
        file.writelines(', ' * (n > 0) + json.dumps(image) for n, image in enumerate(_drawn(*size)))
        file.write(']}')


def _write_coco(folder: Path, *size: int) -> None:
    """The annotations in any order, as COCO's own are."""
    names = {
        name: number for number, name in enumerate(sorted({name for _, labels in _drawn(*size) for name in labels}))
    }
    entries = [(image, names[name]) for image, (_, labels) in enumerate(_drawn(*size)) for name in labels]
    random.Random(0).shuffle(entries)
    box = dict(bbox=[1.5, 2.25, 30.0, 40.5], area=1215.0, iscrowd=0)
    lists = dict(
        images=(
            dict(id=number, file_name=path, width=640, height=480) for number, (path, _) in enumerate(_drawn(*size))
        ),
        annotations=(dict(id=n, image_id=image, category_id=name, **box) for n, (image, name) in enumerate(entries)),
        categories=(dict(id=number, name=name) for name, number in names.items()),
    )
    (folder / 'annotations').mkdir(exist_ok=True)
    with (folder / 'annotations' / 'instances_train2014.json').open('w') as file:
        file.write('{"info": {}')
        for key, items in lists.items():
            file.write(f', "{key}": [')
            file.writelines(', ' * (n > 0) + json.dumps(item) for n, item in enumerate(items))
            file.write(']')
        file.write('}')


def _measure(prepare: Callable[[], None], read: Callable[..., Annotations], folder: str) -> list[float]:
    prepare()
    before, private, found = _peak(), _private(), []
    start = time.process_time()
    annotations = read(Path(folder), 'train')
    found += [time.process_time() - start, _peak() - before, _private() - private]
    start = time.process_time()
    dataset = MultiLabelDataset(merge_same_files(annotations, folder), folder)
    assert summarize(dataset).images == len(annotations)
    weights = balanced_weights(dataset)
    assert len(weights) == len(annotations)
    return [*found, time.process_time() - start, _peak() - before, _private() - private]


def _worker(read: Callable[..., Annotations], folder: str) -> float:
    """Private memory of one of two processes that have read targets."""
    context = get_context('spawn')
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_read_targets, args=(read, folder, seed, barrier, queue)) for seed in range(2)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return max(found)


def _read_targets(
    read: Callable[..., Annotations], folder: str, seed: int, barrier: Any, queue: 'multiprocessing.Queue[float]'
) -> None:
    private = _private()
    annotations = read(Path(folder), 'train')
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


# what prepares a process, writes the file and reads it; a cache has what the reader before it has
READERS: dict[str, Any] = {
    'rows': (_rows_alone, _write_csv, read_csv),
    'csv': (_without_pyarrow, _write_csv, read_csv),
    'pyarrow': (_nothing, _write_csv, read_csv),
    'json': (_nothing, _write_json, read_json),
    'coco': (_nothing, _write_coco, partial(read_coco, year=2014)),
    'cache': None,
}


if __name__ == '__main__':
    print(main())
