"""From a command line, and a YAML file, to checked options."""

from timm_mldecoder.engine.flags.parse import (
    parse_train,
    parse_validate,
    tell_without_effect,
    train_parser,
    validate_parser,
)

__all__ = ['parse_train', 'parse_validate', 'tell_without_effect', 'train_parser', 'validate_parser']
