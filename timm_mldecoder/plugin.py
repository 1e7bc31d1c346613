"""The plug-in: ``timm.create_model(name, ml_decoder=...)``. The only file that touches timm's factory.

torch calls the entry points of its group ``torch.backends`` at the end of ``import torch``; ours is `autoload`. It must
cost next to nothing and must not fail, so this file imports neither timm nor torch, and waits for timm's factory with
an import hook. ``create_model`` looks ``model_entrypoint`` up in its own module when it is called: replacing that one
name reaches every ``from timm import create_model`` made before.
"""

import functools
import os
import sys
import warnings

from timm_mldecoder.models import CLASSIFIER_OPTIONS

ENTRY_POINT_SWITCH = 'TIMM_MLDECODER_AUTOLOAD'
FACTORY = 'timm.models._factory'


def activate() -> None:
    """Make ``timm.create_model`` understand ``ml_decoder``, now or when timm is imported. Idempotent."""
    if FACTORY in sys.modules:
        _hook(sys.modules[FACTORY])
    if not _active():
        sys.meta_path.insert(0, _FactoryFinder())


def autoload() -> None:
    """The entry point: `activate`, unless ``TIMM_MLDECODER_AUTOLOAD=0``; an error of ours never reaches torch."""
    try:
        if os.environ.get(ENTRY_POINT_SWITCH) != '0':
            activate()
        elif not _active():
            # torch has just imported the package for us. Forget it, so that the user's own import still activates.
            for name in [name for name in sys.modules if name.partition('.')[0] == __package__]:
                del sys.modules[name]
    except Exception as error:  # `import torch` must succeed, whatever the error
        warnings.warn(f'timm_mldecoder could not start: {error!r}. timm works without ml_decoder', stacklevel=2)


def loaded_by_torch() -> bool:
    """Return whether torch is being imported right now, so that torch and not the user imports this package."""
    spec = getattr(sys.modules.get('torch'), '__spec__', None)
    return bool(getattr(spec, '_initializing', False))


def _active() -> bool:
    return any(isinstance(finder, _FactoryFinder) for finder in sys.meta_path)


class _FactoryFinder:
    """Finds timm's factory as any import would, and hooks it after it has run."""

    def find_spec(self, name, path=None, target=None):
        if name != FACTORY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, 'find_spec'))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _HookedLoader(spec.loader)
        return spec


class _HookedLoader:
    def __init__(self, loader) -> None:
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _hook(module)


def _hook(factory) -> None:
    if getattr(factory, '_ml_decoder_hook', False):
        return
    wrappers = {
        'model_entrypoint': _taking_options,
        'load_model_config_from_path': _telling_pool,
        'load_model_config_from_hf': _telling_pool,
    }
    for name, wrap in wrappers.items():
        if hasattr(factory, name):  # else an unknown timm, which must work without us
            setattr(factory, name, wrap(getattr(factory, name)))
    factory._ml_decoder_hook = True


def _taking_options(model_entrypoint):
    """Wrap timm's lookup: the functions it returns also take the options of this package."""

    @functools.wraps(model_entrypoint)
    def lookup(*args, **kwargs):
        entrypoint = model_entrypoint(*args, **kwargs)

        @functools.wraps(entrypoint)
        def create(*args, **kwargs):
            options = {**(kwargs.get('pretrained_model_args') or {}), **kwargs}
            if not any(name in options for name in CLASSIFIER_OPTIONS):
                return entrypoint(*args, **kwargs)
            return _our_factory().create_model(functools.partial(entrypoint, *args), **kwargs)

        return create

    return lookup


def _telling_pool(load_config):
    """Wrap timm's reading of a stored model: report the pooling of the backbone, where timm recorded it as removed.

    Otherwise nobody could tell what timm recorded from a ``global_pool=''`` of the user.
    """

    @functools.wraps(load_config)
    def load(*args, **kwargs):
        pretrained_cfg, name, model_args = load_config(*args, **kwargs)
        option = next((name for name in ('ml_decoder', 'probe_head') if (model_args or {}).get(name)), None)
        if option:
            head = model_args[option]
            if isinstance(head, dict):  # class names are there for transformers; here they come with the weights
                model_args = {**model_args, option: {name: head[name] for name in head if name != 'class_names'}}
            pool = head.get('global_pool') if isinstance(head, dict) else None
            others = {name: value for name, value in model_args.items() if name != 'global_pool'}
            model_args = {**others, 'global_pool': pool} if pool else others
        return pretrained_cfg, name, model_args

    return load


def _our_factory():
    try:
        from timm_mldecoder.models import factory
    except Exception as error:  # timm or this package is damaged
        raise RuntimeError(f'timm_mldecoder does not work with the installed timm: {error!r}') from error
    return factory
