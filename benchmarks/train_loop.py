"""train.py's loop beside a plain one: the same model, loss, optimizer and loader, an epoch each in turn.

    python -m benchmarks.train_loop [--device cuda]

On CUDA both run in bfloat16, channels-last and compiled.
"""

import contextlib
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs

from benchmarks.measure import Step, markdown, paired_times, parser, ratio
from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import Options, train_options
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import train_epoch
from timm_mldecoder.train.run import Run

HEADER = ('loop', 'img/s', 'of the plain loop')
CLASSES = 10


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=5)
    flags.add_argument('--model', default='resnet18')
    flags.add_argument('--img-size', type=int, default=64)
    flags.add_argument('--batch-size', type=int, default=32)
    flags.add_argument('--images', type=int, default=1920, help='images an epoch')
    flags.add_argument('--workers', type=int, default=1)
    args = flags.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder, 'data'), args.images, CLASSES, args.img_size)
        options = _options(folder, args)
        with join_world(options.device) as world:
            run = build_run(options, world)
            loops = {'plain': _plain_epoch(options), 'train.py': _engine_epoch(run)}
            times = paired_times(loops, args.rounds, args.device, workers=args.workers)
            run.close()
    plain, ours = times.values()
    speeds = [args.images / median(each) for each in (plain, ours)]
    rows = [['plain', speeds[0], '1.000'], ['`train.py`', speeds[1], f'{ratio(plain, ours):.3f}']]
    return markdown(HEADER, rows)


def _options(folder: str, args: Namespace) -> Options:
    fast = dict(amp=True, amp_dtype='bfloat16', channels_last=True, torchcompile='inductor')
    return train_options(
        data_dir=f'{folder}/data', output=folder, val_split='', model=args.model, num_classes=CLASSES,
        img_size=args.img_size, batch_size=args.batch_size, workers=args.workers, device=args.device, opt='sgd',
        lr=0.01, sched='none', use_ml_decoder_head=1, **(fast if args.device == 'cuda' else {}),
    )  # fmt: skip


def _engine_epoch(run: Run) -> Step:
    """An epoch of train.py, without validation and checkpoint."""

    def epoch() -> None:
        train_epoch(run)
        run.state.begin_epoch(run.state.epoch + 1)

    return epoch


def _plain_epoch(options: Options) -> Step:
    """The loop that one would write by hand."""
    device = torch.device(options.device)
    head = dict(num_of_groups=options.num_of_groups, decoder_embedding=options.decoder_embedding)
    model = timm.create_model(options.model, num_classes=CLASSES, ml_decoder=head).to(device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    config = resolve_data_config(options.to_dict(), model=model)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=options.to_namespace()))
    trained = torch.compile(model) if options.torchcompile else model
    loss_fn = timm.loss.LabelSmoothingCrossEntropy(options.smoothing)
    loader = create_loader(
        create_dataset('', options.data_dir, split='train', is_training=True), is_training=True, device=device,
        input_size=config['input_size'], batch_size=options.batch_size, mean=config['mean'], std=config['std'],
        interpolation=options.train_interpolation, scale=options.scale, ratio=options.ratio,
        num_workers=options.workers)  # fmt: skip

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, target in loader:
            yield images.contiguous(memory_format=torch.channels_last) if options.channels_last else images, target

    def epoch() -> None:
        trained.train()
        for images, target in batches():
            with torch.autocast('cuda', torch.bfloat16) if options.amp else contextlib.nullcontext():
                loss = loss_fn(trained(images), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def write_images(root: Path, number: int, classes: int, size: int, split: str = 'train') -> None:
    """Write an image folder of noise."""
    random = np.random.RandomState(0)
    for index in range(number):
        folder = root / split / f'{index % classes}'
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.randint(0, 256, (size, size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f'{index}.jpg')


if __name__ == '__main__':
    print(main())
