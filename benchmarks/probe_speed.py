"""What a probe costs: twelve heads beside one head on the same backbone pass, and reading cached features beside `dd`.

    python -m benchmarks.probe_speed [--model resnet50] [--batch-size 32] [--cache-images 3000] [--folder FOLDER]

A step is the backbone's forward pass and an optimizer step of every run; seconds and ratios are medians.

Cached features are read in the random order of an epoch, `dd` reads the same files from first to last. The readers
alternate, each begins with the files in the page cache, or each with the files out of it, and seconds are the best of
all rounds. The reader yields float16 as it is stored; the row with float32 adds the conversion that training makes.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn

from benchmarks.measure import autocast, markdown, paired_times, parser, ratio
from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import train_options
from timm_mldecoder.models.probe_model import build_probe, remove_head
from timm_mldecoder.probe.cache import FeatureCache
from timm_mldecoder.probe.features import Backbone, Batch, read_together, training_groups
from timm_mldecoder.probe.options import HeadSpec
from timm_mldecoder.probe.train import Run, Trainer

HEADS = ('linear', 'max', 'logsumexp', 'ml_decoder_small')
RATES = (1e-3, 3e-3, 1e-2)
CLASSES = 80
HEADER = ('work', 'seconds', 'relative to', 'ratio')


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=5)
    flags.add_argument('--model', default='resnet50')
    flags.add_argument('--img-size', type=int, default=224)
    flags.add_argument('--batch-size', type=int, default=32)
    flags.add_argument('--cache-images', type=int, default=3000, help='of 49 tokens, 2048 wide: 200 KB each')
    flags.add_argument('--folder', help='folder for the cache, on the disk to measure; a temporary one if not given')
    args = flags.parse_args(argv)
    return markdown(HEADER, [*_heads(args), *_cache(args)])


def _heads(args) -> list[list]:
    device = torch.device(args.device)
    model = remove_head(timm.create_model(args.model, num_classes=CLASSES)).to(device)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    backbone = Backbone(model, partial(autocast, images))
    target = (torch.rand(args.batch_size, CLASSES, device=device) < 0.05).float()
    options = train_options(data_dir='.', device=args.device, opt='adamw', task='multilabel')
    everything = [Run(HeadSpec(name, name, {}), rate, 0) for name in HEADS for rate in RATES]
    steps = {}
    for runs in (everything[:1], everything):
        trainer = Trainer(
            options,
            runs,
            lambda spec: build_probe(model, CLASSES, spec.name),
            nn.BCEWithLogitsLoss(),
            lambda: None,
            World(device),
        )
        steps[len(runs)] = partial(_probe_step, trainer, backbone, images, target)
    times = paired_times(steps, args.rounds, args.device)
    one, several = times.values()
    label = f'{len(everything)} heads ({", ".join(HEADS)} at {len(RATES)} rates)'
    return [
        ['1 head (linear)', f'{median(one):.3f}', '', ''],
        [label, f'{median(several):.3f}', '1 head', f'{ratio(several, one):.2f}'],
    ]


def _probe_step(trainer: Trainer, backbone: Backbone, images: Tensor, target: Tensor) -> None:
    trainer.step(Batch(*backbone(images), target), 0, 1.0)


def _cache(args) -> list[list]:
    shape, number = (49, 2048), -(-args.cache_images // args.batch_size) * args.batch_size  # full batches
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        open_cache = partial(
            FeatureCache,
            Path(name) / 'train',
            {},
            number=number,
            shape=shape,
            class_token=False,
            views=1,
            shard=1024,
            device=torch.device('cpu'),
        )
        cache = open_cache()
        cache.begin()
        cache.write(cache.missing(), lambda images: (images, None), _random_features, 64, 0)
        files = sorted(cache.folder.glob('*.tokens.npy'))
        groups = training_groups(number, args.batch_size, 0, 0)
        world = World(torch.device('cpu'))
        readers = {
            'dd': partial(_dd, files),
            'the cache, in random order': lambda: _exhaust(open_cache().read(groups)),
            'the same, converted to float32': lambda: _exhaust(read_together(open_cache(), groups, world)),
        }
        size = number * cache.bytes_per_image / 2**20
        rows = []
        for state, prepare in (('in the page cache', _dd), ('from the disk', _drop)):
            times = {name: [] for name in readers}
            for _ in range(args.rounds):
                for name, reader in readers.items():
                    prepare(files)
                    times[name].append(_seconds(reader))
            dd, *others = ((name, min(several)) for name, several in times.items())
            rows.append([f'`dd` of {size:,.0f} MiB, {state}', f'{dd[1]:.3f}', '', ''])
            rows += [[name, f'{best:.3f}', 'speed of `dd`', f'{dd[1] / best:.2f}'] for name, best in others]
    return rows


def _random_features(groups: list) -> Iterator[tuple[Tensor, Tensor]]:
    for group in groups:
        yield torch.randn(len(group), 49, 2048), torch.zeros(len(group))


def _exhaust(batches: Iterator[Batch]) -> None:
    for _ in batches:
        pass


def _dd(files: list[Path]) -> None:
    for file in files:
        subprocess.run(['dd', f'if={file}', 'of=/dev/null', 'bs=1M'], check=True, capture_output=True)


def _drop(files: list[Path]) -> None:
    """Put files out of the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == '__main__':
    print(main())
