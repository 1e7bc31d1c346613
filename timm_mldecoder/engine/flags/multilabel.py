"""Flags that multi-label recipes and their evaluation need beyond timm's."""

from timm_mldecoder.engine.flags.flag import Group, flag, switch

MULTI_LABEL: Group = (
    'Multi-label recipes',
    [
        flag('--crop-mode', type=str, metavar='MODE', help='how evaluation images are cut: squash, border or center'),
        flag(
            '--cutout',
            type=float,
            metavar='FRACTION',
            default=0.0,
            help='paint a rectangle with this fraction of the sides over each training image',
        ),
        flag(
            '--cutout-prob', type=float, metavar='P', default=1.0, help='share of the images that --cutout paints over'
        ),
        flag('--class-priors', type=str, metavar='FILE', default='', help='CSV of class priors for --loss csl'),
    ],
)

MULTI_LABEL_RESULTS: Group = (
    'Multi-label results',
    [
        switch(
            '--write-thresholds', help='tune a threshold a class for F1 on this split, and store them in --checkpoint'
        ),
        flag(
            '--write-class-priors',
            type=str,
            metavar='FILE',
            default='',
            help='write the mean probability of each class, as --class-priors of train.py reads it',
        ),
        flag(
            '--class-report',
            type=str,
            metavar='FILE',
            default='',
            help='write average precision and threshold by class',
        ),
    ],
)
