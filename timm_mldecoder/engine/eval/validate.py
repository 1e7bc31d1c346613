"""Scoring every model that the options of validate.py name: one, a folder of checkpoints, a pattern of models."""

import csv
import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import natural_key
from timm.utils.decay_batch import decay_batch_step

from timm_mldecoder.engine.checkpoint.files import SUFFIX
from timm_mldecoder.engine.eval.score import Result, score_model
from timm_mldecoder.engine.runtime.distributed import World
from timm_mldecoder.engine.runtime.failure import RunFailed
from timm_mldecoder.engine.runtime.memory import is_out_of_memory

_logger = logging.getLogger(__name__)

_RANKING = ('top1', 'map', 'zsl_map')


def score(options: Namespace, explicit: dict[str, Any], world: World) -> None:
    """Score every model or checkpoint that the options name, print the results and write them to a file.

    One of several that fails is told and left out; what was scored is kept if the sweep is interrupted, too. Several
    processes end at the first failure: they cannot go on together once it happened in some of them only.

    Raises:
        ValueError: For whatever the user got wrong.
        RunFailed: If some of several models could not be scored.
    """
    candidates = list_candidates(options)
    several = len(candidates) > 1
    if several:
        options.results_file = options.results_file or './results-all.csv'
    results, failed = [], []
    try:
        for model, checkpoint in candidates:
            own = Namespace(**{**vars(options), 'model': model, 'checkpoint': checkpoint})
            try:
                results.append(_score_with_retry(own, explicit, world, retry=options.retry or several))
            except Exception as error:  # whatever is wrong with one model, the others may be fine
                if not several or world.distributed:
                    raise
                failed.append(checkpoint or model)
                told = isinstance(error, (ValueError, OSError))
                _logger.error(f'{failed[-1]} is left out: {error}', exc_info=not told)
    finally:
        if results and world.primary:
            _report(results, options, several)
    if failed:
        raise RunFailed(f'{len(failed)} of {len(candidates)} could not be scored: {", ".join(failed)}')


def _report(results: list[Result], options: Namespace, several: bool) -> None:
    results.sort(key=lambda result: -next((result[name] for name in _RANKING if name in result), 0.0))
    print(f'--result\n{json.dumps(results if several else results[0], indent=4)}', flush=True)
    if options.results_file:
        _write_results(Path(options.results_file), results, options.results_format)


def list_candidates(options: Namespace) -> list[tuple[str, str]]:
    """Pairs of model and checkpoint: one, a folder of checkpoints, a pattern of model names, or a file of them."""
    folder = Path(options.checkpoint) if options.checkpoint else None
    if folder and folder.is_dir():
        files = sorted(
            (str(path) for end in (SUFFIX, '.pth', '.safetensors') for path in folder.glob(f'*{end}')), key=natural_key
        )
        if not files:
            raise ValueError(f'--checkpoint {folder}: the folder has no checkpoint')
        return [(options.model, file) for file in files]
    if ':' in options.model or timm.is_model(options.model):
        return [(options.model, options.checkpoint)]
    if options.model == 'all':
        return [(name, '') for name in timm.list_models(pretrained=True, exclude_filters=['*_in21k', '*_in22k'])]
    names = timm.list_models(options.model, pretrained=True)
    if not names and Path(options.model).is_file():
        names = Path(options.model).read_text().split()
    if not names:
        raise ValueError(f'--model {options.model}: no such model, no pattern of models, no file of names')
    return [(name, options.checkpoint) for name in names]


def _score_with_retry(options: Namespace, explicit: dict[str, Any], world: World, retry: bool) -> Result:
    """Score one model, with smaller and smaller batches where memory runs out and `retry` says so."""
    while True:
        try:
            return score_model(options, explicit, world)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            smaller = decay_batch_step(options.batch_size)
            if not retry or not smaller:
                remedy = 'pass --retry, or a smaller -b' if smaller else 'not even one image fits'
                raise ValueError(f'--batch-size {options.batch_size} does not fit the memory: {remedy}') from error
        _logger.warning(f'A batch of {options.batch_size} does not fit the memory, trying {smaller}.')
        options = Namespace(**{**vars(options), 'batch_size': smaller})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _write_results(path: Path, results: list[Result], kind: str) -> None:
    """Write results as CSV, one row a model, or as JSON."""
    with open(path, 'w', newline='') as file:
        if kind == 'json':
            json.dump(results, file, indent=4)
            return
        writer = csv.DictWriter(file, list(dict.fromkeys(name for result in results for name in result)))
        writer.writeheader()
        writer.writerows(results)
