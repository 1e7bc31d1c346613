"""Look at a dataset before training on it: files, labels, copies, leaks.

    timm-mldecoder check DATA [--dataset csv --task multilabel] [--report FOLDER] [--strict]

Reads every image of the training and the validation split once, in parallel, and reports files that cannot be read,
modes, sizes and EXIF rotation, classes and their numbers of images, exact and near copies within and across the splits,
labels that contradict each other between copies, and what evaluation cuts off. What cannot be read is remembered, and
told before the first epoch of training. The flags of the data are those of train.py.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from timm.data import resolve_data_config

from timm_mldecoder.check.duplicates import find_copies
from timm_mldecoder.check.findings import KINDS, RARE, Finding, Split, make_split
from timm_mldecoder.check.page import write_page
from timm_mldecoder.data import MultiLabelDataset, cooccurrence
from timm_mldecoder.data.annotation_cache import cache_in
from timm_mldecoder.data.images import Reading
from timm_mldecoder.data.transforms import CUT, lost_share
from timm_mldecoder.flags import Options, parse_train
from timm_mldecoder.loading.bad_images import remember
from timm_mldecoder.loading.compare_classes import likely_causes
from timm_mldecoder.loading.datasets import create_split, image_mode, log_summary
from timm_mldecoder.loading.scan import ImageFacts, scan
from timm_mldecoder.runtime.errors import CommandParser, RunFailed, run_command
from timm_mldecoder.runtime.log import progress_bar

_logger = logging.getLogger(__name__)

PAGE = 'check.html'
EXAMPLES = 5  # of a kind of finding in the log
_FLAGS = """
    data data_dir dataset train_split val_split dataset_download dataset_trust_remote_code class_map voc_difficult
    cache_dir
    coco_unannotated input_img_mode input_key target_key task target_format val_fraction split_seed split_column
    path_column label_column label_separator background image_range exif_rotate workers in_chans img_size input_size
    crop_pct crop_mode scale train_crop_mode device config
"""
TAKEN = frozenset(_FLAGS.split())


def main(argv: Sequence[str] | None = None) -> None:
    """Check a dataset with the options of a command line.

    Raises:
        RunFailed: With `--strict`, if anything is found.
    """
    own, others = _parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    options = parse_train(['--device', 'cpu', *others])
    # a recipe may have all flags of train.py
    if odd := sorted(name for name in options.given - TAKEN if not options.flag(name).startswith('--config')):
        raise ValueError(f'{options.flag(odd[0])} has no effect on check: leave it out')
    splits = {'train': options.train_split} | ({'validation': options.val_split} if options.val_split else {})
    datasets = {role: create_split(options, split, missing=None) for role, split in splits.items()}
    read = {}
    for role, dataset in datasets.items():
        log_summary(role, dataset, training=role == 'train')
        read[role] = make_split(dataset, _scan(role, dataset, options))
        for line in _describe(role, read[role]):
            _logger.info(line)
    with cache_in(options.cache_dir):
        remember(options.data_dir, [image for split in read.values() for image in split.facts])
    config = resolve_data_config(options.to_dict())
    multilabel = options.task == 'multilabel'
    found = find(read, config, options.exif_rotate, multilabel)
    if multilabel and options.train_crop_mode is None and not options.no_aug:
        smallest, largest = options.scale
        shown = f'{smallest:.0%} to {largest:.0%} of the area of an image'
        _logger.info(f'train: random crops show {shown}; --train-crop-mode squash shows all of it')
    _log(found)
    if own.report:
        own.report.mkdir(parents=True, exist_ok=True)
        write_page(own.report / PAGE, f'Check of {options.data_dir or options.dataset}', read, found)
        _logger.info(f'Page written: {own.report / PAGE}')
    if own.strict and found:
        raise RunFailed(f'{len(found)} findings in {options.data_dir or options.dataset}')


def _parser() -> argparse.ArgumentParser:
    flags = ' '.join(f'--{name.replace("_", "-")}' for name in sorted(TAKEN - {'data'}))
    parser = CommandParser(
        'timm-mldecoder check', __doc__, usage='%(prog)s DIR [--flag value ...]', epilog=f'Flags of train.py: {flags}'
    )
    add = parser.add_argument
    add('--report', type=Path, metavar='FOLDER', help=f'write a page with thumbnails of copies there, {PAGE}')
    add('--strict', action='store_true', help='exit with code 1 if anything is found')
    return parser


def _scan(role: str, dataset: Any, options: Options) -> list[ImageFacts]:
    workers = options.workers if 'workers' in options.given else os.cpu_count() or 1
    reading = getattr(dataset, 'reading', None) or Reading.of(options)
    facts = []
    with progress_bar(f'Reading {role}', len(dataset), primary=True) as bar:
        for image in scan(dataset, reading, image_mode(options), workers):
            facts.append(image)
            bar.update()
    return facts


def _describe(role: str, split: Split) -> list[str]:
    """What the files of a split are, and which classes occur together."""
    readable = [image for image in split.facts if not image.reason]
    if not readable:
        return []
    lines = [f'modes: {_counts(Counter(image.mode for image in readable))}']
    for name, side in (('width', 0), ('height', 1)):
        values = [image.size[side] for image in readable]
        lines.append(f'{name}: {min(values)} to {max(values)} pixels, median {median(values):g}')
    if animated := sum(image.frames > 1 for image in readable):
        lines.append(f'{animated} have several frames, of which the first counts')
    if isinstance(split.dataset, MultiLabelDataset) and role == 'train':
        lines += _together(split)
    return [f'{role}: {line}' for line in lines]


def _together(split: Split) -> list[str]:
    shares, names = cooccurrence(split.dataset, counts='images')
    counts = split.counts()
    pairs = [
        (share, names[row], names[column])
        for row, values in enumerate(shares.tolist())
        for column, share in enumerate(values)
        if share >= 0.9 and counts[row] >= EXAMPLES and counts[column] < len(split.facts)
    ]
    shown = ', '.join(f'{name} with {other} ({share:.0%})' for share, name, other in sorted(pairs)[::-1][:EXAMPLES])
    return [f'classes that nearly always occur with another: {shown}'] if pairs else []


def find(splits: Mapping[str, Split], config: dict[str, Any], exif_rotate: bool, multilabel: bool) -> list[Finding]:
    """Find mistakes in the splits `train` and, if there is one, `validation`, in the order of `KINDS`.

    Args:
        config: Data configuration of timm, for what evaluation shows of an image.
        exif_rotate: Whether images are turned as EXIF data says.
    """
    found = [*find_copies(splits), *_classes(splits)]
    for role, split in splits.items():
        found += [Finding('unreadable', (image.path,), image.reason) for image in split.facts if image.reason]
        readable = [image for image in split.facts if not image.reason]
        if (rotated := [image.path for image in readable if image.rotated]) and not exif_rotate:
            found.append(Finding('rotated', tuple(rotated), f'{role}: {len(rotated)} of {len(readable)} images'))
        lost = lost_share([image.size for image in readable], config) if multilabel and role != 'train' else 0
        if lost > CUT:
            remedy = '--crop-mode squash --crop-pct 1 shows all of them'
            crop = f'crop {config["crop_mode"]}, {config["crop_pct"]:g}'
            found.append(Finding('cut off', (), f'{role}: {lost:.0%} of the area (the median) by {crop}; {remedy}'))
    order = list(KINDS)
    return sorted(found, key=lambda finding: order.index(finding.kind))


def _classes(splits: Mapping[str, Split]) -> Iterator[Finding]:
    train, validation = splits['train'], splits.get('validation')
    names = train.class_names
    for cause in likely_causes(names):
        yield Finding('class names', (), cause)
    if train.labels is not None:
        for name, count in zip(names, train.counts(), strict=False):
            if not count:
                yield Finding('empty class', (), name)
            elif count == len(train.facts):
                yield Finding('constant class', (), name)
    if validation and validation.labels is not None:
        for name, count in zip(validation.class_names, validation.counts(), strict=False):
            if count < RARE:
                yield Finding('rare class', (), f'{name} ({count} images)')


def _counts(counts: Mapping[str, int]) -> str:
    return ', '.join(f'{count:,} {name}' for name, count in Counter(counts).most_common())


def _log(found: Sequence[Finding]) -> None:
    for kind, meaning in KINDS.items():
        part = [finding for finding in found if finding.kind == kind]
        if part:
            _logger.warning(f'{len(part):,} {kind}: {meaning}')
        for finding in part[:EXAMPLES]:
            files = ', '.join(finding.files[:3]) + (', ...' if len(finding.files) > 3 else '')
            text = finding.text if finding.images else f'{files}: {finding.text}'.removeprefix(': ')
            _logger.warning(f'    {text}')
        if len(part) > EXAMPLES:
            _logger.warning(f'    and {len(part) - EXAMPLES:,} more')
    if not found:
        _logger.info('nothing found')


if __name__ == '__main__':
    sys.exit(run_command(main))
