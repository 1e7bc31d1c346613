"""Fine-tuning with the recipes `finetune/...`: pooling beside ML-Decoder, each at its own best rate, on real pictures.

    python -m benchmarks.finetune FOLDER [--datasets solar,digit_scenes] [--models lite0] [--rates 1e-3,3e-3] [--seeds 3]

Both heads get the same effort: every rate with one seed, the best by validation, then the other seeds at that rate. The test split, which
chose nothing, scores the best epoch of each run. Finished runs are kept in FOLDER/finetune.jsonl, so a grid that was stopped goes on.
Prints a table: mean and standard deviation over seeds of test top-1 or mAP, the rate, minutes of a run.
"""  # noqa: E501

import argparse
import json
import logging
import shutil
import statistics
import time
from pathlib import Path

import torch

import timm_mldecoder
from benchmarks import pictures

DATASETS = dict(solar='single_label', fashion='single_label', fashion_scenes='multilabel', digit_scenes='multilabel')
# the recipes' rate of the head is that of ML-Decoder
HEADS = dict(pooling=dict(use_ml_decoder_head=0, head_lr_scale=1.0), ml_decoder=dict(use_ml_decoder_head=1))
METRICS = dict(single_label='top1', multilabel='map')


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = lambda text: text.split(',')  # noqa: E731
    parser.add_argument('folder', type=Path, help='where pictures, weights and results go')
    parser.add_argument('--datasets', type=names, default=list(DATASETS), help='(default: all four)')
    parser.add_argument(
        '--models', type=names, default=['lite0', 'garment_resnet'], help='(default: lite0,garment_resnet)'
    )
    parser.add_argument('--heads', type=names, default=list(HEADS), help='(default: pooling,ml_decoder)')
    parser.add_argument('--rates', type=names, default=['3e-4', '1e-3', '3e-3'], help='(default: 3e-4,1e-3,3e-3)')
    parser.add_argument('--seeds', type=int, default=3, help='(default: 3)')
    parser.add_argument('--images', type=int, default=400, help='training pictures (default: 400)')
    parser.add_argument('--size', type=int, default=160, help='pixels (default: 160)')
    parser.add_argument(
        '--flags', type=json.loads, default={}, help='more flags of train, as JSON, such as another config'
    )
    return parser.parse_args(arguments)


def subset(source: Path, images: int) -> Path:
    """Copy a dataset with fewer training pictures, and half as many for validation; the test split is whole."""
    target = source.with_name(f'{source.name}_{images}')
    if target.exists():
        return target
    shutil.copytree(source, part := source.with_name(f'{target.name}.part'), dirs_exist_ok=True)
    for split, count in dict(train=images, validation=images // 2).items():
        if (table := part / f'{split}.csv').exists():
            table.write_text('\n'.join(table.read_text().splitlines()[: count + 1]) + '\n')
            continue
        found = sorted((part / split).glob('*/*'))
        kept = {found[number * len(found) // count] for number in range(min(count, len(found)))}
        for path in set(found) - kept:
            path.unlink()
    return part.rename(target)


def train_once(options: argparse.Namespace, key: dict) -> dict:
    """Train and score one model; return `key` with the metrics of validation and test."""
    task = DATASETS[key['dataset']]
    data = subset(options.folder / key['dataset'], key['images'])
    reader = dict(dataset='csv') if task == 'multilabel' else {}
    shutil.rmtree(options.folder / 'runs', ignore_errors=True)  # of a grid that was stopped
    begin = time.perf_counter()
    flags = dict(config=f'finetune/{task}') | HEADS[key['head']] | key['flags']
    result = timm_mldecoder.train(
        data, model=f'local-dir:{options.folder / key["model"]}', pretrained=True,
        img_size=key['size'], lr=float(key['rate']), seed=key['seed'],
        output=options.folder / 'runs', experiment='run', device='cpu', channels_last=True,
        workers=0, checkpoint_hist=1, **reader, **flags,
    )  # fmt: skip
    minutes = (time.perf_counter() - begin) / 60
    metric = METRICS[task]
    test = timm_mldecoder.evaluate(
        data, checkpoint=result.best, split='test', device='cpu', workers=0, batch_size=64, **reader
    )
    shutil.rmtree(result.folder)
    validation = [row[f'eval_{metric}'] for row in result.rows]
    return {**key, 'validation': max(validation), 'test': test[metric], 'minutes': minutes, 'curve': validation}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, force=True)
    torch.set_num_threads(1)
    log = options.folder / 'finetune.jsonl'
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for name in (*options.datasets, *options.models):
        pictures.write(name, options.folder)

    def finished(**key) -> dict:
        for row in done:
            if all(row[name] == value for name, value in key.items()):
                return row
        row = train_once(options, key)
        with log.open('a') as file:
            file.write(json.dumps(row) + '\n')
        print({name: value for name, value in row.items() if name != 'curve'}, flush=True)
        done.append(row)
        return row

    lines = ['| dataset | backbone | head | rate | validation | test | minutes |', '|---|---|---|---|---|---|---|']
    for dataset in options.datasets:
        for model in options.models:
            for head in options.heads:
                common = dict(
                    dataset=dataset,
                    model=model,
                    head=head,
                    size=options.size,
                    images=options.images,
                    flags=options.flags,
                )
                tries = [finished(**common, rate=rate, seed=0) for rate in options.rates]
                rate = max(tries, key=lambda row: row['validation'])['rate']
                runs = [finished(**common, rate=rate, seed=seed) for seed in range(options.seeds)]
                scores, minutes = [_spread(runs, 'validation'), _spread(runs, 'test')], _spread(runs, 'minutes')
                lines.append('| ' + ' | '.join([dataset, model, head, rate, *scores, minutes]) + ' |')
    print('\n'.join(lines))


def _spread(runs: list[dict], name: str) -> str:
    values = [row[name] for row in runs]
    return f'{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}'


if __name__ == '__main__':
    main()
