"""GFLOPs of the paper's models, beside the published figures.

    python -m benchmarks.flops [--tables 1 2 9 10 A]

A GFLOP here is 10^9 multiply-accumulates (MACs) of one image: those of convolutions and matrix products, attention
included, as the paper counts. Norms, activations and pooling do not count. Models are counted on the meta device, so
the figures are the same on every machine. Tables 1, 2, 9 and 10 are those of arXiv 2111.12933, A the README of the
code of arXiv 2209.06585. The transformer decoder is `benchmarks.peers.FullDecoder`: one query per class, full
self-attention among the queries.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import timm_mldecoder  # noqa: F401 - create_model takes ml_decoder
from benchmarks.measure import markdown
from benchmarks.peers import FullDecoder

HEADER = ('table', 'model', 'classes', 'head', 'GFLOPs', 'published', 'difference')
GAP, DECODER = 'GAP', 'transformer decoder'
XL = dict(layers=[3, 8, 34, 5])  # the reference's TResNet-XL


@dataclass(frozen=True)
class Case:
    """One row of a table."""

    table: str  # table of the paper
    model: str  # timm's name
    size: int  # image height and width
    classes: int  # number of classes C
    head: str | int  # `GAP`, `DECODER`, or the number of queries K of an ML-Decoder head
    published: float | None = None  # published GFLOPs, None where the paper gives none or we have no source for it
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the model

    @property
    def head_name(self) -> str:
        return f'ML-Decoder, K = {self.head}' if isinstance(self.head, int) else self.head


CASES = (
    Case('1', 'tresnet_m', 448, 80, GAP, 23.0),
    Case('1', 'tresnet_m', 448, 80, DECODER),
    Case('1', 'tresnet_m', 448, 80, 20, 23.6),
    Case('1', 'tresnet_m', 448, 80, 80, 23.9),
    Case('2', 'tresnet_m', 224, 9605, GAP),
    Case('2', 'tresnet_m', 224, 9605, 100),
    Case('2', 'tresnet_m', 224, 9605, 200),
    Case('2', 'tresnet_m', 224, 9605, 400),
    Case('9', 'tresnet_m', 224, 100, GAP),
    Case('9', 'tresnet_m', 224, 1000, GAP, 5.7),
    Case('9', 'tresnet_m', 224, 5000, GAP),
    Case('9', 'tresnet_m', 224, 100, DECODER),
    Case('9', 'tresnet_m', 224, 1000, DECODER, 14.2),
    Case('9', 'tresnet_m', 224, 5000, DECODER),
    Case('9', 'tresnet_m', 224, 100, 100, 6.3),
    Case('9', 'tresnet_m', 224, 1000, 100, 6.3),
    Case('9', 'tresnet_m', 224, 5000, 100, 6.4),
    Case('10', 'tresnet_v2_l', 224, 80, 80),
    Case('10', 'tresnet_v2_l', 448, 80, 80),
    Case('10', 'tresnet_v2_l', 640, 80, 80),
    Case('10', 'tresnet_v2_l', 640, 80, 80, model_kwargs=XL),
    Case('A', 'tf_efficientnetv2_s', 448, 80, 80, 12.28),
    Case('A', 'tf_efficientnetv2_l', 448, 80, 80, 49.92),
    Case('A', 'tresnet_v2_l', 448, 80, 80, 36.15),
)


def build(case: Case) -> nn.Module:
    """The model of a row, on torch's default device."""
    if case.head == DECODER:
        backbone = timm.create_model(case.model, num_classes=0, global_pool='', **case.model_kwargs)
        return nn.Sequential(backbone, FullDecoder(case.classes, backbone.num_features))
    head = dict(num_of_groups=case.head) if isinstance(case.head, int) else False
    return timm.create_model(case.model, num_classes=case.classes, ml_decoder=head, **case.model_kwargs)


@contextmanager
def count_products() -> Iterator[FlopCounterMode]:
    """Count floating-point operations, with attention as the matrix products it consists of.

    Which fused attention a version of torch counts, and on which device, differs.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def gflops(case: Case) -> float:
    """Multiply-accumulates of one image in evaluation mode, in 10^9."""
    with torch.device('meta'):
        model, image = build(case).eval().requires_grad_(False), torch.empty(1, 3, case.size, case.size)
    with count_products() as counter:
        model(image)
    return counter.get_total_flops() / 2e9  # the counter counts a multiply-accumulate as two


def main(argv: list[str] | None = None) -> str:
    flags = argparse.ArgumentParser(description=__doc__.partition('\n')[0], allow_abbrev=False)
    tables = list(dict.fromkeys(case.table for case in CASES))
    flags.add_argument('--tables', nargs='+', choices=tables, default=tables)
    args = flags.parse_args(argv)
    return markdown(HEADER, [_row(case) for case in CASES if case.table in args.tables])


def _row(case: Case) -> list:
    count = gflops(case)
    model = f'{case.model}{", XL layers" if case.model_kwargs else ""} at {case.size}'
    published = difference = None
    if case.published is not None:
        published, difference = f'{case.published:g}', f'{count - case.published:+.2f}'
    return [case.table, model, case.classes, case.head_name, f'{count:.2f}', published, difference]


if __name__ == '__main__':
    print(main())
