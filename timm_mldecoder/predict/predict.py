"""The pass of a model over images, in finished parts, shared by all ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from timm_mldecoder.distributed.world import World
from timm_mldecoder.evaluation.evaluate import float32_logits
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.loading.loader import KeyedCollate, KeyedSamples, Placement
from timm_mldecoder.loading.workers import shut_down, worker_options
from timm_mldecoder.modeling.load import LoadedModel
from timm_mldecoder.predict.parts import Parts, Prediction
from timm_mldecoder.predict.sources import SourceDataset
from timm_mldecoder.runtime.errors import RunFailed
from timm_mldecoder.runtime.log import progress_bar


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
        return logits, features


def predict(
    loaded: LoadedModel,
    dataset: SourceDataset,
    parts: Parts,
    world: World,
    *,
    features: str = '',
    compiled: bool = False,
    batch_size: int,
    workers: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    placement: Placement,
    bad_image: str = 'skip',
) -> None:
    """Predict every image of the missing parts; a collective call, after which the first rank joins the parts.

    `features` are 'pooled' or 'queries' to store those too, as `parts` is prepared for; '' for none.

    Raises:
        RunFailed: If an image cannot be read and `bad_image` is 'abort'.
    """
    network: Any = _Network(loaded.model, features)
    if compiled:
        network = torch.compile(network)
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
    results = _predictions(loaded, network, batches, loader, dataset, autocast, placement, parts)
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
    loaded: LoadedModel,
    network: Any,
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
            with autocast(), float32_logits(loaded.model):
                outputs, features = network(images)
            scores = loaded.scores(outputs)
            arrays = {'scores': scores.numpy().astype(parts.dtype('scores'))} if 'scores' in parts.arrays else {}
            arrays |= {} if features is None else {'features': features.float().cpu().half().numpy()}
            for row, (position, labels) in enumerate(zip(positions, loaded.labels(scores), strict=True)):
                kept = {name: rows[row] for name, rows in arrays.items()}
                predictions[position] = predictions[position]._replace(labels=labels, arrays=kept)
        yield predictions
