"""Zero-shot recognition of drawn shapes: how well are combinations recognized that no training scene shows?

    python -m benchmarks.zero_shot              full and group decoding, query augmentations, and a control; 3 seeds
    python -m benchmarks.zero_shot --ablations  the ablations of the paper's appendix B

One row per configuration: mean and sample standard deviation over the seeds of mAP and F1@3 (F1 of the 3 highest
scores). As in the paper, ZSL scores the unseen classes alone on the scenes that show one of them, GZSL all classes on
all scenes. `chance` is the mAP of random scores. The control is the same training with the label embeddings permuted
at random: what it reaches on unseen classes does not come from the embeddings. The dataset is that of
`benchmarks.shapes`, the model one of timm's of 0.4 million parameters, head included, from random weights.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import timm_mldecoder  # noqa: F401 - create_model takes ml_decoder
from benchmarks import shapes
from timm_mldecoder.losses import RandomQueryLoss
from timm_mldecoder.metrics.multilabel import MultiLabelEvaluator

HEAD = dict(decoder_embedding=64, num_heads=4, dim_feedforward=128, dropout=0.0)
BATCH = 32
NOISE, RANDOM, GROUPS = dict(query_noise=0.1), dict(random_queries=10), dict(num_of_groups=12)
WAYS = {
    'full decoding': {},
    'full, query noise': NOISE,
    'full, random queries': RANDOM,
    'full, both': {**NOISE, **RANDOM},
    'groups of 5': GROUPS,
    'control: shuffled label embeddings': dict(shuffled=True),
}
ABLATIONS = {
    'groups of 5: text query, text pooling': GROUPS,
    'groups of 5: text query, learned pooling': dict(GROUPS, classifier='learned'),
    'groups of 5: learned query, text pooling': dict(GROUPS, learnable_queries=True),
    'groups of 5: text query, learned shared pooling': dict(GROUPS, classifier='shared'),
}
COLUMNS = ['ZSL mAP', 'ZSL F1@3', 'GZSL mAP', 'GZSL F1@3']


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
def score(model: nn.Module, words: Tensor, images: Tensor, target: Tensor) -> list[float]:
    """Return mAP and F1@3, in percent, of the classes with the label embeddings `words`."""
    model.eval().get_classifier().set_word_embeddings(words)
    evaluator = MultiLabelEvaluator()
    for batch, wanted in zip(images.split(100), target.split(100), strict=True):
        evaluator.update(model(batch), wanted)
    metrics = evaluator.compute()
    return [metrics['map'], metrics['of1_top3']]


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('--ablations', action='store_true', help='learned and text queries and pooling, in groups')
    parser.add_argument('--seeds', type=int, default=3, help='runs per row, two or more (default: %(default)s)')
    parser.add_argument('--scenes', type=int, default=2000, help='training scenes (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=5, help='(default: %(default)s)')
    parser.add_argument('--validation-scenes', type=int, default=1000, help='(default: %(default)s)')
    options = parser.parse_args(argv)

    seen, unseen = shapes.split_classes()
    order = seen + unseen
    embeddings = dict(zip(shapes.CLASSES, shapes.embed_classes(), strict=True))
    words = torch.stack([embeddings[name] for name in order])
    scenes = draw(seen, seen, options.scenes, seed=1)
    images, target = draw(shapes.CLASSES, order, options.validation_scenes, seed=2)
    # ZSL: unseen classes on the scenes that show one; GZSL: all classes, all scenes
    shows_unseen = target[:, len(seen) :].any(1).nonzero().flatten()
    sets = [(shows_unseen, slice(len(seen), None)), (torch.arange(len(target)), slice(None))]
    sets = sets[:1] if options.ablations else sets
    chance = [f'{100 * target[rows, classes].mean():.1f} |' for rows, classes in sets]

    start = time.perf_counter()
    print(f'{options.scenes} scenes of {len(seen)} seen classes, {options.epochs} epochs, {options.seeds} seeds')
    columns = COLUMNS[: 2 * len(sets)]
    print(f'| way | {" | ".join(columns)} |')
    print('|---' * (len(columns) + 1) + '|')
    for way, head in (ABLATIONS if options.ablations else WAYS).items():
        head = dict(head)
        dealt = words
        if head.pop('shuffled', False):
            dealt = words[torch.randperm(len(words), generator=torch.Generator().manual_seed(0))]
        runs = []
        for seed in range(options.seeds):
            model = train(dealt[: len(seen)], *scenes, options.epochs, seed, **head)
            parts = [score(model, dealt[classes], images[rows], target[rows, classes]) for rows, classes in sets]
            runs.append(sum(parts, []))
        means, spreads = torch.tensor(runs).mean(dim=0), torch.tensor(runs).std(dim=0)
        cells = [f'{mean:.1f} ± {spread:.1f}' for mean, spread in zip(means, spreads, strict=True)]
        print(f'| {way} | {" | ".join(cells)} |', flush=True)
    print(f'| chance | {" | ".join(chance)} |')
    print(f'{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads')


if __name__ == '__main__':
    main()
