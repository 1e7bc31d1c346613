"""Small, fully determined image folders: the class is the colour of a square on noise."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(root: Path, train: int = 60, validation: int = 15, classes: int = 3, size: int = 48) -> Path:
    """Write `train` and `validation` PNGs a class into `root/<split>/class_<index>/`, and return `root`."""
    random = np.random.RandomState(0)
    for split, count in (('train', train), ('validation', validation)):
        for label in range(classes):
            folder = root / split / f'class_{label}'
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                image = random.randint(0, 120, (size, size, 3))
                y, x = random.randint(4, size - 20, 2)
                image[y : y + 14, x : x + 14, label % 3] += 120
                Image.fromarray(image.astype(np.uint8)).save(folder / f'{index:03d}.png')
    return root
