"""Score every model that the options of validate.py name: one, a folder of checkpoints, a pattern of models."""

import csv
import json
import logging
from pathlib import Path

import timm
import torch
from timm.utils.decay_batch import decay_batch_step

from timm_mldecoder.checkpoint.files import SUFFIX
from timm_mldecoder.data.class_order import sort_key
from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import Options
from timm_mldecoder.runtime.errors import RunFailed, is_out_of_memory
from timm_mldecoder.validate.report import report_folder
from timm_mldecoder.validate.score import Result, score_model

_logger = logging.getLogger(__name__)

_RANKING = ('top1', 'map', 'zsl_map')


def validate(options: Options, world: World) -> None:
    """Score every model or checkpoint that the options name, print the results and write them to a file.

    Of several, one that fails is reported and skipped, and results are kept if the sweep is interrupted. Several ranks
    end at the first failure: they cannot continue together once it happened on some of them only.

    Raises:
        RunFailed: If some of several models could not be scored.
    """
    candidates = list_candidates(options)
    several = len(candidates) > 1
    results: list[Result] = []
    failed = []
    try:
        for model, checkpoint in candidates:
            one = options.replace(model=model, checkpoint=checkpoint)
            if several and options.report:
                one = one.replace(report=str(report_folder(options.report, checkpoint or model)))
            try:
                results.append(_score_with_retry(one, world, retry=options.retry or several))
            except Exception as error:  # whatever is wrong with one model, the others may be fine
                if not several or world.distributed:
                    raise
                failed.append(checkpoint or model)
                expected = isinstance(error, (ValueError, OSError, RunFailed))
                _logger.error(f'skipped {failed[-1]}: {error}', exc_info=not expected)
    finally:
        if results and world.primary:
            path = options.results_file or ('./results-all.csv' if several else '')
            _report(results, several, path, options.results_format)
    if failed:
        raise RunFailed(f'{len(failed)} of {len(candidates)} could not be scored: {", ".join(failed)}')


def list_candidates(options: Options) -> list[tuple[str, str]]:
    """Return pairs of model and checkpoint: one, a folder of checkpoints, a pattern of model names, or a file of them.

    Raises:
        ValueError: If the options name nothing.
    """
    folder = Path(options.checkpoint) if options.checkpoint else None
    if folder and folder.is_dir():
        files = [str(path) for suffix in (SUFFIX, '.pth', '.safetensors') for path in folder.glob(f'*{suffix}')]
        if not files:
            raise ValueError(f'--checkpoint {folder}: the folder has no checkpoint')
        return [(options.model, file) for file in sorted(files, key=sort_key)]
    if ':' in options.model or timm.is_model(options.model):
        return [(options.model, options.checkpoint)]
    if options.model == 'all':
        return [(name, '') for name in timm.list_models(pretrained=True, exclude_filters=['*_in21k', '*_in22k'])]
    names = timm.list_models(options.model, pretrained=True) if options.model else []  # timm lists all for ''
    if not names and Path(options.model).is_file():
        names = Path(options.model).read_text().split()
    if not names:
        raise ValueError(f'--model {options.model}: not a model, a pattern of models, or a file of names')
    return [(name, options.checkpoint) for name in names]


def _score_with_retry(options: Options, world: World, retry: bool) -> Result:
    """Score one model, with smaller and smaller batches if memory runs out and `retry` is set."""
    while True:
        try:
            return score_model(options, world)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            smaller = decay_batch_step(options.batch_size)
            if not retry or not smaller:
                remedy = 'pass --retry, or a smaller -b' if smaller else 'not even one image fits'
                raise ValueError(f'--batch-size {options.batch_size} does not fit into memory: {remedy}') from error
        _logger.warning(f'a batch of {options.batch_size} does not fit into memory, trying {smaller}')
        options = options.replace(batch_size=smaller)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _report(results: list[Result], several: bool, path: str, kind: str) -> None:
    """Print the results as JSON, best first, and write them as CSV, one row per model, or as JSON."""
    results.sort(key=lambda result: -next((result[name] for name in _RANKING if name in result), 0.0))
    print(f'--result\n{json.dumps(results if several else results[0], indent=4)}', flush=True)
    if not path:
        return
    with open(path, 'w', newline='') as file:
        if kind == 'json':
            json.dump(results, file, indent=4)
            return
        writer = csv.DictWriter(file, list(dict.fromkeys(name for result in results for name in result)))
        writer.writeheader()
        writer.writerows(results)
