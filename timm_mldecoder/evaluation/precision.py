"""Logits in float32 under mixed precision: those in bfloat16 tie, which changes average precision and thresholds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_mldecoder.head import MLDecoder


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
    found = model.get_classifier()
    found = [head.group_fc if isinstance(head, MLDecoder) else head for head in _several(found)]
    return [module for module in found if isinstance(module, nn.Module)]


def _several(found: Any) -> list[Any]:
    return list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]


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
