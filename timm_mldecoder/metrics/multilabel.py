"""Multi-label metrics beside timm's: ignored labels, class-wise and overall precision and recall, tuned thresholds.

All metrics are exact, also across ranks: none is a mean of per-rank metrics. Memory grows by one float32 score and one
int8 target per entry, in main memory of the rank that saw the image: 5 bytes, so 2.0 GB for the 41,686 images and 9,605
classes of Open Images, divided among the ranks. Metrics are computed a few classes at a time (see `CHUNK`). Measured:
2.4 GiB in all; timm's evaluator takes 2.4 GiB for an eighth of the images.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor

_logger = logging.getLogger(__name__)

CHUNK = 1 << 22  # entries sorted at once; a sort and its cumulative sums need about 60 bytes per entry, 0.25 GB in all
MEAN_AP = ('map', 'map_partial', 'map_weighted')
PRECISION_RECALL = ('cp', 'cr', 'cf1', 'op', 'or', 'of1')  # names of the values of `precision_recall`


def average_precision(scores: Tensor, target: Tensor) -> Tensor:
    """Return the non-interpolated average precision of each class.

    Equal to `sklearn.metrics.average_precision_score`: equal scores share one threshold, and a class without positives
    has AP 0. A class with a NaN score has AP NaN.

    Args:
        scores: Scores or logits, [N, C].
        target: 1 positive, 0 negative, below 0 ignored, [N, C].

    Returns:
        Float64 [C], in [0, 1].
    """
    _, true_positives, predicted, ends = _operating_points(scores, target)
    before = F.pad(torch.where(ends, true_positives, 0).cummax(0).values[:-1], (0, 0, 1, 0))
    gained = torch.where(ends, true_positives - before, 0)
    precision = true_positives.double() / predicted.clamp(min=1)
    result = (gained * precision).sum(0) / true_positives[-1].clamp(min=1)
    return result.masked_fill(scores.isnan().any(0), math.nan)


def read_threshold_metric(metric: str) -> float | None:
    """Return the precision P of 'precision=P', None for 'f1' and 'mcc'.

    Raises:
        ValueError: If the metric is none of these.
    """
    if metric in ('f1', 'mcc'):
        return None
    name, _, value = metric.partition('=')
    try:
        least = float(value)
    except ValueError:
        least = math.nan
    if name != 'precision' or not 0 < least <= 1:
        raise ValueError(f'--threshold-metric {metric}: expected f1, mcc, or precision=P with P in (0, 1]')
    return least


def threshold_quality(counts: tuple[Tensor, Tensor, Tensor, Tensor], metric: str = 'f1') -> Tensor:
    """Return how good predictions are, the higher the better; float64 of the shape of the counts.

    Args:
        counts: True positives, predictions, positives and annotated entries, which broadcast.
        metric: 'f1'; 'mcc' (Matthews' correlation coefficient, in [-1, 1]); or 'precision=P': the recall where the
            precision is at least P, below that the precision - 1, so that the highest recall at P wins, else the
            highest precision.

    Raises:
        ValueError: If the metric is none of these.
    """
    right, predicted, positive, annotated = (count.double() for count in counts)
    least = read_threshold_metric(metric)
    if metric == 'f1':
        return 2 * right / (predicted + positive).clamp(min=1)
    if least is None:
        spread = predicted * positive * (annotated - predicted) * (annotated - positive)
        return torch.where(spread > 0, (right * annotated - predicted * positive) / spread.clamp(min=1).sqrt(), 0)
    precision = _ratio(right, predicted)
    return torch.where(precision >= least, _ratio(right, positive.expand_as(right)), precision - 1)


def best_thresholds(scores: Tensor, target: Tensor, metric: str = 'f1') -> Tensor:
    """Return the best threshold of each class when `score >= threshold` is positive, by F1 unless another is given.

    It lies midway between the scores it separates; of equally good thresholds the highest.

    Args:
        scores: Scores, [N, C].
        target: 1 positive, 0 negative, below 0 ignored, [N, C].
        metric: What is to be highest, see `threshold_quality`.

    Returns:
        Float64 [C], each exact in the scores' own precision; 0.5 for classes without a positive.
    """
    ranked, true_positives, predicted, ends = _operating_points(scores, target)
    quality = threshold_quality((true_positives, predicted, true_positives[-1], predicted[-1]), metric)
    last = torch.where(ends, quality, -math.inf).argmax(0, keepdim=True)
    lowest_above = ranked.gather(0, last)
    highest_below = F.pad(ranked[1:], (0, 0, 0, 1)).gather(0, last)  # after the last score: 0
    midway = (lowest_above + highest_below) / 2
    threshold = torch.where(midway > highest_below, midway, lowest_above)[0]  # neighbouring floats have no middle
    return torch.where(true_positives[-1] > 0, threshold, 0.5).double()


def _operating_points(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the counts for a threshold at each rank.

    Returns:
        All [N, C], from the highest score down: the scores, the number of positives and of annotated entries so far,
        and whether the rank is the last of those that share its score.
    """
    ranked, order = scores.sort(dim=0, descending=True)
    target = target.gather(0, order)
    ends = torch.ones_like(ranked, dtype=torch.bool)
    ends[:-1] = ranked[:-1] != ranked[1:]
    return ranked, (target == 1).cumsum(0), (target >= 0).cumsum(0), ends


def precision_recall(counts: Tensor) -> dict[str, float]:
    """Return class-wise and overall precision, recall and F1, in [0, 1] (arXiv 1904.03582, section 4.1).

    CP and CR are means over classes and CF1 is their harmonic mean; OP, OR and OF1 count all classes together. 0 / 0
    counts as 0.

    Args:
        counts: True positives, predictions and positives of each class, [3, C].
    """
    true_positives, predicted, positive = counts.double()
    cp, cr = _ratio(true_positives, predicted).mean(), _ratio(true_positives, positive).mean()
    op, recall = _ratio(true_positives.sum(), predicted.sum()), _ratio(true_positives.sum(), positive.sum())
    values = cp, cr, _ratio(2 * cp * cr, cp + cr), op, recall, _ratio(2 * op * recall, op + recall)
    return {name: value.item() for name, value in zip(PRECISION_RECALL, values, strict=True)}


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient of counts, with 0 / 0 = 0."""
    return torch.where(denominator > 0, numerator / denominator, 0)


class MultiLabelEvaluator(ClassificationEvaluator):
    """timm's multi-label metrics and more, with ignored labels; a replacement of timm's evaluator.

    All in percent: `map`; `cp`, `cr`, `cf1`, `op`, `or`, `of1` (see `precision_recall`) at the threshold, and with the
    suffix `_top3` for the three highest scores of each image; timm's `micro_f1`, `macro_f1`, `sample_f1`. As in timm,
    a class without positives has AP 0. `loss` is the binary cross-entropy, the mean over annotated entries.

    For partial annotation (the code of arXiv 2110.10955): `map_partial` is the mean AP of the classes that have both
    positives and negatives, and `map_weighted` the mean of the same classes weighted by their numbers of positives.
    Both are 0 if no class has both.

    Labels below 0 are ignored: removed before the highest scores are selected, and neither right nor wrong. Soft
    targets are positive from 0.5.

    Args:
        device: The device of the model's outputs, also for sums and collectives.
        max_samples: Ignore predictions beyond this number of images (padding of distributed samplers).
        threshold: Probability from which a class is predicted, one for all classes or one per class [C].
        top_k: Numbers of highest scores to predict.
    """

    default_metric = 'map'

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        max_samples: int | None = None,
        threshold: float | Sequence[float] | Tensor = 0.5,
        top_k: Sequence[int] = (3,),
    ):
        if isinstance(device, int):  # torch takes 12 for a GPU
            raise ValueError(f'device: got the number {device}; the number of classes is taken from the first batch')
        self.threshold = torch.as_tensor(threshold, dtype=torch.float32, device=device)
        if not ((self.threshold >= 0) & (self.threshold <= 1)).all():
            raise ValueError(f'thresholds are probabilities in [0, 1], got {threshold}')
        if any(k < 1 for k in top_k):
            raise ValueError(f'top_k must be at least 1, got {list(top_k)}')
        self.top_k = tuple(top_k)
        super().__init__(device, max_samples=max_samples)

    @property
    def metric_names(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on top_k
        """Names of the metrics that `compute` returns, in its order."""
        at_top_k = tuple(f'{name}_top{k}' for k in self.top_k for name in PRECISION_RECALL)
        return ('loss', *MEAN_AP, *PRECISION_RECALL, *at_top_k, 'micro_f1', 'macro_f1', 'sample_f1')

    def reset(self) -> None:
        """Discard all images."""
        super().reset()
        self.class_ap: Tensor | None = None  # percent, float64 [C], once computed
        self._scores: list[Tensor] = []  # float32 logits [B, C], on the CPU
        self._targets: list[Tensor] = []  # int8 1, 0 or -1, [B, C], on the CPU
        self._class_counts: Tensor | None = None  # int64 [1 + len(top_k), 3, C]
        self._annotated: Tensor | None = None  # int64 [C], number of annotated entries
        self._sample_f1 = torch.zeros_like(self.loss_sum)

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor) -> None:
        """Add logits and targets, both [B, C]."""
        if output.dim() != 2 or target.shape != output.shape:
            raise ValueError(
                f'logits and targets need one shape [B, C], got {list(output.shape)} and {list(target.shape)}'
            )
        output, target = self._prepare(output, target)
        if not len(output):
            return
        annotated, positive = target >= 0, target >= 0.5
        self._scores.append(output.cpu())
        self._targets.append(torch.where(annotated, positive, -1).to('cpu', torch.int8))

        # loss
        loss = F.binary_cross_entropy_with_logits(output, target.float(), reduction='none')
        self.loss_sum += loss.masked_fill(~annotated, 0).sum(dtype=self.loss_sum.dtype)
        self.counts[0] += annotated.sum()

        # predictions by threshold and by rank
        predicted = [output.sigmoid() >= self.threshold]
        ranking = output.masked_fill(~annotated, -math.inf)
        for k in self.top_k:
            highest = ranking.topk(min(k, ranking.shape[1])).indices
            predicted.append(torch.zeros_like(annotated).scatter(1, highest, True))

        # counts
        predicted = torch.stack(predicted) & annotated
        right = predicted & positive
        counts = torch.stack([right.sum(1), predicted.sum(1), positive.sum(0).expand_as(right[:, 0])], 1)
        self._class_counts = counts if self._class_counts is None else self._class_counts + counts
        self._annotated = annotated.sum(0) if self._annotated is None else self._annotated + annotated.sum(0)
        self._add_sample_f1(predicted[0], positive)

    def _add_sample_f1(self, predicted: Tensor, positive: Tensor) -> None:
        """Add the F1 of each image, from what is predicted and positive [B, C]; ignored labels are neither."""
        right = predicted & positive
        of_images = torch.stack([right.sum(1), predicted.sum(1), positive.sum(1)])
        sample_f1 = _ratio(2 * of_images[0], of_images[1] + of_images[2])
        self._sample_f1 += sample_f1.sum(dtype=self._sample_f1.dtype)

    def _summary(self, loss_sum: Tensor, counts: Tensor) -> OrderedDict[str, float]:
        return OrderedDict(loss=loss_sum.item() / max(int(counts[0]), 1))

    def compute(self, distributed: bool = False) -> OrderedDict[str, float]:
        """Return every metric over all images of all ranks.

        Raises:
            ValueError: If no rank has seen an image.
        """
        rows, num_classes = self._extent(distributed)
        if not sum(rows):
            raise ValueError('no image to evaluate: the validation set is empty')
        class_counts, annotated = self._class_counts, self._annotated
        if class_counts is None or annotated is None:  # on a rank without images
            class_counts = torch.zeros(1 + len(self.top_k), 3, num_classes, dtype=torch.int64, device=self.device)
            annotated = class_counts[0, 0]
        class_counts, annotated, sample_f1 = class_counts.clone(), annotated.clone(), self._sample_f1.clone()
        for counts in (class_counts, annotated, sample_f1) if distributed else ():
            dist.all_reduce(counts)
        class_counts, annotated = class_counts.cpu(), annotated.cpu()
        positives = class_counts[0, 2]
        if without := int((positives == 0).sum()):
            _logger.info(f'{without} of {len(annotated)} classes have no positive image and count as AP 0')
        if without := int(((positives == annotated) & (positives > 0)).sum()):
            _logger.warning(f'{without} of {len(annotated)} classes have no negative image and count as AP 100')

        metrics = super().compute(distributed)
        self.class_ap = 100 * self.per_class(average_precision, distributed)
        both = (positives > 0) & (positives < annotated)
        metrics['map'] = self.class_ap.mean().item()
        metrics['map_partial'] = _ratio(self.class_ap[both].sum(), both.sum()).item()
        metrics['map_weighted'] = _ratio((self.class_ap * positives)[both].sum(), positives[both].sum()).item()
        for counts, suffix in zip(class_counts, ('', *(f'_top{k}' for k in self.top_k)), strict=True):
            metrics.update((name + suffix, 100 * value) for name, value in precision_recall(counts).items())
        right, predicted, _ = class_counts[0].double()
        metrics['micro_f1'] = metrics['of1']
        metrics['macro_f1'] = 100 * _ratio(2 * right, predicted + positives).mean().item()
        metrics['sample_f1'] = 100 * sample_f1.item() / sum(rows)
        return metrics

    def tune_thresholds(
        self, distributed: bool = False, metric: str = 'f1', categories: Tensor | None = None
    ) -> Tensor:
        """Return the best threshold of each class on the images seen, float64 [C].

        Args:
            distributed: Whether to tune on the images of all ranks.
            metric: What is to be highest, see `threshold_quality`.
            categories: Category of each class, [C], numbers from 0. The classes of a category share a threshold, a
                multiple of 0.001, and are counted together.
        """
        if categories is None:
            return self.per_class(lambda logits, target: best_thresholds(logits.sigmoid(), target, metric), distributed)
        steps = torch.arange(1001, dtype=torch.float32) / 1000
        counts = torch.zeros(2, int(categories.max()) + 1, len(steps) + 1, dtype=torch.int64)  # annotated, positive
        for logits, target in self.samples():
            # the number of thresholds that a score reaches
            place = torch.bucketize(logits.sigmoid().contiguous(), steps, right=True) + categories * counts.shape[2]
            for number, chosen in enumerate((target >= 0, target == 1)):
                counts[number] += torch.bincount(place[chosen], minlength=counts[0].numel()).view_as(counts[0])
        if distributed:
            counts = counts.to(self.device)
            dist.all_reduce(counts)
        predicted, right = counts.cpu().flip(2).cumsum(2).flip(2)[:, :, 1:]  # from each threshold up: [K, 1001]
        positive, annotated = (count.sum(1, keepdim=True).cpu() for count in (counts[1], counts[0]))
        quality = threshold_quality((right, predicted, positive, annotated), metric)
        thresholds = []
        for best, number in zip(quality == quality.max(1, keepdim=True).values, positive[:, 0].tolist(), strict=True):
            high = int(best.nonzero().max())  # the middle of the highest thresholds that are equally good
            worse = (~best[:high]).nonzero()
            low = int(worse.max()) + 1 if len(worse) else 0
            thresholds.append(float(steps[(low + high) // 2]) if number else 0.5)
        return torch.tensor(thresholds, dtype=torch.float64)[categories]

    def use_thresholds(self, thresholds: Tensor) -> None:
        """Predict the images seen so far, and further ones, from other probabilities, [C]; `compute` then follows."""
        self.threshold = thresholds.to(self.device, torch.float32)
        if self._class_counts is None:
            return
        at_thresholds = self.class_counts().to(self._class_counts.device)
        self._class_counts = torch.cat([at_thresholds[None], self._class_counts[1:]])
        self._sample_f1 = torch.zeros_like(self._sample_f1)
        for logits, target in self.samples():
            positive = target.to(self.device) == 1
            predicted = (logits.to(self.device).sigmoid() >= self.threshold) & (target.to(self.device) >= 0)
            self._add_sample_f1(predicted, positive)

    def class_counts(self, thresholds: Tensor | None = None, distributed: bool = False) -> Tensor:
        """Return true positives, predictions and positives of each class over all images, int64 [3, C].

        Args:
            thresholds: Probabilities from which classes are predicted, [C] or one value; None for `threshold`.
            distributed: Whether to sum over the ranks.
        """
        _, num_classes = self._extent(distributed)
        thresholds = self.threshold if thresholds is None else thresholds.to(self.device)
        counts = torch.zeros(3, num_classes, dtype=torch.int64, device=self.device)
        for logits, target in zip(self._scores, self._targets, strict=True):
            positive = target.to(self.device) == 1
            predicted = (logits.to(self.device).sigmoid() >= thresholds) & (target.to(self.device) >= 0)
            counts += torch.stack([(predicted & positive).sum(0), predicted.sum(0), positive.sum(0)])
        if distributed:
            dist.all_reduce(counts)
        return counts.cpu()

    def per_class(self, function: Callable[[Tensor, Tensor], Tensor], distributed: bool = False) -> Tensor:
        """Apply a function of all images' logits and targets [N, c] to [c], a few classes at a time; float64 [C]."""
        result = torch.zeros(self._extent(distributed)[1], dtype=torch.float64)
        for columns, logits, target in self.class_chunks(distributed):
            result[columns] = function(logits, target).double().cpu()
        if distributed:
            result = result.to(self.device)
            dist.all_reduce(result)
        return result.cpu()

    def class_chunks(self, distributed: bool = False) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield a few classes at a time, with the logits and targets [N, c] of all images of all ranks.

        The ranks take turns: each chunk is gathered and yielded on one rank only. Every rank must exhaust the iterator,
        which makes collective calls.
        """
        rows, num_classes = self._extent(distributed)
        world_size = dist.get_world_size() if distributed else 1
        step = max(1, CHUNK // max(1, sum(rows)))
        for turn, start in enumerate(range(0, num_classes, step)):
            columns, owner = slice(start, min(start + step, num_classes)), turn % world_size
            logits = self._columns(self._scores, columns, torch.float32, rows, owner, distributed)
            target = self._columns(self._targets, columns, torch.int8, rows, owner, distributed)
            if logits is not None and target is not None:
                yield columns, logits, target

    def samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield float32 logits and int8 targets [B, C] of the images of this rank, batch by batch in their order."""
        yield from zip(self._scores, self._targets, strict=True)

    def _extent(self, distributed: bool) -> tuple[list[int], int]:
        """Return the number of images of each rank and the number of classes (unknown to a rank without images)."""
        num_classes = self._scores[0].shape[1] if self._scores else 0
        extent = torch.tensor([[self.num_samples, num_classes]], device=self.device)
        if distributed:
            extents = [torch.empty_like(extent) for _ in range(dist.get_world_size())]
            dist.all_gather(extents, extent)
            extent = torch.cat(extents)
        return extent[:, 0].tolist(), int(extent[:, 1].max())

    def _columns(
        self, parts: list[Tensor], columns: slice, dtype: torch.dtype, rows: list[int], owner: int, distributed: bool
    ) -> Tensor | None:
        """Return the columns of all ranks' images [N, c] on the rank `owner`, None on the others."""
        width = columns.stop - columns.start
        local = torch.cat([part[:, columns] for part in parts] or [torch.empty(0, width, dtype=dtype)]).to(self.device)
        if not distributed:
            return local
        padded = F.pad(local, (0, 0, 0, max(rows) - len(local)))  # collectives need one shape
        is_owner = dist.get_rank() == owner
        gathered = [torch.empty_like(padded) for _ in rows] if is_owner else None
        dist.gather(padded, gathered, dst=owner)
        if gathered is None:
            return None
        return torch.cat([part[:count] for part, count in zip(gathered, rows, strict=True)])
