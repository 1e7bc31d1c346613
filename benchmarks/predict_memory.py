"""Memory and time of `predict` over the number of images, on one rank and on several.

    python -m benchmarks.predict_memory [--images 5000 50000] [--ranks 1 2]

The images are copies of a PNG of 32 x 32 pixels, the model is timm's test_resnet with ML-Decoder: what grows is what the command keeps
of an image, not the image. Memory is the most that one of its processes held, on Linux.
"""  # noqa: E501

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
from PIL import Image

from benchmarks.measure import markdown
from timm_mldecoder.checkpoint.folders import save_folder

HEADER = ('images', 'ranks', 'seconds', 'img/s', 'peak MiB of a process')


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0], allow_abbrev=False)
    parser.add_argument('--images', type=int, nargs='+', default=[5000, 50000])
    parser.add_argument('--ranks', type=int, nargs='+', default=[1, 2])
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = timm.create_model('test_resnet', num_classes=10, ml_decoder=True)
        save_folder(model, folder / 'model', data_config=dict(input_size=(3, 32, 32)))
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        (images := folder / 'images').mkdir()
        Image.fromarray(pixels).save(images / '0.png')
        written = 1
        for number in sorted(args.images):
            for copy in range(written, number):
                shutil.copyfile(images / '0.png', images / f'{copy}.png')
            written = max(written, number)
            for ranks in args.ranks:
                rows.append([number, ranks, *_run(folder, number, ranks)])
    return markdown(HEADER, rows)


def _run(folder: Path, number: int, ranks: int) -> list[float]:
    out = folder / f'{number}_{ranks}.csv'
    start = ['-m', 'torch.distributed.run', '--nproc-per-node', str(ranks)] if ranks > 1 else []
    command = [*start, '-m', 'timm_mldecoder.predict', folder / 'images', '--model', f'local-dir:{folder / "model"}']
    flags = ['--out', out, '--device', 'cpu', '-j', '0', '-b', '256']
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, [*command, *flags])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status or len(out.read_text().splitlines()) != number + 1:
        raise SystemExit(f'predict of {number} images on {ranks} ranks ended with {status}')
    return [seconds, number / seconds, usage.ru_maxrss / 1024]


if __name__ == '__main__':
    print(main())
