"""Train the head alone: the backbone in eval mode, without gradients, weight decay or exchange between ranks."""

import logging

from timm.utils import unwrap_model
from torch import nn

from timm_mldecoder.models.classifier_model import classifiers_of

_logger = logging.getLogger(__name__)


def head_parameters(model: nn.Module) -> set[int]:
    """Return the `id` of every parameter of the classifier."""
    return {id(parameter) for module in classifiers_of(unwrap_model(model)) for parameter in module.parameters()}


class Freezer:
    """Freezes the backbone of a model for some epochs.

    A frozen backbone stays bit-equal: it has no gradients, its BatchNorm statistics are fixed, and its dropout and
    stochastic depth are off. No graph of it is kept, so that its activations need no memory.

    Args:
        model: timm model, not yet wrapped.
        enabled: Whether the backbone is ever frozen.
        until: Epoch from which it is trained too; None for never.
    """

    def __init__(self, model: nn.Module, enabled: bool, until: int | None = None) -> None:
        self._model = model  # tasks of distillation wrap it together with parts that are trained too
        head = head_parameters(model)
        self._backbone = [parameter for parameter in model.parameters() if id(parameter) not in head]
        self._trainable = [parameter for parameter in self._backbone if parameter.requires_grad]
        self._enabled = enabled
        self._until = until

    def is_frozen(self, epoch: int) -> bool:
        """Return whether the backbone is frozen in an epoch."""
        return self._enabled and (self._until is None or epoch < self._until)

    def apply(self, epoch: int) -> bool:
        """Freeze or unfreeze the parameters for an epoch, and return whether that changed anything."""
        trainable = not self.is_frozen(epoch)
        changed = any(parameter.requires_grad != trainable for parameter in self._trainable)
        for parameter in self._trainable:
            parameter.requires_grad_(trainable)
        if changed:
            _logger.info(f'Epoch {epoch}: the backbone is {"trained" if trainable else "frozen"}')
        return changed

    def train_mode(self, model: nn.Module, epoch: int) -> None:
        """Put a model into training mode, its backbone only if it is trained."""
        model.train()
        if self.is_frozen(epoch):
            self._model.eval()
            for module in classifiers_of(self._model):
                module.train()
