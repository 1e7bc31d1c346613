"""Losses and metrics of classes that are divided over ranks, beside those of whole logits: `divided_classes.py`.

Printed: the losses that agree, of which `exchanged` ones send logits.
"""

import torch
import torch.distributed as dist
from timm.loss import create_classification_loss
from timm.task import ClassificationEvaluator
from torch import nn

from benchmarks.shards import Sent
from timm_mldecoder.distributed.classes import ClassPart
from timm_mldecoder.distributed.losses import divide_loss
from timm_mldecoder.distributed.metrics import divide_evaluator
from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.losses import create_loss
from timm_mldecoder.metrics import MultiLabelEvaluator

CLASSES, IMAGES = 121, 6
SINGLE, MIXED, SEVERAL, PARTIAL = 'class indices', 'mixed', 'several labels', 'partial labels'


def losses():
    """Yield kinds of targets, and losses for them."""
    weight = torch.linspace(0.5, 2, CLASSES)
    timm = create_classification_loss
    yield SINGLE, nn.CrossEntropyLoss()
    yield SINGLE, nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    yield MIXED, nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    yield SINGLE, nn.CrossEntropyLoss(reduction='sum')
    yield SINGLE, timm('ce', smoothing=0.1)
    yield MIXED, timm('ce', soft_targets=True)
    yield SINGLE, timm('bce', smoothing=0.1, class_weight=weight)
    yield SINGLE, timm('bce', smoothing=0.1, bce_sum=True, pos_weight=2.0)
    yield MIXED, timm('bce', soft_targets=True, bce_target_thresh=0.3)
    yield SEVERAL, timm('bce', multi_label=True, smoothing=0.1, bce_sum=True, pos_weight=weight)
    yield SINGLE, timm('asl')
    yield SINGLE, timm('poly')
    for reduction in ('mean', 'batchmean', 'sum'):
        yield SEVERAL, timm('asl', multi_label=True, asl_reduction=reduction, class_weight=weight, pos_weight=weight)
        yield PARTIAL, create_loss('asl', reduction=reduction)
    yield SEVERAL, timm('poly', multi_label=True, smoothing=0.1)
    yield SEVERAL, timm('zlpr', multi_label=True)
    yield SEVERAL, create_loss('bce', smoothing=0.1)
    yield SEVERAL, create_loss('aam', scale=None, gamma_neg=1.0)
    yield PARTIAL, create_loss('hill', reduction='mean')
    yield PARTIAL, create_loss('splc', smoothing=0.1)
    for mode in ('ignore', 'ignore_normalize_classes', 'negative', 'selective'):
        yield PARTIAL, create_loss('csl', mode=mode)
    yield PARTIAL, create_loss('csl', class_prior=torch.linspace(0, 0.1, CLASSES))
    yield PARTIAL, create_loss('csl', likelihood_topk=1000)
    yield PARTIAL, create_loss('csl', likelihood_topk=0)


def targets(kind, images):
    if kind == SINGLE:
        return torch.randint(CLASSES, (images,))
    if kind == MIXED:
        return torch.rand(images, CLASSES).softmax(1)
    return torch.randint(-1 if kind == PARTIAL else 0, 2, (images, CLASSES)).float()


def check_losses(part, rows):
    """Print the losses that agree."""
    for kind, loss in losses():
        torch.manual_seed(0)
        logits = (3 * torch.randn(part.ranks * IMAGES, CLASSES)).requires_grad_()
        target = targets(kind, len(logits))
        parts = [loss(*values) for values in zip(logits.split(IMAGES), target.split(IMAGES), strict=True)]
        expected = torch.stack(parts).mean()
        expected.backward()

        own = logits.detach()[:, part.own].clone().requires_grad_()
        with Sent() as sent:
            found = divide_loss(loss, part)(own, target[rows])
            found.backward()
        dist.all_reduce(found.detach())
        name = f'{type(loss).__name__}: {kind}'
        torch.testing.assert_close(found / part.ranks, expected, msg=lambda text, name=name: f'{name}: {text}')
        wanted = part.ranks * logits.grad[:, part.own]
        torch.testing.assert_close(own.grad, wanted, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f'{n}: {text}')
        of_logits = 4 * IMAGES * CLASSES * (part.ranks - 1) / part.ranks
        labels = of_logits if target.dim() == 2 else 0
        exchanged = sent.bytes >= 2 * of_logits
        if not exchanged and getattr(loss, 'likelihood_topk', 0) < CLASSES:
            assert sent.bytes <= labels + of_logits / 2, (name, sent.bytes)
        if part.rank == 0:
            print('exchanged' if exchanged else 'divided', name)


def check_metrics(part, kind, create, images):
    """Compare with an evaluator of whole logits; the last rank's sampler has padded its images."""
    torch.manual_seed(1)
    whole, divided = create(), create(max_samples=images - 2 if part.rank == part.ranks - 1 else images)
    divide_evaluator(divided, part)
    batches = [3 * torch.randn(part.ranks, IMAGES, CLASSES) for _ in range(images // IMAGES)]
    for number, logits in enumerate(batches):
        target = targets(kind, part.ranks * IMAGES).unflatten(0, (part.ranks, IMAGES))
        divided.update(logits.flatten(0, 1)[:, part.own], target[part.rank])
        valid = IMAGES - 2 if number == len(batches) - 1 else IMAGES
        for rank in range(part.ranks):
            count = valid if rank == part.ranks - 1 else IMAGES
            whole.update(logits[rank][:count], target[rank][:count])
    expected, found = whole.compute(), divided.compute(distributed=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=lambda text, n=name: f'{n}: {text}')


def main() -> None:
    with join_world('cpu') as world:
        part = ClassPart(CLASSES, -(-CLASSES // world.size), world.rank, world.size)
        check_losses(part, slice(world.rank * IMAGES, (world.rank + 1) * IMAGES))
        check_metrics(part, SINGLE, ClassificationEvaluator, 18)
        check_metrics(part, PARTIAL, lambda **options: MultiLabelEvaluator(top_k=(1, 3, 25), **options), 18)


if __name__ == '__main__':
    main()
