"""Files of class priors, the estimated frequency of each class, for the class-aware selective loss (arXiv 2110.10955).

A CSV of two columns, `Classes` and `avg_pred`, the layout of the published files. The estimate is the mean predicted
probability of a model trained with mode 'ignore' (`timm_mldecoder.metrics.class_priors.MeanProbability`).
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from timm_mldecoder.data.text_files import normalize_name, read_rows

HEADER = ['Classes', 'avg_pred']


def write_priors(path: str | Path, class_names: Sequence[str], priors: Tensor) -> None:
    """Write the prior of each class, [C] in [0, 1]."""
    with Path(path).open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows(zip(class_names, priors.tolist(), strict=True))


def read_priors(path: str | Path, class_names: Sequence[str]) -> Tensor:
    """Read the prior of each class, float32 [C] in the order of `class_names`.

    Raises:
        ValueError: If a line is malformed, or the classes of the file are not `class_names`.
    """
    priors = {}
    for line, row in read_rows(Path(path)):
        if row == HEADER and line == 1:
            continue
        try:
            name, prior = normalize_name(row[0]), float(row[1])
        except (IndexError, ValueError) as error:
            raise ValueError(f'{path}, line {line}: expected class and prior, got {row}') from error
        if not 0 <= prior <= 1:
            raise ValueError(f'{path}, line {line}: the prior of {name!r} must be in [0, 1], got {prior}')
        priors[name] = prior
    missing, unknown = [sorted(set(a) - set(b)) for a, b in ((class_names, priors), (priors, class_names))]
    if missing or unknown:
        raise ValueError(f'{path} does not have the classes of the dataset: missing {missing}, unknown {unknown}')
    return torch.tensor([priors[name] for name in class_names])
