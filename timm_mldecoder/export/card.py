"""What a model card says of a run: its metrics, and the command that trained it."""

import shlex
from collections.abc import Mapping
from typing import Any

from timm_mldecoder.checkpoint.read import RUN, ranked_by_ema
from timm_mldecoder.flags.config import as_arguments
from timm_mldecoder.flags.parse import flags


def run_facts(content: Mapping[str, Any], use_ema: bool | None = None) -> dict[str, str]:
    """Return the lines of a model card for a checkpoint of train.py: metrics, start weights, thresholds and command.

    Metrics are those of the weights that the checkpoint was ranked by, unknown where `use_ema` takes others.
    """
    rows = content[RUN]['rows'] if use_ema in (None, ranked_by_ema(content)) else []
    row = {name: value for name, value in (rows[-1] if rows else {}).items() if name != 'eval_ema'}
    metrics = [f'{name[5:]} {value:.3f}' for name, value in row.items() if name.startswith('eval_')]
    command = shlex.join(['train.py', 'DATA', *chosen_flags(vars(content['args']))])
    options, tuned = vars(content['args']), content.get('thresholds') or {}
    pretrained = f'the pretrained weights of {options["model"]}, whose licence holds' if options['pretrained'] else ''
    facts = {
        'Metrics of the validation split': ', '.join(metrics) or 'unknown',
        'Start weights': options.get('initial_checkpoint') or pretrained or 'random',
        'Training': f'`{command}`',
    }
    thresholds = ', '.join(f'{name} {value:.3f}' for name, value in [*tuned.items()][:20])
    more = ', ...' if len(tuned) > 20 else ''
    return facts | ({'Thresholds': f'{thresholds}{more}; all of them are in config.json'} if tuned else {})


def chosen_flags(options: Mapping[str, Any]) -> list[str]:
    """Return the flags of a run that decide its result and differ from the defaults."""
    where = {'data', 'data_dir', 'output', 'experiment', 'config', 'resume', 'workers', 'device', 'log_interval'}
    rows = flags('train')
    arguments = []
    for name, row in rows.items():
        if name not in where and name in options and options[name] != row.default:
            arguments += as_arguments(row, options[name])
    return arguments
