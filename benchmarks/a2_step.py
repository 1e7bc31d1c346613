"""An optimizer step of recipe A2 (arXiv 2110.00476): ResNet-50 with pooling, with ML-Decoder, and with the reference.

    python -m benchmarks.a2_step [--device cuda]

Forward, binary cross-entropy on mixed targets, backward and LAMB, on images that are on the device already. On CUDA a
batch has 256 images, in bfloat16 and channels-last. The reference is the published algorithm, `benchmarks.peers`.
"""

from statistics import median

import timm
import torch
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from benchmarks.measure import Step, autocast, markdown, paired_times, parser, peak_memory, ratio
from benchmarks.peers import ReferenceHead

CLASSES, QUERIES = 1000, 100
HEADER = ('head, batch', 'img/s', 'of GAP', 'step, ms', 'memory, MiB')


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=3)
    flags.add_argument('--model', default='resnet50', help="a timm model with ResNet's forward_features")
    flags.add_argument('--batch-size', type=int, help='default: 4, on CUDA 256')
    flags.add_argument('--img-size', type=int, default=224)
    flags.add_argument('--compiled', action='store_true', help='compile the models')
    args = flags.parse_args(argv)
    batch_size = args.batch_size or (256 if args.device == 'cuda' else 4)
    images = torch.randn(batch_size, 3, args.img_size, args.img_size, device=args.device)
    models = {name: model.to(args.device) for name, model in _models(args.model).items()}
    if args.device == 'cuda':
        images = images.contiguous(memory_format=torch.channels_last)
        models = {name: model.to(memory_format=torch.channels_last) for name, model in models.items()}
    # a mixed batch: two labels per image
    target = torch.rand(batch_size, CLASSES, device=args.device).topk(2).indices
    target = torch.zeros(batch_size, CLASSES, device=args.device).scatter_(1, target, 0.5)
    steps = {name: _step(model, images, target, args.compiled) for name, model in models.items()}
    times = paired_times(steps, args.rounds, args.device, warmup=2)
    rows = [
        [
            f'{name}, {batch_size}',
            batch_size / median(times[name]),
            ratio(times['GAP'], times[name]),
            1e3 * median(times[name]),
            peak_memory(steps[name], args.device),
        ]
        for name in models
    ]
    return markdown(HEADER, rows)


def _models(name: str) -> dict[str, nn.Module]:
    backbone = timm.create_model(name, num_classes=0, global_pool='', drop_path_rate=0.05)
    reference = ReferenceHead(CLASSES, QUERIES, backbone.num_features)
    return {
        'GAP': timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.05),
        'ML-Decoder': timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.05, ml_decoder=True),
        'reference': nn.Sequential(backbone, reference),
    }


def _step(model: nn.Module, images: Tensor, target: Tensor, compiled: bool) -> Step:
    model.train()
    optimizer = create_optimizer_v2(model, opt='lamb', lr=5e-3, weight_decay=0.02)
    loss_fn = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.2)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with autocast(images):
            logits = forward(images)
        loss_fn(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == '__main__':
    print(main())
