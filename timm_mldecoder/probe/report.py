"""The results of a probe: a Markdown table, `curves.png`, `results.json`, and a complete checkpoint of each head."""

import importlib.util
import json
import logging
import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_mldecoder.checkpoint.folders import folder_config
from timm_mldecoder.checkpoint.read import RUN, VERSION, check_entries
from timm_mldecoder.flags import Options
from timm_mldecoder.loading.create_loaders import DataConfig
from timm_mldecoder.models.probes import small_ml_decoder_options
from timm_mldecoder.probe.options import TEXT_HEADS, ProbeOptions
from timm_mldecoder.probe.train import Choice, Run
from timm_mldecoder.runtime.files import write_atomically

_logger = logging.getLogger(__name__)

RESULTS, TABLE, CURVES = 'results.json', 'results.md', 'curves.png'


def collect(
    options: ProbeOptions,
    choices: Sequence[Choice],
    runs: Sequence[Run],
    test: dict[int, dict[str, float] | None] | None,
    files: dict[str, str],
    read_seconds: float,
) -> dict[str, Any]:
    """Return the results in JSON form.

    Args:
        choices: The best learning rate of each head.
        test: Metrics on the test split of the chosen runs, by their index in `runs`; None without such a split.
        files: Checkpoint of each head, by its label.
        read_seconds: Time of reading or computing features for training, on the first rank.
    """
    metric = options.train.eval_metric
    place = {id(run): index for index, run in enumerate(runs)}
    heads = {}
    for choice in choices:
        finals = [run.metrics[max(run.metrics)] if test is None else test[place[id(run)]] for run in choice.runs]
        scores = [None if values is None else values[metric] for values in finals]
        finite = [score for score in scores if score is not None]
        complete = len(finite) == len(scores)
        heads[choice.spec.label] = {
            'mean': statistics.mean(finite) if complete else None,
            'std': (statistics.stdev(finite) if len(finite) > 1 else 0.0) if complete else None,
            'scores': scores,
            'lr': choice.rate,
            'at_end': choice.at_end,
            'tried': {f'{rate:g}': value for rate, value in choice.tried.items()},
            'parameters': choice.runs[0].parameters,
            'seconds': statistics.mean(run.seconds for run in choice.runs),
            'checkpoint': files[choice.spec.label],
        }
    return {
        'model': options.train.model,
        'task': options.train.task,
        'metric': metric,
        'split': options.test_split or options.train.val_split,
        'chosen_on': options.train.val_split,
        'seeds': options.seeds,
        'tuning_seeds': options.tuning_seeds,
        'epochs': options.train.epochs,
        'feature_seconds': read_seconds,
        'heads': heads,
        'runs': [
            {
                'head': run.spec.label,
                'lr': run.rate,
                'seed': run.seed,
                'loss': [value if math.isfinite(value) else None for value in run.losses],
                'metrics': {str(epoch): values for epoch, values in run.metrics.items()},
            }
            for run in runs
        ],
    }


def table(results: dict[str, Any]) -> str:
    """Return the Markdown table of results."""
    lines = [
        f'| head | {results["metric"]} ({results["split"]}) | parameters | seconds | learning rate |',
        '|---|---|---|---|---|',
    ]
    for label, row in results['heads'].items():
        score = 'diverged' if row['mean'] is None else f'{row["mean"]:.2f} ± {row["std"]:.2f}'
        end = ' (end of --lrs)' if row['at_end'] else ''
        lines.append(f'| {label} | {score} | {row["parameters"]:,} | {row["seconds"]:.1f} | {row["lr"]:g}{end} |')
    return '\n'.join(lines)


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write results, table and curves, and warn about learning rates at an end of their range."""
    for label, row in results['heads'].items():
        if row['at_end']:
            _logger.warning(f'{label}: the best learning rate {row["lr"]:g} is at an end of --lrs; extend the range')
    if results['split'] == results['chosen_on']:
        _logger.warning('scores are those of the split that chose the learning rates; --test-split scores another one')
    text = table(results)
    write_atomically(folder / RESULTS, lambda file: file.write(json.dumps(results, indent=1).encode()))
    write_atomically(folder / TABLE, lambda file: file.write(f'{text}\n'.encode()))
    if importlib.util.find_spec('matplotlib'):
        write_atomically(folder / CURVES, partial(_draw, results))
    else:
        _logger.warning(f'{CURVES} is not drawn: it needs matplotlib, pip install matplotlib')
    print(f'\n{text}\n\n{folder}', flush=True)


def _draw(results: dict[str, Any], file: Any) -> None:
    """Draw the metric by epoch at the best learning rate, and by learning rate after the last epoch."""
    metric = results['metric']
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    curves, rates = figure.subplots(1, 2)
    for label, row in results['heads'].items():
        chosen = [run for run in results['runs'] if run['head'] == label and run['lr'] == row['lr']]
        epochs = [epoch for epoch in chosen[0]['metrics'] if all(run['metrics'][epoch] for run in chosen)]
        means = [statistics.mean(run['metrics'][epoch][metric] for run in chosen) for epoch in epochs]
        curves.plot([int(epoch) + 1 for epoch in epochs], means, label=label, marker='.')
        tried = {float(rate): value for rate, value in row['tried'].items() if value is not None}
        rates.plot(list(tried), list(tried.values()), label=label, marker='.')
    curves.set(xlabel='epoch', ylabel=f'{metric} ({results["chosen_on"]}, mean over seeds)')
    rates.set(xlabel='learning rate', xscale='log')
    curves.legend(fontsize=7)
    for axis in (curves, rates):
        axis.grid(alpha=0.3)
    figure.savefig(file, format='png', dpi=120, bbox_inches='tight')


def write_checkpoint(
    path: Path,
    options: Options,
    model: Any,
    run: Run,
    *,
    config: DataConfig,
    class_names: list[str] | None,
    words: dict[str, Any],
    held_out: Tensor | None = None,
) -> None:
    """Write the backbone and the head of a run as a checkpoint of train.py.

    An ML-Decoder is written as the head that train.py builds, every other head as `probe_head` of
    ``timm.create_model``. `words` are the options of `MLDecoder` for text queries; empty without them.
    """
    num_classes = run.head.num_classes
    final = run.metrics[max(run.metrics)]
    score = float('nan') if final is None else final[options.eval_metric]
    last = options.epochs - 1
    rows = [{'epoch': last, **{f'eval_{name}': float(value) for name, value in (final or {}).items()}}]
    content = {
        'epoch': last,
        'arch': model.pretrained_cfg.get('architecture') or options.model,
        'version': VERSION,
        'state_dict': _weights(model, run.head),
        'optimizer': {},
        'metric': score,
        'saver': {'checkpoint_files': [], 'best_metric': score, 'metric': options.eval_metric},
        'args': checkpoint_options(options, run, num_classes, model.ml_decoder_features, words)
        .with_data_path()
        .to_namespace(),
        RUN: {
            'epoch': options.epochs,
            'batch': 0,
            'start': dict(position=0, batch=0, order_ranks=None, end_position=None),
            'restart': None,
            'skipped': 0,
            'rows': rows,
            'schedule': None,
            'ranks': [dict(loss=0.0, samples=0, bad_images=[], buffers={})],
            'world_size': 1,
            'batch_size': options.batch_size,
            'grad_accum_steps': 1,
            'optimizer_generator': None,
            'early_stop': None,
            'model_config': folder_config(options.model) or None,
            'held_out': held_out,
            'data_config': dict(config),
        },
    }
    if class_names:
        content['class_names'] = class_names
    check_entries(content, path)
    write_atomically(path, partial(torch.save, content))


def _weights(model: Any, head: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the backbone with this head, on the CPU."""
    slot = model.get_submodule(model.ml_decoder_slot)
    model.set_submodule(model.ml_decoder_slot, head)
    try:
        return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    finally:
        model.set_submodule(model.ml_decoder_slot, slot)


def checkpoint_options(
    options: Options, run: Run, num_classes: int, num_features: int, words: dict[str, Any]
) -> Options:
    """Return the options of train.py that build the backbone with the head of a run."""
    options = options.replace(num_classes=num_classes, lr=run.rate, seed=options.seed + run.seed)
    spec = run.spec
    if spec.name not in TEXT_HEADS:
        stored = {'name': spec.name, **spec.options}  # none of them is a tensor
        return options.replace(
            use_ml_decoder_head=0, word_embeddings='', model_kwargs={**options.model_kwargs, 'probe_head': stored}
        )
    head = dict(spec.options)
    if spec.name == 'ml_decoder_small':
        head = small_ml_decoder_options(num_features, **words, **head)
    head = {name: value for name, value in head.items() if name not in words}
    return options.replace(
        use_ml_decoder_head=1,
        decoder_embedding=head.pop('dim', -1),
        num_of_groups=head.pop('num_of_groups', -1),
        ml_decoder_kwargs=head,
    )
