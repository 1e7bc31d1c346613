"""The dataset of a split: opened as the options say, checked against what its folder holds, and summarized."""

import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import MultiLabelTarget
from torch import Tensor
from torch.utils.data import Dataset

from timm_mldecoder.data import (
    FORMATS,
    TIMM_FOLDERS,
    MultiLabelDataset,
    class_to_index,
    create_dataset,
    overlap,
    summarize,
)
from timm_mldecoder.data.annotation_cache import cache_in
from timm_mldecoder.data.annotations import POSITIVE, ClassIndex
from timm_mldecoder.data.class_split import read_class_split, select_classes
from timm_mldecoder.data.formats.class_folders import split_folder
from timm_mldecoder.data.formats.coco import LAYOUTS
from timm_mldecoder.data.formats.csv_list import has_rows
from timm_mldecoder.data.formats.records import read_by_rule
from timm_mldecoder.data.hold_out import hold_out
from timm_mldecoder.data.images import Reading, some_headers, strict
from timm_mldecoder.data.partial import leave_out_labels
from timm_mldecoder.data.text_files import SPLITS, split_name, split_names
from timm_mldecoder.data.transforms import CUT, lost_share
from timm_mldecoder.flags import scores_both
from timm_mldecoder.flags.options import SplitOptions
from timm_mldecoder.runtime.log import warnings_of_first_rank

_logger = logging.getLogger(__name__)

ONE_FILE = ('csv', 'json', 'coco')  # formats of which one file may hold all images
RECORDS = ('hfds', 'hfids', 'tfds', 'wds')
STREAMS = ('hfids', 'tfds', 'wds')


def dataset_kind(name: str) -> str:
    """Return the kind of a dataset, the part of its name before the slash, in lower case; '' for folders and tars."""
    return name.partition('/')[0].lower()


def image_mode(options: SplitOptions) -> str:
    """Return the PIL mode in which images are read."""
    return options.input_img_mode or ('RGB' if options.channels == 3 else 'L')


@warnings_of_first_rank()
def create_split(
    options: SplitOptions,
    split: str,
    *,
    training: bool = False,
    num_samples: int | None = None,
    repeats: float = 0,
    missing: str | None = 'error',
    load_bytes: bool = False,
    known: Tensor | None = None,
) -> Any:
    """Create the dataset of one split.

    Args:
        training: Whether it is trained on: streams are shuffled, and zero-shot splits keep the seen classes.
        num_samples: Number of samples of a stream that does not report it.
        repeats: Passes over a stream per epoch.
        missing: 'error' or 'skip' at images that are annotated but not on disk; None does not check.
        load_bytes: Whether the transform takes the bytes of image files.
        known: Digests of the images that `--val-fraction` held out of a training run; None draws them.

    Raises:
        ValueError: If the data is missing, or does not fit the task.
    """
    source, held_out = _source_of(options, split)
    _check_folder(options.dataset, options.data_dir, source)
    _check_image_mode(options.dataset, image_mode(options), options.channels)
    given = dict(is_training=training, num_samples=num_samples, repeats=repeats, missing=missing)
    if load_bytes:
        given['load_bytes'] = True
    dataset = _open(options, source, given)
    _check_layout(options, dataset, source, training)
    _set_targets(options, dataset)
    if held_out is not None:
        hold_out(dataset, options.val_fraction, options.split_seed, held_out, known)
    if training and options.partial_labels:
        _leave_out_labels(options, dataset)
    if options.class_split:
        _select_classes(options, dataset, training)
    return dataset


def _open(options: SplitOptions, source: str, given: dict[str, Any]) -> Any:
    """Open a split with the settings of `create_split` and of its format; a ValueError for what the readers raise."""
    mode, kind, root = image_mode(options), dataset_kind(options.dataset), Path(options.data_dir or '')
    settings = dict(
        **{name: getattr(options, name) for name in ('class_map', 'batch_size', 'seed', 'input_key', 'target_key')},
        download=options.dataset_download,
        input_img_mode=mode,
        target_format=options.target_format if options.task == 'multilabel' and kind in RECORDS else None,
        trust_remote_code=options.dataset_trust_remote_code,
        **given,
    )
    if kind == 'csv':
        names = ('path_column', 'label_column', 'label_separator', 'split_column')
        settings |= {name: getattr(options, name) for name in names}
    if kind in ('hfds', 'wds'):
        settings['label_separator'] = options.label_separator
    if options.voc_difficult is not None:
        settings['difficult'] = options.voc_difficult
    if kind.startswith('coco'):
        settings['unannotated'] = options.coco_unannotated
    if not kind and (forgotten := _forgotten_dataset(root)):
        raise ValueError(f'{options.data_dir}: {forgotten}')
    try:
        with cache_in(options.cache_dir):
            dataset: Any = strict(create_dataset(options.dataset, root=options.data_dir, split=source, **settings))
    except ImportError as error:
        raise ValueError(f'--dataset {options.dataset}: {error}; install that package') from error
    except ValueError as error:
        nothing = not kind and 'no images in' in str(error)
        raise ValueError(f'{error}{_lists_beside(root, source) if nothing else ""}') from error
    except KeyError as error:
        if kind != 'wds':
            raise
        raise ValueError(f'{options.data_dir}: _info.json has no {error} of split {source!r}') from error
    except (RuntimeError, AssertionError, OSError, pickle.UnpicklingError) as error:  # what timm's readers raise
        raise ValueError(f'{options.data_dir or options.dataset}: {error}') from error
    reading = replace(Reading.of(options), fast=options.decode == 'fast')
    if hasattr(dataset, 'reading'):
        dataset.reading = reading
    if kind == 'wds':
        read_by_rule(dataset, reading, mode)
    return dataset


def _check_layout(options: SplitOptions, dataset: Any, source: str, training: bool) -> None:
    """Raise ValueError for class folders that are none, or one of which a list of images lies beside."""
    root = Path(options.data_dir or '')
    names = None if dataset_kind(options.dataset) else list(class_to_index(dataset) or ())
    if names is not None and len(names) == 1:  # '' is what timm makes of images without class folders
        beside = _lists_beside(root, source, any_table=names == [''])
        if beside or names == ['']:
            beside = beside or '; --dataset names another format'
            raise ValueError(f'{options.data_dir}: no class folders of {source!r}{beside}')
    if options.task == 'multilabel' and options.dataset in TIMM_FOLDERS:
        if beside := _lists_beside(root, source):
            raise ValueError(f'{options.data_dir}: class folders have one class per image{beside}')
        if training:
            _logger.warning(f'{options.data_dir}: --task multilabel, and class folders have one class per image')


def _set_targets(options: SplitOptions, dataset: Any) -> None:
    """Let the targets be those of the task: a class index, or a vector of several classes."""
    own, multilabel = isinstance(dataset, MultiLabelDataset), options.task == 'multilabel'
    if own and not multilabel:
        _check_one_class(options.dataset, dataset)
        dataset.target_transform = ClassIndex()
    if multilabel and getattr(dataset, 'target_transform', None) is None and not own:
        classes: Any = options.num_classes or len(class_to_index(dataset) or ()) or None
        dataset.target_transform = _SeveralClasses(classes, dense=options.target_format == 'multihot')


def _leave_out_labels(options: SplitOptions, dataset: Any) -> None:
    """Leave out labels of the training split (`--partial-labels`), and log how many are left."""
    if not isinstance(dataset, MultiLabelDataset):
        raise ValueError(f'--partial-labels: --dataset {options.dataset} is not one of {", ".join(FORMATS)}')
    dataset.annotations = leave_out_labels(dataset.annotations, options.partial_labels, options.seed)
    values = [value for *_, value in dataset.annotations.blocks()]
    positive = sum(int((value == POSITIVE).sum()) for value in values)
    kept = f'{positive} positive and {sum(map(len, values)) - positive} negative labels'
    _logger.info(f'--partial-labels {options.partial_labels}: kept {kept}')


class _SeveralClasses(MultiLabelTarget):
    """timm's target of several classes, which a reader of one class per image may give as a number."""

    def __call__(self, target: Any) -> Tensor:
        return super().__call__([target] if isinstance(target, (int, np.integer)) else target)


def _check_one_class(name: str, dataset: MultiLabelDataset) -> None:
    """Raise ValueError unless every image has exactly one class and no label to ignore."""
    shown = np.zeros(len(dataset), dtype=np.int32)
    for image, _, value in dataset.annotations.blocks():
        np.add.at(shown, image[value == POSITIVE], 1)
    odd = np.flatnonzero(shown != 1)
    if len(odd) or dataset.annotations.has_ignored:
        example = int(odd[0]) if len(odd) else 0
        label, value = dataset.annotations.labels(example)
        names = [dataset.class_names[index] for index in label[value == POSITIVE].tolist()]
        remedy = 'pass --task multilabel'
        if name == 'csv' and len(dataset.class_names) == 1:
            remedy += f', or --label-column {dataset.class_names[0]}: its 0 and 1 are then the names of two classes'
        raise ValueError(
            f'--dataset {name}: {len(odd)} of {len(dataset)} images do not have exactly one class, such as '
            f'{dataset.filename(example)} ({", ".join(names[:3]) or "none"}): {remedy}'
        )


def _forgotten_dataset(root: Path) -> str:
    """Return what to add where files of another format are in place of class folders; empty if there are none."""
    if root.suffix.lower() == '.json' and root.is_file() and b'"categories"' in root.read_bytes():
        return 'annotations in COCO format: add --dataset coco'
    if root.suffix.lower() in ('.csv', '.json') and root.is_file():
        return f'a list of images: add --dataset {root.suffix[1:].lower()}'
    if not root.is_dir():
        return ''
    if found := sorted(root.glob('annotations/instances_*20??.json')):
        return f'the annotations of COCO: add --dataset coco{found[0].stem[-4:]} --task multilabel'
    if any(root.glob('*/_annotations.coco.json')) or any(root.glob('annotations/instances_*.json')):
        return 'annotations in COCO format: add --dataset coco --task multilabel'
    if found := sorted(root.glob('VOCdevkit/VOC20??')):
        return f'Pascal-VOC: add --dataset {found[0].name.lower()} --task multilabel'
    if (root / '_info.json').is_file() and any(root.glob('*.tar')):
        return f'WebDataset shards: add --dataset wds/{root.name}'
    return ''


def _lists_beside(root: Path, split: str, any_table: bool = True) -> str:
    """Return what to add where a folder without class folders holds another format; empty if it does not.

    With `any_table`, a CSV file that is not named as the split counts too.
    """
    if found := next((kind for kind in ('csv', 'json') if (root / f'{split}.{kind}').is_file()), None):
        return f'; {split}.{found} is there: add --dataset {found} --task multilabel'
    if any_table and root.is_dir() and (found := sorted(root.glob('*.csv'))):
        return f'; {found[0].name} is there: give it in place of the folder, with --dataset csv'
    if root.is_dir() and any(path for suffix in ('parquet', 'arrow') for path in root.glob(f'**/*.{suffix}')):
        return f'; files of a Hugging Face dataset are there: add --dataset hfds/{root}'
    return ''


def _source_of(options: SplitOptions, split: str) -> tuple[str, bool | None]:
    """Return the split that is read for a split, and which part of it `--val-fraction` makes it, if any.

    Raises:
        ValueError: If the data has a validation split of its own, or cannot be divided.
    """
    train, validation = options.train_split, options.val_split
    root, flag = Path(options.data_dir or ''), f'--val-fraction {options.val_fraction:g}'
    kind = dataset_kind(options.dataset)
    divided = bool(options.val_fraction and validation)
    if divided and split_name(split) == 'validation':
        split = validation
    one = root.is_file() and not options.split_column
    whole = one or (options.dataset in TIMM_FOLDERS and split_folder(str(root), split) == str(root))
    if divided and split not in (train, validation) and whole:
        raise ValueError(f'{root} has no split {split!r}: {flag} divides it into {train} and {validation}')
    if not divided or split not in (train, validation):
        if options.script == 'validate' and kind in ONE_FILE and root.is_file() and not options.split_column:
            _logger.info(f'{root}: all of its images')
            return 'train', None  # nothing is trained on here
        return split, None
    if kind not in ('csv', 'json', 'coco', 'hfds') and options.dataset not in TIMM_FOLDERS:
        raise ValueError(
            f'{flag}: only CSV, JSON and COCO files, class folders, tars and hfds/ datasets can be divided'
        )
    if kind == 'csv' and options.split_column:
        if has_rows(root, validation, options.split_column, options.path_column, options.label_column):
            raise ValueError(f'{flag}: the column {options.split_column!r} has rows for {validation}; leave one out')
        return train, split != train
    own = [
        name if kind not in ('csv', 'json') else f'{name}.{kind}' for name in (validation, *split_names('validation'))
    ]
    if kind == 'hfds':
        own = []
    elif kind == 'coco':
        own = [layout.format(name) for name in split_names('validation') for layout in LAYOUTS]
    names = {path.relative_to(root).as_posix().lower(): path for path in [*root.glob('*'), *root.glob('*/*.json')]}
    if found := next((names[name.lower()].relative_to(root) for name in own if name and name.lower() in names), None):
        raise ValueError(f'{flag}: {root / found} is there, which is a validation split; leave one of them out')
    return train, split != train


def _select_classes(options: SplitOptions, dataset: Dataset, training: bool) -> None:
    """Keep the classes that `--class-split` and `--score-classes` select."""
    if not isinstance(dataset, MultiLabelDataset):
        raise ValueError(f'--class-split needs multi-label data; --dataset {options.dataset} has one class per image')
    split = read_class_split(options.class_split, dataset.class_names)
    parts = {'all': split.all, 'seen': split.seen, 'unseen': split.unseen}
    names = split.seen if training else parts[options.score_classes]
    # as in the paper: training uses images that show a seen class, ZSL those that show an unseen one
    alone = training or options.score_classes == 'unseen'
    selected = select_classes(dataset.annotations, names, only_positive=alone)
    if scores_both(options) and not training:
        select_classes(dataset.annotations, split.unseen, only_positive=True)  # refuses data without unseen classes
        dataset.num_seen = len(split.seen)
    dataset.annotations = selected


@warnings_of_first_rank()
def log_summary(name: str, dataset: Dataset, training: bool = False) -> None:
    """Log what is to be known of a split before it is trained on."""
    found = summarize(dataset)
    for line in found.log_lines(name):
        _logger.info(line)
    for line in found.warnings(name, training):
        _logger.warning(line)
    if hasattr(dataset, 'reading'):
        for line in dataset.reading.describe(name, dataset):
            _logger.warning(line)


@warnings_of_first_rank()
def warn_about_overlap(train: Any, other: Dataset) -> None:
    """Warn of files that are trained on and in another split too."""
    if shared := overlap(train, other):
        remedy = '; --val-fraction 0.2 holds a part out' if len(shared) == len(train) else ''
        _logger.warning(f'{len(shared)} files are in both splits, such as {shared[0]}: scores will be too high{remedy}')


@warnings_of_first_rank()
def warn_about_crop(dataset: Dataset, config: dict[str, Any]) -> None:
    """Warn where the evaluation of a data configuration of timm cuts off what several labels per image may be about."""
    lost = lost_share((image.size for image in some_headers(dataset)), config)
    if lost > CUT:
        _logger.warning(
            f'evaluation cuts {lost:.0%} of the area of the images off (the median), and objects with it that are '
            'labelled: --crop-mode squash --crop-pct 1 shows all of them'
        )


def _check_folder(dataset: str, root: str | None, split: str) -> None:
    """Raise ValueError if an image folder, or the requested split in it, does not exist.

    timm takes the root itself where no folder has the split's name. That is right for a root of class folders, and
    scores the training images too for a root of other splits.
    """
    if dataset_kind(dataset) in FORMATS or '/' in dataset or root is None:
        return
    path = Path(root)
    if not path.exists():
        raise ValueError(f'{root}: no such folder or tar file')
    if path.is_file():
        return
    present = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
    splits = [name for name in present if split_name(name) in SPLITS]
    if splits and split_folder(root, split) == root:
        raise ValueError(
            f'{root} has no folder {split!r}; it has {", ".join(splits)}. --val-fraction 0.2 holds a part out for '
            'validation'
        )


def _check_image_mode(dataset: str, mode: str, channels: int) -> None:
    """Raise ValueError if images are read with other channels than the model takes; torchvision's have their own."""
    if dataset_kind(dataset) == 'torch':
        return
    try:
        found = Image.getmodebands(mode)
    except KeyError as error:
        raise ValueError(f'--input-img-mode {mode}: Pillow has no such mode') from error
    if found != channels:
        raise ValueError(
            f'the model takes {channels} channels, --input-img-mode {mode} has {found}: change it or --in-chans (L has '
            '1 channel, LA 2, RGB 3, RGBA and CMYK 4)'
        )
