"""What the project aims at, and what the tables of docs/performance.md say about it."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.measure import markdown

HEADER = ('what', 'aim', 'measured', 'result')
NUMBER = re.compile(r'-?[\d,]*\d(\.\d+)?')


class Aim(NamedTuple):
    """One row of the summary."""

    what: str  # what is measured
    bound: float  # the figure that is aimed at; infinite for none
    least: bool  # whether the figure must be at least `bound`; otherwise at most
    table: str  # label of the table on the page
    column: int  # its column, counted from 0
    rows: str = ''  # pattern of the first cell of the rows that count
    why: str = ''  # why it is missed, said only where it is


AIMS = (
    Aim('head, inference, over its matrix products alone', 1.15, False, 'head cpu', 2),
    Aim('head, training step, over its matrix products alone', 1.25, False, 'head cpu', 6),
    Aim(
        'head, most memory of a training step, over what the backward pass reads', 1.15, False, 'saved_tensors cpu', 1,
        '^over all', 'where it peaks, the gradients of the hidden layer and of two weights lie beside what is kept',
    ),
    Aim(
        'head, inference, over the published algorithm', 0.90, False, 'head cpu', 3,
        why='at batch 1 both mostly read the same weights',
    ),
    Aim(
        'head, training step, over the published algorithm, 1,000 classes, batch 16', 0.85, False, 'head cpu', 7,
        '^1,000, .* 16$', 'most of the step are matrix products that both share',
    ),
    Aim('train.py, throughput of a plain loop, ResNet-18 at 64 pixels', 0.99, True, 'train_loop cpu', 2, 'train.py'),
    Aim('validate.py, throughput of a plain loop', 0.98, True, 'validate_loop cpu', 2, 'validate.py'),
    Aim("train.py to its first optimizer step, % more than timm's script", 0, False, 'startup cpu', 3, '^train.py'),
    Aim('`import torch` and `import timm` with the plug-in, % more', 1, False, 'startup cpu', 3, 'import'),
    Aim('1.28 million files to the dataset of train.py, seconds', math.inf, False, 'million_images cpu', 3, 'train'),
    Aim('10,000 classes, ResNet-50 training, over 1,000', 1.05, False, 'scaling cpu', 7, 'classes, 10,000'),
    Aim('1,000,000 classes, K = 1000, AdamW: GiB of a step', 24, False, 'million_classes cpu', 5),
    Aim('GPU: head, training step, over the published algorithm', 0.40, False, 'head cuda', 7, ', 100, .* 128$'),
    Aim('GPU: ResNet-50, inference throughput over GAP', 0.95, True, 'model cuda', 3, '^resnet50'),
    Aim('GPU: ResNet-50, training throughput over GAP', 0.92, True, 'model cuda', 6, '^resnet50'),
)  # fmt: skip


def summary(page: str) -> str:
    """Return the table of aims, with the figures of the tables on a page."""
    return markdown(HEADER, [_row(aim, page) for aim in AIMS])


def _row(aim: Aim, page: str) -> list[str]:
    bound = '–' if math.isinf(aim.bound) else f'{"≥" if aim.least else "≤"} {aim.bound:g}'
    figures = list(_figures(aim, page))
    if not figures:
        gpu = aim.table.endswith('cuda')
        return [aim.what, bound, '–', 'not run: no GPU was at hand' if gpu else 'not run']
    low, high = min(figures, key=_value), max(figures, key=_value)
    measured = low if low == high else f'{low} to {high}'
    if math.isinf(aim.bound):
        return [aim.what, bound, measured, 'no aim']
    worst = _value(low if aim.least else high)
    if worst >= aim.bound if aim.least else worst <= aim.bound:
        return [aim.what, bound, measured, 'met']
    by = f'missed by {abs(worst / aim.bound - 1):.0%}' if aim.bound else 'missed'
    return [aim.what, bound, measured, f'{by}: {aim.why}' if aim.why else by]


def _figures(aim: Aim, page: str) -> Iterator[str]:
    place = re.search(rf'<!-- {aim.table} -->\n(.*?)<!-- end -->', page, re.DOTALL)
    for line in place[1].splitlines() if place else ():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        chosen = len(cells) > aim.column and re.search(aim.rows, cells[0])
        if chosen and NUMBER.fullmatch(cells[aim.column]):
            yield cells[aim.column]


def _value(figure: str) -> float:
    return float(figure.replace(',', ''))
