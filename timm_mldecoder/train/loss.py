"""The training loss, and timm's task that holds it together with the model."""

import importlib
import logging
import os
import sys
from typing import Any

import torch
from timm.loss import create_classification_loss
from timm.loss.class_weights import CLASS_WEIGHT_METHODS, load_class_stats, resolve_class_weights
from timm.task import ClassificationTask, MultiLabelClassificationTask, TrainingTask
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_mldecoder.data import MultiLabelDataset, summarize
from timm_mldecoder.data.class_files import read_priors
from timm_mldecoder.distributed.world import World
from timm_mldecoder.evaluation.evaluate import multilabel_evaluator
from timm_mldecoder.flags import scores_both
from timm_mldecoder.flags.optimization import LossOptions, loss_name
from timm_mldecoder.flags.options import TaskOptions
from timm_mldecoder.head.layers import CosineGroupFullyConnected
from timm_mldecoder.loading.create_loaders import DataConfig, mixes, model_dtype
from timm_mldecoder.losses import LOSSES, RandomQueryLoss, create_loss
from timm_mldecoder.metrics import MultiLabelEvaluator
from timm_mldecoder.models.cosine import CosineClassifier
from timm_mldecoder.train.distill import create_distillation_task

_logger = logging.getLogger(__name__)

# timm's defaults of the losses that both packages have: a flag means the same whichever class computes the loss.
TIMM_DEFAULTS: dict[str, dict[str, Any]] = {'asl': {}, 'bce': dict(reduction='mean')}
# Flags of each loss, named as timm's factory names its arguments.
LOSS_FLAGS = {
    'asl': ('asl_gamma_pos', 'asl_gamma_neg', 'asl_clip', 'asl_reduction'),
    'poly': ('poly_gamma', 'poly_epsilon', 'poly_alpha'),
    'twoway': ('twoway_tp', 'twoway_tn'),
    'db': ('db_neg_scale', 'db_init_bias', 'db_focal_gamma'),
}
# Options of those losses that only timm's classes have.
TIMM_ONLY = ('bce_sum', 'bce_target_thresh', 'bce_pos_weight', 'loss_pos_weight', 'loss_class_weight')
_COSINE = (CosineClassifier, CosineGroupFullyConnected)
ClassStats = tuple[Tensor, int]  # positives of each class [C], number of samples


class MultiLabelTask(MultiLabelClassificationTask):
    """timm's multi-label task, evaluated with labels to ignore and more metrics.

    Args:
        num_seen: Number of classes seen in training, the first of those that are scored; None for all.
    """

    def __init__(self, *args: Any, num_seen: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._num_seen = num_seen

    def create_evaluator(self, **options: Any) -> MultiLabelEvaluator:
        return multilabel_evaluator(self._num_seen, device=self.device, threshold=self.threshold, **options)


def create_task(options: TaskOptions, model: nn.Module, dataset: Any, images: DataConfig, world: World) -> TrainingTask:
    """Create timm's task of the model, its teacher if it has one, and the loss that options and labels request."""
    loss = create_train_loss(options.replace(num_classes=options.num_classes or model.num_classes), dataset)
    if options.loss == 'aam' and not any(isinstance(module, _COSINE) for module in model.modules()):
        remedy = '--ml-decoder-kwargs classifier=cosine' if options.use_ml_decoder_head else '--cosine-classifier 1'
        _logger.warning(f'--loss aam takes its logits for cosines, which those of this model are not: add {remedy}')
    if options.loss == 'csl' and not _has_ignored(dataset):
        _logger.warning('--loss csl selects among labels to ignore, of which this dataset has none')
    settings: dict[str, Any] = dict(
        criterion=RandomQueryLoss(loss) if options.random_queries else loss,
        device=world.device,
        dtype=model_dtype(options),
        verbose=world.primary,
    )
    if options.kd_model_name or options.kd_checkpoint:
        return create_distillation_task(options, model, dataset, images, **settings)
    if options.task == 'classification':
        return ClassificationTask(model, **settings)
    num_seen = len(dataset.class_names) if scores_both(options) else None
    return MultiLabelTask(model, **settings, threshold=options.multilabel_threshold, num_seen=num_seen)


def create_train_loss(options: TaskOptions, dataset: Dataset) -> nn.Module:
    """Create the training loss.

    Raises:
        ValueError: If an option does not go with the loss, or the labels to ignore do not.
    """
    if options.loss and ':' in options.loss:
        return _create_users_loss(options.loss, options.loss_kwargs)
    try:
        if options.task == 'multilabel' and _is_own(options, dataset):
            return _create_own_loss(options, dataset)
        return _create_timm_loss(options, dataset)
    except TypeError as error:  # a name in --loss-kwargs that the loss does not have
        raise ValueError(f'--loss-kwargs {options.loss_kwargs}: {error}') from error


def _create_users_loss(name: str, settings: dict[str, Any]) -> nn.Module:
    """Create the loss of a class that the user names: called with logits [B, C] and the targets of the data."""
    module, _, attribute = name.partition(':')
    sys.path.insert(0, os.getcwd())
    try:
        loss = getattr(importlib.import_module(module), attribute)(**settings)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'--loss {name}: {error}') from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(loss, nn.Module):
        raise ValueError(f'--loss {name} is not a torch.nn.Module')
    return loss


def _is_own(options: TaskOptions, dataset: Dataset) -> bool:
    """Return whether a multi-label loss is this package's rather than timm's."""
    name = options.loss or 'bce'
    timm_only = [f'--{option.replace("_", "-")}' for option in TIMM_ONLY if getattr(options, option)]
    if _has_ignored(dataset):
        if name not in LOSSES:
            raise ValueError(f'--loss {name} would learn from labels to ignore: choose from {sorted(LOSSES)}')
        if mixes(options):
            raise ValueError(f'--mixup and --cutmix would mix labels to ignore, which --dataset {options.dataset} has')
        if timm_only:
            raise ValueError(f'{", ".join(timm_only)} do not work with --loss {name} and labels to ignore')
    return name in LOSSES and not (timm_only and name in TIMM_DEFAULTS)


def _create_own_loss(options: TaskOptions, dataset: Any) -> nn.Module:
    name = options.loss or 'bce'
    given = {flag: getattr(options, flag) for flag in LOSS_FLAGS.get(name, ())} | options.loss_kwargs
    settings = {option.removeprefix(f'{name}_'): value for option, value in given.items()}
    if options.class_priors:
        settings['class_prior'] = read_priors(options.class_priors, dataset.class_names)
    settings.setdefault('smoothing', 0.0 if mixes(options) else options.smoothing)  # mixup smooths targets itself
    return create_loss(name, **{**TIMM_DEFAULTS.get(name, {}), **settings})


def _create_timm_loss(options: TaskOptions, dataset: Dataset) -> nn.Module:
    multilabel = options.task == 'multilabel'
    name = loss_name(options, options.task)
    stats = _class_stats(options, dataset)
    class_weight = _loss_weight(options, 'class_weight', options.loss_class_weight, stats)
    pos_weight = _loss_weight(options, 'pos_weight', options.loss_pos_weight, stats)
    weighted = class_weight is not None or pos_weight is not None
    if options.bce_loss and not (options.loss or multilabel or options.smoothing or mixes(options) or weighted):
        _logger.warning('--bce-loss has no effect without smoothing and mixup, as in timm; --loss bce has')
        return nn.CrossEntropyLoss()
    if name == 'ce' and class_weight is not None:  # timm's cross-entropies have no weights
        smoothing = 0.0 if mixes(options) else options.smoothing
        weight = torch.as_tensor(class_weight)
        weight = weight if weight.ndim else None  # one weight for all classes leaves their weighted mean as it is
        return nn.CrossEntropyLoss(weight, label_smoothing=smoothing, **options.loss_kwargs)
    settings = dict(
        loss_type=name,
        multi_label=multilabel,
        smoothing=options.smoothing,
        soft_targets=mixes(options),
        class_weight=class_weight,
        pos_weight=pos_weight,
        **{flag: getattr(options, flag) for flag in LOSS_FLAGS.get(name, ())},
    )
    if name == 'bce':
        settings |= dict(bce_target_thresh=options.bce_target_thresh, bce_sum=options.bce_sum)
        settings['pos_weight'] = options.bce_pos_weight if pos_weight is None else pos_weight
    if name == 'jsd':
        settings['jsd_splits'] = options.aug_splits
    if name == 'db':
        if stats is None:
            raise ValueError('--loss db needs --class-stats: this dataset does not report its labels')
        settings |= dict(class_counts=stats[0], num_samples=stats[1])
    return create_classification_loss(**{**settings, **options.loss_kwargs})


def _class_stats(options: LossOptions, dataset: Dataset) -> ClassStats | None:
    """Read the counts of `--class-stats`, or count the labels of the training data."""
    if not options.class_stats:
        summary = summarize(dataset)
        if summary.positives is None or summary.images is None:
            return None
        return torch.from_numpy(summary.positives).float(), summary.images
    try:
        return load_class_stats(options.class_stats)
    except (ValueError, TypeError) as error:  # not JSON, or not numbers
        raise ValueError(f'--class-stats {options.class_stats}: {error}') from error


def _loss_weight(options: TaskOptions, kind: str, value: str | None, stats: ClassStats | None) -> Tensor | float | None:
    flag = f'--loss-{kind.replace("_", "-")} {value}'
    settings: dict[str, Any] = dict(
        kind=kind, power=options.loss_weight_power, beta=options.loss_weight_beta, max_weight=options.loss_weight_max
    )
    try:
        if stats is not None and value and value.strip() in CLASS_WEIGHT_METHODS:
            weights = _weights_of_counts(flag, value, *stats, settings)
        else:
            weights = resolve_class_weights(value, class_stats=stats, **settings)
        if isinstance(weights, Tensor) and weights.ndim and options.num_classes not in (None, len(weights)):
            raise ValueError(f'{len(weights)} values, and {options.num_classes} classes')
        return weights
    except ValueError as error:
        raise ValueError(f'{flag}: {error}') from error


def _weights_of_counts(flag: str, method: str, counts: Tensor, images: int, settings: dict[str, Any]) -> Tensor:
    """Compute weights from positives per class; classes that a method has no weight for get 1, and a warning.

    These are the classes that every image shows, for the weight of positives (it would be 0), and those that no image
    shows, for the weight of a class (it would decide the mean of all).
    """
    of_positives = settings['kind'] == 'pos_weight'
    without = counts >= images if of_positives else counts == 0
    weights = torch.full((len(counts),), min(1.0, settings['max_weight'] or 1.0))
    if not without.all():
        found = resolve_class_weights(method, class_stats=(counts[~without], images), **settings)
        weights[~without] = torch.as_tensor(found)
    if without.any():
        shown = ', '.join(map(str, without.nonzero()[:5, 0].tolist())) + (', ...' if without.sum() > 5 else '')
        shows = 'every image shows' if of_positives else 'no image shows'
        _logger.warning(f'{flag}: weight 1 for {int(without.sum())} classes that {shows} (numbers {shown})')
    return weights


def _has_ignored(dataset: Dataset) -> bool:
    """Return whether some labels of a dataset are to be ignored."""
    return isinstance(dataset, MultiLabelDataset) and dataset.annotations.has_ignored
