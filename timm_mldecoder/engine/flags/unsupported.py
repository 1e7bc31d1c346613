"""What timm's scripts do and these do not: accepted by the parser, refused with one sentence."""

from argparse import Namespace

from timm_mldecoder.engine.flags.flag import Group, flag, switch

NAFLEX: Group = (
    'NaFlex loaders (refused)',
    [
        switch('--naflex-loader', help='not here'),
        flag('--naflex-train-seq-lens', type=int, nargs='+', default=[128, 256, 576, 784, 1024], help='not here'),
        flag('--naflex-max-seq-len', type=int, default=576, help='not here'),
        flag('--naflex-patch-sizes', type=int, nargs='+', help='not here'),
        flag('--naflex-patch-size-probs', type=float, nargs='+', help='not here'),
        flag('--naflex-loss-scale', type=str, default='linear', choices=['none', 'sqrt', 'linear'], help='not here'),
        switch('--naflex-patchify-channels-first', help='not here'),
    ],
)
DISTILLATION: Group = (
    'Knowledge distillation (refused)',
    [
        flag('--kd-model-name', type=str, help='not here'),
        flag('--kd-distill-type', type=str, default='logit', choices=['logit', 'feature', 'token'], help='not here'),
        flag('--kd-loss-type', type=str, default='kl', help='not here'),
        flag('--distill-loss-weight', type=float, help='not here'),
        flag('--task-loss-weight', type=float, help='not here'),
        flag('--kd-temperature', type=float, default=4.0, help='not here'),
        flag('--kd-student-feature-dim', type=int, help='not here'),
        flag('--kd-teacher-feature-dim', type=int, help='not here'),
        flag('--kd-token-distill-type', type=str, default='soft', choices=['soft', 'hard'], help='not here'),
    ],
)
SPLITS: Group = (
    'Augmentation splits with JSD (refused)',
    [flag('--aug-splits', type=int, default=0, help='not here'), switch('--jsd-loss', help='not here')],
)
SPLIT_BN: Group = ('Split batch norm (refused)', [switch('--split-bn', help='not here')])
TORCHSCRIPT: Group = (
    'TorchScript and its fusers (refused)',
    [switch('--torchscript', help='not here'), flag('--fuser', type=str, default='', help='not here')],
)

TF_PREPROCESSING: Group = ("TensorFlow's preprocessing (refused)", [switch('--tf-preprocessing', help='not here')])

#: The groups of train.py, and those of validate.py.
TRAIN_REFUSED = [NAFLEX, DISTILLATION, SPLITS, SPLIT_BN, TORCHSCRIPT]
VALIDATE_REFUSED = [('NaFlex loaders (refused)', [NAFLEX[1][0], NAFLEX[1][2]]), TORCHSCRIPT, TF_PREPROCESSING]

_REASON = "is not offered here; use timm's own {script} with --model-kwargs ml_decoder=True, which takes the same head"


def refuse(options: Namespace, script: str) -> None:
    """Raise a ValueError for a flag of a refused group that is set to anything but its default."""
    for title, rows in TRAIN_REFUSED if script == 'train.py' else VALIDATE_REFUSED:
        for names, settings in rows:
            name = names[0].lstrip('-').replace('-', '_')
            if getattr(options, name) != settings['default']:
                what = title.removesuffix(' (refused)')
                raise ValueError(f'{names[0]} {getattr(options, name)}: {what} {_REASON.format(script=script)}')
    if getattr(options, 'loss', None) == 'jsd':
        raise ValueError(f'--loss jsd: {SPLITS[0].removesuffix(" (refused)")} {_REASON.format(script=script)}')
