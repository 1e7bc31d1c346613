"""BatchNorm folded into the convolutions before it, for inference."""

from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = (nn.Conv2d, Conv2dSame)  # not their subclasses, which may compute with another weight
NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def fuse_batch_norm(model: nn.Module, image: Tensor, tolerance: float = 1e-3) -> int:
    """Fold each BatchNorm that is alone in reading the output of a convolution into it, in place.

    Which do so is observed in one forward pass, so that it works on every architecture. The logits stay the same but
    for rounding.

    Args:
        model: A model in eval mode.
        image: Images [B, C, H, W] that the model takes.
        tolerance: Largest difference of the logits, relative to the largest logit or 1.

    Returns:
        The number of BatchNorm layers that were folded.

    Raises:
        ValueError: If the model is in training mode, or its logits changed.
    """
    if model.training:
        raise ValueError('BatchNorm can be fused for inference only: call eval() first')
    with torch.inference_mode(), _Watch(model) as watch:
        before = model(image)
    pairs = watch.pairs()
    names = {module: name for name, module in model.named_modules()}
    for norm, conv in pairs.items():
        _fold(conv, norm)
        parent, _, name = names[norm].rpartition('.')
        setattr(model.get_submodule(parent), name, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
    with torch.inference_mode():
        difference = (model(image) - before).abs().max().item()
    if not difference <= tolerance * max(1.0, before.abs().max().item()):
        raise ValueError(f'fusing {len(pairs)} BatchNorm layers changed the logits by {difference:.2g}: leave it out')
    return len(pairs)


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    # in float64, so that rounding is that of one convolution
    doubles: Any = [None if tensor is None else tensor.double() for tensor in tensors]
    weight, bias, mean, variance, scale, shift = doubles
    weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    conv.weight.copy_(weight)


class _Watch(TorchFunctionMode):
    """Notes which BatchNorm reads the output of which convolution, and what else reads it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.made: dict[int, tuple[nn.Module, Tensor]] = {}  # by id; holding the tensor keeps the id its own
        self.read: dict[nn.Module, int] = {}
        self.shared: set[int] = set()  # outputs with other readers
        self.calls: dict[nn.Module, int] = {}
        self.inside = False
        self.handles = []
        for module in model.modules():
            if type(module) in CONVOLUTIONS and not hasattr(module, 'parametrizations'):
                self.handles.append(module.register_forward_hook(self._made))
            elif type(module) in NORMS and module.running_mean is not None:
                self.handles += [
                    module.register_forward_pre_hook(self._enter),
                    module.register_forward_hook(self._leave),
                ]

    def _made(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.made[id(output)] = module, output
        self.calls[module] = self.calls.get(module, 0) + 1

    def _enter(self, module: nn.Module, inputs: tuple) -> None:
        self.inside = True
        self.calls[module] = self.calls.get(module, 0) + 1
        if id(inputs[0]) in self.made:
            if id(inputs[0]) in self.read.values():
                self.shared.add(id(inputs[0]))
            self.read[module] = id(inputs[0])

    def _leave(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.inside = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.inside and getattr(function, '__name__', '') != '__get__':  # the shape of a tensor is no use of it
            self.shared.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.made)
        return function(*args, **kwargs)

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)

    def pairs(self) -> dict[nn.Module, nn.Module]:
        """The convolution of each BatchNorm that can be folded."""
        found = {norm: self.made[key][0] for norm, key in self.read.items() if key not in self.shared}
        return {norm: conv for norm, conv in found.items() if self.calls[norm] == self.calls[conv] == 1}
