"""The pass of a model over images, in finished parts, shared by all ranks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, default_collate

from timm_mldecoder.engine.input.images import KeyedCollate, KeyedSamples, Placement, init_worker
from timm_mldecoder.engine.predict.parts import Label, Parts, Prediction
from timm_mldecoder.engine.predict.sources import SourceDataset
from timm_mldecoder.engine.runtime.distributed import World
from timm_mldecoder.engine.runtime.errors import RunFailed
from timm_mldecoder.engine.runtime.log import progress_bar
from timm_mldecoder.head import MLDecoder


class Predictor(NamedTuple):
    """A model, and how its outputs become labels.

    Attributes:
        model: The model, in eval mode on its device.
        data_config: timm's data configuration.
        class_names: Names of the outputs in order.
        thresholds: Probability from which a label is given, [C]; None for a single-label model, which gives the best.
        image_mode: PIL mode of the images.
        top_k: Largest number of labels per image; None for no limit, or one of a single-label model.
        features: 'pooled' or 'queries' to give features too; '' for none.
    """

    model: nn.Module
    data_config: dict[str, Any]
    class_names: list[str]
    thresholds: Tensor | None
    image_mode: str
    top_k: int | None = None
    features: str = ''

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the probabilities [B, C] of a batch of images, and its features, both float32 on the CPU."""
        features = None
        if not self.features:
            logits = self.model(images)
        else:
            maps = self.model.forward_features(images)
            if self.features == 'pooled':
                features = self.model.forward_head(maps, pre_logits=True)
                logits = self.model.forward_head(maps)
            else:
                logits, features = _query_outputs(self.model, maps)
        logits = (logits[0] if isinstance(logits, (tuple, list)) else logits).float()
        scores = logits.softmax(dim=1) if self.thresholds is None else logits.sigmoid()
        return scores.cpu(), None if features is None else features.float().cpu()

    def labels(self, scores: Tensor) -> list[Label]:
        """Return the labels of one image: those that reach their threshold, at most `top_k`, the likeliest first."""
        order = scores.argsort(descending=True)
        if self.thresholds is not None:
            order = order[(scores >= self.thresholds)[order]]
        limit = self.top_k or (1 if self.thresholds is None else None)
        return [Label(index, self.class_names[index], scores[index].item()) for index in order[:limit].tolist()]


def _query_outputs(model: nn.Module, maps: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of a model with an ML-Decoder head, and what its decoder gives for each query, [B, K, D]."""
    head = next(module for module in model.modules() if isinstance(module, MLDecoder))
    outputs: list[Tensor] = []
    handle = head.group_fc.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    try:
        return model.forward_head(maps), outputs[-1]
    finally:
        handle.remove()


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
) -> int:
    """Predict every image of the missing parts and join them; a collective call.

    Returns:
        The number of images that could not be read.

    Raises:
        RunFailed: If an image cannot be read and `bad_image` is 'abort'.
    """
    if world.primary:
        parts.begin()
    world.barrier()
    missing = parts.missing()
    world.barrier()  # no rank writes a part before all have listed what is missing
    batches = PartBatches(parts, missing[world.rank :: world.size], batch_size)
    loader = DataLoader(
        KeyedSamples(dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=KeyedCollate(default_collate, partial=True),
        pin_memory=placement.device.type == 'cuda',
        worker_init_fn=init_worker,
        multiprocessing_context='forkserver' if world.distributed and workers else None,
    )
    pending: list[Prediction] = []
    results = _predictions(predictor, loader, dataset, autocast, placement, 'scores' in parts.arrays)
    with progress_bar('Predict', sum(len(batch) for _, batch in batches.all()), world.primary) as bar:
        for (part, batch), predictions in zip(batches.all(), results, strict=True):
            failed = next((item for item in predictions if item.error), None)
            if failed is not None and bad_image == 'abort':
                raise RunFailed(f'{failed.image} cannot be read ({failed.error}); --bad-image skip leaves it out')
            pending += predictions
            bar.update(len(batch))
            if len(pending) == len(parts.images(part)):
                parts.write(part, pending)
                pending = []
    world.barrier()
    return world.broadcast(parts.finish() if world.primary else None)


class PartBatches(Sampler[range]):
    """The batches of some parts. None reaches over the end of a part, so that a part is the same whoever writes it."""

    def __init__(self, parts: Parts, numbers: list[int], batch_size: int) -> None:
        self._parts = parts
        self._numbers = numbers
        self._batch_size = batch_size

    def all(self) -> Iterator[tuple[int, range]]:
        """Yield the part and the images of each batch."""
        for part in self._numbers:
            images = self._parts.images(part)
            for start in range(0, len(images), self._batch_size):
                yield part, images[start : start + self._batch_size]

    def __len__(self) -> int:
        return sum(-(-len(self._parts.images(part)) // self._batch_size) for part in self._numbers)

    def __iter__(self) -> Iterator[range]:
        return (batch for _, batch in self.all())


@torch.inference_mode()
def _predictions(
    predictor: Predictor,
    loader: DataLoader,
    dataset: SourceDataset,
    autocast: Callable[[], AbstractContextManager],
    placement: Placement,
    keep_scores: bool,
) -> Iterator[list[Prediction]]:
    """Yield the predictions of each batch in order, unreadable images included."""
    for indices, (batch, positions, bad) in zip(loader.batch_sampler, loader, strict=True):
        names = [dataset.filename(index) for index in indices]
        errors = {image.path: image.reason for image in bad}
        found: dict[int, Prediction] = {}
        if batch is not None:
            images, _ = placement.place(*batch)
            with autocast():
                scores, features = predictor(placement.layout(images))
            for row, position in enumerate(positions):
                arrays = {'scores': scores[row].half().numpy()} if keep_scores else {}
                if features is not None:
                    arrays['features'] = features[row].half().numpy()
                found[position] = Prediction(names[position], predictor.labels(scores[row]), '', arrays)
        yield [
            found[position] if position in found else Prediction(name, error=errors[name])
            for position, name in enumerate(names)
        ]
