"""Where the head's time goes: a training step by torch's operations, the head's and the reference's.

    python -m benchmarks.operations [--device cuda]

1000 classes, K = 100, 49 tokens. Time in an operation itself, a step's mean.
"""

import torch
from torch import nn

from benchmarks.measure import markdown, parser, training
from benchmarks.peers import ReferenceHead
from timm_mldecoder import MLDecoder

CLASSES, QUERIES, SIDE, WIDTH = 1000, 100, 7, 2048
SHOWN = 12  # operations; the others are added up
HEADER = ('operation', 'ours, ms', 'reference, ms', 'ours, calls', 'reference, calls')


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=5)
    flags.add_argument('--batch-size', type=int, help='default: 16, on CUDA 128')
    args = flags.parse_args(argv)
    batch_size = args.batch_size or (128 if args.device == 'cuda' else 16)
    features = torch.randn(batch_size, WIDTH, SIDE, SIDE, device=args.device, requires_grad=True)
    heads = MLDecoder(CLASSES, QUERIES), ReferenceHead(CLASSES, QUERIES, WIDTH)
    ours, reference = (_operations(head.to(args.device), features, args.rounds, args.device) for head in heads)
    names = sorted({*ours, *reference}, key=lambda name: -max(ours.get(name, (0,))[0], reference.get(name, (0,))[0]))
    rows = [_row(f'`{name}`', [name], ours, reference) for name in names[:SHOWN]]
    rows += [_row('the others', names[SHOWN:], ours, reference), _row('all', names, ours, reference)]
    return markdown(HEADER, rows)


def _operations(head: nn.Module, features: torch.Tensor, rounds: int, device: str) -> dict[str, tuple[float, int]]:
    """Operation -> (ms, calls) of one step."""
    step = training(head, features)
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(rounds):
            step()
    time_of = 'self_device_time_total' if device == 'cuda' else 'self_cpu_time_total'
    return {
        event.key.removeprefix('aten::'): (getattr(event, time_of) / 1e3 / rounds, event.count // rounds)
        for event in profile.key_averages()
    }


def _row(label: str, names: list[str], *profiles: dict[str, tuple[float, int]]) -> list:
    totals = [[sum(profile.get(name, (0.0, 0))[i] for name in names) for profile in profiles] for i in (0, 1)]
    return [label, *(float(ms) for ms in totals[0]), *totals[1]]


if __name__ == '__main__':
    print(main())
