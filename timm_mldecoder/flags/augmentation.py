"""Flags of augmentation and regularization."""

from dataclasses import dataclass

from timm_mldecoder.flags.data import INTERPOLATIONS
from timm_mldecoder.flags.flag import DISTRIBUTED, NO_HEAD, Need, given, train
from timm_mldecoder.flags.group import Group

# fmt: off
CROPS = Need(lambda o: o.train_crop_mode != 'squash', '--train-crop-mode rrc: squash takes the whole image')
AUGMENTS = Need(lambda o: not o.no_aug, 'augmentation, which --no-aug turns off')
MIXES = given('mixup', 'cutmix', 'cutmix_minmax')
MIXES_BOTH = Need(lambda o: bool(o.mixup and (o.cutmix or o.cutmix_minmax)), 'both --mixup and --cutmix')
NO_AA = Need(lambda o: not o.aa, 'no --aa, which replaces color jitter')
NEVER = Need(lambda o: False, '--drop-path, its name in timm today')


@dataclass(frozen=True)
class AugmentationOptions(Group):
    """Augmentation."""

    no_aug: bool = train(False, 'train on the evaluation transform')
    train_crop_mode: str | None = train(None, 'crop of training images: random resized (rrc, the default), random '
        'keeping the aspect ratio (rkrc, rkrr), or resize without crop (squash)',
        choices=('rrc', 'rkrc', 'rkrr', 'squash'), needs=AUGMENTS)
    scale: list[float] = train([0.08, 1.0], 'smallest and largest area of the random crop, as a share of the image',
        range='(0, inf)', needs=(AUGMENTS, CROPS))
    ratio: list[float] = train([3.0 / 4.0, 4.0 / 3.0], 'smallest and largest aspect ratio of the random crop',
        range='(0, inf)', needs=(AUGMENTS, CROPS))
    hflip: float = train(0.5, 'probability of a horizontal flip', range='[0, 1]', needs=AUGMENTS)
    vflip: float = train(0.0, 'probability of a vertical flip', range='[0, 1]', needs=AUGMENTS)
    color_jitter: float = train(0.4, 'strength of color jitter', range='[0, inf)', needs=AUGMENTS)
    color_jitter_prob: float | None = train(None, 'probability of color jitter; always if not given', range='[0, 1]',
        needs=(AUGMENTS, NO_AA))
    grayscale_prob: float | None = train(None, 'probability of conversion to gray', range='[0, 1]', needs=AUGMENTS)
    gaussian_blur_prob: float | None = train(None, 'probability of Gaussian blur', range='[0, 1]', needs=AUGMENTS)
    aa: str | None = train(None, 'AutoAugment, RandAugment or AugMix policy, such as rand-m7-mstd0.5-inc1',
        metavar='POLICY', needs=AUGMENTS)
    cutout: float = train(0.0, 'sides of the rectangle painted over each training image, as a share of its sides; 0: '
        'off', range='[0, 1]', needs=AUGMENTS)
    cutout_prob: float = train(1.0, 'share of the images that --cutout paints over', range='[0, 1]',
        needs=(AUGMENTS, given('cutout')))
    cutout_place: str = train('before', 'paint before or after the other augmentations', choices=('before', 'after'),
        needs=(AUGMENTS, given('cutout')))
    aug_repeats: float = train(0, 'augmented copies of each image per epoch, over all ranks', range='[0, 1024]',
        needs=DISTRIBUTED)
    aug_splits: int = train(0, 'views of each image in a batch, of which the first is only cropped and flipped; 0: off',
        range='[0, 64]')
    reprob: float = train(0.0, 'probability of random erasing', range='[0, 1]', needs=AUGMENTS)
    remode: str = train('pixel', 'fill of random erasing: zeros, one random color, or random pixels',
        choices=('const', 'rand', 'pixel'), needs=given('reprob'))
    recount: int = train(1, 'regions per image of random erasing', range='[1, 1024]', needs=given('reprob'))
    resplit: bool = train(False, 'do not erase in the first half of each batch, or with --aug-splits in the first '
        'views', needs=given('reprob', 'split_bn'))
    mixup: float = train(0.0, 'alpha of mixup; 0: off', range='[0, inf)')
    cutmix: float = train(0.0, 'alpha of CutMix; 0: off', range='[0, inf)')
    cutmix_minmax: list[float] | None = train(None, 'smallest and largest ratio of CutMix; replaces its alpha',
        range='[0, 1]')
    mixup_prob: float = train(1.0, 'probability of mixup or CutMix', range='[0, 1]', needs=MIXES)
    mixup_switch_prob: float = train(0.5, 'probability of CutMix instead of mixup', range='[0, 1]', needs=MIXES_BOTH)
    mixup_mode: str = train('batch', 'one mixing ratio per batch, per pair or per image',
        choices=('batch', 'pair', 'elem'), needs=MIXES)
    mixup_off_epoch: int = train(0, 'epoch from which mixup and CutMix are off; 0: never', range='[0, inf)',
        needs=MIXES)
    train_interpolation: str = train('random', 'interpolation of training images',
        choices=('', 'random', *INTERPOLATIONS), needs=AUGMENTS)



@dataclass(frozen=True)
class RegularizationOptions(Group):
    """Regularization."""

    smoothing: float = train(0.1, 'label smoothing; for --task multilabel the default is 0', range='[0, 1)')
    drop: float = train(0.0, 'dropout before the classifier; for an ML-Decoder head use --ml-decoder-kwargs dropout=P',
        range='[0, 1)',
        needs=NO_HEAD._replace(text='--use-ml-decoder-head 0; for the head use --ml-decoder-kwargs dropout=P'))
    drop_path: float | None = train(None, 'stochastic depth: probability of dropping a block', range='[0, 1)')
    drop_connect: float | None = train(None, 'former name of --drop-path, without effect', range='[0, 1)', needs=NEVER)
    drop_block: float | None = train(None, 'probability of DropBlock', range='[0, 1)')
