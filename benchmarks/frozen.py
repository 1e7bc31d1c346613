"""Heads on a frozen backbone with ImageNet weights, over size and number of pictures, size and number of objects.

    python -m benchmarks.frozen FOLDER [--tables size,images,objects,evidence] [--heads linear,ml_decoder_small] [--seeds 3]
    python -m benchmarks.frozen FOLDER --published

| table    | pictures                                         | columns                               |
|----------|--------------------------------------------------|---------------------------------------|
| size     | solar cells, all 1,640 for training              | 224, 320 and 448 pixels               |
| images   | solar cells of 320 pixels                        | 100, 400 and 1,640 for training       |
| evidence | scenes of up to three garments, 224 pixels       | garments of 28 to 40 and of 72 to 96  |
| objects  | scenes of garments of 28 to 48 pixels            | one, up to four, up to eight garments |

A column is one run of the command `probe` on EfficientNet-Lite0: the same rates for every head, further ones where the best is at an end, chosen
on the validation split by one seed; then mean and standard deviation over seeds of test top-1 or mAP, and seconds of a run. Every head takes at
least 410 steps of 32 pictures (8 epochs of 1,640). Columns that are done are kept in FOLDER, features of a column are deleted after it.

`--published` follows the protocol of Deitsch et al. (arXiv 1807.02894): 1,968 cells for training, 656 for the test. The cells are 448 pixels
large. The rate is chosen with 1,640 and 328 of the 1,968, in the last column of `size`; then each head is trained on all of them at that rate.
"""  # noqa: E501

import argparse
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import pictures
from benchmarks.demo import run
from benchmarks.digits import SceneOptions
from benchmarks.finetune import subset
from timm_mldecoder.runtime.errors import run_command

HEADS = 'linear,max,logsumexp,efficient_probing,ml_decoder_small,ml_decoder'
STEPS, BATCH = 410, 32
SCENES = SceneOptions(size=224, sides=(28, 48), max_digits=4, clutter=4)
FEW = replace(SCENES, max_digits=3, clutter=2)
# by table and column: the pictures, their side in pixels, and the number of training pictures where not all are taken
TABLES: dict[str, dict[str, tuple[str | SceneOptions, int, int | None]]] = dict(
    size={f'{pixels} pixels': ('solar', pixels, None) for pixels in (224, 320, 448)},
    images={f'{count or 1640} images': ('solar', 320, count) for count in (100, 400, None)},
    evidence={
        '28 to 40 pixels': (replace(FEW, sides=(28, 40)), 224, None),
        '72 to 96 pixels': (replace(FEW, sides=(72, 96)), 224, None),
    },
    objects={
        f'up to {most}' if most > 1 else 'one': (replace(SCENES, max_digits=most), 224, None) for most in (1, 4, 8)
    },
)
COMMON = [
    *('--crop-pct', '1', '--crop-mode', 'squash', '-b', str(BATCH), '-j', '1', '--device', 'cpu', '--channels-last'),
    *('--model', 'local-dir:lite0', '--pretrained', '--lrs', '1e-3,3e-3,1e-2'),
]  # fmt: skip


def probe(name: str, data: Path, pixels: int, options: argparse.Namespace, *flags: str, keep=False) -> dict[str, Any]:
    """Return the results of a probe, from its folder where it was run before; `keep` its features for the next one."""
    folder, cache = options.folder, options.folder / 'features'
    results = folder / name / 'results.json'
    found = json.loads(results.read_text()) if results.exists() else dict(heads={}, seeds=0)
    if not set(options.heads.split(',')) <= found['heads'].keys() or found['seeds'] != options.seeds:
        shutil.rmtree(folder / name, ignore_errors=True)
        common = ['--img-size', str(pixels), '--heads', options.heads, '--seeds', str(options.seeds)]
        where = ['--output', str(folder), '--experiment', name, '--cache', str(cache)]
        common = [text.replace('local-dir:', f'local-dir:{folder}/') for text in (*COMMON, *common)]
        run('probe', str(data), *common, *where, *flags)
        if not keep:
            shutil.rmtree(cache)
        found = json.loads(results.read_text())
    return found['heads']


def column(source: str | SceneOptions, pixels: int, count: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """Return the results of one column."""
    if isinstance(source, SceneOptions):
        name = f'garments_{source.sides[0]}_{source.sides[1]}_{source.max_digits}'
        data, kind = options.folder / name, ['--dataset', 'csv', '--task', 'multilabel']
        if not data.exists():
            pictures.write_fashion_scenes(part := data.with_name(f'{name}.part'), source)
            part.rename(data)
    else:
        data, kind = pictures.write(source, options.folder), []
        if count:
            data = subset(data, count)
    number = sum(1 for _ in (data / 'train').rglob('*.png'))
    epochs = str(max(8, math.ceil(STEPS / max(1, number // BATCH))))
    flags = ['--epochs', epochs, '--val-interval', epochs, '--tuning-seeds', '1', '--extend-lrs', '2']
    return probe(f'{data.name}_{pixels}', data, pixels, options, '--test-split', 'test', *flags, *kind)


def published(options: argparse.Namespace) -> str:
    """Return the table of the published protocol."""
    chosen = column(*TABLES['size']['448 pixels'], options)
    data = options.folder / 'solar'
    whole = options.folder / 'solar_1968'
    if not whole.exists():
        part = whole.with_name(f'{whole.name}.part')
        for split in ('train', 'validation'):
            shutil.copytree(data / split, part / 'train', dirs_exist_ok=True)
        shutil.copytree(data / 'test', part / 'test')
        part.rename(whole)
    rows = []
    for label, row in chosen.items():  # nothing is left to choose: the test split only scores
        one = argparse.Namespace(**{**vars(options), 'heads': label})
        flags = ['--val-split', 'test', '--lrs', f'{row["lr"]:g}', '--epochs', '8', '--val-interval', '8']
        rows.append((label, probe(f'published_{label}', whole, 448, one, *flags, keep=True)[label]))
    shutil.rmtree(options.folder / 'features', ignore_errors=True)
    lines = ['| head | test top-1 | learning rate | seconds |', '|---|---|---|---|']
    return '\n'.join(
        lines + [f'| {label} | {_score(row)} | {row["lr"]:g} | {row["seconds"]:.0f} |' for label, row in rows]
    )


def _score(row: dict[str, Any]) -> str:
    return 'diverged' if row['mean'] is None else f'{row["mean"]:.1f} ± {row["std"]:.1f}'


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('folder', type=Path, help='where pictures, weights and results go')
    parser.add_argument('--tables', default=','.join(TABLES), help=f'of {", ".join(TABLES)} (default: all)')
    parser.add_argument('--published', action='store_true', help='the published protocol instead of the tables')
    parser.add_argument('--heads', default=HEADS, help=f'heads of the command probe (default: {HEADS})')
    parser.add_argument('--seeds', type=int, default=3, help='(default: 3)')
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    pictures.write('lite0', options.folder)
    if options.published:
        print(published(options))
        return
    for table in options.tables.split(','):
        columns = {name: column(*what, options) for name, what in TABLES[table].items()}
        print(f'\n### {table}\n\n| head | ' + ' | '.join(columns) + ' | parameters | seconds |')
        print('|---' * (len(columns) + 3) + '|')
        for label in options.heads.split(','):
            rows = [heads[label] for heads in columns.values()]
            cells = [_score(row) + '*' * row['at_end'] for row in rows]
            print(f'| {label} | {" | ".join(cells)} | {rows[-1]["parameters"]:,} | {rows[-1]["seconds"]:.0f} |')
    print('\n*: the best learning rate is at an end of the range')


if __name__ == '__main__':
    sys.exit(run_command(main))
