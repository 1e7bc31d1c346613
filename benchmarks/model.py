"""Whole models: img/s and memory with global average pooling and with ML-Decoder, eager and compiled.

    python -m benchmarks.model [--device cuda] [--models resnet50 ...] [--compiled resnet50 ...]

1000 classes, ML-Decoder with its defaults (K = 100), 224 x 224 images. A training step is forward and backward.
"""

from statistics import median

import timm
import torch
from torch import nn

from benchmarks.measure import Step, inference, markdown, paired_times, parser, peak_memory, ratio, training

MODELS = ('resnet50', 'convnext_tiny', 'vit_small_patch16_224', 'tresnet_m')
HEADER = (
    'model, mode, batch',
    *('inference img/s: GAP', 'ML-Decoder', 'ratio'),
    *('training img/s: GAP', 'ML-Decoder', 'ratio'),
    *('training MiB: GAP', 'ML-Decoder', 'ratio'),
)


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=5)
    flags.add_argument('--models', nargs='+', default=MODELS, help='any timm models')
    flags.add_argument('--compiled', nargs='*', help='models to compile too; default: all of them')
    flags.add_argument('--batch-size', type=int, help='default: 8, on CUDA 128')
    flags.add_argument('--img-size', type=int, default=224)
    args = flags.parse_args(argv)
    batch_size = args.batch_size or (128 if args.device == 'cuda' else 8)
    compiled = args.models if args.compiled is None else args.compiled
    x = torch.randn(batch_size, 3, args.img_size, args.img_size, device=args.device)
    if args.device == 'cuda':
        x = x.contiguous(memory_format=torch.channels_last)
    rows = [
        _row(name, mode, x, args.rounds, args.device)
        for mode, names in (('eager', args.models), ('compiled', compiled))
        for name in names
    ]
    return markdown(HEADER, rows)


def _row(name: str, mode: str, x: torch.Tensor, rounds: int, device: str) -> list:
    models = {head: _create(name, head, device) for head in (False, True)}
    row = [f'{name}, {mode}, {len(x)}']
    steps: dict[bool, Step] = {}
    for kind in (inference, training):
        torch.compiler.reset()
        steps = {head: kind(torch.compile(m) if mode == 'compiled' else m, x) for head, m in models.items()}
        times = paired_times(steps, rounds, device, warmup=2)
        row += [len(x) / median(times[head]) for head in models]
        row.append(ratio(times[False], times[True]))  # of throughputs: the other way round than of times
    memory = [peak_memory(step, device) for step in steps.values()]
    return [*row, *memory, memory[1] / memory[0]]


def _create(name: str, ml_decoder: bool, device: str) -> nn.Module:
    model = timm.create_model(name, num_classes=1000, ml_decoder=ml_decoder).to(device)
    return model.to(memory_format=torch.channels_last) if device == 'cuda' else model


if __name__ == '__main__':
    print(main())
