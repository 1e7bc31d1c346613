"""What a model with very many classes takes on paper: memory, bytes sent and time per step, for each way to divide it.

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
    'divided by',
    *('head, state GB', 'head, transient GB', 'logits GB', 'backbone, state GB', 'sum GB'),
    *('sent per step GB', 'time by {}, ms'),
)
WAYS = ('--parallel ddp', '--parallel fsdp', '--head-parallel')


def state_bytes(parameters: float, ranks: int = 1, states: int = 2) -> float:
    """Return the bytes per rank of weights, their gradients and the optimizer's tensors of their shape."""
    return (2 + states) * FLOAT * parameters / ranks


def gathered_bytes(size: float, ranks: int) -> float:
    """Return the bytes that a rank sends while all ranks gather (or reduce and scatter) `size` bytes, by rings."""
    return size * (ranks - 1) / ranks


def sizes(args: argparse.Namespace) -> dict[str, int]:
    """Return the numbers of parameters: of the classifier, the rest of the head, and the backbone."""
    dim, hidden = args.dim, args.dim_feedforward
    classifier = args.groups * dim * -(-args.classes // args.groups)
    decoder = args.features * dim + dim + 4 * dim * (dim + 1) + hidden * dim * 2 + hidden + dim + 6 * dim
    return dict(classifier=classifier, rest=decoder + args.classes, backbone=args.backbone)


def plan(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return bytes per rank for each way to divide the model."""
    ranks, count = args.ranks, sizes(args)
    head = count['classifier'] + count['rest']
    logits = 2 * FLOAT * args.batch_size * args.classes  # and their gradient
    tokens = FLOAT * args.batch_size * args.tokens * args.dim * ranks
    weights = FLOAT * head
    found = {}
    for way in WAYS:
        divided = 1 if way == '--parallel ddp' else ranks
        small = FLOAT * (count['rest'] + count['backbone'])
        # weights are gathered twice, forward and backward, and gradients summed once; all gradients are summed in ddp
        sent = (2 if divided == 1 else 3) * gathered_bytes(FLOAT * (head + count['backbone']), ranks)
        transient = 0.0 if divided == 1 else 2 * weights  # the gathered weights and their gradient
        if way == '--head-parallel':
            transient = 2 * (FLOAT * count['rest'] + tokens)
            sent = 3 * gathered_bytes(small, ranks) + 2 * gathered_bytes(tokens, ranks) + gathered_bytes(logits, ranks)
        found[way] = dict(
            head=state_bytes(head, divided),
            transient=transient,
            logits=logits,
            backbone=state_bytes(count['backbone'], divided),
            sent=sent,
        )
    return found


def main(argv: list[str] | None = None) -> str:
    flags = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    flags.add_argument('--classes', type=int, default=10_000_000)
    flags.add_argument('--ranks', type=int, default=8)
    flags.add_argument('--groups', type=int, help='default: classes / 1000')
    flags.add_argument('--dim', type=int, default=768, help='width of the head')
    flags.add_argument('--dim-feedforward', type=int, default=2048)
    flags.add_argument('--features', type=int, default=1024, help='width of the features of the backbone')
    flags.add_argument('--tokens', type=int, default=196, help='tokens per image')
    flags.add_argument('--batch-size', type=int, default=32, help='images per rank')
    flags.add_argument('--backbone', type=int, default=303_000_000, help='parameters of the backbone: ViT-L')
    args = flags.parse_args(argv)
    args.groups = args.groups or max(1, args.classes // 1000)
    link = 'NVLink 4' if args.ranks <= GPUS_PER_NODE else 'NDR InfiniBand'
    rows = []
    for way, found in plan(args).items():
        held = [found[name] for name in ('head', 'transient', 'logits', 'backbone')]
        time = 1e3 * found['sent'] / BANDWIDTHS[link]
        rows.append([way, *(value / GB for value in (*held, sum(held), found['sent'])), time])
    header = [name.format(link) for name in HEADER]
    return markdown(header, rows)


if __name__ == '__main__':
    print(main())
