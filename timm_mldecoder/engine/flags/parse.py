"""From a command line and a YAML file, or from values, to the checked options of a script."""

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.utils.distributed import world_info_from_env

from timm_mldecoder.engine.flags import augmentation, data, model, optimization, run, unsupported
from timm_mldecoder.engine.flags.checks import check, check_task, scores_both
from timm_mldecoder.engine.flags.config import read_config
from timm_mldecoder.engine.flags.flag import Flag, Group, Parser
from timm_mldecoder.engine.flags.options import Options, closest

_logger = logging.getLogger(__name__)

GROUPS = (
    data.DATASET,
    model.MODEL,
    model.HEAD,
    data.CLASSES,
    data.IMAGES,
    data.LOADING,
    optimization.LOSS,
    optimization.OPTIMIZER,
    optimization.SCHEDULE,
    augmentation.AUGMENTATION,
    augmentation.REGULARIZATION,
    data.SIZES,
    model.BATCH_NORM,
    model.EMA,
    model.DEVICE,
    run.RUN,
    run.TRACKERS,
    run.RESULTS,
    unsupported.UNSUPPORTED,
)
_DESCRIPTIONS = {
    'train': 'Train a timm image classifier, with an ML-Decoder head or the head of the model.',
    'validate': 'Evaluate a timm image classifier, with an ML-Decoder head or the head of the model.',
}
_FOLDER = {'data', 'data_dir'}  # two names of one option
_PRECISION = {'amp', 'amp_dtype', 'model_dtype'}


def groups(script: str) -> list[Group]:
    """The groups of flags of a script, `train` or `validate`."""
    return [(title, [row.of(script) for row in rows if script in row.scripts]) for title, rows in GROUPS]


def flags(script: str) -> dict[str, Flag]:
    """The flags of a script by the name of their option."""
    return {row.dest: row for _, rows in groups(script) for row in rows}


def train_parser() -> Parser:
    """The parser of train.py: timm's flags with timm's defaults, and those of this package."""
    return Parser(_DESCRIPTIONS['train'], groups('train'))


def validate_parser() -> Parser:
    """The parser of validate.py."""
    return Parser(_DESCRIPTIONS['validate'], groups('validate'))


def parse_train(argv: Sequence[str] | None = None) -> Options:
    """The options of a training run: defaults, then the YAML file, then the command line.

    Raises:
        ValueError: For an unknown or unsupported flag, a value that is not allowed, or options that contradict each
            other.
    """
    return _parse('train', train_parser(), argv)


def parse_validate(argv: Sequence[str] | None = None) -> Options:
    """The options of an evaluation.

    Raises:
        ValueError: As in `parse_train`.
    """
    return _parse('validate', validate_parser(), argv)


def train_options(**values: Any) -> Options:
    """The options of a training run from values, with the defaults and the checks of the command line.

    Raises:
        ValueError: For an unknown name, and as in `parse_train`.
    """
    return _from_values('train', values)


def validate_options(**values: Any) -> Options:
    """The options of an evaluation from values, with the defaults and the checks of the command line.

    Raises:
        ValueError: For an unknown name, and as in `parse_train`.
    """
    return _from_values('validate', values)


def inherit(options: Options, trained: Mapping[str, Any]) -> Options:
    """Options of validate.py with those that a checkpoint of train.py brings, except where the user gave them.

    Args:
        options: The options of validate.py.
        trained: The options of the training run, by name.

    Raises:
        ValueError: If a flag that the user gave is not for the task of the checkpoint.
    """
    kept = options.given | (_PRECISION if options.given & {'amp', 'model_dtype'} else set())
    names = [name for name, row in flags('validate').items() if row.inherited and name in trained]
    options = options.replace(**{name: trained[name] for name in names if name not in kept})
    check_task(options)
    return options


def warn_no_effect(options: Options, script: str) -> None:
    """Warn about each flag that the user gave and that has no effect given the other options."""
    if world_info_from_env()[1] != 0:  # rank
        return
    for name, row in flags(script).items():
        value = getattr(options, name)
        if name not in options.given or value == row.default:
            continue
        failed = next((need for need in row.needs if not need.holds(options)), None)
        if failed is not None:
            shown = '' if value is True else f' {" ".join(map(str, value)) if isinstance(value, list) else value}'
            _logger.warning(f'No effect: {options.flag(name)}{shown} needs {failed.text}')


def _parse(script: str, parser: Parser, argv: Sequence[str] | None) -> Options:
    rows = flags(script)
    argv = list(sys.argv[1:] if argv is None else argv)
    given, spelled = parser.read(argv)
    path = given.get('config')
    if path:
        rows['config'].check(path, '--config', None)
        arguments = read_config(path, rows, parser, skip=_FOLDER if given.keys() & _FOLDER else ())
        # --config again: a list before the command line must not take in its folder
        given, _ = parser.read([*(text for texts in arguments.values() for text in texts), f'--config={path}', *argv])
        spelled = {name: f'--config {path}: {name}' for name, texts in arguments.items() if texts} | spelled
    return _finish(script, rows, given, spelled)


def _from_values(script: str, values: Mapping[str, Any]) -> Options:
    rows = flags(script)
    for name in values.keys() - rows.keys():
        raise ValueError(f'there is no option {name!r}{closest(name, rows)}')
    given = {name: rows[name].convert(value) for name, value in values.items()}
    return _finish(script, rows, given, {name: rows[name].label for name in given})


def _finish(script: str, rows: Mapping[str, Flag], given: dict[str, Any], spelled: Mapping[str, str]) -> Options:
    values = {name: row.default for name, row in rows.items()} | given
    if values['data'] and values['data_dir'] and values['data'] != values['data_dir']:
        raise ValueError(f'{values["data"]} contradicts --data-dir {values["data_dir"]}; give one of them')
    values['data'] = values['data_dir'] = values['data'] or values['data_dir']
    options = Options(values, spelled)
    options = options.replace(**_dependent_defaults(options, script))
    check(options, rows, script)
    if script == 'train':
        warn_no_effect(options, script)
    return options


def _dependent_defaults(options: Options, script: str) -> dict[str, Any]:
    """The defaults that depend on other options, for the options that are not given."""
    defaults = {}
    device = options.device
    if script == 'validate' and not torch.cuda.is_available():
        defaults['device'] = device = device if 'device' in options.given else 'cpu'
        if 'device' not in options.given:
            _logger.warning('no CUDA device found: evaluating on the CPU')
    if options.amp and device.startswith('cpu'):
        # float16 on a CPU has no loss scaling, and its convolutions take some eighty times as long backwards
        defaults['amp_dtype'] = 'bfloat16'
        if 'amp_dtype' not in options.given:
            _logger.info('mixed precision on a CPU: using bfloat16; --amp-dtype float16 overrides it')
    if script == 'train':
        if options.task == 'multilabel':
            defaults |= dict(smoothing=0.0, eval_metric='zsl_map' if scores_both(options) else 'map')
        if options.sched in ('wsd', 'rsqrt'):
            defaults['decay_epochs'] = 0.2  # a share of the schedule; 90 epochs are the default of step
    changes = {name: value for name, value in defaults.items() if name not in options.given}
    return changes | ({'grad_accum_steps': max(1, options.grad_accum_steps)} if script == 'train' else {})
