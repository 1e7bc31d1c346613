"""`summary.csv` with a row per epoch, and the result as JSON that timm's sweep tools read."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_mldecoder.runtime.files import write_atomically

SUMMARY = 'summary.csv'
Metrics = dict[str, float]


def summary_row(epoch: int, train: Metrics, validation: Metrics | None, lr: float) -> Metrics:
    """Return the metrics of an epoch under the names of timm's `summary.csv`."""
    return {
        'epoch': epoch,
        **{f'train_{name}': value for name, value in train.items()},
        **{f'eval_{name}': value for name, value in (validation or {}).items()},
        'lr': lr,
    }


def write_summary(path: Path, rows: list[Metrics]) -> None:
    """Write every epoch so far, each once, under one header."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: name == 'lr')  # last, as in timm's
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def read_summary(path: Path, before: float = math.inf) -> list[Metrics]:
    """Return the epochs of a summary before one, none without a file; a ValueError if it is not a summary."""
    if not path.exists():
        return []
    try:
        with open(path, newline='') as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        return [{**row, 'epoch': int(row['epoch'])} for row in rows if row['epoch'] < before]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is not a summary of epochs: {error!r}') from error


def print_result(rows: list[Metrics], metric: str, decreasing: bool) -> None:
    """Print loss and ranking metric of the ten best epochs as JSON, the best last; `summary.csv` has all metrics."""
    results = []
    for row in rows:
        result = {'epoch': row['epoch'], 'train': _group(row, 'train_', ('loss', metric))}
        validation = _group(row, 'eval_', ('loss', metric))
        results.append({**result, 'validation': validation} if validation else result)

    def rank(result: dict) -> float:
        value = result.get('validation', result['train']).get(metric, math.nan)
        return -math.inf if math.isnan(value) else -value if decreasing else value

    print(f'--result\n{json.dumps(sorted(results, key=rank)[-10:], indent=4)}')


def _group(row: Mapping[str, float], prefix: str, names: Sequence[str]) -> Metrics:
    return {name: row[prefix + name] for name in dict.fromkeys(names) if prefix + name in row}
