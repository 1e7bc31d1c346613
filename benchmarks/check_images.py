"""Images per CPU second of `timm-mldecoder check` beside a bare loop that decodes: JPEG files of 600 KB.

python -m benchmarks.check_images --images 64 --rounds 3
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from timm_mldecoder.data import create_dataset
from timm_mldecoder.data.images import Reading
from timm_mldecoder.loading.scan import scan


def write_images(folder: Path, number: int) -> None:
    """Write JPEG files of 1600 x 1200 pixels, with noise of a photo's size."""
    random = np.random.default_rng(0)
    for index in range(number):
        coarse = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((1600, 1200))
        pixels = np.asarray(coarse, dtype=np.int16) + random.integers(-14, 15, (1200, 1600, 1), dtype=np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f'{index}.jpg', quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=64)
    parser.add_argument('--rounds', type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / 'train' / 'a'
        folder.mkdir(parents=True)
        write_images(folder, options.images)
        size = sum(path.stat().st_size for path in folder.iterdir()) / options.images
        dataset = create_dataset('', root, 'train')
        best = {'decode': float('inf'), 'check': float('inf')}
        for _ in range(options.rounds):
            start = time.process_time()
            for path in sorted(folder.iterdir()):
                with Image.open(path) as image:
                    image.convert('RGB')
            best['decode'] = min(best['decode'], time.process_time() - start)
            start = time.process_time()
            facts = list(scan(dataset, Reading(), 'RGB', workers=0))
            best['check'] = min(best['check'], time.process_time() - start)
            assert not any(image.reason for image in facts)
    print(f'{options.images} images of {size / 1024:.0f} KB, one process')
    for name, seconds in best.items():
        print(f'{name}: {options.images / seconds:.1f} images per CPU second')
    print(f'ratio: {best["decode"] / best["check"]:.2f}')


if __name__ == '__main__':
    main()
