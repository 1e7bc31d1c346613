"""Flags of validate.py."""

from timm_mldecoder.engine.flags.dataset import DATASET
from timm_mldecoder.engine.flags.flag import Group, flag, pairs, switch
from timm_mldecoder.engine.flags.model import HEAD
from timm_mldecoder.engine.flags.multilabel import MULTI_LABEL_RESULTS
from timm_mldecoder.engine.flags.zero_shot import ZERO_SHOT_CLASSES

_SHARED = {
    'data',
    '--data-dir',
    '--dataset',
    '--dataset-download',
    '--class-map',
    '--input-img-mode',
    '--input-key',
    '--target-key',
    '--dataset-trust-remote-code',
    '--task',
    '--target-format',
    '--multilabel-threshold',
}

VALIDATE_GROUPS: list[Group] = [
    (
        'Data set',
        [row for row in DATASET[1] if row[0][0] in _SHARED]
        + [
            flag('--split', metavar='NAME', default='validation', help='split to evaluate'),
            flag('--num-samples', type=int, metavar='N', help='samples of a streamed data set that cannot tell'),
        ],
    ),
    (
        'Model',
        [
            flag(
                '--model',
                '-m',
                metavar='NAME',
                default='dpn92',
                help='timm model, a pattern of them, or a file of names',
            ),
            switch('--pretrained', help='evaluate the pretrained weights'),
            flag(
                '--checkpoint', type=str, metavar='FILE', default='', help='checkpoint to evaluate, or a folder of them'
            ),
            switch('--use-ema', help='evaluate the averaged weights of the checkpoint'),
            flag('--num-classes', type=int, metavar='N', help='number of classes'),
            flag('--gp', type=str, metavar='POOL', help='global pooling'),
            flag('--in-chans', type=int, metavar='N', help='image channels'),
            pairs('--model-kwargs', help='further arguments of the model'),
            switch('--reparam', help='fuse reparameterisable layers'),
            switch('--fast-norm', help="timm's faster norm layers under autocast"),
            switch('--channels-last', help='use the channels-last memory layout'),
            flag('--torchcompile', type=str, nargs='?', const='inductor', metavar='BACKEND', help='compile the model'),
            flag('--torchcompile-mode', type=str, metavar='MODE', help='mode of torch.compile'),
            switch('--aot-autograd', help='compile with the AOT Autograd backend'),
        ],
    ),
    HEAD,
    (
        'Images',
        [
            flag('--img-size', type=int, metavar='N', help='image size'),
            flag('--input-size', type=int, nargs=3, metavar='N', help='channels, height and width, over --img-size'),
            switch('--use-train-size', help='the training size of the model rather than its test size'),
            flag('--crop-pct', type=float, metavar='PCT', help='centre crop'),
            flag('--crop-mode', type=str, metavar='MODE', help='squash, border or center'),
            flag('--crop-border-pixels', type=int, metavar='N', help='pixels cut off each border'),
            flag('--mean', type=float, nargs='+', metavar='MEAN', help='mean of the pixels'),
            flag('--std', type=float, nargs='+', metavar='STD', help='standard deviation of the pixels'),
            flag('--interpolation', type=str, metavar='NAME', default='', help='interpolation'),
            switch('--test-pool', help='pool over larger images at test time'),
        ],
    ),
    (
        'Run',
        [
            flag('-j', '--workers', type=int, metavar='N', default=4, help='loader processes'),
            flag('-b', '--batch-size', type=int, metavar='N', default=256, help='images a batch and process'),
            flag(
                '--bad-image',
                type=str,
                choices=['skip', 'abort'],
                default='abort',
                help='what to do about an image that cannot be read: score the others, or end the run',
            ),
            switch('--retry', help='halve the batch until it fits the memory'),
            switch('--no-prefetcher', help='normalise images in the loader, not on the device'),
            switch('--pin-mem', help='pin the memory of batches'),
            flag('--device', type=str, metavar='NAME', default='cuda', help='device to run on'),
            flag('--num-gpu', type=int, metavar='N', default=1, help='GPUs of one process'),
            switch('--amp', help='mixed precision'),
            flag('--amp-dtype', type=str, metavar='DTYPE', default='float16', help='float16 or bfloat16'),
            flag('--model-dtype', type=str, metavar='DTYPE', help='dtype of the weights: float32, float16 or bfloat16'),
            flag('--seed', type=int, metavar='S', default=42, help='random seed'),
            flag('--log-freq', type=int, metavar='N', default=10, help='batches between log lines'),
        ],
    ),
    ZERO_SHOT_CLASSES,
    MULTI_LABEL_RESULTS,
    (
        'Results',
        [
            flag('--results-file', type=str, metavar='FILE', default='', help='file for the results'),
            flag('--results-format', type=str, metavar='FORMAT', default='csv', help='csv or json'),
            flag(
                '--real-labels',
                type=str,
                metavar='FILE',
                default='',
                help='JSON of ImageNet ReaL labels to score as well',
            ),
            flag(
                '--valid-labels',
                type=str,
                metavar='FILE',
                default='',
                help='text file of the class indices that may be predicted',
            ),
            flag(
                '--metrics-avg',
                type=str,
                choices=['micro', 'macro', 'weighted'],
                help='precision, recall and F1 too, averaged so (needs scikit-learn)',
            ),
        ],
    ),
]
