"""Flags of timm's scripts that are parsed and refused; the help text is the reason."""

from timm_mldecoder.engine.flags.flag import Group, both, train

_NAFLEX = 'NaFlex loaders are not supported; use --img-size, or --train-img-sizes for several sizes'

# fmt: off
UNSUPPORTED: Group = ('Unsupported', [
    both('--naflex-loader', bool, False, _NAFLEX, supported=False),
    train('--naflex-train-seq-lens', int, [128, 256, 576, 784, 1024], _NAFLEX, nargs='+', supported=False),
    both('--naflex-max-seq-len', int, 576, _NAFLEX, supported=False),
    train('--naflex-patch-sizes', int, None, _NAFLEX, nargs='+', supported=False),
    train('--naflex-patch-size-probs', float, None, _NAFLEX, nargs='+', supported=False),
    train('--naflex-loss-scale', str, 'linear', _NAFLEX, choices=('none', 'sqrt', 'linear'), supported=False),
    train('--naflex-patchify-channels-first', bool, False, _NAFLEX, supported=False),
])
