"""Flags of zero-shot runs."""

from argparse import Namespace

from timm_mldecoder.engine.flags.flag import Group, flag

_CLASSES = [
    flag(
        '--word-embeddings',
        type=str,
        metavar='FILE',
        default='',
        help='label embeddings, which make the queries of the ML-Decoder head (timm_mldecoder.data.embed makes them)',
    ),
    flag(
        '--class-split',
        type=str,
        metavar='FILE',
        default='',
        help='JSON of seen and unseen classes: train on the seen, score the unseen alone and with the seen',
    ),
    flag(
        '--score-classes',
        type=str,
        default='all',
        choices=['all', 'seen', 'unseen'],
        help='classes of --class-split that evaluation asks for',
    ),
]
ZERO_SHOT: Group = (
    'Zero-shot',
    [
        *_CLASSES,
        flag(
            '--random-queries',
            type=int,
            metavar='N',
            default=0,
            help='random word queries added in training, as positives',
        ),
        flag(
            '--query-noise',
            type=float,
            metavar='X',
            default=0.0,
            help='noise on the word embeddings in training, relative to their root mean square',
        ),
    ],
)
ZERO_SHOT_CLASSES: Group = ('Zero-shot', _CLASSES)


def scores_both(options: Namespace) -> bool:
    """Whether unseen classes are scored alone, and with the seen ones."""
    return bool(options.class_split) and options.score_classes == 'all'
