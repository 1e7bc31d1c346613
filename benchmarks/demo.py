"""Heads on a frozen backbone, on real pictures: minutes on two cores, with the package's own commands.

    python -m benchmarks.demo [FOLDER] [--size 224] [--heads linear,ml_decoder] [--seeds 1]

1. Solar cells (2,624 electroluminescence pictures, intact or defective) on EfficientNet-Lite0 with ImageNet weights.
2. Scenes of several digits among scrambled ones, multi-label, on the same backbone.

The command `probe` extracts the features once, trains every head at several learning rates, and scores each at its own best
rate on test pictures that chose nothing. Prints a table with the published figures; writes `attention.png`, cells with the
attention of *defective*, and the report of validate.py on the test cells, `report/index.html`. Without the packages of pictures
and weights (`make demo` installs them) the backbone is a small one, trained on single digits first, and the cells are left out.

The cells are CC BY-NC-SA 4.0: Deitsch et al., Solar Energy 185, 2019, arXiv 1807.02894.
"""  # noqa: E501

import argparse
import contextlib
import csv
import io
import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import timm_mldecoder
from benchmarks import pictures
from benchmarks.digits import write_digit_scenes, write_digits
from timm_mldecoder import __main__ as cli
from timm_mldecoder.models.attention_maps import attention_maps, attention_overlay, denormalise
from timm_mldecoder.runtime.errors import run_command

HEADS = 'linear,max,logsumexp,attention_pool:mlp_ratio=1.0,efficient_probing,ml_decoder_small:dim=128'
PUBLISHED = """\
| SVM on hand-made features, Deitsch et al. | 82.44 | | | |
| VGG-19 fine-tuned on a GPU, Deitsch et al. | 88.42 | | | |"""
PROBE = shlex.split("""
    --test-split test --crop-pct 1 --crop-mode squash -b 32 -j 1 --device cpu --channels-last --lrs 3e-4,1e-3,3e-3
    --tuning-seeds 1
""")
SMALL = shlex.split('--model test_resnet --model-kwargs output_stride=8 --in-chans 1 --mean 0.5 --std 0.5')


def run(command: str, *flags: str | Path) -> None:
    """Run a command of the package; its progress goes to standard error."""
    arguments = [str(flag) for flag in flags]
    print(f'\n$ timm-mldecoder {shlex.join([command, *arguments])}', flush=True)
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main([command, *arguments])


def probe(folder: Path, name: str, pixels: int, *flags: str | Path) -> dict:
    """Compare heads on a dataset of `folder`, print the table and return the results."""
    begin = time.perf_counter()
    shutil.rmtree(folder / f'{name}_heads', ignore_errors=True)  # of an earlier demo; the features are used again
    places = ['--output', folder, '--experiment', f'{name}_heads', '--cache', folder / f'{name}_features_{pixels}']
    run('probe', folder / name, *PROBE, '--img-size', str(pixels), *places, *flags)
    seconds = time.perf_counter() - begin
    print(f'\n### {name}, {seconds:.0f} s\n\n{(folder / f"{name}_heads" / "results.md").read_text().strip()}')
    return json.loads((folder / f'{name}_heads' / 'results.json').read_text())


def _training(heads: str, options: argparse.Namespace, epochs: int) -> list[str]:
    flags = ['--heads', heads, '--seeds', str(options.seeds)]
    return [*flags, '--epochs', str(epochs), '--val-interval', str(epochs)]  # the last epoch chooses


def solar(folder: Path, backbone: list, options: argparse.Namespace) -> None:
    """Compare heads on the cells, and show where the best attention head looks."""
    results = probe(folder, 'solar', options.size, *backbone, *_training(options.heads, options, options.epochs))
    print(PUBLISHED)
    decoders = {label: row for label, row in results['heads'].items() if label.startswith('ml_decoder')}
    if not decoders:
        return
    best = folder / 'solar_heads' / max(decoders.values(), key=lambda row: row['mean'] or 0)['checkpoint']
    evaluated = ['--split', 'test', '--checkpoint', best, '--device', 'cpu', '-b', '64', '-j', '1']
    run('validate', folder / 'solar', *evaluated, '--report', folder / 'report')
    draw_attention(best, folder / 'solar' / 'test', folder / 'report' / 'scores.csv', folder / 'attention.png')
    print(f'\nPicture: {folder / "attention.png"}\nReport: {folder / "report" / "index.html"}')


@torch.no_grad()
def draw_attention(
    checkpoint: Path, cells: Path, scores: Path, picture: Path, columns: int = 6, side: int = 200
) -> None:
    """Draw cells called defective, rightly and wrongly, and defective ones that were missed, with their attention.

    Args:
        checkpoint: A model with an ML-Decoder head.
        cells: The folder of the images.
        scores: The report's scores of these images.
        picture: The file to write.
        columns: Cells of each kind.
        side: Side of a drawn cell in pixels.
    """
    model = timm_mldecoder.load(checkpoint)
    defective = model.class_names.index('defective')
    with scores.open(newline='') as file:
        table = list(csv.DictReader(file))
    kinds = {
        'defective, found': ('defective', 'defective'),
        'defective, missed': ('defective', 'intact'),
        'intact, called defective': ('intact', 'defective'),
    }
    rows = {kind: [row for row in table if (row['label'], row['predicted']) == pair] for kind, pair in kinds.items()}
    sheet = Image.new('RGB', (columns * side, len(rows) * (side + 18)), 'white')
    draw = ImageDraw.Draw(sheet)
    for line, (title, chosen) in enumerate(rows.items()):
        top = line * (side + 18)
        draw.text((4, top + 3), f'{title}: probability of defective, and where its query attends', fill='black')
        for column, row in enumerate(chosen[:columns]):
            score = float(row['label_score' if row['label'] == 'defective' else 'score'])
            image = model.prepare(cells / row['image'])
            (weights,) = attention_maps(model.model, image[None], torch.tensor([defective]))
            pixels = denormalise(image, *(model.data_config[name] for name in ('mean', 'std')))
            sheet.paste(attention_overlay(pixels, weights, side), (column * side, top + 18))
            draw.text((column * side + 4, top + 22), f'{score:.2f}', fill='yellow')
    sheet.save(picture)


def digits(folder: Path, backbone: list, pixels: int, options: argparse.Namespace) -> None:
    """Compare heads on scenes of several digits."""
    name = f'scenes_{options.scenes}'  # a cache of features is for one number of them
    if not (folder / name).exists():
        scenes = dict(size=64, sides=(10, 20), max_digits=4, clutter=4)
        write_digit_scenes(
            part := folder / f'{name}.part', options.scenes, options.scenes // 2, options.scenes, **scenes
        )
        part.rename(folder / name)
    fast = [head for head in options.heads.split(',') if not head.startswith('attention_pool')]  # the slowest
    training = _training(','.join(fast) or options.heads, options, options.epochs * 3 // 2)
    probe(folder, name, pixels, '--dataset', 'csv', '--task', 'multilabel', *backbone, *training)


def small_backbone(folder: Path) -> list:
    """Train a small backbone on single digits, for want of ImageNet weights."""
    write_digits(folder / 'digits')
    flags = [*SMALL, *shlex.split("""
        --img-size 32 --crop-pct 1 -b 64 --opt adamw --lr 3e-3 --epochs 8 --warmup-epochs 1 --train-crop-mode squash
        --hflip 0 --device cpu -j 0 --num-classes 10
    """)]  # fmt: skip
    if not (folder / 'backbone' / 'model_best.pth.tar').is_file():
        run('train', folder / 'digits', *flags, '--output', folder, '--experiment', 'backbone')
    return ['--initial-checkpoint', folder / 'backbone' / 'model_best.pth.tar', '--in-chans', '1']


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('folder', type=Path, nargs='?', default=Path('demo_output'), help='where everything goes')
    parser.add_argument('--size', type=int, default=320, help='pixels of a cell (default: 320)')
    parser.add_argument('--heads', default=HEADS, help=f'heads of the command probe (default: {HEADS})')
    parser.add_argument('--seeds', type=int, default=3, help='(default: 3)')
    parser.add_argument(
        '--epochs', type=int, default=8, help='epochs of every head, half as many more on the scenes (default: 8)'
    )
    parser.add_argument('--scenes', type=int, default=300, help='training scenes of digits (default: 300)')
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    try:
        backbone = ['--model', f'local-dir:{pictures.write("lite0", folder)}', '--pretrained']
        pictures.write('solar', folder)
    except ImportError as error:
        print(f'digits only, because the pictures or the weights are missing: {error}')
        digits(folder, small_backbone(folder), 64, options)
        return
    solar(folder, backbone, options)
    digits(folder, backbone, 128, options)


if __name__ == '__main__':
    sys.exit(run_command(main))
