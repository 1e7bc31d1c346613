"""From a command line and a YAML file, or from values, to checked options."""

from timm_mldecoder.flags.checks import metric_names, scores_both
from timm_mldecoder.flags.options import Options
from timm_mldecoder.flags.parse import (
    inherit,
    parse_train,
    parse_validate,
    train_options,
    train_parser,
    unchecked_options,
    validate_options,
    validate_parser,
    warn_no_effect,
)

__all__ = [
    'Options',
    'inherit',
    'metric_names',
    'parse_train',
    'parse_validate',
    'scores_both',
    'train_options',
    'train_parser',
    'unchecked_options',
    'validate_options',
    'validate_parser',
    'warn_no_effect',
]
