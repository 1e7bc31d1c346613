"""The command `train`: build a run and train it. Called, the package is the function `timm_mldecoder.api.train`."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """`timm_mldecoder.train` names this package and a public function, whichever is imported first."""

    def __call__(self, data: Any = None, **flags: Any) -> Any:
        return import_module('timm_mldecoder.api').train(data, **flags)


sys.modules[__name__].__class__ = _Callable
