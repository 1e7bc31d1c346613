"""ML-Decoder on real images that ship with scikit-learn, in minutes on two cores.

    python -m benchmarks.demo [FOLDER] [--quick]

1. Single-label: train.py trains pooling + linear and ML-Decoder on single digits; validate.py scores the ML-Decoder
   model once more, through ``local-dir:``.
2. Multi-label: the backbone of the first is frozen, and every head of `benchmarks.probing` trained on its cached
   features of cluttered scenes, each at its own best learning rate and number of steps.

Prints the tables, and writes `demo.png` (what the classes attend to, and the heads' training curves) and the reports of
validate.py: `report/single`, `report/digits` and `report/pairs`, each with an index.html.
"""

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.models import save_for_hf
from torch import nn

from benchmarks.digits import scenes, write_digit_scenes
from benchmarks.probing import DIGITS, HEADS, PAIRS, Setting, compare, print_table, single_digits, tokens
from timm_mldecoder.checkpoint.folders import save_folder
from timm_mldecoder.models.probe_model import add_probe_head

ROOT = Path(__file__).resolve().parents[1]
MODEL, CLASSES, SIZE = 'test_resnet', 10, 32
MODEL_KWARGS = dict(output_stride=8)
SINGLE_LABEL_HEADS = {'GAP': None, 'ML-Decoder': dict(decoder_embedding=256, dim_feedforward=512, dropout=0.0)}
COMMON = [
    '--model', MODEL, '--num-classes', str(CLASSES), '--in-chans', '1', '--img-size', str(SIZE), '--crop-pct', '1',
    '--mean', '0.5', '--std', '0.5', '--device', 'cpu', '-j', '0',
]  # fmt: skip
TRAINING = [
    '--model-kwargs', 'output_stride=8', '-b', '64', '--opt', 'adamw', '--lr', '3e-3', '--weight-decay', '0.05',
    '--warmup-epochs', '1', '--sched-on-updates', '--train-crop-mode', 'squash', '--hflip', '0', '--color-jitter', '0',
]  # fmt: skip
PLACEMENTS, EPOCHS = 3, 4  # of each training digit; epochs over all of them
SETTINGS = [Setting('digits', DIGITS), Setting('pairs', PAIRS)]
PROBED = {name: head for name, head in HEADS.items() if name not in ('efficient_probing_8', 'class_token')}
SCENES_DRAWN = {'digits': 3, 'pairs': 2}
MOST_CLASSES_DRAWN = 4


def write_single_digits(root: Path, placements: int) -> None:
    """Write single digits, each of a random size in a random place, as an image folder."""
    rng = np.random.default_rng(0)
    for split, times in (('train', placements), ('validation', 1)):
        for turn in range(times):
            for number, (image, label) in enumerate(zip(*single_digits(split, rng), strict=True)):
                path = root / split / str(label.item()) / f'{turn}-{number:04d}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.numpy()).save(path)


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


def train(data: Path, folder: Path, head: dict | None, epochs: int) -> str:
    """Train one head; its row of the table without the name."""
    for old in folder.glob('*.pth.tar'):
        old.unlink()  # of an earlier demo: train.py does not start over another run
    start = time.perf_counter()
    output = ['--output', str(folder.parent), '--experiment', folder.name]
    run('train.py', str(data), *COMMON, *TRAINING, *head_flags(head), '--epochs', str(epochs), *output)
    seconds = time.perf_counter() - start
    with (folder / 'summary.csv').open() as file:
        best = max(float(row['eval_top1']) for row in csv.DictReader(file))
    parameters = sum(p.numel() for p in load(folder, head).parameters())
    return f'{parameters:,} | {best:.1f} | {seconds:.0f}'


def load(folder: Path, head: dict | None) -> nn.Module:
    checkpoint = folder / 'model_best.pth.tar'
    options = dict(MODEL_KWARGS, num_classes=CLASSES, in_chans=1, ml_decoder=head, checkpoint_path=checkpoint)
    return timm.create_model(MODEL, **options).eval()


def single_label(folder: Path, quick: bool) -> None:
    """Train both heads on single digits, and print a table."""
    data = folder / 'digits'
    write_single_digits(data, placements=1 if quick else PLACEMENTS)
    count = {split: sum(1 for _ in (data / split).rglob('*.png')) for split in ('train', 'validation')}
    print(f'### Single digits: {count["train"]} training and {count["validation"]} validation images\n')
    print('| head | parameters of the model | top-1 | seconds |\n|---|---|---|---|')
    with ThreadPoolExecutor(max_workers=2) as pool:  # a run has one thread
        rows = pool.map(
            lambda item: train(data, folder / item[0], item[1], epochs=1 if quick else EPOCHS),
            SINGLE_LABEL_HEADS.items(),
        )
        for name, row in zip(SINGLE_LABEL_HEADS, rows, strict=True):
            print(f'| {name} | {row} |', flush=True)
    model = load(folder / 'ML-Decoder', SINGLE_LABEL_HEADS['ML-Decoder'])
    model.pretrained_cfg |= dict(input_size=(1, SIZE, SIZE), mean=(0.5,), std=(0.5,))
    save_for_hf(model, folder / 'exported')
    exported = ['--model', f'local-dir:{folder / "exported"}', '--pretrained']
    (folder / 'report').mkdir(exist_ok=True)
    output = run('validate.py', str(data), *COMMON, *exported, '--report', str(folder / 'report' / 'single'))
    top1 = json.loads(output.split('--result')[1])['top1']
    print(f'\nML-Decoder, validate.py --model local-dir:{folder / "exported"}: top-1 {top1:.1f}\n', flush=True)


def probe(folder: Path, setting: Setting, quick: bool) -> tuple[dict[str, dict], dict[str, nn.Module]]:
    """Compare all heads on the frozen backbone of `single_label`, with one thread."""
    torch.set_num_threads(1)
    backbone = load(folder / 'GAP', None).requires_grad_(False)
    if quick:
        setting = replace(setting, num_train=64, steps=(3, 6))
    return compare(setting, backbone, PROBED, seeds=1 if quick else 3, num_held_out=60 if quick else 600)


def multi_label(folder: Path, quick: bool) -> None:
    """Compare the heads on both kinds of scenes; print the table, write the picture."""
    number = len(SETTINGS)
    with ProcessPoolExecutor(number, mp_context=multiprocessing.get_context('spawn')) as pool:
        answers = list(pool.map(probe, [folder] * number, SETTINGS, [quick] * number))
    results = {setting.label: answer[0] for setting, answer in zip(SETTINGS, answers, strict=True)}
    (folder / 'probing.json').write_text(json.dumps(results, indent=2))
    print_table('Heads on the frozen backbone: test mAP of cluttered scenes', results)
    backbone = load(folder / 'GAP', None)
    figure = Figure(figsize=(11, 6.5), layout='constrained')
    left, right = figure.subfigures(1, 2, width_ratios=(1.6, 1))
    rows = iter(left.subplots(sum(SCENES_DRAWN.values()), 1 + MOST_CLASSES_DRAWN))
    left.suptitle('scene, and what the query of each of its classes attends to (ml_decoder_small)', fontsize=9)
    for setting, (_, heads) in zip(SETTINGS, answers, strict=True):
        draw_attention(rows, setting, backbone, heads['ml_decoder_small'])
    for axis, setting in zip(right.subplots(number, 1), SETTINGS, strict=True):
        draw_curves(axis, setting, results[setting.label])
    figure.savefig(folder / 'demo.png', dpi=80)
    print(f'Picture: {folder / "demo.png"}')
    with ThreadPoolExecutor(max_workers=2) as pool:
        heads = [heads['ml_decoder_small'] for _, heads in answers]
        list(pool.map(report, [folder] * number, SETTINGS, heads, [60 if quick else 600] * number))
    print(f'Reports: {" ".join(str(path) for path in sorted(folder.glob("report/*/index.html")))}')


def report(folder: Path, setting: Setting, head: nn.Module, count: int) -> None:
    """Write the report of validate.py on the test scenes, for the frozen backbone with a head."""
    scene, place = setting.scene, folder / f'scenes_{setting.label}'
    shutil.rmtree(place, ignore_errors=True)  # of an earlier demo
    write_digit_scenes(place, 0, 0, count, **asdict(scene))
    model = add_probe_head(load(folder / 'GAP', None), len(scene.class_names), 'ml_decoder_small')
    model.get_classifier().load_state_dict(head.state_dict())
    images = dict(input_size=(1, scene.size, scene.size), mean=(0.5,), std=(0.5,), crop_pct=1.0)
    save_folder(model, place / 'model', class_names=scene.class_names, data_config=images, task='multilabel')
    flags = ['--dataset', 'csv', '--split', 'test', '--in-chans', '1', '--device', 'cpu', '-j', '0']
    model = ['--model', f'local-dir:{place / "model"}', '--pretrained']
    run('validate.py', str(place), *flags, *model, '--report', str(folder / 'report' / setting.label))


@torch.no_grad()
def draw_attention(rows, setting: Setting, backbone: nn.Module, head: nn.Module) -> None:
    """The first test scenes with at least two classes (of pairs: one), and the attention of each class in them."""
    wanted = [
        (image, classes)
        for image, target in scenes('test', 100, setting.scene)
        if len(classes := np.flatnonzero(target)) >= (1 if setting.scene.kind == 'pairs' else 2)
    ][: SCENES_DRAWN[setting.label]]
    for image, classes in wanted:
        row = next(rows)
        features = tokens(backbone, torch.from_numpy(image).unsqueeze(0))
        probability, attention = head(features)[0].sigmoid(), head.attention_weights(features)[0]
        side = round(attention.shape[-1] ** 0.5)
        row[0].imshow(image, cmap='gray')
        for axis, index in zip(row[1:], classes, strict=False):
            weights = attention[index // head.group_fc.group_size].reshape(side, side).numpy()
            axis.imshow(image, cmap='gray')
            axis.imshow(weights, cmap='jet', alpha=0.5, extent=(0, image.shape[1], image.shape[0], 0))
            axis.set_title(f'{setting.scene.class_names[index]}: {probability[index]:.2f}', fontsize=7)
        for axis in row:
            axis.axis('off')


def draw_curves(axis, setting: Setting, results: dict[str, dict]) -> None:
    """Validation mAP in training, mean of the seeds, of each head at its best learning rate and number of steps."""
    for name, result in results.items():
        steps, scores = np.mean(result['curves'], axis=0).T
        axis.plot(steps, scores, marker='.', label=f'{name} ({result["parameters"]:,})')
    axis.set_title(setting.label, fontsize=9)
    axis.set_xlabel('steps', fontsize=8)
    axis.set_ylabel('validation mAP', fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6, title='head (parameters)', title_fontsize=6)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('folder', type=Path, nargs='?', default=Path('demo_output'), help='where everything goes')
    parser.add_argument('--quick', action='store_true', help='little data, one seed, a few steps: to see that it runs')
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    single_label(folder, options.quick)
    multi_label(folder, options.quick)


if __name__ == '__main__':
    main()
