"""Flags of the loss, the optimizer and the learning rate."""

from timm.task import LOSS_TYPES

from timm_mldecoder.engine.flags.flag import Group, flag, pairs, switch
from timm_mldecoder.losses import LOSSES

LOSS: Group = (
    'Loss',
    [
        flag(
            '--loss',
            type=str,
            choices=[*LOSS_TYPES, *(name for name in LOSSES if name not in LOSS_TYPES)],
            help='loss; ce for one class an image, bce for several, if not given; csl and aam are for several',
        ),
        switch('--bce-loss', help='binary cross-entropy, the same as --loss bce'),
        switch('--bce-sum', help='sum the BCE over classes'),
        flag('--bce-target-thresh', type=float, metavar='T', help='turn mixed targets above it to 1, others to 0'),
        flag('--bce-pos-weight', type=float, metavar='W', help='weight of the positive term of BCE'),
        flag(
            '--loss-pos-weight',
            type=str,
            metavar='W',
            help='positive weight: number, comma list, file, or a method with --class-stats',
        ),
        flag('--loss-class-weight', type=str, metavar='W', help='class weight: the same forms'),
        flag(
            '--loss-weight-power', type=float, metavar='P', default=1.0, help='exponent of weights from --class-stats'
        ),
        flag('--class-stats', type=str, metavar='FILE', default='', help='JSON with pos_counts and num_samples'),
        flag('--poly-gamma', type=float, metavar='G', default=0.0, help='focusing parameter of the poly loss'),
        flag('--poly-epsilon', type=float, metavar='EPS', default=2.0, help='coefficient of the poly loss'),
        pairs(
            '--loss-kwargs',
            help='further arguments of the loss, as in asl_gamma_pos=0 (timm.loss.create_classification_loss), '
            'detach_focusing=True or mode=selective (timm_mldecoder.losses)',
        ),
    ],
)

OPTIMIZER: Group = (
    'Optimizer',
    [
        flag('--opt', type=str, metavar='NAME', default='sgd', help='timm optimizer'),
        flag('--opt-eps', type=float, metavar='EPS', help='epsilon of the optimizer'),
        flag('--opt-betas', type=float, nargs='+', metavar='BETA', help='betas of the optimizer'),
        flag('--momentum', type=float, metavar='M', default=0.9, help='momentum of the optimizer'),
        flag('--weight-decay', type=float, metavar='WD', default=2e-5, help='weight decay'),
        flag('--clip-grad', type=float, metavar='NORM', help='clip gradients'),
        flag('--clip-mode', type=str, metavar='MODE', default='norm', help='clip by norm, value or agc'),
        flag('--layer-decay', type=float, metavar='D', help='learning-rate decay from layer to layer'),
        flag('--layer-decay-min-scale', type=float, metavar='S', default=0, help='smallest scale of layer decay'),
        flag('--layer-decay-no-opt-scale', type=float, metavar='S', help='scale under which layers are not trained'),
        flag(
            '--bias-lr-scale',
            type=float,
            metavar='FACTOR',
            default=1.0,
            help='learning rate of biases, as a multiple of that of the other parameters',
        ),
        flag(
            '--sam',
            type=float,
            metavar='RHO',
            default=0.0,
            help='sharpness-aware minimisation with a step of this length; two passes an update, off at 0',
        ),
        pairs('--opt-kwargs', help='further arguments of the optimizer'),
    ],
)

SCHEDULE: Group = (
    'Learning rate',
    [
        flag(
            '--sched',
            type=str,
            metavar='NAME',
            default='cosine',
            help='cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, plateau, onecycle or none',
        ),
        switch('--sched-on-updates', help='step the schedule with every update rather than epoch'),
        flag('--lr', type=float, metavar='LR', help='learning rate; from --lr-base if not given'),
        flag(
            '--lr-base', type=float, metavar='LR', default=0.1, help='learning rate at --lr-base-size images an update'
        ),
        flag('--lr-base-size', type=int, metavar='N', default=256, help='images an update that --lr-base is meant for'),
        flag('--lr-base-scale', type=str, metavar='HOW', default='', help='linear or sqrt; by optimizer if empty'),
        flag('--lr-noise', type=float, nargs='+', metavar='PCT', help='where learning-rate noise starts and ends'),
        flag('--lr-noise-pct', type=float, metavar='PCT', default=0.67, help='limit of the noise'),
        flag('--lr-noise-std', type=float, metavar='STD', default=1.0, help='standard deviation of the noise'),
        flag('--lr-cycle-mul', type=float, metavar='M', default=1.0, help='growth of cycles'),
        flag('--lr-cycle-decay', type=float, metavar='M', default=0.5, help='decay of the rate from cycle to cycle'),
        flag('--lr-cycle-limit', type=int, metavar='N', default=1, help='number of cycles'),
        flag('--lr-k-decay', type=float, metavar='K', default=1.0, help='k-decay of cosine and poly'),
        flag('--lr-decay-fn', type=str, metavar='NAME', help='decay of the wsd and rsqrt schedules'),
        flag('--lr-stable-timescale', type=float, metavar='EPOCHS', help='timescale of the rsqrt schedule'),
        flag('--warmup-lr', type=float, metavar='LR', default=1e-5, help='learning rate that warm-up starts at'),
        flag('--min-lr', type=float, metavar='LR', default=0, help='learning rate that schedules end at'),
        flag('--epochs', type=int, metavar='N', default=300, help='epochs to train'),
        flag(
            '--epoch-repeats', type=float, metavar='N', default=0.0, help='passes over a streamed data set in one epoch'
        ),
        flag('--start-epoch', type=int, metavar='N', help='epoch to start at, whatever a resumed checkpoint says'),
        flag(
            '--decay-milestones',
            type=int,
            nargs='+',
            metavar='EPOCH',
            default=[90, 180, 270],
            help='steps of multistep',
        ),
        flag(
            '--decay-epochs', type=float, metavar='N', default=90, help='epochs between steps; length of the wsd decay'
        ),
        flag('--warmup-epochs', type=int, metavar='N', default=5, help='epochs of warm-up'),
        switch('--warmup-prefix', help='warm up before the schedule, not within it'),
        flag('--cooldown-epochs', type=int, metavar='N', default=0, help='epochs at --min-lr after the schedule'),
        flag('--patience-epochs', type=int, metavar='N', default=10, help='patience of the plateau schedule'),
        flag('--decay-rate', '--dr', type=float, metavar='RATE', default=0.1, help='decay of a step; power of poly'),
    ],
)
