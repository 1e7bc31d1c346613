"""Heads on a frozen backbone, compared: linear probes, attention pooling, efficient probing and ML-Decoder.

    python -m benchmarks.probing [FOLDER] [--quick] [--backbone vit] [--tables digits,pairs,...] [--seeds 3]

The backbone (timm's test_resnet at stride 8, or a small ViT with a class token) is trained on single digits and then
frozen. Heads are trained on its cached features of multi-label scenes (`benchmarks.digits`). Training,
validation and test digits are disjoint.

Every head has its own learning rate and, where a setting has several, its own number of steps: the best on the
validation split, with the first seed, of at least four rates for each number of steps. If the best rate is at an end of
the range, the range is extended. Scores are mAP on the test split, mean and standard deviation over the seeds. Prints
Markdown tables; writes `probing.png` and `probing.json` to FOLDER.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.digits import SceneOptions, compose_scene, load_split, scenes
from timm_mldecoder.models.probes import PROBES

BATCH_SIZE = 32
WEIGHT_DECAY = 0.01
LEARNING_RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2)
LIMITS = (1e-5, 5.0)  # of the extended range
HEADS = {
    'mean': PROBES['linear'],
    'max': PROBES['max'],
    'logsumexp': PROBES['logsumexp'],
    'attention_pool': PROBES['attention_pool'],
    'efficient_probing': PROBES['efficient_probing'],  # 32 queries as in its paper
    'efficient_probing_8': lambda *sizes: PROBES['efficient_probing'](*sizes, num_queries=8),
    'ml_decoder': lambda *sizes: PROBES['ml_decoder'](*sizes, dim=128, dim_feedforward=256),  # tokens are 96 wide
    'ml_decoder_small': PROBES['ml_decoder_small'],
    'class_token': PROBES['class_token'],  # of the ViT only
}
CURVE_POINTS = 5  # times that a run is scored on validation, in equal distances; the last after training
FINE_TUNED = ('mean', 'attention_pool', 'ml_decoder_small')


@dataclass(frozen=True)
class Setting:
    """One column of a table; every head is trained for each number of steps."""

    label: str
    scene: SceneOptions
    num_train: int = 1000
    steps: tuple[int, ...] = (200, 400)
    fine_tune: bool = False


class Trial(NamedTuple):
    """What determines a run in a setting."""

    head: str
    rate: float
    steps: int
    seed: int = 0


DIGITS = SceneOptions(size=64, sides=(10, 16), max_digits=6, max_classes=4, clutter=8)
PAIRS = replace(DIGITS, kind='pairs', min_digits=2, max_classes=10, clutter=4)
SWEPT = Setting('digits', DIGITS, steps=(400,))
TABLES: dict[str, tuple[str, list[Setting]]] = {
    'digits': ('Scenes of digits', [Setting('digits', DIGITS)]),
    'pairs': ('Pairs of digits: the evidence lies in two places', [Setting('pairs', PAIRS)]),
    'objects': (
        'Most digits per scene',
        [replace(SWEPT, label=str(n), scene=replace(DIGITS, max_digits=n)) for n in (2, 6, 10)],
    ),
    'clutter': (
        'Scrambled digits per scene',
        [replace(SWEPT, label=str(n), scene=replace(DIGITS, clutter=n)) for n in (0, 8, 14)],
    ),
    'size': (
        'Side of a digit in pixels, in scenes of 64 pixels',
        [
            replace(SWEPT, label=f'{low} to {high}', scene=replace(DIGITS, sides=(low, high)))
            for low, high in ((7, 10), (10, 16), (16, 24))
        ],
    ),
    'images': (
        'Training images',
        [replace(SWEPT, label=str(n), num_train=n) for n in (100, 300, 1000, 3000)],
    ),
    'fine-tuned': (
        'Frozen, and fine-tuned end to end',
        [replace(SWEPT, label='frozen'), replace(SWEPT, label='fine-tuned', steps=(150,), fine_tune=True)],
    ),
}


def normalize(images: Tensor) -> Tensor:
    """uint8 [B, S, S] to float [B, 1, S, S]."""
    return (images.unsqueeze(1).float() / 255 - 0.5) / 0.5


def single_digits(split: str, rng: np.random.Generator, size: int = 32) -> tuple[Tensor, Tensor]:
    """Every digit of a split once, in random order, each of a random size in a random place: uint8 [N, S, S]."""
    options = SceneOptions(size=size, sides=(10, 24), max_digits=1)
    images, classes = load_split(split)
    order = rng.permutation(len(images))
    placed = [compose_scene(images[[i]], classes[[i]], rng, options)[0] for i in order]
    return torch.from_numpy(np.stack(placed)), torch.from_numpy(classes[order])


def create_resnet() -> nn.Module:
    return timm.create_model('test_resnet', in_chans=1, num_classes=10, output_stride=8)


def create_vit() -> nn.Module:
    """A ViT of two blocks, pooled by its class token, on the 8 x 8 feature map of the same ResNet."""
    resnet = timm.create_model('test_resnet', in_chans=1, features_only=True, out_indices=(-1,), output_stride=8)
    stem = partial(HybridEmbed, backbone=resnet)
    settings = dict(embed_dim=96, depth=2, num_heads=4, embed_layer=stem)
    return VisionTransformer(img_size=DIGITS.size, patch_size=1, in_chans=1, num_classes=10, **settings)


# how a backbone is created, and the side of the images of single digits on which it is trained; a ViT's position
# embeddings are of one size of image, that of the scenes
BACKBONES = {'resnet': (create_resnet, 32), 'vit': (create_vit, DIGITS.size)}


def train_backbone(name: str, epochs: int) -> nn.Module:
    """Train a backbone on single digits with its own pooling and a linear classifier."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    create, size = BACKBONES[name]
    model = create()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    epoch = [single_digits('train', rng, size) for _ in range(epochs)]
    batches = [(x, y) for images, classes in epoch for x, y in zip(images.split(64), classes.split(64), strict=True)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(len(batches), 20), pct_start=0.1)
    for images, classes in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(normalize(images)), classes, label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    images, classes = single_digits('validation', rng, size)
    with torch.no_grad():
        accuracy = (model(normalize(images)).argmax(dim=1) == classes).float().mean().item()
    print(f'backbone: {100 * accuracy:.1f} % top-1 on single digits of the validation split\n', flush=True)
    return model.requires_grad_(False)


def tokens(backbone: nn.Module, images: Tensor) -> Tensor:
    """Images [B, S, S] to tokens [B, N, F]; the first is the class token, if there is one."""
    features = backbone.forward_features(normalize(images))
    return features if features.ndim == 3 else features.flatten(2).transpose(1, 2)


@dataclass
class Data:
    """Inputs (cached tokens, or images) and targets of the three splits."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]


def load(setting: Setting, backbone: nn.Module, num_held_out: int) -> Data:
    inputs, targets = {}, {}
    for split, count in (('train', setting.num_train), ('validation', num_held_out), ('test', num_held_out)):
        images, labels = zip(*scenes(split, count, setting.scene), strict=True)
        images = torch.from_numpy(np.stack(images))
        targets[split] = torch.from_numpy(np.stack(labels)).float()
        with torch.no_grad():
            cached = images if setting.fine_tune else torch.cat([tokens(backbone, x) for x in images.split(100)])
        inputs[split] = cached
    return Data(inputs, targets)


class Run:
    """One head in training."""

    def __init__(self, trial: Trial, head: Callable, backbone: nn.Module, setting: Setting) -> None:
        torch.manual_seed(trial.seed)
        self.trial = trial
        self.head = head(backbone.num_features, len(setting.scene.class_names))
        self.num_parameters = sum(p.numel() for p in self.head.parameters())
        self.backbone = copy.deepcopy(backbone).requires_grad_(True) if setting.fine_tune else None
        self.prefix = getattr(backbone, 'num_prefix_tokens', 0)  # class tokens
        parameters = [*self.head.parameters(), *(self.backbone.parameters() if setting.fine_tune else ())]
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, trial.rate, total_steps=trial.steps, pct_start=0.1
        )
        self.seconds = 0.0
        self.curve: list[tuple[int, float]] = []  # steps, and mAP on validation after them
        self.train(True)

    @property
    def validation(self) -> float:
        """mAP on validation after training."""
        return self.curve[-1][1]

    def train(self, mode: bool) -> None:
        for module in (self.head, self.backbone):
            if module is not None:
                module.train(mode)

    def logits(self, inputs: Tensor) -> Tensor:
        features = inputs if self.backbone is None else tokens(self.backbone, inputs)
        return self.head(features[:, self.prefix :], features[:, 0] if self.prefix else None)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(self.logits(inputs), targets).backward()
        self.optimizer.step()
        self.schedule.step()
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def score(self, data: Data, split: str) -> float:
        """mAP in percent."""
        self.train(False)
        logits = torch.cat([self.logits(x) for x in data.inputs[split].split(100)])
        self.train(True)
        return 100 * average_precision_score(data.targets[split].numpy(), logits.nan_to_num(0).numpy(), average='macro')


def train_side_by_side(
    trials: Iterable[Trial], data: Data, backbone: nn.Module, setting: Setting, heads: dict[str, Callable]
) -> list[Run]:
    """Train heads; those of one seed get the same batches."""
    runs = [Run(trial, heads[trial.head], backbone, setting) for trial in trials]
    for seed in sorted({run.trial.seed for run in runs}):
        several = [run for run in runs if run.trial.seed == seed]
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        for step in range(1, max(run.trial.steps for run in several) + 1):
            while len(order) < BATCH_SIZE:
                order = torch.cat([order, torch.randperm(setting.num_train, generator=generator)])
            batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
            inputs, targets = data.inputs['train'][batch], data.targets['train'][batch]
            for run in several:
                steps = run.trial.steps
                if step > steps:
                    continue
                run.step(inputs, targets)
                if step % max(steps // CURVE_POINTS, 1) == 0 or step == steps:
                    run.curve.append((step, run.score(data, 'validation')))
    return runs


def compare(
    setting: Setting, backbone: nn.Module, heads: dict[str, Callable], seeds: int, num_held_out: int
) -> tuple[dict[str, dict], dict[str, nn.Module]]:
    """The score of each head at its best learning rate and number of steps, and the heads of the first seed."""
    data = load(setting, backbone, num_held_out)
    scale = 0.25 if setting.fine_tune else 1.0  # a whole network wants smaller rates
    tried: dict[tuple[str, int], list[Run]] = {(name, steps): [] for name in heads for steps in setting.steps}
    todo = [Trial(name, scale * rate, steps) for name, steps in tried for rate in LEARNING_RATES]
    while todo:
        for run in train_side_by_side(todo, data, backbone, setting, heads):
            name, rate, steps, _ = run.trial
            tried[name, steps].append(run)
            print(
                f'{setting.label}: {name} at {rate:.2g}, {steps} steps: {run.validation:.1f}',
                file=sys.stderr,
                flush=True,
            )
        todo = []
        for (name, steps), runs in tried.items():
            rates = [run.trial.rate for run in runs]
            best = max(runs, key=lambda run: run.validation).trial.rate
            further = {min(rates): best / 4, max(rates): best * 4}.get(best)
            if further is not None and LIMITS[0] < further < LIMITS[1]:
                todo.append(Trial(name, further, steps))
    results, trained = {}, {}
    for name in heads:
        of_head = [run for steps in setting.steps for run in tried[name, steps]]
        best = max(of_head, key=lambda run: run.validation)
        others = [best.trial._replace(seed=seed) for seed in range(1, seeds)]
        runs = [best, *train_side_by_side(others, data, backbone, setting, heads)]
        scores = [run.score(data, 'test') for run in runs]
        results[name] = {
            'mean': statistics.mean(scores),
            'std': statistics.stdev(scores) if seeds > 1 else 0.0,
            'rate': best.trial.rate,
            'steps': best.trial.steps,
            'tried': [(run.trial.steps, run.trial.rate, run.validation) for run in of_head],
            'parameters': best.num_parameters,
            'seconds': statistics.mean(run.seconds for run in runs),
            'curves': [run.curve for run in runs],
        }
        trained[name] = best.head.eval()
    return results, trained


def heads_of(columns: dict[str, dict]) -> list[str]:
    """The heads that every column of a table has."""
    first, *others = columns.values()
    return [head for head in first if all(head in other for other in others)]


def print_table(title: str, columns: dict[str, dict]) -> None:
    first = next(iter(columns.values()))
    print(f'### {title}\n')
    print(f'| head | parameters | seconds | {" | ".join(columns)} | learning rates and steps |')
    print('|---|---|---|' + '---|' * (len(columns) + 1))
    for name in heads_of(columns):
        cells = [f'{column[name]["mean"]:.1f} ± {column[name]["std"]:.1f}' for column in columns.values()]
        rates = ', '.join(f'{column[name]["rate"]:.2g} × {column[name]["steps"]}' for column in columns.values())
        row = first[name]
        print(f'| {name} | {row["parameters"]:,} | {row["seconds"]:.1f} | {" | ".join(cells)} | {rates} |')
    print(flush=True)


def plot(tables: dict[str, dict[str, dict]], path: Path) -> None:
    """One panel per table: lines over its columns, or bars if it has one column."""
    figure = Figure(figsize=(4.2 * len(tables), 3.8))
    panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axis, (name, columns) in zip(panels, tables.items(), strict=True):
        for head in heads_of(columns):
            means, spread = ([column[head][key] for column in columns.values()] for key in ('mean', 'std'))
            color = f'C{list(HEADS).index(head)}'  # the same in every panel
            if len(columns) == 1:
                axis.bar([head], means, yerr=spread, capsize=2, color=color)
            else:
                axis.errorbar(list(columns), means, yerr=spread, label=head, marker='.', capsize=2, color=color)
        if len(columns) == 1:
            axis.tick_params(axis='x', labelrotation=90, labelsize=7)
        else:
            axis.legend(fontsize=6)
        axis.set_title(TABLES[name][0], fontsize=8)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel('test mAP')
    figure.savefig(path, dpi=120, bbox_inches='tight')
    print(f'plot: {path}')


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('folder', type=Path, nargs='?', default=Path('output/probing'), help='for the plot and results')
    parser.add_argument('--quick', action='store_true', help='two tables, one seed, a few steps: to see that it runs')
    parser.add_argument('--backbone', choices=BACKBONES, default='resnet', help='(default: %(default)s)')
    parser.add_argument('--tables', help=f'of {", ".join(TABLES)}; separated by commas (default: all)')
    parser.add_argument('--heads', help=f'of {", ".join(HEADS)}; separated by commas (default: all)')
    parser.add_argument('--seeds', type=int, default=3, help='runs of each head at its best learning rate')
    options = parser.parse_args(arguments)
    chosen = options.tables.split(',') if options.tables else ['digits', 'pairs'] if options.quick else list(TABLES)
    usable = [name for name in HEADS if name != 'class_token' or options.backbone == 'vit']
    heads = options.heads.split(',') if options.heads else usable
    for names, table in ((chosen, TABLES), (heads, usable)):
        unknown = [name for name in names if name not in table]
        if unknown:
            parser.error(f'unknown {", ".join(unknown)}; choose of {", ".join(table)}')
    seeds, num_held_out = (1, 100) if options.quick else (options.seeds, 600)
    options.folder.mkdir(parents=True, exist_ok=True)

    backbone = train_backbone(options.backbone, epochs=1 if options.quick else 15)
    tables, done = {}, {}
    for name in chosen:
        title, settings = TABLES[name]
        tables[name] = {}
        for setting in settings:
            if options.quick:
                setting = replace(setting, num_train=100, steps=(12, 24))  # not 10: no warmup
            names = [head for head in heads if not setting.fine_tune or head in FINE_TUNED]
            key = replace(setting, label='')
            if key not in done:
                done[key], _ = compare(setting, backbone, {head: HEADS[head] for head in names}, seeds, num_held_out)
            tables[name][setting.label] = done[key]
            (options.folder / 'probing.json').write_text(json.dumps(tables, indent=2))
        print_table(title, tables[name])
    plot(tables, options.folder / 'probing.png')


if __name__ == '__main__':
    main()
