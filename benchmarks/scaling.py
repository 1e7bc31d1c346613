"""What the cost grows with: classes, queries K, and tokens (image size), of the head and of a whole ResNet-50.

    python -m benchmarks.scaling [--device cuda]

Each row changes one thing of the base and is timed against it, run by run: 1000 classes, K = 100, 224 x 224 images.
"""

from statistics import median
from typing import NamedTuple

import timm
import torch

from benchmarks.measure import inference, markdown, paired_times, parser, peak_memory, ratio, training
from timm_mldecoder import MLDecoder

WIDTH, STRIDE = 2048, 32  # of ResNet-50's features


class Case(NamedTuple):
    num_classes: int = 1000
    num_queries: int = 100
    img_size: int = 224


BASE = Case()
CASES = {
    'classes': [Case(num_classes=n) for n in (100, 1000, 10_000, 100_000, 1_000_000)],
    'K': [Case(num_queries=n) for n in (20, 50, 100, 200, 400, 1000)],
    'image size': [Case(img_size=n) for n in (160, 224, 320, 448)],
}
FIELDS = {'classes': 'num_classes', 'K': 'num_queries', 'image size': 'img_size'}
WHOLE_MODEL_CLASSES = 100_000  # a larger table adds nothing but time
HEADER = (
    'what changes, to',
    *('head inference, ms', '× base', 'head training, ms', '× base', 'training MiB'),
    *('ResNet-50 inference, × base', 'training, × base'),
)


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=3)
    flags.add_argument('--batch-size', type=int, help='default: 8, on CUDA 64')
    flags.add_argument('--axes', nargs='+', choices=CASES, default=list(CASES), help='what to change')
    flags.add_argument('--most', type=int, default=1_000_000, help='leave out larger values')
    args = flags.parse_args(argv)
    batch_size = args.batch_size or (64 if args.device == 'cuda' else 8)
    rows = [
        _row(axis, getattr(case, FIELDS[axis]), case, batch_size, args.rounds, args.device)
        for axis in args.axes
        for case in CASES[axis]
        if getattr(case, FIELDS[axis]) <= args.most
    ]
    return markdown(HEADER, rows)


def _row(axis: str, value: int, case: Case, batch_size: int, rounds: int, device: str) -> list:
    row = [f'{axis}, {value:,}']
    heads = {c: _head(c).to(device) for c in (case, BASE)}
    features = {c: _features(c, batch_size, device) for c in heads}
    for kind in (inference, training):
        times = paired_times({c: kind(heads[c], features[c]) for c in heads}, rounds, device)
        row += [1e3 * median(times[case]), ratio(times[case], times[BASE])]
    row.append(peak_memory(training(heads[case], features[case]), device))
    if case.num_classes > WHOLE_MODEL_CLASSES:
        return [*row, None, None]
    models = {c: _model(c, device) for c in heads}
    images = {c: _images(c, batch_size, device) for c in heads}
    for kind in (inference, training):
        times = paired_times({c: kind(models[c], images[c]) for c in heads}, rounds, device)
        row.append(ratio(times[case], times[BASE]))
    return row


def _head(case: Case) -> MLDecoder:
    return MLDecoder(case.num_classes, case.num_queries, initial_num_features=WIDTH)


def _features(case: Case, batch_size: int, device: str) -> torch.Tensor:
    side = case.img_size // STRIDE
    features = torch.randn(batch_size, WIDTH, side, side, device=device)
    if device == 'cuda':
        features = features.bfloat16().contiguous(memory_format=torch.channels_last)
    return features.requires_grad_()


def _model(case: Case, device: str) -> torch.nn.Module:
    options = dict(num_of_groups=case.num_queries)
    model = timm.create_model('resnet50', num_classes=case.num_classes, ml_decoder=options).to(device)
    return model.to(memory_format=torch.channels_last) if device == 'cuda' else model


def _images(case: Case, batch_size: int, device: str) -> torch.Tensor:
    images = torch.randn(batch_size, 3, case.img_size, case.img_size, device=device)
    return images.contiguous(memory_format=torch.channels_last) if device == 'cuda' else images


if __name__ == '__main__':
    print(main())
