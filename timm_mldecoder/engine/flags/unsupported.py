"""Flags of timm's scripts that are parsed and refused; the help text is the reason."""

from timm_mldecoder.engine.flags.flag import Group, both, train, validate

_KD = 'knowledge distillation is not supported; leave the flag out'
_SCRIPT = 'TorchScript is not supported; use --torchcompile'

# fmt: off
UNSUPPORTED: Group = ('Unsupported', [
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
