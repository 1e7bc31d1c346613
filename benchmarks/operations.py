"""Where the head's time goes: a training step by torch's operations, the head's and the reference's.

    python -m benchmarks.operations [--device cuda]

1000 classes, K = 100, 49 tokens. Time in an operation itself, the median of alternating steps.
"""

from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.measure import Step, markdown, parser, training
from benchmarks.peers import ReferenceHead
from timm_mldecoder import MLDecoder

CLASSES, QUERIES, SIDE, WIDTH = 1000, 100, 7, 2048
Profile = dict[str, tuple[float, int]]  # operation -> ms and calls of one step
SHOWN = 12  # operations; the others are added up
HEADER = ('operation', 'ours, ms', 'reference, ms', 'ours, calls', 'reference, calls')


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=5)
    flags.add_argument('--batch-size', type=int, help='default: 16, on CUDA 128')
    args = flags.parse_args(argv)
    batch_size = args.batch_size or (128 if args.device == 'cuda' else 16)
    features = torch.randn(batch_size, WIDTH, SIDE, SIDE, device=args.device, requires_grad=True)
    heads = MLDecoder(CLASSES, QUERIES), ReferenceHead(CLASSES, QUERIES, WIDTH)
    steps = [training(head.to(args.device), features) for head in heads]
    for step in steps:
        step()
    rounds = [[_operations(step, args.device) for step in steps] for _ in range(args.rounds)]
    ours, reference = (_medians(profiles) for profiles in zip(*rounds, strict=True))
    names = sorted({*ours, *reference}, key=lambda name: -max(ours.get(name, (0,))[0], reference.get(name, (0,))[0]))
    rows = [_row(f'`{name}`', [name], ours, reference) for name in names[:SHOWN]]
    rows += [_row('the others', names[SHOWN:], ours, reference), _row('all', names, ours, reference)]
    return markdown(HEADER, rows)


def _operations(step: Step, device: str) -> Profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    time_of = 'self_device_time_total' if device == 'cuda' else 'self_cpu_time_total'
    averages = profile.key_averages()
    return {event.key.removeprefix('aten::'): (getattr(event, time_of) / 1e3, event.count) for event in averages}


def _medians(profiles: Sequence[Profile]) -> Profile:
    names = {name for profile in profiles for name in profile}
    return {name: tuple(map(median, zip(*(p.get(name, (0.0, 0)) for p in profiles), strict=True))) for name in names}


def _row(label: str, names: list[str], *profiles: Profile) -> list:
    totals = [[sum(profile.get(name, (0.0, 0))[i] for name in names) for profile in profiles] for i in (0, 1)]
    return [label, *map(float, totals[0]), *map(int, totals[1])]


if __name__ == '__main__':
    print(main())
