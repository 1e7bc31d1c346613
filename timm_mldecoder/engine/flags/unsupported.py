"""Flags of timm's scripts that are parsed and refused; the help text is the reason."""

from timm_mldecoder.engine.flags.flag import Group, both, train, validate

_NAFLEX = 'NaFlex loaders are not supported; use --img-size, or --train-img-sizes for several sizes'
_KD = 'knowledge distillation is not supported; leave the flag out'
_SCRIPT = 'TorchScript is not supported; use --torchcompile'

# fmt: off
UNSUPPORTED: Group = ('Unsupported', [
    both('--naflex-loader', bool, False, _NAFLEX, supported=False),
    train('--naflex-train-seq-lens', int, [128, 256, 576, 784, 1024], _NAFLEX, nargs='+', supported=False),
    both('--naflex-max-seq-len', int, 576, _NAFLEX, supported=False),
    train('--naflex-patch-sizes', int, None, _NAFLEX, nargs='+', supported=False),
    train('--naflex-patch-size-probs', float, None, _NAFLEX, nargs='+', supported=False),
    train('--naflex-loss-scale', str, 'linear', _NAFLEX, choices=('none', 'sqrt', 'linear'), supported=False),
    train('--naflex-patchify-channels-first', bool, False, _NAFLEX, supported=False),
    train('--kd-model-name', str, None, _KD, supported=False),
    train('--kd-distill-type', str, 'logit', _KD, choices=('logit', 'feature', 'token'), supported=False),
    train('--kd-loss-type', str, 'kl', _KD, supported=False),
    train('--distill-loss-weight', float, None, _KD, supported=False),
    train('--task-loss-weight', float, None, _KD, supported=False),
    train('--kd-temperature', float, 4.0, _KD, supported=False),
    train('--kd-student-feature-dim', int, None, _KD, supported=False),
    train('--kd-teacher-feature-dim', int, None, _KD, supported=False),
    train('--kd-token-distill-type', str, 'soft', _KD, choices=('soft', 'hard'), supported=False),
    both('--torchscript', bool, False, _SCRIPT, supported=False),
    both('--fuser', str, '', _SCRIPT, supported=False),
    validate('--tf-preprocessing', bool, False, 'TensorFlow preprocessing is not supported; use --interpolation and '
             '--crop-pct', supported=False),
])
