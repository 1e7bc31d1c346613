"""What a model with very many classes takes on paper, replicated and sharded: memory, bytes sent and time per step.

    python -m benchmarks.plan --classes 10_000_000 --ranks 8

An ML-Decoder head on a backbone, float32 weights and a step of Adam; one GPU per rank. Memory is that of weights,
gradients, optimizer state and logits, without activations. Time is that of the bytes at published
bandwidths, not overlapped with computation, which hides some of it.
"""

import argparse

from benchmarks.measure import markdown

GB = 1e9
FLOAT = 4  # bytes
#: Bytes per second that a GPU sends, each way. NVLink 4 (H100, 900 GB/s both ways together): NVIDIA H100 data sheet;
#: NDR InfiniBand: 400 Gbit/s per port, one port per GPU as in a DGX H100.
BANDWIDTHS = {'NVLink 4': 450 * GB, 'NDR InfiniBand': 50 * GB}
GPUS_PER_NODE = 8
HEADER = (
    'held by',
    *('head, state GB', 'head, gathered GB', 'logits GB', 'backbone, state GB', 'sum GB'),
    *('sent per step GB', 'time, ms', 'over'),
)
DDP, FSDP = '--parallel ddp', '--parallel fsdp'


def state_bytes(parameters: float, ranks: int = 1, states: int = 2) -> float:
    """Return the bytes per rank of weights, their gradients and the optimizer's tensors of their shape."""
    return (2 + states) * FLOAT * parameters / ranks


def sent_bytes(way: str, parameters: float, ranks: int) -> float:
    """Return the bytes that a rank sends per step, with collectives over rings."""
    # gradients are summed everywhere; or weights gathered twice and gradients scattered
    return (2 if way == DDP else 3) * FLOAT * parameters * (ranks - 1) / ranks


def plan(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return bytes per rank for the replicated and for the sharded model."""
    dim, hidden = args.dim, args.dim_feedforward
    classifier = args.groups * dim * -(-args.classes // args.groups)
    decoder = (args.features + 1) * dim + 4 * dim * (dim + 1) + 2 * hidden * dim + hidden + dim + 6 * dim
    head = classifier + decoder + args.classes  # with the bias of each class
    logits = FLOAT * args.batch_size * args.classes
    return {
        way: dict(
            head=state_bytes(head, ranks),
            gathered=2 * FLOAT * head if way == FSDP else 0,  # and the gradients
            logits=2 * logits,
            backbone=state_bytes(args.backbone, ranks),
            sent=sent_bytes(way, head + args.backbone, args.ranks),
        )
        for way, ranks in ((DDP, 1), (FSDP, args.ranks))
    }


def main(argv: list[str] | None = None) -> str:
    flags = argparse.ArgumentParser(description=__doc__.partition('\n')[0], allow_abbrev=False)
    flags.add_argument('--classes', type=int, default=10_000_000)
    flags.add_argument('--ranks', type=int, default=8)
    flags.add_argument('--groups', type=int, help='default: classes / 1000')
    flags.add_argument('--dim', type=int, default=768, help='width of the head')
    flags.add_argument('--dim-feedforward', type=int, default=2048)
    flags.add_argument('--features', type=int, default=1024, help='width of the features of the backbone')
    flags.add_argument('--batch-size', type=int, default=32, help='images per rank')
    flags.add_argument('--backbone', type=int, default=303_000_000, help='parameters of the backbone: ViT-L')
    args = flags.parse_args(argv)
    args.groups = args.groups or max(1, args.classes // 1000)
    link = 'NVLink 4' if args.ranks <= GPUS_PER_NODE else 'NDR InfiniBand'
    rows = []
    for way, found in plan(args).items():
        held = [found[name] for name in ('head', 'gathered', 'logits', 'backbone')]
        values = [value / GB for value in (*held, sum(held), found['sent'])]
        rows.append([way, *values, 1e3 * found['sent'] / BANDWIDTHS[link], link])
    return markdown(HEADER, rows)


if __name__ == '__main__':
    print(main())
