"""The main job on real images that ship with scikit-learn: pooling + linear beside ML-Decoder, in minutes on two cores.

    python -m benchmarks.demo [FOLDER]

Writes the data, trains both heads with train.py, validates with validate.py, reloads the ML-Decoder model in a new
process through ``local-dir:``, prints the tables and leaves `attention.png`.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from timm_mldecoder.data import create_dataset
from timm_mldecoder.data.digits import write_digit_scenes, write_digits
from timm_mldecoder.models.attention_maps import attention_maps

ROOT = Path(__file__).resolve().parents[1]
MODEL, CLASSES, SIZE = 'test_resnet', 10, 64
MODEL_KWARGS = dict(output_stride=8)  # 8 x 8 tokens
HEADS = {'GAP': None, 'ML-Decoder': dict(decoder_embedding=256, dim_feedforward=512, dropout=0.0)}
COMMON = [
    '--model', MODEL, '--num-classes', str(CLASSES), '--in-chans', '1', '--img-size', str(SIZE),
    '--mean', '0.5', '--std', '0.5', '--device', 'cpu', '-j', '0',
]  # fmt: skip
DIGITS = [
    '--model-kwargs', 'output_stride=8', '-b', '64', '--epochs', '12', '--opt', 'adamw', '--lr', '3e-3',
    '--weight-decay', '0.05', '--warmup-epochs', '1', '--sched-on-updates', '--hflip', '0', '--color-jitter', '0',
    '--scale', '0.6', '1', '--smoothing', '0',
]  # fmt: skip
SCENES = [
    '--model-kwargs', 'output_stride=16', '--dataset', 'csv', '--task', 'multilabel', '--target-format', 'multihot',
    '-b', '32', '--epochs', '8', '--loss', 'bce', '--eval-metric', 'map', '--opt', 'adamw',
    '--weight-decay', '0.01', '--sched', 'onecycle', '--warmup-epochs', '2', '--warmup-lr', '8e-5', '--min-lr', '8e-9',
    '--train-crop-mode', 'squash', '--hflip', '0', '--color-jitter', '0',
]  # fmt: skip
# each head's best of this one, half and twice of it, with seed 0; a common one would decide which head is ahead
SCENES_LR = {'GAP': '8e-3', 'ML-Decoder': '4e-3'}


def head_flags(head: dict | None) -> list[str]:
    if head is None:
        return ['--use-ml-decoder-head', '0']
    width = str(head['decoder_embedding'])
    others = [f'{name}={value}' for name, value in head.items() if name != 'decoder_embedding']
    return ['--use-ml-decoder-head', '1', '--decoder-embedding', width, '--ml-decoder-kwargs', *others]


def run(script: str, *flags: str) -> str:
    """One of the project's scripts in a process of its own; its output."""
    one_thread = {**os.environ, 'OMP_NUM_THREADS': '1'}  # networks this small are slower with more
    process = subprocess.run(
        [sys.executable, ROOT / script, *flags], capture_output=True, text=True, cwd=ROOT, env=one_thread
    )
    if process.returncode:
        raise SystemExit(f'{script} {" ".join(flags)} ended with {process.returncode}:\n{process.stderr[-4000:]}')
    return process.stdout


def train(data: Path, folder: Path, head: dict | None, flags: list[str], seed: int = 42) -> tuple[dict, float]:
    """Train one head; the row of the best epoch in summary.csv, and seconds."""
    for old in folder.glob('*.pth.tar'):
        old.unlink()  # of an earlier demo: train.py does not start over another run
    start = time.perf_counter()
    run(
        'train.py',
        str(data),
        *COMMON,
        *flags,
        *head_flags(head),
        '--seed',
        str(seed),
        '--output',
        str(folder.parent),
        '--experiment',
        folder.name,
    )
    seconds = time.perf_counter() - start
    with (folder / 'summary.csv').open() as file:
        rows = list(csv.DictReader(file))
    metric = 'eval_map' if 'eval_map' in rows[0] else 'eval_top1'
    return max(rows, key=lambda row: float(row[metric])), seconds


def validate(data: Path, *flags: str) -> float:
    """Top-1 of validate.py, in percent."""
    output = run('validate.py', str(data), *COMMON, *flags)
    return json.loads(output.split('--result')[1])['top1']


def digits(folder: Path) -> None:
    """Single-label: both heads on 1,797 real digits."""
    data = write_digits(folder / 'digits')
    train_images, validation_images = (len(list((data / split).rglob('*.png'))) for split in ('train', 'validation'))
    print(f'Digits, {MODEL} at {SIZE} x {SIZE}: {train_images} training and {validation_images} validation images\n')
    print('| head | parameters | top-1 | validate.py | training |\n|---|---|---|---|---|')
    for name, head in HEADS.items():
        best, seconds = train(data, folder / name, head, DIGITS)
        checkpoint = folder / name / 'model_best.pth.tar'
        again = validate(data, '--checkpoint', str(checkpoint), *head_flags(head))
        model = timm.create_model(
            MODEL, num_classes=CLASSES, in_chans=1, ml_decoder=head, checkpoint_path=checkpoint, **MODEL_KWARGS
        )
        size = sum(p.numel() for p in model.parameters())
        print(f'| {name} | {size:,} | {float(best["eval_top1"]):.2f} | {again:.2f} | {seconds:.0f} s |', flush=True)

    # the model of the last row, as others would get it
    model.pretrained_cfg |= dict(input_size=(1, SIZE, SIZE), mean=(0.5,), std=(0.5,))
    save_for_hf(model, folder / 'exported')
    reloaded = validate(data, '--model', f'local-dir:{folder / "exported"}', '--pretrained')
    print(f'\nReloaded in a new process through local-dir:{folder / "exported"}: top-1 {reloaded:.2f}')
    draw(model.eval(), data, folder / 'attention.png')


def draw(model: torch.nn.Module, data: Path, path: Path, count: int = 8) -> None:
    """Some validation images, and what the query of the predicted class attended to."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    dataset = create_dataset('', data, split='validation', transform=transform, input_img_mode='L')
    picks = torch.linspace(0, len(dataset) - 1, count).long().tolist()
    images = torch.stack([dataset[index][0] for index in picks])
    classes = model(images).argmax(dim=1)
    maps = torch.nn.functional.interpolate(
        attention_maps(model, images, classes).unsqueeze(1), images.shape[-2:], mode='bilinear'
    )
    figure = Figure(figsize=(1.5 * count, 3.4))
    axes = figure.subplots(2, count)
    for column, (index, image, label, attention) in enumerate(zip(picks, images, classes, maps, strict=True)):
        axes[0, column].imshow(image[0], cmap='gray')
        axes[0, column].set_title(f'{dataset[index][1]} → {label.item()}')
        axes[1, column].imshow(image[0], cmap='gray')
        axes[1, column].imshow(attention[0], cmap='jet', alpha=0.5)
    for axis in axes.flat:
        axis.axis('off')
    figure.suptitle("true → predicted; below, the attention of the predicted class's query")
    figure.savefig(path, dpi=120, bbox_inches='tight')
    print(f'What the head looks at: {path}')


def scenes(folder: Path, seeds: int) -> None:
    """Multi-label: both heads on scenes of several digits, mean and spread over seeds.

    The backbone is, for both, the one that was trained on single digits with pooling.
    """
    data = write_digit_scenes(folder / 'scenes')
    start = ['--pretrained', '--pretrained-path', str(folder / 'GAP' / 'model_best.pth.tar')]
    print(f'\nScenes of several digits, {MODEL}, same backbone, same budget, {seeds} seeds\n')
    print('| head | mAP, mean | lowest | highest |\n|---|---|---|---|')
    with ThreadPoolExecutor(max_workers=2) as pool:  # a run has one thread
        runs = {
            name: [
                pool.submit(
                    train,
                    data,
                    folder / f'{name}-scenes-{seed}',
                    head,
                    [*SCENES, *start, '--lr', SCENES_LR[name]],
                    seed,
                )
                for seed in range(seeds)
            ]
            for name, head in HEADS.items()
        }
    for name, futures in runs.items():
        scores = [float(future.result()[0]['eval_map']) for future in futures]
        print(f'| {name} | {statistics.mean(scores):.1f} | {min(scores):.1f} | {max(scores):.1f} |', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, nargs='?', default=Path('demo_output'), help='where everything goes')
    parser.add_argument('--seeds', type=int, default=3, help='runs of each head on the scenes')
    options = parser.parse_args()
    folder = options.folder.resolve()
    digits(folder)
    if options.seeds:
        scenes(folder, options.seeds)


if __name__ == '__main__':
    main()
