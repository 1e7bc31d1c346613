"""The plug-in: ``timm.create_model(name, ml_decoder=...)``. The only file that touches timm's factory.

torch calls the entry points of its group ``torch.backends`` at the end of ``import torch``; ours is `autoload`. It must
cost next to nothing and can never fail, so this file imports neither timm nor torch, and waits for timm's factory with
an import hook. ``create_model`` looks ``model_entrypoint`` up in its own module when it is called: replacing that one
name reaches every ``from timm import create_model`` made before.
"""

import functools
import os
import re
import sys
import warnings

ENTRY_POINT_SWITCH = 'TIMM_MLDECODER_AUTOLOAD'
OLDEST_TIMM = (1, 0, 31)
# Where timm's factory is: today's place, and the one before timm 0.8, watched only to say that it is too old.
FACTORIES = ('timm.models._factory', 'timm.models.factory')


def activate() -> None:
    """Make ``timm.create_model`` understand ``ml_decoder``, now or when timm is imported. Twice is the same as once."""
    for name in FACTORIES:
        if name in sys.modules:
            _hook(sys.modules[name])
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
    except Exception as error:  # whatever it is, `import torch` has to succeed
        warnings.warn(f'timm_mldecoder could not start: {error!r}. timm works without ml_decoder.', stacklevel=2)


def loaded_by_torch() -> bool:
    """Whether torch is being imported right now, so that importing this package is its doing and not the user's."""
    spec = getattr(sys.modules.get('torch'), '__spec__', None)
    return bool(getattr(spec, '_initializing', False))


def _active() -> bool:
    return any(isinstance(finder, _FactoryFinder) for finder in sys.meta_path)


class _FactoryFinder:
    """Finds timm's factory as any import would, and hooks it once it has run."""

    def find_spec(self, name, path=None, target=None):
        if name not in FACTORIES:
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
    if hasattr(factory, 'model_entrypoint'):
        find = factory.model_entrypoint
        factory.model_entrypoint = functools.wraps(find)(lambda *args, **kwargs: _with_option(find(*args, **kwargs)))
    elif hasattr(factory, 'create_model'):  # a timm we do not know: leave it as it is, but say so when asked
        factory.create_model = _refusing(factory.create_model)
    factory._ml_decoder_hook = True


def _with_option(entrypoint):
    """A timm model function that also takes ``ml_decoder``."""

    @functools.wraps(entrypoint)
    def create(*args, ml_decoder=None, **kwargs):
        stored = (kwargs.get('pretrained_model_args') or {}).get('ml_decoder')
        if not (ml_decoder or isinstance(ml_decoder, dict)):
            if stored and kwargs.get('pretrained'):
                raise ValueError(
                    'this checkpoint holds an ML-Decoder head: leave ml_decoder out, or load it without pretrained=True'
                )
            return entrypoint(*args, **kwargs)
        return _factory_module().create_with_head(
            functools.partial(entrypoint, *args), ml_decoder, stored_head=bool(stored), **kwargs
        )

    return create


def _refusing(create_model):
    @functools.wraps(create_model)
    def create(*args, **kwargs):
        if kwargs.get('ml_decoder'):
            _refuse('its model factory has changed')
        return create_model(*args, **kwargs)

    return create


def _factory_module():
    """Our part of the work, or one clear word about why it cannot be had."""
    if tuple(int(part) for part in re.findall(r'\d+', _timm_version())[:3]) < OLDEST_TIMM:
        _refuse(f'it needs timm {".".join(map(str, OLDEST_TIMM))} or newer')
    try:
        from timm_mldecoder.models import factory
    except Exception as error:  # timm or this package is broken: say so once, where the option was asked for
        _refuse(f'it could not be loaded: {error!r}', error)
    return factory


def _timm_version() -> str:
    return getattr(sys.modules['timm'], '__version__', '(unknown version)')


def _refuse(reason: str, cause: BaseException | None = None) -> None:
    message = f'ml_decoder does not work with the installed timm {_timm_version()}: {reason}'
    warnings.warn(message, RuntimeWarning, stacklevel=4)
    raise RuntimeError(message) from cause
