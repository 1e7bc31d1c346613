"""Prints the peak memory in GiB that the evaluator adds on data of the size of Open Images."""

import resource

import torch

from timm_mldecoder.metrics import MultiLabelEvaluator


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


before, num_images, num_classes = peak(), 41_686, 9_605
evaluator = MultiLabelEvaluator()
for start in range(0, num_images, 128):
    logits = torch.randn(1, num_classes).repeat(min(128, num_images - start), 1)
    evaluator.update(logits, torch.randint(-1, 2, (num_classes,)).expand_as(logits))
evaluator.compute()
print(peak() - before)
