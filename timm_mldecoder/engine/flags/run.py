"""Flags of the run itself: seed, log, checkpoints, loading, trackers."""

from timm_mldecoder.engine.flags.flag import Group, flag, switch

RUN: Group = (
    'Run',
    [
        flag('-c', '--config', type=str, metavar='FILE', default='', help='YAML file of options; flags win over it'),
        flag('--seed', type=int, metavar='S', default=42, help='random seed'),
        flag(
            '--worker-seeding', type=str, metavar='HOW', default='all', help='what loader processes seed: all or part'
        ),
        flag('--log-interval', type=int, metavar='N', default=50, help='updates between log lines'),
        flag('--val-interval', type=int, metavar='N', default=1, help='epochs between validations and checkpoints'),
        flag(
            '--recovery-interval', type=int, metavar='N', default=0, help='updates between checkpoints within an epoch'
        ),
        flag('--checkpoint-hist', type=int, metavar='N', default=10, help='checkpoints to keep'),
        flag('--stop-epoch', type=int, metavar='N', help='stop after N epochs, the schedule unchanged'),
        flag('--save-epochs', type=int, nargs='+', metavar='N', help='keep milestone-N.pth.tar once N epochs are done'),
        flag(
            '--nonfinite',
            type=str,
            choices=['skip', 'abort'],
            default='skip',
            help='what to do when loss or gradients are not finite: skip the update on all processes, or end the run',
        ),
        flag('--nonfinite-limit', type=int, metavar='N', default=20, help='updates skipped in a row that end the run'),
        flag(
            '--bad-image',
            type=str,
            choices=['skip', 'abort'],
            default='skip',
            help='what to do about a training image that cannot be read: take the next one, or end the run',
        ),
        flag(
            '--val-bad-image',
            type=str,
            choices=['skip', 'abort'],
            default='abort',
            help='the same for validation, where skip scores the others',
        ),
        flag('-j', '--workers', type=int, metavar='N', default=4, help='loader processes'),
        switch('--save-images', help='save a batch of images with every log line'),
        switch('--pin-mem', help='pin the memory of batches'),
        switch('--no-prefetcher', help='normalise images in the loader, not on the device'),
        flag('--output', type=str, metavar='DIR', default='', help='folder of results, output/train if empty'),
        flag(
            '--experiment',
            type=str,
            metavar='NAME',
            default='',
            help='sub-folder of this run, named by time and model if empty',
        ),
        flag(
            '--eval-metric',
            type=str,
            metavar='NAME',
            default='top1',
            help='metric that ranks checkpoints; map unless given for multilabel',
        ),
        flag(
            '--tta', type=int, metavar='N', default=0, help='average the outputs of N successive images at validation'
        ),
        switch('--use-multi-epochs-loader', help='start loading the next epoch while this one is validated'),
        switch('--log-wandb', help='log to Weights & Biases'),
        flag('--wandb-project', type=str, metavar='NAME', help='its project'),
        flag('--wandb-tags', type=str, nargs='+', metavar='TAG', default=[], help='its tags'),
        flag('--wandb-resume-id', type=str, metavar='ID', default='', help='its run to go on with'),
        switch('--log-trackio', help='log to trackio'),
        switch('--log-tensorboard', help='log to TensorBoard, under the folder of the run'),
    ],
)
