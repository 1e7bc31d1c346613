"""Runs of one head in a probe (4 learning rates x 3 seeds) beside one run, on cached features, and the floor of both.

    python -m benchmarks.probe_runs [--heads linear,efficient_probing] [--tokens 196] [--width 384] [--batch-size 32]

A step reads a batch from the cache, converts it to float32, and trains every run. What no step of 12 runs can do
without: the floor, which are their matrix products alone, of the same shapes, with those inside torch's fused
attention; one reading of the batch; the optimizer steps. Each cell is a median, ratios are medians of the ratios round
by round.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.measure import markdown, paired_times, parser, ratio
from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import train_options
from timm_mldecoder.models.probes import PROBES
from timm_mldecoder.probe.cache import FeatureCache
from timm_mldecoder.probe.features import read_together, training_groups
from timm_mldecoder.probe.options import HeadSpec
from timm_mldecoder.probe.train import Run, Trainer
from timm_mldecoder.runtime.errors import keep_freed_memory

HEADS = 'linear,max,logsumexp,efficient_probing,attention_pool,ml_decoder_small'
RATES, SEEDS = (1e-3, 3e-3, 1e-2, 3e-2), 3
CLASSES = 80
HEADER = (
    *('head', 'one run, ms', '12 runs, ms', '12 / one', 'floor, ms', 'reading, ms', 'optimizer, ms'),
    *('floor / one', 'all three / one', '12 / all three'),
)
# `_scaled_dot_product_...` are the fused kernels of the attention, forward and backward
PRODUCTS = ('aten::mm', 'aten::addmm', 'aten::bmm', 'aten::baddbmm', 'aten::_scaled_dot_product_')


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=5)
    flags.add_argument('--heads', default=HEADS)
    flags.add_argument('--tokens', type=int, default=196)
    flags.add_argument('--width', type=int, default=384)
    flags.add_argument('--batch-size', type=int, default=32)
    flags.add_argument('--steps', type=int, default=2, help='of a measurement')
    args = flags.parse_args(argv)
    keep_freed_memory()  # as the command
    with tempfile.TemporaryDirectory() as folder:
        cache = _write_cache(args, Path(folder))
        return markdown(HEADER, [_row(name, args, cache) for name in args.heads.split(',')])


def _row(name: str, args, cache: FeatureCache) -> list[object]:
    one, several = (_trainer(name, args, rates, seeds) for rates, seeds in ((RATES[:1], 1), (RATES, SEEDS)))
    with _Products() as products:
        _train(several, cache, args.batch_size)
    steps = {1: partial(_train, one, cache, args.batch_size), 12: partial(_train, several, cache, args.batch_size)}
    parts = dict(
        floor=products.replay, reading=partial(_read, one, cache, args.batch_size), optimizer=partial(_update, several)
    )
    times = paired_times({**steps, **parts}, args.rounds, args.device)
    in_ms = {key: 1e3 * median(several) / args.steps for key, several in times.items()}
    in_ms['optimizer'] *= args.steps  # `_update` is one step
    needed = [
        floor + reading + args.steps * optimizer
        for floor, reading, optimizer in zip(*(times[part] for part in parts), strict=True)
    ]
    ratios = ratio(times['floor'], times[1]), ratio(needed, times[1]), ratio(times[12], needed)
    return [name, in_ms[1], in_ms[12], ratio(times[12], times[1]), *(in_ms[part] for part in parts), *ratios]


def _trainer(name: str, args, rates: tuple[float, ...], seeds: int) -> Trainer:
    device = torch.device(args.device)
    options = train_options(data_dir='.', device=args.device, opt='adamw', task='multilabel')
    runs = [Run(HeadSpec(name, name, {}), rate, seed) for rate in rates for seed in range(seeds)]
    build = partial(PROBES[name], args.width, CLASSES)
    return Trainer(options, runs, lambda spec: build(), nn.BCEWithLogitsLoss(), lambda: None, World(device))


def _train(trainer: Trainer, cache: FeatureCache, batch_size: int) -> None:
    groups = training_groups(cache.number, batch_size, 0, 0)
    for step, batch in enumerate(read_together(cache, groups, trainer.world)):
        trainer.step(batch, step, 1.0)


def _read(trainer: Trainer, cache: FeatureCache, batch_size: int) -> None:
    for _ in read_together(cache, training_groups(cache.number, batch_size, 0, 0), trainer.world):
        pass


def _update(trainer: Trainer) -> None:
    for run in trainer.runs:
        run.optimizer.step()


def _write_cache(args, folder: Path) -> FeatureCache:
    number, shape = args.steps * args.batch_size, (args.tokens, args.width)
    settings = dict(class_token=False, views=1, shard=1024, device=torch.device(args.device))
    cache = FeatureCache(folder / 'train', {}, number=number, shape=shape, **settings)
    cache.begin()
    cache.write(cache.missing(), lambda images: (images, None), partial(_random_features, shape), 64, 0)
    return cache


def _random_features(shape: tuple[int, int], groups: list) -> Iterator[tuple[Tensor, Tensor]]:
    for group in groups:
        yield torch.randn(len(group), *shape), (torch.rand(len(group), CLASSES) < 0.05).float()


class _Products(TorchDispatchMode):
    """Records calls of matrix products, with one tensor for all arguments of the same shape and strides."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple] = []
        self._tensors: dict[tuple, Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().startswith(PRODUCTS):
            self._calls.append((function, *tree_map_only(Tensor, self._like, (args, kwargs or {}))))
        return function(*args, **(kwargs or {}))

    def _like(self, tensor: Tensor) -> Tensor:
        key = tensor.shape, tensor.stride()
        if key not in self._tensors:
            size = 1 + sum((length - 1) * stride for length, stride in zip(*key, strict=True))  # expanded ones share
            self._tensors[key] = torch.randn(size, device=tensor.device).as_strided(*key)
        return self._tensors[key]

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs in self._calls:
            function(*args, **kwargs)


if __name__ == '__main__':
    print(main())
