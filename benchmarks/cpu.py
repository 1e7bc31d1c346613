"""What pays on this CPU: layout, bfloat16 and torch.compile, in images per second of training and inference.

    python -m benchmarks.cpu [--models resnet18 ...] [--batch-size 16] [--rounds 5]

1,000 classes, ML-Decoder with its defaults, 224 x 224 images. A training step is forward and backward. The first row of a model is eager
float32 with contiguous images; the others are ratios to it, round by round. bfloat16 is autocast, as `--amp`: it pays
where the CPU has AVX512-BF16 or AMX (`torch.cpu.get_capabilities()`).
"""  # noqa: E501

from statistics import median

import timm
import torch

from benchmarks.measure import Step, inference, markdown, paired_times, parser, ratio, training

MODELS = ('tf_efficientnet_lite0', 'resnet18', 'vit_tiny_patch16_224')
HEADER = ('model, flags', 'training, img/s', 'of float32', 'inference, img/s', 'of float32')
# name -> --channels-last, --amp, --torchcompile
WAYS = {
    'float32': (False, False, False),
    '--channels-last': (True, False, False),
    '--amp': (False, True, False),
    '--channels-last --amp': (True, True, False),
    '--channels-last --torchcompile': (True, False, True),
}


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=5)
    flags.add_argument('--models', nargs='+', default=MODELS, help='any timm models')
    flags.add_argument('--batch-size', type=int, default=16)
    flags.add_argument('--img-size', type=int, default=224)
    args = flags.parse_args(argv)
    rows = []
    for name in args.models:
        x = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
        times = {}
        for kind in (training, inference):
            torch.compiler.reset()
            times[kind] = paired_times({way: _step(kind, name, x, *how) for way, how in WAYS.items()}, args.rounds)
        for way in WAYS:
            cells: list[object] = []
            for measured in times.values():
                cells += [len(x) / median(measured[way]), ratio(measured['float32'], measured[way])]
            rows.append([f'{name}, {way}', *cells])
    return markdown(HEADER, rows)


def _step(kind, name: str, x: torch.Tensor, channels_last: bool, amp: bool, compiled: bool) -> Step:
    """Return a step of the model in one way."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = timm.create_model(name, num_classes=1000, ml_decoder=True).to(memory_format=layout)
    step = kind(torch.compile(model) if compiled else model, x.contiguous(memory_format=layout))

    def cast():
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            return step()

    return cast


if __name__ == '__main__':
    torch.set_num_threads(1)  # processor time: other work on the machine does not count
    print(main())
