"""Images per second of `--decode fast` and of the exact decoder beside timm's own loader, on photographs of 500 KB.

    python -m benchmarks.decode [--images 64] [--workers 0]

Files are JPEG of 1600 x 1200 pixels with a photograph's noise, made here; images get 224 pixels, in training with
timm's default augmentation. Passes alternate; a ratio is the median of the ratios pass by pass. Without workers these
are seconds of the processor. The last column is the mean difference of pixels, of 255, from those of timm's transform.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
from timm.data import create_dataset, create_loader

from benchmarks.check_images import write_images
from benchmarks.measure import Step, markdown, paired_times, parser, ratio
from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import train_options
from timm_mldecoder.loading.create_loaders import create_eval_loader, create_train_loader
from timm_mldecoder.loading.datasets import create_split

HEADER = ('images', 'loader', 'img/s', "of timm's", 'pixel difference')
CONFIG = dict(input_size=(3, 224, 224), interpolation='bicubic', mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875)


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=5)
    flags.add_argument('--images', type=int, default=64)
    flags.add_argument('--batch-size', type=int, default=32)
    flags.add_argument('--workers', type=int, default=0)
    args = flags.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as root:
        (folder := Path(root, 'train', 'a')).mkdir(parents=True)
        write_images(folder, args.images)
        for training in (True, False):
            loaders = {'timm': _timm(root, args, training)}
            loaders |= {name: _ours(root, args, training, name) for name in ('exact', 'fast')}
            steps: dict[str, Step] = {
                name: lambda make=make: sum(len(batch[1]) for batch in make()) for name, make in loaders.items()
            }
            times = paired_times(steps, args.rounds, args.device, workers=args.workers)
            pixels = {
                name: None if training else torch.cat([images for images, _ in make()])
                for name, make in loaders.items()
            }
            for name in loaders:
                rate = args.images / median(times[name])
                difference = None if training else float((pixels[name] - pixels['timm']).abs().mean() * 127.5)
                label = 'timm' if name == 'timm' else f'`--decode {name}`'
                rows.append(
                    [
                        'training' if training else 'evaluation',
                        label,
                        rate,
                        ratio(times['timm'], times[name]),
                        difference,
                    ]
                )
    return markdown(HEADER, rows)


def _timm(root: str, args, training: bool) -> Callable[[], Iterable]:
    dataset = create_dataset('', root, 'train', is_training=training)
    settings = dict(is_training=training, num_workers=args.workers, device=torch.device(args.device))
    loader = create_loader(
        dataset, batch_size=args.batch_size, persistent_workers=args.workers > 0, **settings, **CONFIG
    )
    return lambda: loader


def _ours(root: str, args, training: bool, decode: str) -> Callable[[], Iterable]:
    options = train_options(
        data_dir=root, device=args.device, batch_size=args.batch_size, workers=args.workers, decode=decode
    )
    dataset = create_split(options, 'train', training=training)
    world = World(torch.device(args.device))
    if training:
        loader = create_train_loader(options, dataset, CONFIG, world, num_classes=1, rng_state=torch.get_rng_state())
        return lambda: loader.epoch(0)
    settings = dict(batch_size=args.batch_size, bad_image='abort', remedy='')
    return create_eval_loader(options, dataset, CONFIG, world, **settings).batches


if __name__ == '__main__':
    print(main())
