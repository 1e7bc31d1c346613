"""Files of class names, thresholds, priors, categories and implications that a user has for a model."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_mldecoder.data.text_files import normalize_name, read_names, read_rows, read_text


def read_class_names(path: Path, num_classes: int) -> list[str]:
    """Return the names of the outputs in order.

    Args:
        path: A text file with a name per line; or `.json`: a list of names, names by index, or indices by name.
        num_classes: Number of outputs.

    Raises:
        ValueError: If there are not as many distinct names, or the indices are not 0 to num_classes - 1.
    """
    content = _read_json(path) if path.suffix == '.json' else read_names(path)
    if isinstance(content, dict):
        pairs = [(name, key) if isinstance(name, int) else (key, name) for key, name in content.items()]
        by_index = {str(index): name for index, name in pairs}
        if set(by_index) != {str(index) for index in range(num_classes)}:
            raise ValueError(f'{path}: the indices of the names must be 0 to {num_classes - 1}')
        content = [by_index[str(index)] for index in range(num_classes)]
    if not isinstance(content, list) or not all(isinstance(name, str) and name for name in content):
        raise ValueError(f'{path}: expected a list of names, or an object of names and indices')
    if len(content) != num_classes or len(set(content)) != num_classes:
        found = f'{len(content)} names, {len(set(content))} of them distinct'
        raise ValueError(f'{path}: the model has {num_classes} classes, the file {found}')
    return content


def read_thresholds(path: Path, class_names: Sequence[str] | None, task: str = 'multilabel') -> dict[str, float]:
    """Return the probability from which each class is predicted.

    Args:
        path: A CSV file with a row `name,threshold` per class, such as that of `validate.py --class-report`; or
            `.json`: thresholds by name, or a list in the order of the classes.
        class_names: Names of all classes, None if they are not known.
        task: Task of the model.

    Raises:
        ValueError: If a class has no threshold, or one outside [0, 1]; if classes have no names or exclude each other.
    """
    if task != 'multilabel':
        raise ValueError('--thresholds are for --task multilabel')
    if not class_names:
        raise ValueError('thresholds are stored by class name: pass --class-names FILE too')
    if path.suffix == '.json':
        content = _read_json(path)
        values = dict(zip(class_names, content, strict=False)) if isinstance(content, list) else content
    else:
        rows = [row for _, row in read_rows(path)]
        named = [field.strip() for field in rows[0]] if rows else []
        columns = (named.index('class'), named.index('threshold')) if {'class', 'threshold'} <= set(named) else (0, 1)
        rows = rows[1:] if 'threshold' in named else rows
        values = {row[columns[0]]: row[columns[1]] for row in rows if len(row) > max(columns)}
    if not isinstance(values, dict):
        raise ValueError(f'{path}: expected thresholds by name')
    found = {}
    for name in class_names:
        if name not in values:
            raise ValueError(f'{path}: no threshold of class {name!r}')
        found[name] = _probability(values[name], f'{path}: threshold of class {name!r}')
    return found


PRIORS_HEADER = ['Classes', 'avg_pred']


def write_priors(path: str | Path, class_names: Sequence[str], priors: Tensor) -> None:
    """Write the prior of each class, [C] in [0, 1]: its estimated frequency, for `--loss csl` (arXiv 2110.10955).

    The layout is that of the published files. The estimate is the mean predicted probability of a model trained with
    mode 'ignore' (`validate.py --write-class-priors`).
    """
    with Path(path).open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(PRIORS_HEADER)
        writer.writerows(zip(class_names, priors.tolist(), strict=True))


def read_priors(path: str | Path, class_names: Sequence[str]) -> Tensor:
    """Read what `write_priors` writes, float32 [C] in the order of `class_names`.

    Raises:
        ValueError: If a line is malformed, or the classes of the file are not `class_names`.
    """
    priors = {}
    for line, row in read_rows(Path(path)):
        if row == PRIORS_HEADER and line == 1:
            continue
        if len(row) < 2:
            raise ValueError(f'{path}, line {line}: expected class and prior, got {row}')
        name = normalize_name(row[0])
        priors[name] = _probability(row[1], f'{path}, line {line}: the prior of {name!r}')
    missing, unknown = [sorted(set(a) - set(b)) for a, b in ((class_names, priors), (priors, class_names))]
    if missing or unknown:
        raise ValueError(f'{path} does not have the classes of the dataset: missing {missing}, unknown {unknown}')
    return torch.tensor([priors[name] for name in class_names])


def read_categories(path: Path, class_names: Sequence[str]) -> Tensor:
    """Return the category of each class, [C], as numbers in the order of the categories' names.

    Args:
        path: A CSV file with a row `class,category` per class. With a header, the columns are those called `class`,
            `name` or `tag`, and `category`; more columns and more classes do no harm.
        class_names: Names of all classes.

    Raises:
        ValueError: If a class has no category.
    """
    rows = [[field.strip() for field in row] for _, row in read_rows(path)]
    header = rows[0] if rows else []
    name_column, category_column = 0, 1
    if 'category' in header:
        category_column = header.index('category')
        named = [column for column in ('class', 'name', 'tag') if column in header]
        if not named:
            raise ValueError(f'{path}: no column class, name or tag beside category; the header is {", ".join(header)}')
        name_column, rows = header.index(named[0]), rows[1:]
    columns = max(name_column, category_column)
    found = {normalize_name(row[name_column]): row[category_column] for row in rows if len(row) > columns}
    for name in class_names:
        if not found.get(name):
            raise ValueError(f'{path}: no category of class {name!r}')
    numbers = {category: number for number, category in enumerate(sorted({found[name] for name in class_names}))}
    return torch.tensor([numbers[found[name]] for name in class_names])


def read_implications(path: Path, class_names: Sequence[str]) -> Tensor:
    """Return which classes imply which, closed under transitivity: pairs of indices [2, E], implying and implied.

    Args:
        path: A text file with a line `tag -> tag` per implication. Names may contain an arrow.
        class_names: Names of all classes.

    Raises:
        ValueError: If a line is not an implication of two classes.
    """
    index = {name: number for number, name in enumerate(class_names)}
    direct: dict[int, set[int]] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        parts = [normalize_name(part) for part in line.split('->')]
        if parts == ['']:
            continue
        pairs = [('->'.join(parts[:cut]), '->'.join(parts[cut:])) for cut in range(1, len(parts))]
        pairs += [(' -> '.join(parts[:cut]), ' -> '.join(parts[cut:])) for cut in range(1, len(parts))]
        if not pairs:
            raise ValueError(f'{path}, line {number}: expected "tag -> tag", got {line!r}')
        known = [pair for pair in pairs if set(pair) <= set(index)]
        if not known:
            unknown = next(name for name in pairs[0] if name not in index)
            raise ValueError(f'{path}, line {number}: the model has no class {unknown!r}')
        direct.setdefault(index[known[0][0]], set()).add(index[known[0][1]])
    closed: list[tuple[int, int]] = []
    for first in direct:
        reached, waiting = {first}, [first]
        while waiting:
            new = direct.get(waiting.pop(), set()) - reached
            reached |= new
            waiting += new
        closed += [(first, other) for other in sorted(reached - {first})]
    return torch.tensor(closed, dtype=torch.long).reshape(-1, 2).T


def _probability(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f'{where} must be a number, got {value!r}') from None
    if not 0 <= number <= 1:
        raise ValueError(f'{where} must be in [0, 1], got {number}')
    return number


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f'{path}: not JSON: {error}') from error
