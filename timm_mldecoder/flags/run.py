"""Flags of the run: seed, log, checkpoints, trackers, and the results of an evaluation."""

from timm_mldecoder.flags.flag import Group, Need, both, train, validate
from timm_mldecoder.flags.needs import VALIDATES, given

_WANDB = given('log_wandb')

# fmt: off
SKIPS = Need(lambda o: o.nonfinite == 'skip', '--nonfinite skip')

RUN: Group = ('Run', [
    train('-c --config', str, '', 'YAML file of options, or a recipe by name; flags given override it', path='file'),
    both('--seed', int, 42, 'random seed', range='[0, 2147483647]'),
    train('--output', str, '', 'folder of all runs; output/train if empty', metavar='DIR'),
    train('--experiment', str, '', 'folder of this run in --output; date, time and model if empty'),
    train('--log-interval', int, 50, 'optimizer steps between log lines', range='[1, inf)'),
    validate('--log-freq', int, 10, 'batches between log lines', range='[1, inf)'),
    train('--val-interval', int, 1, 'epochs between validations and checkpoints', range='[1, inf)'),
    train('--eval-metric', str, 'top1', 'metric that ranks checkpoints: loss, top1 or top5; with --task multilabel '
          'map, loss, micro_f1 and others, and map if not given (openimages: map_partial; --class-split: zsl_map)',
          needs=VALIDATES),
    train('--checkpoint-hist', int, 10, 'number of best checkpoints to keep', range='[1, inf)'),
    train('--recovery-interval', int, 0, 'optimizer steps between checkpoints within an epoch; 0: off',
          range='[0, inf)'),
    train('--save-epochs', int, None, 'epochs after which milestone-N.pth.tar is kept', nargs='+', range='[1, inf)'),
    train('--nonfinite', str, 'skip', 'loss or gradients that are not finite: skip the optimizer step on all ranks, or '
          'end the run', choices=('skip', 'abort')),
    train('--nonfinite-limit', int, 20, 'skipped steps in a row that end the run', range='[1, inf)', needs=SKIPS),
    train('--save-images', bool, False, 'save a batch of images with each log line'),
    validate('--retry', bool, False, 'halve the batch size until it fits into memory'),
])

TRACKERS: Group = ('Trackers', [
    train('--log-wandb', bool, False, 'log to Weights & Biases'),
    train('--wandb-project', str, None, 'Weights & Biases project', needs=_WANDB),
    train('--wandb-tags', str, [], 'Weights & Biases tags', nargs='+', metavar='TAG', needs=_WANDB),
    train('--wandb-resume-id', str, '', 'Weights & Biases run to resume', metavar='ID', needs=_WANDB),
    train('--log-trackio', bool, False, 'log to trackio'),
    train('--log-tensorboard', bool, False, 'log to TensorBoard, in the folder of the run'),
])

RESULTS: Group = ('Results', [
    validate('--results-file', str, '', 'file for the results', path='output'),
    validate('--results-format', str, 'csv', 'format of --results-file', choices=('csv', 'json'),
             needs=given('results_file')),
    validate('--real-labels', str, '', 'JSON file of ImageNet ReaL labels, scored as well', path='file'),
    validate('--valid-labels', str, '', 'text file of the class indices that may be predicted, one per line',
             path='file'),
    validate('--metrics-avg', str, None, 'add precision, recall and F1 with this average (needs scikit-learn)',
             choices=('micro', 'macro', 'weighted')),
    validate('--write-thresholds', bool, False, 'multi-label: find the best threshold of each class on this split and '
             'store it in --checkpoint or the folder of --model local-dir:'),
    validate('--threshold-metric', str, 'f1', 'what makes a threshold the best: f1, mcc, or precision=P, the highest '
             'recall with a precision of at least P', metavar='METRIC', needs=given('write_thresholds')),
    validate('--threshold-categories', str, '', 'CSV file of class,category: classes of a category share a threshold',
             path='file', needs=given('write_thresholds')),
    validate('--write-class-priors', str, '', 'multi-label: write the mean probability of each class, for '
             '--class-priors of train.py', path='output'),
    validate('--class-report', str, '', 'multi-label: write average precision and threshold of each class',
             path='output'),
    validate('--report', str, '', 'folder for a page of results, index.html, and the scores per image, scores.csv',
             path='output folder', metavar='DIR'),
])
