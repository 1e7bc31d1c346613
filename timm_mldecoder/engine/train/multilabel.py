"""What a multi-label run does in another way than timm's: losses, metrics, transforms, labels to ignore."""

from argparse import Namespace
from typing import Any

from timm.task import MultiLabelClassificationTask
from torch.utils.data import Dataset

from timm_mldecoder.data import MultiLabelDataset
from timm_mldecoder.data.priors import read_priors
from timm_mldecoder.data.transforms import Cutout, cut_out, squash
from timm_mldecoder.losses import LOSSES, MultiLabelLoss, create_loss
from timm_mldecoder.metrics.multilabel import MultiLabelEvaluator
from timm_mldecoder.metrics.zero_shot import ZeroShotEvaluator

#: Losses that timm has too, and that it computes where it can.
SHARED_LOSSES = ('bce', 'asl')
#: timm's defaults of the losses that both have; nothing but what is asked for changes where ours steps in.
_TIMM_DEFAULTS = {
    'asl': dict(gamma_neg=4.0, gamma_pos=1.0, clip=0.05, detach_focusing=False, reduction='batchmean'),
    'bce': dict(reduction='mean'),
}
_TIMM_ONLY = ('bce_sum', 'bce_target_thresh', 'bce_pos_weight', 'loss_pos_weight', 'loss_class_weight')


class MultiLabelTask(MultiLabelClassificationTask):
    """timm's multi-label task, evaluated with labels to ignore and more metrics.

    Args:
        num_seen: Classes seen in training, the first of those that are scored; None where all are.
    """

    def __init__(self, *args: Any, num_seen: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._num_seen = num_seen

    def create_evaluator(self, **options: Any) -> MultiLabelEvaluator:
        return create_evaluator(self._num_seen, device=self.device, threshold=self.threshold, **options)


def create_evaluator(num_seen: int | None, **options: Any) -> MultiLabelEvaluator:
    """The evaluator of multi-label data, of which `num_seen` classes were seen in training (None: all)."""
    return MultiLabelEvaluator(**options) if num_seen is None else ZeroShotEvaluator(num_seen, **options)


def create_own_loss(options: Namespace, dataset: Dataset) -> MultiLabelLoss | None:
    """The loss of this package that the options and the labels ask for; None where timm has what it takes.

    Raises:
        ValueError: If the labels to ignore, or an option, do not go with the loss.
    """
    name = options.loss or 'bce'
    ignores = has_ignored(dataset)
    timm_can = name in SHARED_LOSSES and not ignores and not options.loss_kwargs.keys() & _TIMM_DEFAULTS[name].keys()
    if timm_can or (name not in LOSSES and not ignores):
        return None
    if name not in LOSSES:
        raise ValueError(f'--loss {name} would learn from labels that are to be ignored; take one of {sorted(LOSSES)}')
    if ignores and (options.mixup or options.cutmix or options.cutmix_minmax):
        raise ValueError(
            f'--mixup and --cutmix would mix labels that are to be ignored with others; '
            f'--dataset {options.dataset} has such labels'
        )
    given = [f'--{option.replace("_", "-")}' for option in _TIMM_ONLY if getattr(options, option)]
    if given:
        raise ValueError(f'{", ".join(given)} cannot be had with --loss {name} and labels to ignore')
    settings = {option.removeprefix(f'{name}_'): value for option, value in options.loss_kwargs.items()}
    if options.class_priors:
        settings['class_prior'] = read_priors(options.class_priors, dataset.class_names)
    soft = options.mixup or options.cutmix or options.cutmix_minmax  # Mixup has smoothed them already
    settings.setdefault('smoothing', 0.0 if soft else options.smoothing)
    try:
        return create_loss(name, **{**_TIMM_DEFAULTS.get(name, {}), **settings})
    except TypeError as error:  # a name in --loss-kwargs that the loss does not have
        raise ValueError(f'--loss-kwargs {options.loss_kwargs}: {error}') from error


def has_ignored(dataset: Dataset) -> bool:
    """Whether some labels of a data set are to be ignored."""
    return isinstance(dataset, MultiLabelDataset) and dataset.annotations.has_ignored


def change_transform(options: Namespace, dataset: Dataset, interpolation: str) -> None:
    """Squash and cut out, in the training transform that timm has given a data set.

    Raises:
        ValueError: With changing image sizes, which have a transform each.
    """
    if options.no_aug or not (options.cutout or options.train_crop_mode == 'squash'):
        return
    if options.train_img_sizes:
        raise ValueError('--train-crop-mode squash and --cutout do not go with --train-img-sizes')
    if options.train_crop_mode == 'squash':
        dataset.transform = squash(dataset.transform, interpolation)
    if options.cutout:
        dataset.transform = cut_out(dataset.transform, Cutout(options.cutout, options.cutout_prob))
