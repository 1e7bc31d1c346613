"""Flags of the data: where it is, how it is cut, augmented, mixed and loaded."""

from timm_mldecoder.engine.flags.flag import Group, flag, switch

DATASET: Group = (
    'Data set',
    [
        flag('data', nargs='?', metavar='DIR', help='root folder of the data (or --data-dir)'),
        flag('--data-dir', metavar='DIR', help='root folder of the data'),
        flag(
            '--dataset',
            metavar='NAME',
            default='',
            help='kind and name of the data set, "kind/name"; folders or tars if empty',
        ),
        flag('--train-split', metavar='NAME', default='train', help='name of the training split'),
        flag(
            '--val-split',
            metavar='NAME',
            default='validation',
            help='name of the validation split; "" trains without one',
        ),
        flag(
            '--train-num-samples',
            type=int,
            metavar='N',
            help='training samples of a streamed data set that cannot tell',
        ),
        flag(
            '--val-num-samples',
            type=int,
            metavar='N',
            help='validation samples of a streamed data set that cannot tell',
        ),
        switch('--dataset-download', help='let torch/ and tfds/ data sets download what is missing'),
        flag('--class-map', type=str, metavar='FILE', default='', help='file that maps class names to indices'),
        flag('--input-img-mode', type=str, metavar='MODE', help='PIL mode that images are converted to'),
        flag('--input-key', type=str, metavar='KEY', help='key of the image in a data set of records'),
        flag('--target-key', type=str, metavar='KEY', help='key of the target in a data set of records'),
        switch('--dataset-trust-remote-code', help='let a Hugging Face data set run the code that comes with it'),
        flag(
            '--task',
            type=str,
            default='classification',
            choices=['classification', 'multilabel'],
            help='one class an image, or any number of them',
        ),
        flag(
            '--target-format',
            type=str,
            default='indices',
            choices=['indices', 'multihot'],
            help='what a multi-label target is: class indices, or one value a class',
        ),
        flag(
            '--multilabel-threshold',
            type=float,
            metavar='P',
            default=0.5,
            help='probability from which F1 counts a label',
        ),
    ],
)

AUGMENTATION: Group = (
    'Augmentation and regularisation',
    [
        switch('--no-aug', help='train on the evaluation transform'),
        flag(
            '--train-crop-mode',
            type=str,
            metavar='MODE',
            help='rrc (random resized crop, the default), rkrc, rkrr or squash (no crop)',
        ),
        flag(
            '--scale', type=float, nargs='+', metavar='PCT', default=[0.08, 1.0], help='area range of the random crop'
        ),
        flag(
            '--ratio',
            type=float,
            nargs='+',
            metavar='RATIO',
            default=[3.0 / 4.0, 4.0 / 3.0],
            help='aspect range of the random crop',
        ),
        flag('--hflip', type=float, metavar='P', default=0.5, help='probability of a horizontal flip'),
        flag('--vflip', type=float, metavar='P', default=0.0, help='probability of a vertical flip'),
        flag('--color-jitter', type=float, metavar='FACTOR', default=0.4, help='strength of colour jitter'),
        flag('--color-jitter-prob', type=float, metavar='P', help='probability of colour jitter, always if not given'),
        flag('--grayscale-prob', type=float, metavar='P', help='probability of turning grey'),
        flag('--gaussian-blur-prob', type=float, metavar='P', help='probability of Gaussian blur'),
        flag(
            '--aa',
            type=str,
            metavar='POLICY',
            help='AutoAugment, RandAugment, AugMix policy, as in rand-m7-mstd0.5-inc1',
        ),
        flag(
            '--aug-repeats',
            type=float,
            metavar='N',
            default=0,
            help='views of an image in an epoch; distributed runs only',
        ),
        flag('--reprob', type=float, metavar='P', default=0.0, help='probability of random erasing'),
        flag(
            '--remode', type=str, metavar='MODE', default='pixel', help='fill of random erasing: const, rand or pixel'
        ),
        flag('--recount', type=int, metavar='N', default=1, help='regions that random erasing takes'),
        switch('--resplit', help='keep the first half of every batch free of random erasing'),
        flag('--mixup', type=float, metavar='ALPHA', default=0.0, help='alpha of mixup, off at 0'),
        flag('--cutmix', type=float, metavar='ALPHA', default=0.0, help='alpha of CutMix, off at 0'),
        flag(
            '--cutmix-minmax',
            type=float,
            nargs='+',
            metavar='RATIO',
            help='smallest and largest CutMix ratio, instead of alpha',
        ),
        flag('--mixup-prob', type=float, metavar='P', default=1.0, help='probability of mixing at all'),
        flag(
            '--mixup-switch-prob', type=float, metavar='P', default=0.5, help='probability of CutMix where both are on'
        ),
        flag('--mixup-mode', type=str, metavar='MODE', default='batch', help='mix per batch, pair or elem'),
        flag(
            '--mixup-off-epoch', type=int, metavar='N', default=0, help='epoch from which nothing is mixed, never at 0'
        ),
        flag(
            '--smoothing',
            type=float,
            metavar='EPS',
            default=0.1,
            help='label smoothing; 0 unless given for --task multilabel',
        ),
        flag('--train-interpolation', type=str, metavar='NAME', default='random', help='random, bilinear, bicubic'),
        flag('--drop', type=float, metavar='P', default=0.0, help='dropout before the classifier'),
        flag('--drop-connect', type=float, metavar='P', help="timm's former name of --drop-path"),
        flag('--drop-path', type=float, metavar='P', help='stochastic depth'),
        flag('--drop-block', type=float, metavar='P', help='DropBlock'),
    ],
)

SIZES: Group = (
    'Changing image and batch sizes',
    [
        flag('--train-img-sizes', type=int, nargs='+', metavar='N', help='image sizes that batches are drawn from'),
        flag('--train-batch-sizes', type=int, nargs='+', metavar='N', help='batch size of each image size'),
        flag('--train-size-probs', type=float, nargs='+', metavar='P', help='probability of each image size'),
        flag(
            '--train-size-schedule',
            type=str,
            default='constant',
            choices=['constant', 'progressive'],
            help='draw sizes alike all through, or move from the first to the last',
        ),
        flag(
            '--train-size-schedule-spread',
            type=float,
            metavar='STD',
            default=0.65,
            help='width of the progressive window',
        ),
        flag(
            '--train-size-random-mix',
            type=float,
            metavar='P',
            default=0.1,
            help='share of uniform draws while progressive',
        ),
        flag('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, metavar='N', help='batches an epoch'),
        flag(
            '--variable-batch-loss-scale',
            type=str,
            default='none',
            choices=['none', 'sqrt', 'linear'],
            help='how the loss grows with the batch, relative to --batch-size',
        ),
    ],
)
