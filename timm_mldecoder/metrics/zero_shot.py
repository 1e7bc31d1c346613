"""Zero-shot evaluation: the unseen classes alone (ZSL), and together with the seen ones (GZSL), in one pass."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from timm_mldecoder.metrics.multilabel import MultiLabelEvaluator

TOP_K = (3, 5)
# name here: name of the multi-label evaluator
REPORTED = {'map': 'map'} | {
    f'{name}_top{k}': f'{ours}_top{k}' for k in TOP_K for name, ours in (('p', 'op'), ('r', 'or'), ('f1', 'of1'))
}


class ZeroShotEvaluator(MultiLabelEvaluator):
    """Metrics over two sets of columns of the same logits, all in percent (arXiv 2111.12933, section 3.2).

    `zsl_map` is the mAP of the unseen classes; `zsl_p_top3`, `zsl_r_top3` and `zsl_f1_top3` are precision, recall and
    F1 over all labels when the 3 highest scores of each image are predicted, and so on for the top 5. `gzsl_...` are
    the same for all classes. `loss` is that of all classes.

    Args:
        num_seen: Number of seen classes, the first columns; the others are unseen.
        device: The device of the model's outputs.
        max_samples: Ignore predictions beyond this number of images (padding of distributed samplers).
        **options: Options of `MultiLabelEvaluator`.
    """

    default_metric = 'zsl_map'

    def __init__(
        self, num_seen: int, device: torch.device | str | None = None, *, max_samples: int | None = None, **options: Any
    ):
        self._num_seen = num_seen
        self._zsl = MultiLabelEvaluator(device, max_samples=max_samples, top_k=TOP_K)
        super().__init__(device, max_samples=max_samples, top_k=TOP_K, **options)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics that `compute` returns, in its order."""
        return ('loss', *(f'{kind}_{name}' for kind in ('zsl', 'gzsl') for name in REPORTED))

    def reset(self) -> None:
        """Discard all images."""
        super().reset()
        self._zsl.reset()

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add logits and targets of all classes, both [B, C]."""
        super().update(output, target)
        self._zsl.update(output[:, self._num_seen :], target[:, self._num_seen :])

    def compute(self, distributed: bool = False) -> OrderedDict[str, float]:
        """Return every metric over all images of all ranks."""
        found = {'zsl': self._zsl.compute(distributed), 'gzsl': super().compute(distributed)}
        metrics = OrderedDict(loss=found['gzsl']['loss'])
        for kind, values in found.items():
            metrics.update((f'{kind}_{name}', values[ours]) for name, ours in REPORTED.items())
        return metrics
