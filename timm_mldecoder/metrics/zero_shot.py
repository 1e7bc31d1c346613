"""Zero-shot evaluation: the unseen classes alone (ZSL), and together with the seen ones (GZSL)."""

import math
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
    """ZSL and GZSL metrics, all in percent (arXiv 2111.12933, section 3.2).

    `zsl_...` score the unseen classes alone, on the images that show at least one of them; `gzsl_...` score all classes
    on all images. `zsl_map` is the mAP; `zsl_p_top3`, `zsl_r_top3` and `zsl_f1_top3` are precision, recall and F1 over
    all labels when the 3 highest scores of each image are predicted, and so on for the top 5. Without an image that
    shows an unseen class, `zsl_...` are NaN. `loss` is that of all classes and images.

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
        self.num_seen = num_seen
        self._zsl = MultiLabelEvaluator(device, top_k=TOP_K)
        super().__init__(device, max_samples=max_samples, top_k=TOP_K, **options)

    @property
    def metric_names(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on top_k
        """Names of the metrics that `compute` returns, in its order."""
        return ('loss', *(f'{kind}_{name}' for kind in ('zsl', 'gzsl') for name in REPORTED))

    def reset(self) -> None:
        """Discard all images."""
        super().reset()
        self._zsl.reset()

    def update(self, output: Tensor, target: Tensor, unseen: Tensor | None = None) -> None:
        """Add logits and targets of all classes, both [B, C].

        Args:
            output: Logits when all classes are scored together.
            target: Targets of all classes.
            unseen: Logits when the unseen classes are scored alone [B, U], for heads in which the other classes matter
                (group decoding); None for the columns of `output`.
        """
        first = self.num_samples
        super().update(output, target)
        unseen = output[:, self.num_seen :] if unseen is None else unseen
        target = target[: self.num_samples - first, self.num_seen :]  # without the padding of a sampler
        shows_unseen = (target >= 0.5).any(1)
        self._zsl.update(unseen[: len(target)][shows_unseen], target[shows_unseen])

    def compute(self, distributed: bool = False) -> OrderedDict[str, float]:
        """Return every metric over all images of all ranks."""
        gzsl = super().compute(distributed)
        images, _ = self._zsl._extent(distributed)
        zsl = self._zsl.compute(distributed) if sum(images) else dict.fromkeys(gzsl, math.nan)
        metrics = OrderedDict(loss=gzsl['loss'])
        for kind, values in (('zsl', zsl), ('gzsl', gzsl)):
            metrics.update((f'{kind}_{name}', values[ours]) for name, ours in REPORTED.items())
        return metrics
