"""A whole training step of ResNet-50 with very many classes: forward, loss, backward and optimizer; peak memory.

    python -m benchmarks.million_classes [--device cuda]

Binary cross-entropy, one process. Memory is all that the process holds: on a CPU its peak resident size, on CUDA the
peak that torch allocated.
"""

import resource
import time

import timm
import torch
from timm.optim import create_optimizer_v2

from benchmarks.measure import autocast, markdown, parser

GIB = 2**30
HEADER = ('classes, K, batch', 'optimizer', 'parameters, million', 'second step, s', 'loss, both steps', 'peak, GiB')


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=1)
    flags.add_argument('--num-classes', type=int, default=1_000_000)
    flags.add_argument('--num-of-groups', type=int, default=1000)
    flags.add_argument('--batch-size', type=int, help='default: 8, on CUDA 64')
    flags.add_argument('--opt', default='adamw', help="any of timm's optimizers")
    args = flags.parse_args(argv)
    batch_size = args.batch_size or (64 if args.device == 'cuda' else 8)

    options = dict(num_of_groups=args.num_of_groups)
    with torch.device(args.device):
        model = timm.create_model('resnet50', num_classes=args.num_classes, ml_decoder=options)
        images = torch.randn(batch_size, 3, 224, 224)
        labels = torch.randint(args.num_classes, (batch_size,))
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=1e-4)

    losses = []
    for _ in range(1 + args.rounds):
        start = time.perf_counter()
        losses.append(_step(model, optimizer, images, labels))
        seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    case = f'{args.num_classes:,}, {args.num_of_groups}, {batch_size}'
    loss = ' → '.join(f'{loss:.4f}' for loss in losses)
    return markdown(HEADER, [[case, args.opt, parameters, seconds, loss, _peak(args.device) / GIB]])


def _step(model, optimizer, images: torch.Tensor, labels: torch.Tensor) -> float:
    with autocast(images):
        logits = model(images)
    targets = torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _peak(device: str) -> int:
    """Bytes."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


if __name__ == '__main__':
    print(main())
