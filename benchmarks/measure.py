"""What every benchmark shares: paired times, peak memory, the machine in words, and the Markdown table."""

import argparse
import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torch import nn

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # torch's profiler announces itself on standard error

MIB = 2**20
Step = Callable[[], object]


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    flags = argparse.ArgumentParser(description=description.partition('\n')[0], allow_abbrev=False)
    flags.add_argument('--device', default='cpu', choices=('cpu', 'cuda'), help='cuda runs in bfloat16, channels-last')
    flags.add_argument('--rounds', type=int, default=rounds, help='paired, alternating runs, at the least')
    return flags


def machine(device: str) -> str:
    """Device, threads, torch version and date, as one line."""
    if device == 'cuda':
        name = f'{torch.cuda.get_device_name()}, bfloat16'
    else:
        threads = torch.get_num_threads()
        name = f'{_cpu_name()}, {f"{threads} threads" if threads > 1 else "1 thread, processor time"}, float32'
    return f'{name}, torch {torch.__version__}, {date.today().isoformat()}'


def paired_times(
    steps: Mapping[Hashable, Step],
    rounds: int,
    device: str = 'cpu',
    warmup: int = 1,
    seconds: float = 1.0,
    workers: int = 0,
) -> dict[Hashable, list[float]]:
    """Seconds of each step in each round; the steps of a round follow each other, so a slow spell hits them all.

    At least `rounds` rounds, and more until they took `seconds` together: short steps need more of them. On one CPU
    thread without workers these are seconds of the processor, which other work on the machine does not lengthen.
    """
    of_processor = device == 'cpu' and torch.get_num_threads() == 1 and not workers
    clock = time.process_time if of_processor else time.perf_counter
    for step in list(steps.values()) * warmup:
        _seconds(step, device, clock)
    times = {name: [] for name in steps}
    start = time.perf_counter()
    while rounds > 0 or time.perf_counter() - start < seconds:
        for name, step in steps.items():
            times[name].append(_seconds(step, device, clock))
        rounds -= 1
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios round by round."""
    return median(time / other for time, other in zip(times, base, strict=True))


def peak_memory(step: Step, device: str = 'cpu') -> float:
    """The most MiB that `step` held at a time above what was allocated before it.

    Counted where torch allocates, so exact and the same in every run; scratch space inside a CPU library is left out.
    """
    step()  # what is allocated once only
    if device == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, 'trace.json')
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    changes = [event['args'] for event in events if event.get('name') == '[memory]']
    before = changes[0]['Total Allocated'] - changes[0]['Bytes']  # the profiler counts on from an earlier profile
    return (max(change['Total Allocated'] for change in changes) - before) / MIB


def inference(model: nn.Module, x: torch.Tensor) -> Step:
    """A forward pass as a user runs it: eval mode, no gradients, bfloat16 autocast on CUDA."""
    model.eval()

    def step():
        model.eval()
        with torch.inference_mode(), autocast(x):
            return model(x)

    return step


def training(model: nn.Module, x: torch.Tensor) -> Step:
    """Forward and backward in training mode, to gradients of the parameters and, where `x` asks for one, of `x`."""

    def step():
        model.train()
        with autocast(x):
            logits = model(x)
        logits.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
        x.grad = None

    return step


def autocast(x: torch.Tensor):
    return torch.autocast('cuda', torch.bfloat16) if x.is_cuda else contextlib.nullcontext()


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """One Markdown table; the first column to the left, the others to the right."""
    lines = [list(header), ['---', *['---:'] * (len(header) - 1)], *([_cell(cell) for cell in row] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return '–'
    if isinstance(value, float):
        decimals = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
        return f'{value:,.{decimals}f}'
    return f'{value:,}' if isinstance(value, int) else str(value)


def _seconds(step: Step, device: str, clock: Callable[[], float]) -> float:
    if device == 'cuda':
        torch.cuda.synchronize()
    start = clock()
    step()
    if device == 'cuda':
        torch.cuda.synchronize()
    return clock() - start


def _cpu_name() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.processor() or platform.machine())
