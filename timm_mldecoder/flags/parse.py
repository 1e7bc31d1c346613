"""From a command line and a YAML file, or from values, to the checked options of a script."""

import copy
import logging
import os
import sys
from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.utils.distributed import world_info_from_env

from timm_mldecoder.flags.checks import check, check_patches, check_task, default_metric
from timm_mldecoder.flags.config import FOLDER, as_arguments, find_recipe, read_config, read_resumed
from timm_mldecoder.flags.flag import Parser, show
from timm_mldecoder.flags.group import closest
from timm_mldecoder.flags.options import Options, flags, groups

_logger = logging.getLogger(__name__)

# what `--help` shows
_COMMON = """
    help help_all data_dir dataset config task model pretrained initial_checkpoint use_ml_decoder_head num_of_groups
    num_classes img_size train_crop_mode crop_mode crop_pct batch_size workers epochs opt lr weight_decay warmup_epochs
    clip_grad head_lr_scale freeze_backbone loss aa mixup cutmix model_ema amp device output experiment resume
    checkpoint use_ema split test_split write_thresholds class_report report results_file
"""
_PRECISION = {'amp', 'amp_dtype', 'model_dtype'}


def _parser(script: str) -> Parser:
    verb = 'Train' if script == 'train' else 'Evaluate'
    description = f'{verb} a timm image classifier, with an ML-Decoder head or the head of the model.'
    return Parser(description, groups(script), _COMMON.split())


# How the data of the training run is read: so is the same data, not other data.
_OF_DATA = {
    *('dataset', 'val_fraction', 'split_seed', 'split_column'),
    *('path_column', 'label_column', 'label_separator', 'input_key', 'target_key', 'missing_images'),
}


def inherit(options: Options, trained: Mapping[str, Any]) -> Options:
    """Options of validate.py with those of a training run, by name, except where the user gave them.

    Raises:
        ValueError: If a flag that the user gave is not for the task or the loader of the checkpoint.
    """
    kept = options.given | (_PRECISION if options.given & {'amp', 'model_dtype'} else set())
    rows = flags('validate')
    names = {name for name, row in rows.items() if row.inherited and name in trained} - kept
    if not same_data(options, trained):
        names -= _OF_DATA
        if options.data_dir and (fraction := trained.get('val_fraction')) and 'val_fraction' not in kept:
            _logger.warning(
                f'trained with --val-fraction {fraction:g} of {trained.get("data_dir")}; {options.data_dir} is other '
                'data and evaluated as it is: pass the flag if it is the same'
            )
    elif 'split' not in kept and trained.get('val_split'):
        options = options.replace(split=trained['val_split'])
    options = options.replace(**{name: trained[name] for name in names})
    check_task(options)
    check_patches(options)
    trained_on_cpu = trained.get('device', '').startswith('cpu')
    return options if trained_on_cpu else options.replace(**_amp_default(options, options.device))


def same_data(options: Options, trained: Mapping[str, Any]) -> bool:
    """Whether options name the dataset of a training run, by the file or folder that both mean."""
    given, then = options.data_dir or '', trained.get('data_dir') or ''
    if not (given or then):  # records that have their path in their name
        return bool(options.dataset) and options.dataset == trained.get('dataset')
    return bool(given and then) and os.path.realpath(given) == os.path.realpath(then)


def warn_no_effect(options: Options, script: str) -> None:
    """Warn about each flag that the user gave and that has no effect given the other options."""
    if world_info_from_env()[1] != 0:  # rank
        return
    for name, row in flags(script).items():
        value = options[name]
        if name not in options.given or value == row.default:
            continue
        failed = next((need for need in row.needs if not need.holds(options)), None)
        if failed is not None:
            shown = options.flag(name) if value is True else f'{options.flag(name)} {show(value)}'
            _logger.warning(f'No effect: {shown} needs {failed.text}')


def _parse(script: str, argv: Sequence[str] | None = None) -> Options:
    """The options of a command line: defaults, then the YAML file, then `argv`, that of the process if not given.

    A run that is resumed by its name keeps its own options in place of the defaults.

    Raises:
        ValueError: For an unknown flag, a value that is not allowed, or options that contradict each other.
    """
    parser = _parser(script)
    return _finish(script, parser, *parser.read(list(sys.argv[1:] if argv is None else argv)))


def _from_values(script: str, /, **values: Any) -> Options:
    """The options of a script from values, with the defaults, the files and the checks of the command line.

    Raises:
        ValueError: For an unknown name, and as in `_parse`.
    """
    rows, parser = flags(script), _parser(script)
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in rows:
            raise ValueError(f'there is no option {name!r}{closest(name, rows)}')
        try:
            given |= parser.read(as_arguments(rows[name], value))[0]
        except ValueError as error:
            raise ValueError(f'{rows[name].label}: {error}') from error
        if isinstance(value, Mapping):  # may hold what has no literal, such as a class
            given[name] = dict(value)
    return _finish(script, parser, given, {name: rows[name].label for name in given})


def unchecked_options(script: str, /, **values: Any) -> Options:
    """The options of a script with these values given, about no data and without checks: of a model that is loaded."""
    rows = flags(script)
    defaults = {name: row.default for name, row in rows.items()}
    return Options(**defaults | values, script=script, spelled={name: rows[name].label for name in values})


def _finish(script: str, parser: Parser, given: dict[str, Any], spelled: Mapping[str, str]) -> Options:
    """The options that were given, by a flag that was spelled so, with those of files and defaults, and checked."""
    rows = flags(script)
    resumed = read_resumed(given, rows, parser) if script == 'train' else {}
    changed = {name for name, value in resumed.items() if value != rows[name].default}
    resumed |= {name: rows[name].default for name in resumed.keys() - changed}  # 0 where argparse reads 0.0
    recipe: dict[str, Any] = {}
    if path := find_recipe(given.get('config')):
        rows['config'].check(path, '--config', None)
        recipe = read_config(path, rows, parser, skip=FOLDER if given.keys() & FOLDER else ())
        given['config'] = path  # its name may have been given
        if 'lr' in resumed:  # computed of the recipe's
            recipe = {name: value for name, value in recipe.items() if not name.startswith('lr_base')}
    spelled = (
        {name: rows[name].label for name in changed}
        | {name: f'--config {path}: {name}' for name in recipe}
        | dict(spelled)
    )
    given = {name: _expand(value) for name, value in (resumed | recipe | given).items()}
    values = {name: row.default for name, row in rows.items()} | given
    if values['data'] and values['data_dir'] and values['data'] != values['data_dir']:
        raise ValueError(f'{values["data"]} contradicts --data-dir {values["data_dir"]}; give one of them')
    values['data'] = values['data_dir'] = values['data'] or values['data_dir']
    options = Options(**copy.deepcopy(values), spelled=spelled, script=script)
    options = options.replace(**_dependent_defaults(options, given))
    check(options)
    if script == 'train':
        warn_no_effect(options, script)
        _name_recipes(options)
        warn_random_weights(options, frozen='--freeze-backbone' if options.freeze_backbone else '')
    return options


def _name_recipes(options: Options) -> None:
    """Log that timm's defaults for ImageNet apply, where a run from pretrained weights sets none of them."""
    fine_tunes = options.pretrained or options.initial_checkpoint or options.pretrained_path
    if (
        fine_tunes
        and not options.given & {'opt', 'lr', 'lr_base', 'epochs', 'config'}
        and world_info_from_env()[1] == 0
    ):
        recipe = 'multilabel' if options.task == 'multilabel' else 'single_label'
        _logger.warning(
            f"training with timm's defaults for ImageNet, {options.epochs} epochs of {options.opt}: "
            f'for your own images pass --config finetune/{recipe}, or --opt, --lr and --epochs'
        )


def warn_random_weights(options: Options, frozen: str) -> None:
    """Warn of a backbone that stays random, where `frozen` says what freezes it, and of weights that are not loaded."""
    if options.pretrained or options.initial_checkpoint or options.resume or world_info_from_env()[1] != 0:
        return
    if options.model.startswith('local-dir:'):
        _logger.warning(f'--model {options.model}: its weights are not loaded; add --pretrained')
    elif frozen:
        _logger.warning(f'{frozen} keeps random weights: add --pretrained or --initial-checkpoint')


def _expand(value: Any) -> Any:
    """A path with the home folder for `~`, which shells leave alone in `--output=~/x` and YAML files."""
    return os.path.expanduser(value) if isinstance(value, str) and (value == '~' or value.startswith('~/')) else value


def _dependent_defaults(options: Options, known: Container[str]) -> dict[str, Any]:
    """The defaults that depend on other options, but for those whose values are known."""
    defaults: dict[str, Any] = {}
    if 'device' not in options.given and not torch.cuda.is_available():
        defaults['device'] = 'cpu'
        _logger.warning('no CUDA device found: running on the CPU; --device cuda makes that an error')
    defaults |= _amp_default(options, defaults.get('device', options.device))
    if options.script == 'train':
        if options.task == 'multilabel':
            defaults |= dict(smoothing=0.0, eval_metric=default_metric(options))
        if options.sched in ('wsd', 'rsqrt'):
            defaults['decay_epochs'] = 0.2  # a share of the schedule; 90 epochs are the default of step
    changes = {name: value for name, value in defaults.items() if name not in known}
    return changes | ({'grad_accum_steps': max(1, options.grad_accum_steps)} if options.script == 'train' else {})


def _amp_default(options: Options, device: str) -> dict[str, str]:
    """bfloat16 on a CPU: there float16 has no loss scaling, and its convolutions take 80 times as long backwards."""
    if not options.amp or not device.startswith('cpu') or 'amp_dtype' in options.given:
        return {}
    _logger.info('mixed precision on a CPU: using bfloat16; --amp-dtype float16 overrides it')
    return {'amp_dtype': 'bfloat16'}


#: The parser of train.py, with timm's flags and defaults and the flags of this package, and that of validate.py.
train_parser, validate_parser = partial(_parser, 'train'), partial(_parser, 'validate')
#: The options of a training run and of an evaluation, from a command line or from values: see the functions above.
parse_train, parse_validate = partial(_parse, 'train'), partial(_parse, 'validate')
train_options, validate_options = partial(_from_values, 'train'), partial(_from_values, 'validate')
