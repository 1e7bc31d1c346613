"""Flags that multi-label recipes need beyond timm's."""

from timm_mldecoder.engine.options.tables import Group, flag

MULTI_LABEL: Group = ('Multi-label recipes', [
    flag('--crop-mode', type=str, metavar='MODE', help='how evaluation images are cut: squash, border or center'),
    flag('--cutout', type=float, metavar='FRACTION', default=0.0,
         help='paint a rectangle with this fraction of the sides over each training image'),
    flag('--cutout-prob', type=float, metavar='P', default=1.0, help='share of the images that --cutout paints over'),
    flag('--class-priors', type=str, metavar='FILE', default='', help='CSV of class priors for --loss csl'),
])
