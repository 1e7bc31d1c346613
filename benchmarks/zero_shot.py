"""Zero-shot recognition of drawn shapes: how well are combinations recognised that no training scene shows?

    python benchmarks/zero_shot.py              full and group decoding, query augmentations, and a control; 3 seeds
    python benchmarks/zero_shot.py --ablations  the ablations of the paper's appendix B

One row a way: mean and spread (sample standard deviation) over the seeds of the mAP of the unseen classes (ZSL), of
seen and unseen together (GZSL), and F1 of the 3 highest scores. `chance` is the mAP of random scores. The control is
the same training with the label embeddings dealt out at random, so that they say nothing about the classes: what it
reaches on unseen classes is what can be had without the words. The set is that of `timm_mldecoder.data.shapes`, the
model one of timm's of 0.4 million parameters, head included, from random weights.
"""

import argparse
import time

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import timm_mldecoder  # noqa: F401 - create_model takes ml_decoder
from timm_mldecoder.data import shapes
from timm_mldecoder.losses import RandomQueryLoss
from timm_mldecoder.zero_shot_metrics import ZeroShotEvaluator

HEAD = dict(decoder_embedding=64, num_heads=4, dim_feedforward=128, dropout=0.0)
BATCH = 32
NOISE, RANDOM, GROUPS = dict(query_noise=0.1), dict(random_queries=10), dict(num_of_groups=12)
WAYS = {
    'full decoding': {},
    'full, query noise': NOISE,
    'full, random queries': RANDOM,
    'full, both': {**NOISE, **RANDOM},
    'groups of 5': GROUPS,
    'control: shuffled words': dict(shuffled=True),
}
ABLATIONS = {
    'groups of 5: word query, word pooling': GROUPS,
    'groups of 5: word query, learned pooling': dict(GROUPS, classifier='learned'),
    'groups of 5: learned query, word pooling': dict(GROUPS, learnable_queries=True),
    'groups of 5: learned query, learned pooling': dict(GROUPS, learnable_queries=True, classifier='learned'),
}
SHOWN = {'zsl_map': 'ZSL mAP', 'gzsl_map': 'GZSL mAP', 'zsl_f1_top3': 'ZSL F1@3', 'gzsl_f1_top3': 'GZSL F1@3'}


def draw(classes: list[str], order: list[str], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 3, H, W] in -1..1 and targets [count, len(order)]."""
    images, labels = shapes.draw_scenes(classes, count, np.random.default_rng([seed, count]))
    target = torch.zeros(count, len(order))
    for row, names in enumerate(labels):
        target[row, [order.index(name) for name in names]] = 1
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, target


def train(words: Tensor, images: Tensor, target: Tensor, epochs: int, seed: int, **head) -> nn.Module:
    """A model trained on scenes of the seen classes, whose embeddings are `words`."""
    torch.manual_seed(seed)
    model = timm.create_model('test_resnet', output_stride=8, ml_decoder=dict(HEAD, word_embeddings=words, **head))
    nn.init.constant_(model.get_classifier().bias, -4)  # about how rare a class is
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches, pct_start=0.2)
    loss = RandomQueryLoss(lambda logits, target: F.binary_cross_entropy_with_logits(logits, target, reduction='sum'))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: batches * BATCH].view(-1, BATCH):
            optimizer.zero_grad()
            (loss(model(images[batch]), target[batch]) / BATCH).backward()
            optimizer.step()
            schedule.step()
    return model


@torch.inference_mode()
def score(model: nn.Module, num_seen: int, words: Tensor, images: Tensor, target: Tensor) -> dict[str, float]:
    """Zero-shot metrics of a model that is asked for `words`, the seen classes first."""
    model.eval().get_classifier().set_word_embeddings(words)
    evaluator = ZeroShotEvaluator(num_seen)
    for batch, wanted in zip(images.split(100), target.split(100), strict=True):
        evaluator.update(model(batch), wanted)
    return evaluator.compute()


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ablations', action='store_true', help='learned and word queries and pooling, in groups')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--scenes', type=int, default=2000, help='training scenes (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=5, help='(default: %(default)s)')
    options = parser.parse_args()

    seen, unseen = shapes.split_classes()
    order = seen + unseen
    embeddings = dict(zip(shapes.CLASSES, shapes.embed_classes(), strict=True))
    words = torch.stack([embeddings[name] for name in order])
    scenes = draw(seen, seen, options.scenes, seed=1)
    validation = draw(shapes.CLASSES, order, 1000, seed=2)
    chance = 100 * validation[1].mean(dim=0)

    start = time.perf_counter()
    print(f'{options.scenes} scenes of {len(seen)} seen classes, {options.epochs} epochs, {options.seeds} seeds')
    print('| way | ' + ' | '.join(SHOWN.values()) + ' |')
    print('|---' * (len(SHOWN) + 1) + '|')
    for way, head in (ABLATIONS if options.ablations else WAYS).items():
        head = dict(head)
        dealt = words
        if head.pop('shuffled', False):
            dealt = words[torch.randperm(len(words), generator=torch.Generator().manual_seed(0))]
        runs = [
            score(train(dealt[: len(seen)], *scenes, options.epochs, seed, **head), len(seen), dealt, *validation)
            for seed in range(options.seeds)
        ]
        columns = [torch.tensor([run[name] for run in runs]) for name in SHOWN]
        spreads = [f'{column.mean():.1f} ± {column.std():.1f}' for column in columns]
        print(f'| {way} | ' + ' | '.join(spreads) + ' |', flush=True)
    print(f'| chance | {chance[len(seen) :].mean():.1f} | {chance.mean():.1f} | | |')
    print(f'{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads')


if __name__ == '__main__':
    main()
