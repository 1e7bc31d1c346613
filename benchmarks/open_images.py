"""Reading the labels of Open Images: Python's csv module, pyarrow, and the memory-mapped cache, side by side.

    python -m benchmarks.open_images --rows 3000000

Rows are generated in the format of `*-annotations-human-imagelabels.csv` (six labels per image of 9,605 classes). Each
way runs in a process of its own, so that its peak of memory is known. The files were just written: no disk is measured.
"""

import argparse
import multiprocessing
import pickle
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from timm_mldecoder.data.formats import open_images

CLASSES, LABELS_PER_IMAGE = 9605, 6
WAYS = ('csv', 'pyarrow', 'cache')


def write_rows(root: Path, rows: int) -> None:
    """Write the class descriptions and as many labels, grouped by image as in the published files."""
    random = np.random.default_rng(0)
    names = [f'/m/{index:05x}' for index in range(CLASSES)]
    lines = [f'{name},class {index}\n' for index, name in enumerate(names)]
    (root / 'oidv6-class-descriptions.csv').write_text('LabelName,DisplayName\n' + ''.join(lines))
    images = [f'{number:016x}' for number in random.integers(2**63, size=-(-rows // LABELS_PER_IMAGE)).tolist()]
    labels, present = random.integers(CLASSES, size=rows).tolist(), random.integers(2, size=rows).tolist()
    with (root / 'oidv6-train-annotations-human-imagelabels.csv').open('w') as file:
        file.write(','.join(open_images.COLUMNS) + '\n')
        for index in range(rows):
            image = images[index // LABELS_PER_IMAGE]
            file.write(f'{image},verification,{names[labels[index]]},{present[index]}\n')


def read(way: str, root: Path, connection) -> None:
    """Read the labels one way; send seconds, CPU seconds, peak of memory and size of the pickle in MiB, and images."""
    if way == 'csv':
        sys.modules['pyarrow'] = None  # importing it fails
    before, start, start_cpu = _peak(), time.perf_counter(), time.process_time()
    annotations = open_images.read_open_images(root, 'train')
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak = _peak() - before
    connection.send((seconds, cpu, peak, len(pickle.dumps(annotations)) / 2**20, len(annotations)))


def _peak() -> float:
    """Peak of resident memory in MiB; ru_maxrss would include the parent's from before the exec."""
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024


def measure(way: str, root: Path) -> tuple[float, float, float, float, int]:
    """Result of `read` in a new process."""
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=read, args=(way, root, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0], allow_abbrev=False)
    parser.add_argument('--rows', type=int, default=3_000_000, help='number of labels (default: %(default)s)')
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_rows(root, options.rows)
        print('| reader | seconds | CPU seconds | rows/s | peak MiB | MiB sent to a worker | images |')
        print('|---|---:|---:|---:|---:|---:|---:|')
        for way in WAYS:
            if way == 'pyarrow':  # the cache that the csv module left
                for path in (root / '.timm_mldecoder').glob('openimages-train-*'):
                    path.rename(path.with_name('set-aside'))
            seconds, cpu, peak, sent, images = measure(way, root)
            rate = options.rows / seconds
            print(
                f'| {way} | {seconds:.2f} | {cpu:.2f} | {rate:,.0f} | {peak:,.0f} | {sent:.2f} | {images:,} |',
                flush=True,
            )


if __name__ == '__main__':
    main()
