"""The pass of a model over images, in finished parts, shared by all ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

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
        top_k: Largest number of labels per image; None for no limit, or one of a single-label model.
        features: 'pooled' or 'queries' to give features too; '' for none.
    """

    model: nn.Module
    data_config: dict[str, Any]
    class_names: list[str]
    thresholds: Tensor | None
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
    handle = head.layers[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
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
    own = parts.missing()[world.rank :: world.size]
    indices = [index for part in own for index in parts.images(part)]
    loader = DataLoader(
        KeyedSamples(dataset),
        batch_size=batch_size,
        sampler=indices,
        num_workers=workers,
        collate_fn=KeyedCollate(default_collate, partial=True),
        pin_memory=placement.device.type == 'cuda',
        worker_init_fn=init_worker,
        multiprocessing_context='forkserver' if world.distributed and workers else None,
    )
    remaining, pending = iter(own), []
    part = next(remaining, None)
    with progress_bar('Predict', len(indices), world.primary) as bar:
        for predictions in _batches(predictor, loader, dataset, indices, autocast, placement, 'scores' in parts.arrays):
            failed = next((item for item in predictions if item.error), None)
            if failed is not None and bad_image == 'abort':
                raise RunFailed(f'{failed.image} cannot be read ({failed.error}); --bad-image skip leaves it out')
            pending += predictions
            bar.update(len(predictions))
            while part is not None and len(pending) >= len(parts.images(part)):
                size = len(parts.images(part))
                parts.write(part, pending[:size])
                pending, part = pending[size:], next(remaining, None)
    world.barrier()
    return world.broadcast(parts.finish() if world.primary else None)


@torch.inference_mode()
def _batches(
    predictor: Predictor,
    loader: DataLoader,
    dataset: SourceDataset,
    indices: Sequence[int],
    autocast: Callable[[], AbstractContextManager],
    placement: Placement,
    keep_scores: bool,
) -> Iterator[list[Prediction]]:
    """Yield the predictions of each batch, in the order of `indices`, unreadable images included."""
    first = 0
    for batch, positions, bad in loader:
        count = min(loader.batch_size, len(indices) - first)
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
                name = dataset.filename(indices[first + position])
                found[position] = Prediction(name, predictor.labels(scores[row]), '', arrays)
        names = [dataset.filename(index) for index in indices[first : first + count]]
        yield [
            found[position] if position in found else Prediction(name, error=errors[name])
            for position, name in enumerate(names)
        ]
        first += count
