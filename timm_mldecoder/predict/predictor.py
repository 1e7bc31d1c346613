"""The pass of a model over images, in finished parts, shared by all ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from timm_mldecoder.data.images import Reading
from timm_mldecoder.distributed.world import World
from timm_mldecoder.evaluation.precision import float32_logits
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.loading.create_loaders import worker_options
from timm_mldecoder.loading.loader import KeyedCollate, KeyedSamples, Placement, shut_down
from timm_mldecoder.modeling.load import Trained
from timm_mldecoder.predict.parts import Label, Parts, Prediction
from timm_mldecoder.predict.sources import SourceDataset
from timm_mldecoder.runtime.errors import RunFailed
from timm_mldecoder.runtime.log import progress_bar


class Predictor:
    """A trained model, and how its outputs become labels.

    Args:
        trained: The model, in eval mode on its device.
        class_names: Names of the outputs; None for the model's own, else their numbers.
        task: 'classification' or 'multilabel'; None for the model's own.
        threshold: Probability from which a label of a multi-label model is given; None for the tuned ones, else 0.5.
        top_k: Largest number of labels per image; None for no limit, or one of a single-label model.
        implications: Which classes imply which, [2, E] of `read_implications`: with a label, those that it implies are
            given, with a score as high at least.
        features: 'pooled' or 'queries' to give features too; '' for none.
        compiled: Whether to compile the model.

    Attributes:
        thresholds: Probability from which a label is given, [C]; None for a single-label model, which gives the best.

    Raises:
        ValueError: If there are thresholds for a single-label model, tuned ones for other classes, or the model has no
            queries to take features from.
    """

    def __init__(
        self,
        trained: Trained,
        class_names: Sequence[str] | None = None,
        *,
        task: str | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
        implications: Tensor | None = None,
        features: str = '',
        compiled: bool = False,
    ) -> None:
        self.model = trained.model
        self.content = trained.content
        self.data_config = trained.data_config
        self.image_mode = trained.image_mode
        self.reading = Reading.of(trained.options)
        self.class_names = [str(name) for name in class_names or trained.class_names or range(self.model.num_classes)]
        self.thresholds: Tensor | None = None
        if (task or trained.task) == 'multilabel':
            tuned = trained.thresholds(self.class_names) if threshold is None else None
            default = torch.full((len(self.class_names),), 0.5 if threshold is None else threshold)
            self.thresholds = default if tuned is None else tuned
        elif threshold is not None:
            raise ValueError('--threshold is for multi-label models: pass --task multilabel if this is one')
        if implications is not None and (self.thresholds is None or top_k):
            raise ValueError('--implications are for multi-label models, without --top-k, which could cut implied ones')
        self.implications = implications
        self.top_k = top_k or (1 if self.thresholds is None else len(self.class_names))
        self.features = features
        network = _Network(self.model, features)
        self._network = torch.compile(network) if compiled else network

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the probabilities [B, C] of a batch of images, and its features, both float32 on the CPU."""
        logits, features = self._network(images)
        logits = logits.float()
        scores = logits.softmax(dim=1) if self.thresholds is None else logits.sigmoid()
        return scores.cpu(), None if features is None else features.float().cpu()

    def labels(self, scores: Tensor) -> list[list[Label]]:
        """Return the labels of each image from its scores [B, C], the likeliest first.

        Those are the labels that reach their threshold, at most `top_k`, and those that they imply.
        """
        if self.thresholds is not None:
            scores = scores.masked_fill(scores < self.thresholds, -1)
        if self.implications is not None:
            implying, implied = self.implications
            scores = scores.scatter_reduce(1, implied.expand(len(scores), -1), scores[:, implying], 'amax')
        most = int((scores >= 0).sum(dim=1).max())
        values, indices = (found.tolist() for found in scores.topk(min(self.top_k, most)))
        return [
            [Label(index, self.class_names[index], score) for index, score in zip(*found, strict=True) if score >= 0]
            for found in zip(indices, values, strict=True)
        ]


class _Network(nn.Module):
    """A model that gives logits [B, C] and features: pooled ones [B, F], query outputs [B, K, D], or None."""

    def __init__(self, model: Any, features: str) -> None:
        super().__init__()
        self.model = model
        self.features = features
        self.query_outputs: Tensor | None = None
        if features == 'queries':
            head = model.get_classifier()
            if not isinstance(head, MLDecoder):
                raise ValueError('--feature-kind queries needs an ML-Decoder head: pass pooled')
            head.group_fc.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.query_outputs = inputs[0]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.features == 'pooled':
            maps = self.model.forward_features(images)
            logits, features = self.model.forward_head(maps), self.model.forward_head(maps, pre_logits=True)
        else:
            logits = self.model(images)
            features = self.query_outputs
        return (logits[0] if isinstance(logits, (tuple, list)) else logits), features


def predict(
    predictor: Predictor,
    dataset: SourceDataset,
    parts: Parts,
    world: World,
    *,
    batch_size: int,
    workers: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    placement: Placement,
    bad_image: str = 'skip',
) -> None:
    """Predict every image of the missing parts; a collective call, after which the first rank joins the parts.

    Raises:
        RunFailed: If an image cannot be read and `bad_image` is 'abort'.
    """
    if world.primary:
        parts.begin()
    world.barrier()
    missing = parts.missing()
    world.barrier()  # no rank writes a part before all have listed what is missing
    # none reaches over the end of a part, so that a part is the same whoever writes it
    batches = [
        (part, parts.images(part)[start : start + batch_size])
        for part in missing[world.rank :: world.size]
        for start in range(0, len(parts.images(part)), batch_size)
    ]
    loader = iter(
        DataLoader(
            KeyedSamples(dataset),
            batch_sampler=[list(batch) for _, batch in batches],
            collate_fn=KeyedCollate(default_collate, partial=True),
            **worker_options(world, workers, pin_memory=placement.device.type == 'cuda'),
        )
    )
    pending: list[Prediction] = []
    results = _predictions(predictor, batches, loader, dataset, autocast, placement, parts)
    try:
        with progress_bar('Predict', sum(len(batch) for _, batch in batches), world.primary) as bar:
            for (part, batch), predictions in zip(batches, results, strict=True):
                failed = next((item for item in predictions if item.error), None)
                if failed is not None and bad_image == 'abort':
                    raise RunFailed(f'{failed.image} cannot be read ({failed.error}); --bad-image skip leaves it out')
                pending += predictions
                bar.update(len(batch))
                if len(pending) == len(parts.images(part)):
                    parts.write(part, pending)
                    pending = []
    finally:
        shut_down(loader)
    world.barrier()


@torch.inference_mode()
def _predictions(
    predictor: Predictor,
    batches: Sequence[tuple[int, range]],
    loader: Iterator[Any],
    dataset: SourceDataset,
    autocast: Callable[[], AbstractContextManager],
    placement: Placement,
    parts: Parts,
) -> Iterator[list[Prediction]]:
    """Yield the predictions of each batch in order, unreadable images included."""
    for (_, indices), (batch, positions, bad) in zip(batches, loader, strict=True):
        names = [dataset.filename(index) for index in indices]
        errors = {image.path: image.reason for image in bad}
        predictions = [Prediction(name, error=errors.get(name, '')) for name in names]
        if batch is not None:
            images: Any = placement.layout(placement.place(*batch)[0])
            with autocast(), float32_logits(predictor.model):
                scores, features = predictor(images)
            arrays = {'scores': scores.numpy().astype(parts.dtype('scores'))} if 'scores' in parts.arrays else {}
            arrays |= {} if features is None else {'features': features.half().numpy()}
            for row, (position, labels) in enumerate(zip(positions, predictor.labels(scores), strict=True)):
                kept = {name: rows[row] for name, rows in arrays.items()}
                predictions[position] = predictions[position]._replace(labels=labels, arrays=kept)
        yield predictions
