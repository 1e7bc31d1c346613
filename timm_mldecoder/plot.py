"""Draw the curves of one or several runs from their `summary.csv`.

    python -m timm_mldecoder.plot output/train/RUN [output/train/OTHER ...] --output curves.png [--best map]

`--best` prints the best value of a metric in each run, and their mean: published figures are often means of three runs.
"""

import os
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path
from statistics import mean, stdev

from timm_mldecoder.checkpoint.files import Metrics, read_summary
from timm_mldecoder.runtime.errors import CommandParser, run_command

COLUMNS = 4  # of panels; more rows for further metrics


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the runs that the command line names.

    Raises:
        ValueError: If a run has no epochs yet, or matplotlib is missing.
    """
    parser = CommandParser('python -m timm_mldecoder.plot', __doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run, or its summary.csv')
    parser.add_argument('--output', default='curves.png', metavar='FILE', help='picture (default: %(default)s)')
    parser.add_argument('--best', default='', metavar='METRIC', help='print the best METRIC of each run and their mean')
    arguments = parser.parse_args(argv)
    runs = {Path(run): read_run(Path(run)) for run in arguments.runs}
    if arguments.best:
        print_best(runs, arguments.best)
    draw(runs, Path(arguments.output))
    print(arguments.output)


def read_run(path: Path) -> list[Metrics]:
    """The epochs of a run."""
    path = path / 'summary.csv' if path.is_dir() else path
    if not os.path.isfile(path):
        raise ValueError(f'{path}: not a summary of a run')
    rows = read_summary(path, before=inf)
    if not rows:
        raise ValueError(f'{path}: no epochs to draw')
    return rows


def print_best(runs: dict[Path, list[Metrics]], metric: str) -> None:
    """Print the best value of a validation metric in each run, the mean and the sample standard deviation."""
    column, best = f'eval_{metric}', min if metric == 'loss' else max
    values = []
    for path, rows in runs.items():
        found = [(row[column], row['epoch']) for row in rows if column in row]
        if not found:
            known = sorted({name.removeprefix('eval_') for row in rows for name in row if name.startswith('eval_')})
            raise ValueError(f'--best {metric}: {path} has {", ".join(known) or "no metrics of validation"}')
        value, epoch = best(found, key=lambda pair: pair[0])
        values.append(value)
        print(f'{_name(path)}: {metric} {value:.2f} in epoch {epoch}')
    if len(values) > 1:
        print(f'mean of {len(values)} runs: {metric} {mean(values):.2f} ± {stdev(values):.2f}')


def _name(path: Path) -> str:
    return path.parent.name if path.name == 'summary.csv' else path.name


def draw(runs: dict[Path, list[Metrics]], output: Path) -> None:
    """Draw one panel per metric and one line per run; training and validation of a metric share a panel."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('drawing needs matplotlib: pip install matplotlib') from error
    names = dict.fromkeys(name for epochs in runs.values() for row in epochs for name in row if name != 'epoch')
    panels = list(dict.fromkeys(name.removeprefix('train_').removeprefix('eval_') for name in names))
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.6 * rows), layout='constrained')
    for number, panel in enumerate(panels, 1):
        axis = figure.add_subplot(rows, columns, number)
        for index, (path, epochs) in enumerate(runs.items()):
            name = _name(path)
            for column, style in ((f'train_{panel}', '--'), (f'eval_{panel}', '-'), (panel, '-')):
                points = [(row['epoch'], row[column]) for row in epochs if column in row]
                if points:
                    kind = ' (training)' if style == '--' else ''
                    marker = 'o' if len(points) == 1 else ''  # a line of one point shows nothing
                    axis.plot(*zip(*points, strict=True), marker + style, color=f'C{index}', label=f'{name}{kind}')
        axis.set(title=panel, xlabel='epoch')
        axis.grid(alpha=0.3)
        axis.legend(fontsize='small')
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise (OSError if isinstance(error, OSError) else ValueError)(f'--output {output}: {error}') from error


if __name__ == '__main__':
    sys.exit(run_command(main))
