"""ML-Decoder classification heads for timm. Importing this package activates ``create_model(..., ml_decoder=...)``."""

from timm_mldecoder import plugin

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
}

__all__ = ['__version__', *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


if not plugin.loaded_by_torch():
    plugin.activate()
