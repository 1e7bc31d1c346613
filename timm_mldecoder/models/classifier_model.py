"""What timm models with a classifier of this package share: a class made on the fly, `save_for_hf`, initialization."""

import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from timm_mldecoder.models import CLASSIFIER_OPTIONS

_classes: dict[tuple[type, type], type] = {}
_classes_lock = threading.Lock()  # two threads that extend the same timm class must get the same class


class ClassifierModel:
    """Mixin in front of a timm model's own class; a subclass per kind of classifier.

    The model's forward, tensor names and methods stay its own.
    """

    classifier_option: str  # the option of ``timm.create_model`` that builds this classifier
    __jit_unused_properties__ = ('_model_args',)

    @classmethod
    def class_members(cls, model_class: type) -> dict:
        """Return the attributes of the class that extends `model_class`."""
        return {}

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # of the timm model that the class is mixed into

    def classifier_options(self):
        """Return the JSON value of `classifier_option` that builds the classifier again, None without one."""
        raise NotImplementedError

    @property
    def _model_args(self) -> dict:
        """The arguments that ``save_for_hf`` writes, from which ``create_model`` builds this model again."""
        args, value = self.__dict__.get('_recorded_args', {}), self.classifier_options()
        return args if value is None else {**args, self.classifier_option: value}

    @_model_args.setter
    def _model_args(self, args: dict) -> None:
        # timm records the options as the user gave them: they may hold tensors, and the classifier may change later
        self._recorded_args = {name: args[name] for name in args if name not in CLASSIFIER_OPTIONS}

    def init_non_persistent_buffers(self) -> None:
        """Initialise the tensors of the classifier that transformers found in no checkpoint.

        transformers builds models on the meta device, fills in what a checkpoint holds, and calls this hook on modules
        with tensors left over, which are uninitialised memory. Loaded tensors keep their values. timm has a hook of the
        same name, whose calls are ignored: only transformers replaces the functions of ``torch.nn.init`` meanwhile.
        """
        inherited = getattr(super(), 'init_non_persistent_buffers', None)
        if inherited is not None:
            inherited()
        if nn.init.normal_.__module__.partition('.')[0] == 'transformers' and self.num_classes:
            tensors = self.get_classifier().state_dict(keep_vars=True).values()
            loaded = [(tensor, tensor.detach().clone()) for tensor in tensors if is_loaded(tensor)]
            self.reset_classifier_tensors()
            with torch.no_grad():
                for tensor, values in loaded:
                    tensor.copy_(values)

    def reset_classifier_tensors(self) -> None:
        """Draw every tensor of the classifier anew, but for label embeddings that transformers has loaded."""
        self.get_classifier().reset_parameters()

    def __reduce_ex__(self, protocol):
        # Copies and pickles cannot find a class made on the fly by its name: they name its parts and make it again.
        return _empty_instance, type(self).__bases__, self.__dict__


def module_path(model: nn.Module, module: nn.Module) -> str:
    """Return the name of a module within a model."""
    return next(name for name, found in model.named_modules() if found is module)


def classifiers_of(model: Any) -> list[Any]:
    """Return the classifier of a timm model; two of a distilled one."""
    found = model.get_classifier()
    return list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]


def linear_classifier(model: Any, new: str) -> nn.Linear:
    """Return the classifier of a timm model, for a `new` one to replace.

    Raises:
        ValueError: If it is not one linear layer.
    """
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        found = ' and '.join(type(part).__name__ for part in classifiers_of(model))
        raise ValueError(f'{new} replaces one nn.Linear; the classifier of {type(model).__name__} is {found}')
    return classifier


def state_dict_mismatches(tensors: Mapping[str, Tensor], model: nn.Module, any_shape: str | None = None) -> list[str]:
    """Return a line each about tensors that a model misses, does not expect, or has in another shape.

    Args:
        tensors: Tensors by the names of the model's.
        model: The model.
        any_shape: Beginning of the names of tensors whose shapes may differ.
    """
    own = model.state_dict()
    both = [name for name in own if name in tensors and not (any_shape and name.startswith(any_shape))]
    shapes = {name: (list(tensors[name].shape), list(own[name].shape)) for name in both}
    found = {
        'missing': [name for name in own if name not in tensors],
        'unexpected': [name for name in tensors if name not in own],
        'mis-shaped': [f'{name} (file {a}, model {b})' for name, (a, b) in shapes.items() if a != b],
    }
    return [f'{kind}: {shorten(names)}' for kind, names in found.items() if names]


def shorten(names: Sequence[str], limit: int = 120) -> str:
    """Return names in at most about `limit` characters: all, or their number, what they begin with, and the first."""
    text = ', '.join(names)
    if len(text) <= limit:
        return text
    common = os.path.commonprefix(names).rpartition('.')[0]
    first = names[0] if len(names[0]) <= limit else f'{names[0][:limit]}...'
    return f'{len(names)} tensors{f", all of {common}" if common else ""} ({first}, ...)'


def is_loaded(tensor: Tensor) -> bool:
    """Return whether transformers has loaded a tensor from a checkpoint."""
    return getattr(tensor, '_is_hf_initialized', False)


def extend_class(mixin: type[ClassifierModel], model_class: type) -> type:
    """Return the subclass of a timm class that has `mixin` in front; the same for the same arguments."""
    model_class = timm_class(model_class)
    with _classes_lock:
        if (mixin, model_class) not in _classes:
            members = {'__doc__': model_class.__doc__, '__module__': __name__, **mixin.class_members(model_class)}
            name = model_class.__name__ + mixin.__name__.removesuffix('Model')
            _classes[mixin, model_class] = type(name, (mixin, model_class), members)
        return _classes[mixin, model_class]


def change_class(model: Any, mixin: type[ClassifierModel]) -> None:
    """Make a timm model an instance of `extend_class`; what timm recorded of its construction stays."""
    args: dict[str, Any] = model._model_args if hasattr(model, '_model_args') else {}
    model.__dict__.pop('_model_args', None)
    model.__class__ = extend_class(mixin, type(model))
    model._model_args = args


def timm_class(model_class: type) -> type:
    """Return the timm class behind one of `extend_class`; any other class as it is."""
    return model_class.__bases__[1] if issubclass(model_class, ClassifierModel) else model_class


def _empty_instance(mixin: type[ClassifierModel], model_class: type) -> nn.Module:
    cls: Any = extend_class(mixin, model_class)
    return cls.__new__(cls)
