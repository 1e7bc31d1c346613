"""One pass over a split: logits in float32 under mixed precision, metrics that are exact for any number of ranks."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from timm.task import ClassificationEvaluator
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import functional as F

from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags.data import DatasetOptions
from timm_mldecoder.flags.model import DeviceOptions
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.loading.create_loaders import DataConfig
from timm_mldecoder.loading.loader import EvalLoader
from timm_mldecoder.metrics import MultiLabelEvaluator, ZeroShotEvaluator
from timm_mldecoder.modeling.classes import Classes, other_classes
from timm_mldecoder.models.classifier_model import classifiers_of
from timm_mldecoder.runtime.log import EvalLog

_logger = logging.getLogger(__name__)

Metrics = OrderedDict[str, float]


def create_autocast(options: DeviceOptions, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return the context that the forward passes of a script run in."""
    if device.type == 'cpu':
        _advise_on_amp(bool(options.amp))
    return autocast_context(device, options.amp_dtype if options.amp else None)


def autocast_context(device: torch.device, dtype: str | None) -> Callable[[], AbstractContextManager]:
    """Return the context of mixed precision in a dtype, one that does nothing for None."""
    if dtype is None:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, dtype))


@cache
def _advise_on_amp(amp: bool) -> None:
    """Say, once in a process, where bfloat16 would be faster on an x86 CPU, or is slower for want of instructions."""
    found: dict = getattr(torch.cpu, 'get_capabilities', dict)()  # not in torch 2.9
    fast = found.get('avx512_bf16') or found.get('amx_bf16')
    if fast and not amp:
        _logger.info(
            'this CPU computes in bfloat16: --amp --channels-last is about twice as fast (docs/performance.md)'
        )
    elif found.get('architecture') == 'x86_64' and not fast and amp:
        _logger.warning(
            '--amp: this CPU has no instructions for bfloat16 and is several times slower with it; leave it out'
        )


def create_evaluator(
    options: DatasetOptions, dataset: Dataset, threshold: float | Tensor | None = None, **settings: Any
) -> ClassificationEvaluator:
    """Return the evaluator of a split; labels are predicted by `--multilabel-threshold` if no threshold is given."""
    if options.task == 'classification':
        return ClassificationEvaluator(**settings)
    threshold = options.multilabel_threshold if threshold is None else threshold
    return multilabel_evaluator(getattr(dataset, 'num_seen', None), threshold=threshold, **settings)


def multilabel_evaluator(num_seen: int | None, **settings: Any) -> MultiLabelEvaluator:
    """Return the evaluator of multi-label data of which `num_seen` classes were seen in training (None: all)."""
    return MultiLabelEvaluator(**settings) if num_seen is None else ZeroShotEvaluator(num_seen, **settings)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    evaluator: Any,
    world: World,
    *,
    autocast: Callable[[], AbstractContextManager],
    log: EvalLog,
    views: Callable[[Tensor], Sequence[Tensor]] | None = None,
    classes: Tensor | None = None,
    measures: Sequence[Callable[[Tensor, Tensor], None]] = (),
    until: Callable[[Iterable], Iterable] = iter,
) -> Metrics:
    """Score a model on the batches of a split; a collective call.

    Args:
        model: The model, put into eval mode.
        evaluator: Evaluator that turns logits into metrics. For a `ZeroShotEvaluator`, a head in which classes affect
            each other scores the unseen classes in a forward pass of their own.
        log: Called after every batch.
        views: Views of a batch whose logits are averaged, see `test_time_views`; None for the batch alone.
        classes: Indices of the outputs that count; None for all.
        measures: Called with the output and target of each batch.
        until: Cuts the batches off, for a run that was stopped.

    Returns:
        The metrics of the split, accuracies in percent; with `bad_images` where some could not be read.
    """
    model.eval()
    unseen = _unseen_classes(model, evaluator)
    for index, (images, target) in enumerate(until(loader.batches())):
        images = views(images) if views else [images]
        with autocast(), float32_logits(model):
            output = _mean_logits(model, images)
        if classes is not None:
            output = output[:, classes]
        if unseen is None:
            evaluator.update(output, target)
        else:
            with autocast(), other_classes(model, unseen), float32_logits(model):
                alone = _mean_logits(model, images)
            evaluator.update(output, target, alone)
        for measure in measures:
            measure(output, target)
        log(index)
    metrics = evaluator.compute(distributed=world.distributed)
    bad = {image.path for images in world.all_gather(loader.bad_images) for image in images}
    if bad:
        metrics['bad_images'] = len(bad)
    return metrics


def _unseen_classes(model: nn.Module, evaluator: ClassificationEvaluator) -> Classes | None:
    """Return the unseen classes if their logits differ when they are scored alone, else None.

    The paper's ZSL protocol scores the unseen classes alone. Where the logit of a class depends on its own label
    embedding only, these are columns of the logits of all classes; in group decoding a group may hold seen classes too.
    """
    head = next((module for module in model.modules() if isinstance(module, MLDecoder)), None)
    if head is None or head.vocabulary is None or head.independent_classes:
        return None
    if not isinstance(evaluator, ZeroShotEvaluator):
        return None
    names = head.class_names
    return Classes(head.vocabulary.embeddings[evaluator.num_seen :], names and names[evaluator.num_seen :])


def _mean_logits(model: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Return the mean of the logits of all views of a batch, [B, C]."""
    outputs = []
    for view in views:
        output = model(view)
        output = output[0] if isinstance(output, (tuple, list)) else output
        # a copy where there are several: the next replay of a CUDA graph overwrites the output
        outputs.append(output if len(views) == 1 else output.to(torch.float32, copy=True))
    return outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(dim=0)


def test_time_views(number: int, size: tuple[int, int]) -> Callable[[Tensor], Sequence[Tensor]] | None:
    """Return what makes the views of test-time augmentation (`--tta`) of a batch [B, C, H, W].

    These are 2 for a horizontal flip, 5 for the corners and the centre, 10 for those and their flips.
    """
    crops = {5: F.five_crop, 10: F.ten_crop}
    if number in crops:
        return lambda images: crops[number](images, size)
    return (lambda images: [images, images.flip(-1)]) if number == 2 else None


def widen(config: DataConfig, number: int) -> DataConfig:
    """Return the data configuration of images that `--tta 5` and `--tta 10` crop themselves.

    Raises:
        ValueError: If the configuration crops nothing, so that all crops are the same.
    """
    if number not in (5, 10):
        return config
    size = tuple(round(side / config['crop_pct']) for side in config['input_size'][1:])
    if size == tuple(config['input_size'][1:]):
        raise ValueError(f'--tta {number} crops images, --crop-pct {config["crop_pct"]} leaves no margin: pass 0.875')
    return {**config, 'input_size': (config['input_size'][0], *size), 'crop_pct': 1.0}


@contextmanager
def float32_logits(model: nn.Module) -> Iterator[None]:
    """Compute the last step of a model in float32 where it is evaluated under autocast.

    The last step is the classifier, of an ML-Decoder head its group fully-connected layer. It runs twice. Compiled and
    scripted models, and sharded ones, keep the dtype of autocast.
    """
    handles = [module.register_forward_hook(_again, with_kwargs=True) for module in _last_modules(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_modules(model: nn.Module) -> list[nn.Module]:
    model = unwrap_model(model)
    if isinstance(model, torch.jit.ScriptModule) or not hasattr(model, 'get_classifier'):
        return []
    found = [head.group_fc if isinstance(head, MLDecoder) else head for head in classifiers_of(model)]
    return [module for module in found if isinstance(module, nn.Module)]


def _again(module: nn.Module, inputs: tuple[Any, ...], others: dict[str, Any], output: Any) -> Any:
    """Return the output of a module, computed again without the rounding of autocast."""
    if not isinstance(output, Tensor) or not torch.is_autocast_enabled(output.device.type):
        return output
    parameters = list(module.parameters())
    if any(parameter.dtype != torch.float32 or hasattr(parameter, 'full_tensor') for parameter in parameters):
        return output
    with torch.autocast(output.device.type, enabled=False):
        return module.forward(*map(_float, inputs), **{name: _float(value) for name, value in others.items()})


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
