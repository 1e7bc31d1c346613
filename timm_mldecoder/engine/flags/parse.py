"""Command line + YAML file -> options, with every mistake found before anything is built."""

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Container
from typing import Any

import torch
from timm.utils.distributed import world_info_from_env

from timm_mldecoder.engine.flags import dataset, model, multilabel, optim, run, unsupported, zero_shot
from timm_mldecoder.engine.flags.checks import check_train, check_validate
from timm_mldecoder.engine.flags.config import read_config
from timm_mldecoder.engine.flags.flag import build_parser, parse_explicit
from timm_mldecoder.engine.flags.validation import VALIDATE_GROUPS
from timm_mldecoder.engine.flags.warnings import TRAIN_NEEDS, VALIDATE_NEEDS, Needs, without_effect

_logger = logging.getLogger(__name__)

TRAIN_GROUPS = [
    dataset.DATASET,
    model.MODEL,
    model.HEAD,
    optim.LOSS,
    optim.OPTIMIZER,
    optim.SCHEDULE,
    dataset.AUGMENTATION,
    dataset.SIZES,
    multilabel.MULTI_LABEL,
    zero_shot.ZERO_SHOT,
    model.BATCH_NORM,
    model.EMA,
    model.DEVICE,
    run.RUN,
    *unsupported.TRAIN_REFUSED,
]
_FOLDER = {'data', 'data_dir'}  # two names of one thing: a file must not keep the other one


def train_parser() -> ArgumentParser:
    """The parser of train.py: timm's flags with timm's defaults, and those of the ML-Decoder head."""
    return build_parser('Train a timm image classifier, with an ML-Decoder head or its own.', TRAIN_GROUPS)


def validate_parser() -> ArgumentParser:
    """The parser of validate.py."""
    groups = [*VALIDATE_GROUPS, *unsupported.VALIDATE_REFUSED]
    return build_parser('Evaluate a timm image classifier, with an ML-Decoder head or its own.', groups)


def parse_train(argv: list[str] | None = None) -> Namespace:
    """The effective options of a training run: defaults, then the YAML file, then the command line.

    Raises:
        ValueError: For a refused flag, a wrong value in the YAML file, or options that contradict each other.
    """
    parser = train_parser()
    options, explicit = parse_explicit(parser, argv)
    if options.config:
        from_file = read_config(options.config, parser)
        if explicit.keys() & _FOLDER:
            from_file = {name: value for name, value in from_file.items() if name not in _FOLDER}
        explicit = {**from_file, **explicit}
        vars(options).update(explicit)
    unsupported.refuse(options, 'train.py')
    _resolve_defaults(options, explicit)
    check_train(options)
    _tell_without_effect(TRAIN_NEEDS, options, explicit, parser)
    return options


def parse_validate(argv: list[str] | None = None) -> tuple[Namespace, dict[str, Any]]:
    """The options of an evaluation and, apart, those the user wrote.

    Raises:
        ValueError: As in `parse_train`.
    """
    options, explicit = parse_explicit(validate_parser(), argv)
    unsupported.refuse(options, 'validate.py')
    options.data_dir = options.data_dir or options.data
    if 'device' not in explicit and not torch.cuda.is_available():
        options.device = 'cpu'  # scoring on the CPU is slow, not wrong
        _logger.warning('No CUDA device here: evaluating on the CPU.')
    resolve_amp_dtype(options, explicit)
    check_validate(options)
    return options, explicit


def tell_without_effect(options: Namespace, explicit: Container[str]) -> None:
    """Warn of the flags of validate.py in `explicit` that change nothing, given all that is known of the model."""
    _tell_without_effect(VALIDATE_NEEDS, options, explicit, validate_parser())


def _tell_without_effect(needs: Needs, options: Namespace, given: Container[str], parser: ArgumentParser) -> None:
    _, rank, world_size = world_info_from_env()
    for reason in without_effect(needs, options, given, parser, world_size) if rank == 0 else ():
        _logger.warning('No effect: %s', reason)


def _resolve_defaults(options: Namespace, explicit: dict[str, Any]) -> None:
    """Fill in the defaults that depend on other options, as timm does."""
    options.data_dir = options.data_dir or options.data
    options.grad_accum_steps = max(1, options.grad_accum_steps)
    if options.task == 'multilabel':
        options.smoothing = explicit.get('smoothing', 0.0)
        options.eval_metric = explicit.get('eval_metric', 'zsl_map' if zero_shot.scores_both(options) else 'map')
    resolve_amp_dtype(options, explicit)
    if options.sched in ('wsd', 'rsqrt'):  # 90 epochs are meant for step; these two end with a share of the schedule
        options.decay_epochs = explicit.get('decay_epochs', 0.2)


def resolve_amp_dtype(options: Namespace, explicit: dict[str, Any]) -> None:
    """On a CPU, mixed precision means bfloat16 unless float16 was asked for.

    There float16 has no loss scaling, and convolutions take some eighty times as long backwards.
    """
    if options.amp and options.device == 'cpu' and 'amp_dtype' not in explicit:
        options.amp_dtype = 'bfloat16'
        _logger.info('Mixed precision on a CPU: bfloat16 in place of float16, which --amp-dtype float16 asks for.')
