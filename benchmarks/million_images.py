"""A dataset of 1.28 million image files, as many as ImageNet: seconds and memory to build what train.py reads it with.

    python -m benchmarks.million_images [--folder FOLDER]

The files are empty: only names and classes are read. Each dataset is built in a process of its own, once the names are
in the cache of the file system. Memory is what the process holds more than before.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from timm.data import create_dataset

from benchmarks.measure import MIB, markdown, parser
from timm_mldecoder.data import summarize
from timm_mldecoder.flags import train_options
from timm_mldecoder.loading.datasets import create_split

HEADER = ('dataset', 'images', 'classes', 'seconds', 'MiB')


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=1)
    flags.add_argument('--images', type=int, default=1_281_167)
    flags.add_argument('--classes', type=int, default=1000)
    flags.add_argument('--folder', help='where to write the files, on the disk to measure; default: a temporary folder')
    args = flags.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        _write_files(Path(folder, 'train'), args.images, args.classes)
        _in_a_process(_of_timm, folder)  # reads the names once
        rows = [
            [label, args.images, args.classes, *_in_a_process(build, folder)]
            for label, build in (('`timm.data.create_dataset`', _of_timm), ('`train.py`, with its summary', _of_train))
        ]
    return markdown(HEADER, rows)


def _write_files(root: Path, images: int, classes: int) -> None:
    for number in range(classes):
        folder = root / f'n{number:08d}'
        folder.mkdir(parents=True)
        for image in range(number, images, classes):
            os.close(os.open(folder / f'n{number:08d}_{image}.JPEG', os.O_CREAT))


def _of_timm(folder: str) -> object:
    return create_dataset('', folder, split='train', is_training=True)


def _of_train(folder: str) -> object:
    dataset = create_split(train_options(data_dir=folder), 'train', training=True)
    return dataset, summarize(dataset)


def _in_a_process(build: Callable[[str], object], folder: str) -> tuple[float, float]:
    with ProcessPoolExecutor(1, mp_context=get_context('fork')) as pool:
        return pool.submit(_measure, build, folder).result()


def _measure(build: Callable[[str], object], folder: str) -> tuple[float, float]:
    """Seconds, and MiB that the process holds more than before."""
    before, start = _resident(), time.perf_counter()
    built = build(folder)
    seconds = time.perf_counter() - start
    gc.collect()
    held = (_resident() - before) / MIB
    del built
    return seconds, held


def _resident() -> int:
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


if __name__ == '__main__':
    print(main())
