"""ML-Decoder classification heads for timm. Importing this package activates ``create_model(..., ml_decoder=...)``."""

from typing import TYPE_CHECKING

from timm_mldecoder import plugin

if TYPE_CHECKING:
    from timm_mldecoder.api import evaluate, load, train
    from timm_mldecoder.checkpoint.published import convert_state_dict
    from timm_mldecoder.head import MLDecoder
    from timm_mldecoder.models.attach import add_ml_decoder_head
    from timm_mldecoder.models.cosine import CosineClassifier, add_cosine_classifier
    from timm_mldecoder.models.graph import GraphClassifier, add_graph_classifier

__version__ = '0.2.0'

# Public name -> module. Resolved on first use: torch imports this package while it is itself being imported (see
# plugin.py), and must not pay for, or fail on, anything that the plug-in does not need.
_PUBLIC = {
    'CosineClassifier': 'timm_mldecoder.models.cosine',
    'GraphClassifier': 'timm_mldecoder.models.graph',
    'MLDecoder': 'timm_mldecoder.head',
    'add_cosine_classifier': 'timm_mldecoder.models.cosine',
    'add_graph_classifier': 'timm_mldecoder.models.graph',
    'add_ml_decoder_head': 'timm_mldecoder.models.attach',
    'convert_state_dict': 'timm_mldecoder.checkpoint.published',
    'evaluate': 'timm_mldecoder.api',
    'load': 'timm_mldecoder.api',
    'train': 'timm_mldecoder',  # the package of the command, which is callable: see its `__init__`
}

__all__ = [
    'CosineClassifier',
    'GraphClassifier',
    'MLDecoder',
    '__version__',
    'add_cosine_classifier',
    'add_graph_classifier',
    'add_ml_decoder_head',
    'convert_state_dict',
    'evaluate',
    'load',
    'train',
]

if not TYPE_CHECKING:  # else every made-up name would have a type

    def __getattr__(name: str):
        if name not in _PUBLIC:
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        from importlib import import_module

        if name == 'train':
            return import_module('timm_mldecoder.train')
        return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


if not plugin.loaded_by_torch():
    plugin.activate()
