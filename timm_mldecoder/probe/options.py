"""The options of a probe: flags of its own, and those flags of train.py that have an effect."""

import argparse
import ast
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from timm_mldecoder.flags import Options, parse_train
from timm_mldecoder.flags.flag import number
from timm_mldecoder.flags.parse import warn_random_weights
from timm_mldecoder.models.probes import PROBES
from timm_mldecoder.runtime.errors import CommandParser

TEXT_HEADS = ('ml_decoder', 'ml_decoder_small')  # heads that take text queries
_AUGMENTATION = """
    train_crop_mode scale ratio hflip vflip color_jitter color_jitter_prob grayscale_prob gaussian_blur_prob aa cutout
    cutout_prob cutout_place train_interpolation
"""
_OTHERS = """
    data data_dir dataset train_split val_split dataset_download dataset_trust_remote_code class_map voc_difficult
    coco_unannotated cache_dir
    input_img_mode input_key target_key task target_format multilabel_threshold
    background image_range exif_rotate path_column label_column label_separator
    val_fraction split_seed split_column
    word_embeddings class_split score_classes random_queries query_noise query_cutout
    model pretrained pretrained_path initial_checkpoint num_classes model_kwargs fast_norm channels_last
    img_size in_chans input_size crop_pct crop_mode mean std interpolation
    batch_size workers missing_images bad_image no_prefetcher pin_mem
    loss bce_loss bce_sum bce_target_thresh bce_pos_weight loss_pos_weight loss_class_weight loss_weight_power
    loss_weight_beta loss_weight_max class_stats class_priors poly_gamma poly_epsilon poly_alpha
    asl_gamma_pos asl_gamma_neg asl_clip asl_reduction twoway_tp twoway_tn db_neg_scale db_init_bias db_focal_gamma
    loss_kwargs smoothing
    opt opt_eps opt_betas momentum weight_decay opt_kwargs clip_grad clip_mode epochs
    seed output experiment val_interval eval_metric device device_modules amp amp_dtype local_rank
"""
AUGMENTATION = tuple(_AUGMENTATION.split())
_TAKEN = {*AUGMENTATION, *_OTHERS.split()}
# a remedy for flags of train.py that one may expect here
_INSTEAD = {
    'lr': 'use --lrs',
    'lr_base': 'use --lrs',
    'use_ml_decoder_head': 'name the head in --heads',
    'ml_decoder_kwargs': 'give the options in --heads, such as ml_decoder:num_layers=2',
    'num_of_groups': 'give it in --heads: ml_decoder:num_of_groups=100',
    'decoder_embedding': 'give it in --heads: ml_decoder:dim=128',
    'freeze_backbone': 'the backbone of a probe is always frozen',
}
_DEFAULTS = dict(opt='adamw', weight_decay='0.01', smoothing='0', output='output/probe')


class HeadSpec(NamedTuple):
    """A head to train."""

    label: str  # what the user wrote; the name of its row
    name: str  # key of `PROBES`
    options: dict[str, Any]


class ProbeOptions(NamedTuple):
    """Options of a probe."""

    train: Options  # options of train.py; `use_ml_decoder_head` is 1 if there are text queries
    heads: list[HeadSpec]
    rates: list[float]  # learning rates, in increasing order
    further: int  # rates beyond an end of these that a head may get
    seeds: int
    tuning_seeds: int  # the first ones, whose runs choose the rate; the others are trained at it
    test_split: str  # split that the chosen runs are scored on; empty for none
    augment: bool  # whether training images are augmented
    cache: str  # folder of cached features; empty for none
    views: int  # augmented views per training image in the cache
    shard: int  # images per file of the cache


def parse_probe(description: str, argv: Sequence[str] | None = None) -> ProbeOptions:
    """Return the options of a command line.

    Raises:
        ValueError: For a flag that is unknown, has no effect in a probe, or a value that is not allowed.
    """
    own, others = _parser(description).parse_known_args(sys.argv[1:] if argv is None else argv)
    heads = [_head(text) for text in own.heads.split(',')]
    if repeated := {spec.label for spec in heads if heads.count(spec) > 1}:
        raise ValueError(f'--heads: {", ".join(sorted(repeated))} is listed more than once')
    defaults = [text for name, value in _DEFAULTS.items() for text in (f'--{name.replace("_", "-")}', value)]
    added = {} if own.augment else {'no_aug': '--no-aug'}
    if any(flag.partition('=')[0] == '--word-embeddings' for flag in others):  # of a head with queries
        added['use_ml_decoder_head'] = '--use-ml-decoder-head=1'
    train = parse_train([*defaults, *added.values(), *others])
    for name in sorted(train.given - added.keys()):
        if name not in _TAKEN:
            raise ValueError(f'{train.flag(name)} has no effect in a probe: {_INSTEAD.get(name, "leave it out")}')
        if name in AUGMENTATION and not own.augment:
            raise ValueError(f'{train.flag(name)} needs --augment')
    if not train.model.startswith('local-dir:'):  # else train.py's own warning
        warn_random_weights(train, frozen='a probe')
    words = bool(train.word_embeddings)
    if words:  # the flags of text queries belong to the ML-Decoder heads
        if not any(spec.name in TEXT_HEADS for spec in heads):
            raise ValueError(f'--word-embeddings needs one of {", ".join(TEXT_HEADS)} in --heads')
        train = train.replace(use_ml_decoder_head=1)
    fixed = [spec.label for spec in heads if spec.name not in TEXT_HEADS or not words]
    if train.class_split and train.score_classes != 'seen' and fixed:
        raise ValueError(
            f'--class-split: {", ".join(fixed)} cannot score unseen classes; leave only heads with text queries '
            '(--word-embeddings), or pass --score-classes seen'
        )
    if own.views > 1 and not (own.cache and own.augment):
        raise ValueError(f'--cache-views {own.views} needs --cache and --augment')
    if own.shard is not None and not own.cache:
        raise ValueError(f'--cache-shard {own.shard} needs --cache')
    if own.further and len(own.rates) < 2:
        raise ValueError(f'--extend-lrs {own.further} needs at least two rates in --lrs')
    if not train.val_split:
        raise ValueError('--val-split: a probe chooses learning rates on a validation split; give one')
    tuning = own.seeds if own.tuning_seeds is None else own.tuning_seeds
    if tuning > own.seeds:
        raise ValueError(f'--tuning-seeds {tuning} is more than --seeds {own.seeds}')
    return ProbeOptions(train, **{**vars(own), 'heads': heads, 'tuning_seeds': tuning, 'shard': own.shard or 1024})


def _head(text: str) -> HeadSpec:
    """Read ``NAME:OPTION=VALUE:...``."""
    name, *pairs = text.strip().split(':')
    if name not in PROBES:
        raise ValueError(f'--heads {text}: choose from {", ".join(PROBES)}')
    options = {}
    for pair in pairs:
        key, sign, value = pair.partition('=')
        if not sign:
            raise ValueError(f'--heads {text}: expected {name}:OPTION=VALUE, got {pair!r}')
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return HeadSpec(text.strip(), name, options)


def _rates(text: str) -> list[float]:
    rates = sorted({float(part) for part in text.split(',')})
    if not all(0 < rate < float('inf') for rate in rates):
        raise argparse.ArgumentTypeError(f'{text}: learning rates must be finite and above 0')
    return rates


def _parser(description: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        'python -m timm_mldecoder.probe',
        description,
        usage='%(prog)s [DIR] --model NAME [--flag value ...]',
        epilog='Flags of train.py, described there: '
        + ' '.join(f'--{name.replace("_", "-")}' for name in sorted(_TAKEN - {'data', 'local_rank'}))
        + '. Defaults that differ: '
        + ' '.join(f'--{name.replace("_", "-")} {value}' for name, value in _DEFAULTS.items())
        + '; --batch-size 16 to 128 by the number of images, --epochs 10 or more, for 400 steps.',
    )
    add = parser.add_argument
    everything = 'linear,max,logsumexp,attention_pool,efficient_probing,ml_decoder_small,ml_decoder'
    add('--heads', default=everything, help=f'of {", ".join(PROBES)}; NAME:OPTION=VALUE:... gives options of a head '
        '(default: %(default)s)')  # fmt: skip
    rates = '1e-4,3e-4,1e-3,3e-3,1e-2,3e-2'
    add('--lrs', dest='rates', type=_rates, default=rates, help='learning rates (default: %(default)s)')
    positive, seeds = number(int, '[1, 1e6]'), number(int, '[1, 1000]')
    add('--extend-lrs', dest='further', type=number(int, '[0, 100]'), default=0, metavar='N', help='further rates, at '
        'most N, of each head whose best rate is at an end of --lrs (default: %(default)s)')  # fmt: skip
    add('--seeds', type=seeds, default=3, help='seeds of initialization and dropout (default: %(default)s)')
    add('--tuning-seeds', type=seeds, metavar='N', help='the first N seeds choose the rate, the others are '
        'trained at the best one alone (default: all choose)')  # fmt: skip
    add('--test-split', default='', help='split that the runs chosen on the validation split are scored on')
    add('--augment', action='store_true', help='augment training images as train.py does')
    add('--cache', default='', metavar='FOLDER', help='write features there once, and read them from there')
    add('--cache-views', dest='views', type=positive, default=1, help='augmented views per image (default: 1)')
    add('--cache-shard', dest='shard', type=positive, help='images per file of the cache (default: 1024)')
    return parser
