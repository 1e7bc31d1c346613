"""An exported model against the model in PyTorch, and a quantized one against the float one, on real images."""

import importlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from timm_mldecoder.export.formats import Run, set_onnx_metadata
from timm_mldecoder.modeling.load import IMAGE_MODES
from timm_mldecoder.predict.sources import Files, SourceDataset, open_source
from timm_mldecoder.runtime.errors import RunFailed

VERIFIED = 28  # number of images to verify
TIMED = (1, 16)  # batch sizes to time


class Images(NamedTuple):
    """Images as the model takes them, and their classes where the folder names them."""

    tensors: Tensor  # the images [N, channels, height, width]
    labels: Tensor | None  # class indices [N], None if unknown
    originals: Sequence[Image.Image] = ()  # the images before preparation


def load_images(path: Path | None, metadata: Mapping[str, Any], limit: int) -> Images:
    """Load at most `limit` images, evenly spread over the source and prepared for a model.

    Without a source these are handwritten digits that scikit-learn brings. Images in folders that are named like the
    classes of the model get their class.

    Raises:
        ValueError: If there are none, or images have no mode with as many channels as the model takes.
        RunFailed: If an image cannot be read.
    """
    config = metadata['preprocessing']
    channels = config['input_size'][0]
    if channels not in IMAGE_MODES:
        known = ', '.join(map(str, IMAGE_MODES))
        raise ValueError(f'the model takes {channels} channels, images are read with {known}')
    mode = IMAGE_MODES[channels]
    transform = create_transform(**{**config, 'is_training': False})
    labels = None
    if path is None:
        try:
            from benchmarks.digits import load_split

            pixels = load_split('validation')[0]
        except ImportError as error:
            raise ValueError(f'pass --images to verify the file with, or install the digits: {error}') from error
        chosen = [Image.fromarray(pixels[index]).convert(mode) for index in _spread(len(pixels), limit)]
    else:
        source = open_source(path)
        dataset = SourceDataset(source, lambda image: image, mode)
        indices = _spread(len(dataset), limit)
        try:
            chosen = [dataset.read(index) for index in indices]
        except OSError as error:
            raise RunFailed(f'{path}: an image cannot be read: {error}') from error
        index_of = {name: index for index, name in enumerate(metadata['class_names'] or ())}
        found = [index_of.get(Path(dataset.filename(index)).parent.name, -1) for index in indices]
        if isinstance(source, Files) and min(found) >= 0 and metadata['task'] == 'classification':
            labels = torch.tensor(found)
    return Images(torch.stack([transform(image) for image in chosen]), labels, chosen)


def _spread(count: int, limit: int) -> list[int]:
    chosen = min(count, limit)
    return [index * count // chosen for index in range(chosen)]


@torch.no_grad()
def verify(run: Run, model: nn.Module, images: Tensor, sizes: Sequence[int], tolerance: float) -> str:
    """Compare an exported model with the model in PyTorch, and return a line that describes the difference.

    Images are repeated where a batch needs more. The tolerance is in units of the largest logit or of 1, whichever is
    larger.

    Raises:
        RunFailed: If a logit differs more, or is not finite.
    """
    images = images[:VERIFIED]
    expected = model(images)
    scale = max(1.0, expected.abs().max().item())
    largest = 0.0
    for size in sizes:
        for rows in torch.arange(-(-min(len(images), 4 * size) // size) * size).split(size):
            rows = rows % len(images)
            difference = (run(images[rows]) - expected[rows]).abs().max().item()
            largest = difference if difference != difference else max(largest, difference)
            if not largest <= tolerance * scale:
                raise RunFailed(
                    f'the file differs from PyTorch by {largest:.2g} with batch size {size}, more than '
                    f'{tolerance * scale:.2g}: nothing is written; --tolerance raises the bound'
                )
    shown = f'batch size{"s" * (len(sizes) > 1)} {" and ".join(map(str, sizes))}'
    return f'{largest:.2g} at most (bound {tolerance * scale:.2g}), {len(images)} images, {shown}'


@torch.no_grad()
def verify_scores(path: Path, model: nn.Module, images: Images, metadata: Mapping[str, Any]) -> str:
    """Compare the scores of an ONNX file that prepares images itself with those of predict; return a line about it.

    Raises:
        RunFailed: If a score differs by more than 1/255.
    """
    session = importlib.import_module('onnxruntime').InferenceSession(path, providers=['CPUExecutionProvider'])
    count = min(len(images.originals), VERIFIED)
    logits = model(images.tensors[:count])
    expected = logits.sigmoid() if metadata['task'] == 'multilabel' else logits.softmax(dim=1)
    found = [session.run(['scores'], {'pixels': np.asarray(image)[None]})[0] for image in images.originals[:count]]
    largest = (torch.from_numpy(np.concatenate(found)) - expected).abs().max().item()
    if not largest <= 1 / 255:
        raise RunFailed(f'the scores with --with-preprocessing differ by {largest:.2g}, more than 1/255')
    return f'{largest:.2g} at most (bound 0.0039) between scores of pixels, {count} images'


def quantize(path: Path, metadata: Mapping[str, Any], calibration: Tensor | None) -> None:
    """Quantize an ONNX file to int8 in place, and replace its metadata.

    With images for calibration, which fix the ranges of activations, convolutions are quantized; without, linear
    layers, with ranges that each batch computes.
    """
    tools = importlib.import_module('onnxruntime.quantization')
    prepared, quantized = path.with_suffix('.prepared'), path.with_suffix('.int8')
    logging.disable(logging.WARNING)  # onnxruntime logs each node that it leaves alone
    try:
        tools.shape_inference.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        settings = dict(per_channel=True, nodes_to_exclude=_grouped_products(prepared))
        if calibration is None:
            tools.quantize_dynamic(prepared, quantized, op_types_to_quantize=['MatMul', 'Gemm'], **settings)
        else:
            # with the linear layers of an ML-Decoder head in static int8, the labels of the digits are lost
            convolutions = dict(op_types_to_quantize=['Conv'], per_channel=True)
            batches = iter([{'images': image.numpy()} for image in calibration.split(1)])
            reader = SimpleNamespace(get_next=lambda: next(batches, None))
            tools.quantize_static(prepared, quantized, reader, **convolutions)
    finally:
        logging.disable(logging.NOTSET)
    for file in path.parent.iterdir():  # the float model, with its second file of weights
        if file != quantized:
            file.unlink()
    os.replace(quantized, path)
    set_onnx_metadata(path, metadata)


def _grouped_products(path: Path) -> list[str]:
    """Return the names of products with a weight per group, [K, D, group_size], which onnxruntime has in float only."""
    graph = importlib.import_module('onnx').load(path, load_external_data=False).graph
    grouped = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 2}
    return [node.name for node in graph.node if node.op_type == 'MatMul' and grouped & set(node.input)]


def compare(
    models: Mapping[str, Run],
    images: Images,
    metadata: Mapping[str, Any],
    batch_size: int | None = None,
    min_agreement: float = 0.0,
) -> list[str]:
    """Compare a quantized model with the float one: predicted labels, accuracy where it is known, speed.

    Args:
        models: The float model and the quantized one, by the names of their precision.
        batch_size: The only batch size of the models; None for any.
        min_agreement: Smallest share of labels that must agree.

    Returns:
        Lines of a table.

    Raises:
        RunFailed: If fewer labels agree.
    """
    size, count = batch_size or TIMED[-1], len(images.tensors)
    batches = torch.arange(count).split(size)
    predicted = {}
    for name, run in models.items():
        logits = [run(images.tensors[_fill(rows, size, count)])[: len(rows)] for rows in batches]
        predicted[name] = _labels(torch.cat(logits), metadata)
    first, second = predicted.values()
    agreement = (first == second).float().mean().item()
    if agreement < min_agreement:
        raise RunFailed(
            f'{" and ".join(models)} agree in {100 * agreement:.1f} % of the labels, below --min-agreement '
            f'{min_agreement:g}: nothing is written; other --calibration images may help'
        )
    speed = {}
    for timed in TIMED if batch_size is None else (size,):
        seconds = _time(models, images.tensors[_fill(torch.arange(0), timed, count)])
        speed[timed] = {name: 1000 * value / timed for name, value in seconds.items()}
    lines = [f'agreement     {100 * agreement:.2f} % of the labels, {count} images']
    for name, labels in predicted.items():
        parts = [f'{times[name]:.2f} ms per image at batch size {timed}' for timed, times in speed.items()]
        if images.labels is not None:
            parts.insert(0, f'top-1 {100 * (labels == images.labels).float().mean().item():.2f} %')
        lines.append(f'{name:13} {", ".join(parts)}')
    return lines


def _labels(logits: Tensor, metadata: Mapping[str, Any]) -> Tensor:
    """Return the predicted class of each image [N], or for the multi-label task whether it has each class [N, C]."""
    if metadata['task'] != 'multilabel':
        return logits.argmax(dim=1)
    thresholds = metadata['thresholds']
    return logits.sigmoid() >= (0.5 if thresholds is None else torch.tensor(list(thresholds.values())))


def _fill(rows: Tensor, size: int, count: int) -> Tensor:
    """Return `rows` filled up to a batch of `size` with further rows of `count`."""
    return torch.cat([rows, torch.arange(size - len(rows)) % count])


def _time(models: Mapping[str, Run], batch: Tensor) -> dict[str, float]:
    """Return the median seconds of a batch; the models take turns, so that both see the same load of the machine."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(12):
        for name, model in models.items():
            start = time.perf_counter()
            model(batch)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values[2:]) for name, values in seconds.items()}
