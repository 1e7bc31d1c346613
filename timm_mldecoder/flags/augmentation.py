"""Flags of augmentation and regularization."""

from timm_mldecoder.flags.data import INTERPOLATIONS
from timm_mldecoder.flags.flag import Group, Need, train
from timm_mldecoder.flags.needs import DISTRIBUTED, NO_HEAD, given

# fmt: off
AUGMENTS = Need(lambda o: not o.no_aug, 'augmentation, which --no-aug turns off')
MIXES = given('mixup', 'cutmix', 'cutmix_minmax')
MIXES_BOTH = Need(lambda o: bool(o.mixup and (o.cutmix or o.cutmix_minmax)), 'both --mixup and --cutmix')
NO_AA = Need(lambda o: not o.aa, 'no --aa, which replaces color jitter')
NEVER = Need(lambda o: False, '--drop-path, its name in timm today')

AUGMENTATION: Group = ('Augmentation', [
    train('--no-aug', bool, False, 'train on the evaluation transform'),
    train('--train-crop-mode', str, None, 'crop of training images: random resized (rrc, the default), random keeping '
          'the aspect ratio (rkrc, rkrr), or resize without crop (squash)', choices=('rrc', 'rkrc', 'rkrr', 'squash'),
          needs=AUGMENTS),
    train('--scale', float, [0.08, 1.0], 'smallest and largest area of the random crop, as a share of the image',
          nargs='+', range='(0, inf)', needs=AUGMENTS),
    train('--ratio', float, [3.0 / 4.0, 4.0 / 3.0], 'smallest and largest aspect ratio of the random crop', nargs='+',
          range='(0, inf)', needs=AUGMENTS),
    train('--hflip', float, 0.5, 'probability of a horizontal flip', range='[0, 1]', needs=AUGMENTS),
    train('--vflip', float, 0.0, 'probability of a vertical flip', range='[0, 1]', needs=AUGMENTS),
    train('--color-jitter', float, 0.4, 'strength of color jitter', range='[0, inf)', needs=AUGMENTS),
    train('--color-jitter-prob', float, None, 'probability of color jitter; always if not given', range='[0, 1]',
          needs=(AUGMENTS, NO_AA)),
    train('--grayscale-prob', float, None, 'probability of conversion to gray', range='[0, 1]', needs=AUGMENTS),
    train('--gaussian-blur-prob', float, None, 'probability of Gaussian blur', range='[0, 1]', needs=AUGMENTS),
    train('--aa', str, None, 'AutoAugment, RandAugment or AugMix policy, such as rand-m7-mstd0.5-inc1',
          metavar='POLICY', needs=AUGMENTS),
    train('--cutout', float, 0.0, 'sides of the rectangle painted over each training image, as a share of its sides; '
          '0: off', range='[0, 1]', needs=AUGMENTS),
    train('--cutout-prob', float, 1.0, 'share of the images that --cutout paints over', range='[0, 1]',
          needs=(AUGMENTS, given('cutout'))),
    train('--cutout-place', str, 'before', 'paint before or after the other augmentations', choices=('before', 'after'),
          needs=(AUGMENTS, given('cutout'))),
    train('--aug-repeats', float, 0, 'augmented copies of each image per epoch, over all ranks',
          range='[0, 1024]', needs=DISTRIBUTED),
    train('--aug-splits', int, 0, 'views of each image in a batch, of which the first is only cropped and flipped; '
          '0: off', range='[0, 64]'),
    train('--reprob', float, 0.0, 'probability of random erasing', range='[0, 1]', needs=AUGMENTS),
    train('--remode', str, 'pixel', 'fill of random erasing: zeros, one random color, or random pixels',
          choices=('const', 'rand', 'pixel'), needs=given('reprob')),
    train('--recount', int, 1, 'regions per image of random erasing', range='[1, 1024]', needs=given('reprob')),
    train('--resplit', bool, False, 'do not erase in the first half of each batch, or with --aug-splits in the first '
          'views', needs=given('reprob', 'split_bn')),
    train('--mixup', float, 0.0, 'alpha of mixup; 0: off', range='[0, inf)'),
    train('--cutmix', float, 0.0, 'alpha of CutMix; 0: off', range='[0, inf)'),
    train('--cutmix-minmax', float, None, 'smallest and largest ratio of CutMix; replaces its alpha', nargs='+',
          range='[0, 1]'),
    train('--mixup-prob', float, 1.0, 'probability of mixup or CutMix', range='[0, 1]', needs=MIXES),
    train('--mixup-switch-prob', float, 0.5, 'probability of CutMix instead of mixup', range='[0, 1]',
          needs=MIXES_BOTH),
    train('--mixup-mode', str, 'batch', 'one mixing ratio per batch, per pair or per image',
          choices=('batch', 'pair', 'elem'), needs=MIXES),
    train('--mixup-off-epoch', int, 0, 'epoch from which mixup and CutMix are off; 0: never', range='[0, inf)',
          needs=MIXES),
    train('--train-interpolation', str, 'random', 'interpolation of training images',
          choices=('', 'random', *INTERPOLATIONS), needs=AUGMENTS),
])

REGULARIZATION: Group = ('Regularization', [
    train('--smoothing', float, 0.1, 'label smoothing; for --task multilabel the default is 0', range='[0, 1)'),
    train('--drop', float, 0.0, 'dropout before the classifier; for an ML-Decoder head use --ml-decoder-kwargs '
          'dropout=P', range='[0, 1)',
          needs=NO_HEAD._replace(text='--use-ml-decoder-head 0; for the head use --ml-decoder-kwargs dropout=P')),
    train('--drop-path', float, None, 'stochastic depth: probability of dropping a block', range='[0, 1)'),
    train('--drop-connect', float, None, 'former name of --drop-path, without effect', range='[0, 1)', needs=NEVER),
    train('--drop-block', float, None, 'probability of DropBlock', range='[0, 1)'),
])
