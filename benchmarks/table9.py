"""Table 9 of arXiv 2111.12933: speed of TResNet-M with each head, and the largest training batch that fits a GPU.

    python -m benchmarks.table9 [--device cuda] [--heads GAP 'ML-Decoder'] [--classes 1000]

224 x 224 images. Training is forward and backward. The largest batch, without an optimizer, is a multiple of 8,
found by doubling and then halving the interval. A CPU has no largest batch, and no row for a transformer decoder of
5,000 classes, whose attention scores alone take 0.8 GB per image. The published figures are those of the paper's GPU.
"""

from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from benchmarks.flops import DECODER, GAP, Case, build
from benchmarks.measure import Step, inference, markdown, paired_times, parser, ratio, training

HEADS = {GAP: GAP, DECODER: DECODER, 'ML-Decoder': 100}
CLASSES = (100, 1000, 5000)
#: head and classes: training img/s, inference img/s, largest batch, as published
PUBLISHED = {
    (GAP, 1000): (703, 2910, 512),
    (DECODER, 1000): (44, 916, 112),
    ('ML-Decoder', 100): (575, 2588, 464),
    ('ML-Decoder', 1000): (568, 2563, 456),
    ('ML-Decoder', 5000): (562, 2512, 448),
}
HEADER = (
    'head, classes, batch',
    *('training img/s', '/ GAP', 'published', '/ GAP'),
    *('inference img/s', '/ GAP', 'published', '/ GAP'),
    *('largest batch', 'published'),
)
MULTIPLE = 8
MOST_DECODER_CLASSES_ON_CPU = 1000


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=3)
    flags.add_argument('--model', default='tresnet_m', help='any timm model')
    flags.add_argument('--heads', nargs='+', choices=HEADS, default=list(HEADS))
    flags.add_argument('--classes', type=int, nargs='+', default=CLASSES)
    flags.add_argument('--batch-size', type=int, help='for the speed; default: 4, on CUDA 64')
    flags.add_argument('--img-size', type=int, default=224)
    args = flags.parse_args(argv)
    batch_size = args.batch_size or (64 if args.device == 'cuda' else 4)
    rows = []
    for classes in args.classes:
        heads = [
            name
            for name in args.heads
            if args.device == 'cuda' or name != DECODER or classes <= MOST_DECODER_CLASSES_ON_CPU
        ]
        models = {name: _model(args, name, classes) for name in dict.fromkeys([GAP, *heads])}
        columns = [_speeds(kind, models, _images(args, batch_size), args) for kind in (training, inference)]
        models.clear()  # their memory counts against the largest batch
        for name in heads:
            largest = _largest_batch(_model(args, name, classes), args) if args.device == 'cuda' else None
            published = PUBLISHED.get((name, classes), (None, None, None))
            row = [f'{name}, {classes:,}, {batch_size}']
            gaps = PUBLISHED.get((GAP, classes), (None, None, None))
            for speeds, figure, gap in zip(columns, published, gaps, strict=False):  # the third is the largest batch
                row += [*speeds[name], figure, figure / gap if figure and gap else None]
            rows.append([*row, largest, published[2]])
    return markdown(HEADER, rows)


def _model(args, name: str, classes: int) -> nn.Module:
    model = build(Case('9', args.model, args.img_size, classes, HEADS[name])).to(args.device)
    return model.to(memory_format=torch.channels_last) if args.device == 'cuda' else model


def _images(args, batch_size: int) -> torch.Tensor:
    x = torch.randn(batch_size, 3, args.img_size, args.img_size, device=args.device)
    return x.contiguous(memory_format=torch.channels_last) if args.device == 'cuda' else x


def _speeds(
    kind: Callable[[nn.Module, torch.Tensor], Step], models: dict[str, nn.Module], x: torch.Tensor, args
) -> dict[str, tuple[float, float]]:
    """Images per second of each head, and their ratio to GAP in alternating runs."""
    times = paired_times({name: kind(model, x) for name, model in models.items()}, args.rounds, args.device)
    return {name: (len(x) / median(times[name]), ratio(times[GAP], times[name])) for name in models}


def _largest_batch(model: nn.Module, args) -> int:
    """The largest multiple of `MULTIPLE` images whose training step fits the GPU's memory; 0 if none does."""

    def fits(multiples: int) -> bool:
        fitted = True
        try:
            training(model, _images(args, MULTIPLE * multiples))()
        except torch.cuda.OutOfMemoryError:
            fitted = False
        # not in the handler, where the traceback keeps the activations
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return fitted

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return MULTIPLE * low


if __name__ == '__main__':
    print(main())
