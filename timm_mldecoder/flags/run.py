"""Flags of the run: seed, log, checkpoints, trackers, and the results of an evaluation."""

from dataclasses import dataclass

from timm_mldecoder.flags.flag import VALIDATES, Need, both, given, train, validate
from timm_mldecoder.flags.group import Group

_WANDB = given('log_wandb')

# fmt: off
SKIPS = Need(lambda o: o.nonfinite == 'skip', '--nonfinite skip')


@dataclass(frozen=True)
class RunOptions(Group):
    """Run."""

    config: str = train('', 'YAML file of options, or a recipe by name; flags given override it', names='-c --config',
        path='file')
    seed: int = both(42, 'random seed', range='[0, 2147483647]')
    output: str = train('', 'folder of all runs; output/train if empty', metavar='DIR')
    experiment: str = train('', 'folder of this run in --output; date, time and model if empty')
    log_interval: int = train(50, 'optimizer steps between log lines', range='[1, inf)')
    log_freq: int = validate(10, 'batches between log lines', range='[1, inf)')
    val_interval: int = train(1, 'epochs between validations and checkpoints', range='[1, inf)')
    eval_metric: str = train('top1', 'metric that ranks checkpoints: loss, top1 or top5; with --task multilabel map, '
        'loss, micro_f1 and others, and map if not given (openimages: map_partial; --class-split: zsl_map)',
        needs=VALIDATES)
    checkpoint_hist: int = train(10, 'number of best checkpoints to keep', range='[1, inf)')
    recovery_interval: int = train(0, 'optimizer steps between checkpoints within an epoch; 0: off', range='[0, inf)')
    save_epochs: list[int] | None = train(None, 'epochs after which milestone-N.pth.tar is kept', range='[1, inf)')
    nonfinite: str = train('skip', 'loss or gradients that are not finite: skip the optimizer step on all ranks, or '
        'end the run', choices=('skip', 'abort'))
    nonfinite_limit: int = train(20, 'skipped steps in a row that end the run', range='[1, inf)', needs=SKIPS)
    save_images: bool = train(False, 'save a batch of images with each log line')
    retry: bool = validate(False, 'halve the batch size until it fits into memory')



@dataclass(frozen=True)
class TrackerOptions(Group):
    """Trackers."""

    log_wandb: bool = train(False, 'log to Weights & Biases')
    wandb_project: str | None = train(None, 'Weights & Biases project', needs=_WANDB)
    wandb_tags: list[str] = train([], 'Weights & Biases tags', metavar='TAG', needs=_WANDB)
    wandb_resume_id: str = train('', 'Weights & Biases run to resume', metavar='ID', needs=_WANDB)
    log_trackio: bool = train(False, 'log to trackio')
    log_tensorboard: bool = train(False, 'log to TensorBoard, in the folder of the run')



@dataclass(frozen=True)
class ResultOptions(Group):
    """Results."""

    results_file: str = validate('', 'file for the results', path='output')
    results_format: str = validate('csv', 'format of --results-file', choices=('csv', 'json'),
        needs=given('results_file'))
    real_labels: str = validate('', 'JSON file of ImageNet ReaL labels, scored as well', path='file')
    valid_labels: str = validate('', 'text file of the class indices that may be predicted, one per line', path='file')
    metrics_avg: str | None = validate(None, 'add precision, recall and F1 with this average (needs scikit-learn)',
        choices=('micro', 'macro', 'weighted'))
    write_thresholds: bool = validate(False, 'multi-label: find the best threshold of each class on this split and '
        'store it in --checkpoint or the folder of --model local-dir:')
    threshold_metric: str = validate('f1', 'what makes a threshold the best: f1, mcc, or precision=P, the highest '
        'recall with a precision of at least P', metavar='METRIC', needs=given('write_thresholds'))
    threshold_categories: str = validate('', 'CSV file of class,category: classes of a category share a threshold',
        path='file', needs=given('write_thresholds'))
    write_class_priors: str = validate('', 'multi-label: write the mean probability of each class, for --class-priors '
        'of train.py', path='output')
    class_report: str = validate('', 'multi-label: write average precision and threshold of each class', path='output')
    report: str = validate('', 'folder for a page of results, index.html, and the scores per image, scores.csv',
        path='output folder', metavar='DIR')
