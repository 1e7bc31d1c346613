"""Steps on a CPU with malloc as glibc sets it up, and with freed memory kept, as the commands of this package do.

    python -m benchmarks.allocator [--cases training inference probe]

Each in a process of its own; the two take turns. Page faults are those of a step; seconds are of the processor, and
medians; the ratio is the median of the ratios round by round.
"""

import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

import timm
import torch
from torch import nn

from benchmarks.measure import Step, inference, markdown, parser, ratio, training
from timm_mldecoder.models.probes import PROBES
from timm_mldecoder.runtime.errors import keep_freed_memory

HEADER = (
    'step',
    'default, s',
    'kept, s',
    'kept / default',
    'page faults, default',
    'kept',
    'peak MiB, default',
    'kept',
)
_step: Step  # of this process


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=5)
    flags.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES))
    flags.add_argument('--model', default='resnet50')
    flags.add_argument('--img-size', type=int, default=224)
    flags.add_argument('--batch-size', type=int, default=16)
    args = flags.parse_args(argv)
    return markdown(HEADER, [_row(case, args) for case in args.cases])


def _row(case: str, args) -> list[object]:
    start = dict(max_workers=1, mp_context=get_context('spawn'), initializer=_prepare)
    settings = (case, args.model, args.img_size, args.batch_size, torch.get_num_threads())
    with (
        ProcessPoolExecutor(**start, initargs=(False, *settings)) as default,
        ProcessPoolExecutor(**start, initargs=(True, *settings)) as kept,
    ):
        rounds = [[pool.submit(_measure).result() for pool in (default, kept)] for _ in range(args.rounds)]
    (before, faults, peak), (after, kept_faults, kept_peak) = (
        zip(*side, strict=True) for side in zip(*rounds, strict=True)
    )
    seconds = [median(before), median(after), ratio(after, before)]
    return [case, *seconds, int(median(faults)), int(median(kept_faults)), max(peak), max(kept_peak)]


def _prepare(kept: bool, case: str, model: str, size: int, batch_size: int, threads: int) -> None:
    global _step
    torch.set_num_threads(threads)
    if kept:
        keep_freed_memory()
    _step = CASES[case](model, size, batch_size)
    for _ in range(2):
        _step()


def _measure() -> tuple[float, int, int]:
    """Seconds and page faults of a step, and MiB of the process at its peak."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    _step()
    seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_minflt - before, after.ru_maxrss // 1024


def _images(size: int, batch_size: int) -> torch.Tensor:
    return torch.randn(batch_size, 3, size, size)


def _probe(model: str, size: int, batch_size: int) -> Step:
    """Four runs of ml_decoder_small on tokens of ViT-S/16."""
    heads = nn.ModuleList(PROBES['ml_decoder_small'](384, 80) for _ in range(4))
    tokens = torch.randn(batch_size, 196, 384).half()

    def step():
        x = tokens.float()
        for head in heads:
            head(x).square().mean().backward()
        heads.zero_grad()

    return step


CASES = {
    'training': lambda model, size, number: training(timm.create_model(model, ml_decoder=True), _images(size, number)),
    'inference': lambda model, size, number: inference(
        timm.create_model(model, ml_decoder=True), _images(size, number)
    ),
    'probe': _probe,
}


if __name__ == '__main__':
    print(main())
