"""Milliseconds to collate a batch of many classes: with targets of int8, as the loaders have them, and of float32.

    python -m benchmarks.collate [--batch-size 256] [--classes 12547] [--labels 40]

`targets` makes the dense vectors of the batch from the compact form, in the workers; `collate` is timm's `fast_collate`
with images of one pixel; `to float32` is what the device does with int8.
"""

import numpy as np
from timm.data.loader import fast_collate

from benchmarks.measure import Step, markdown, paired_times, parser
from timm_mldecoder.data import Annotations

HEADER = ('targets', 'targets, ms', 'collate, ms', 'to float32, ms')


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=50)
    flags.add_argument('--batch-size', type=int, default=256)
    flags.add_argument('--classes', type=int, default=12_547)
    flags.add_argument('--labels', type=int, default=40, help='per image')
    args = flags.parse_args(argv)
    size = args.batch_size
    label = np.random.default_rng(0).integers(0, args.classes, size * args.labels)
    image = np.repeat(np.arange(size), args.labels)
    names = [str(index) for index in range(args.classes)]
    annotations = Annotations(names, [str(index) for index in range(size)], image, label, np.ones(len(label)))
    pixel = np.zeros((3, 1, 1), dtype=np.uint8)
    rows = []
    for dtype in (np.int8, np.float32):

        def targets(dtype=dtype) -> list:
            return [(pixel, annotations.target(index, dtype)) for index in range(size)]

        samples = targets()
        batch = fast_collate(samples)[1]
        steps: dict[str, Step] = dict(
            targets=targets,
            collate=lambda samples=samples: fast_collate(samples),
            float32=lambda batch=batch: batch.float(),
        )
        times = paired_times(steps, args.rounds, args.device)
        rows.append([np.dtype(dtype).name, *(1e3 * np.median(times[name]) for name in steps)])
    return markdown(HEADER, rows)


if __name__ == '__main__':
    print(main())
