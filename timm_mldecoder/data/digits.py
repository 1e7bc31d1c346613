"""Real images small enough to embed: scikit-learn's digits, alone and composed into multi-label scenes.

    python -m timm_mldecoder.data.digits FOLDER             1,797 single digits, an image folder
    python -m timm_mldecoder.data.digits FOLDER --scenes    scenes of several digits, a CSV data set

The 8 x 8 grey images are those of `sklearn.datasets.load_digits` (UCI optical recognition of handwritten digits).
Nothing is downloaded and every pixel is determined by the arguments.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

from timm_mldecoder.data.formats.csv_list import SEPARATOR

SPLITS = ('train', 'validation')
NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
VALIDATION_EVERY = 5  # every fifth image of each class is held out


def load_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Digits of one split: uint8 images [N, 8, 8] and their classes [N].

    Raises:
        ImportError: If scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The digits come with scikit-learn: pip install 'timm-mldecoder[demo]'.") from error
    images, classes = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    rank = np.empty(len(classes), dtype=int)  # the how-manieth of its class each image is
    for digit in range(10):
        members = np.flatnonzero(classes == digit)
        rank[members] = np.arange(len(members))
    held_out = rank % VALIDATION_EVERY == VALIDATION_EVERY - 1
    chosen = held_out if split == 'validation' else ~held_out
    return images[chosen], classes[chosen]


def write_digits(root: str | Path) -> Path:
    """Write the digits as an image folder, `root/{train,validation}/{0..9}/NNNN.png`, and return `root`."""
    root = Path(root)
    for split in SPLITS:
        images, classes = load_split(split)
        for digit in range(10):
            folder = root / split / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images[classes == digit]):
                Image.fromarray(image).save(folder / f'{number:04d}.png')
    return root


def compose_scene(
    images: np.ndarray, rng: np.random.Generator, size: int, sides: tuple[int, int], max_digits: int
) -> tuple[np.ndarray, list[int]]:
    """One scene of digits that do not overlap.

    Args:
        images: Digits to draw from, uint8 [N, 8, 8].
        rng: Source of every random choice.
        size: Side of the scene in pixels.
        sides: Smallest and largest side of a digit in pixels.
        max_digits: Between one and so many digits are placed; one that finds no free place in 20 tries is left out.

    Returns:
        The uint8 scene [size, size] and the index in `images` of each digit in it.
    """
    scene = np.zeros((size, size), dtype=np.uint8)
    taken = np.zeros((size, size), dtype=bool)
    placed = []
    for index in rng.integers(len(images), size=rng.integers(1, max_digits + 1)):
        side = int(rng.integers(sides[0], sides[1] + 1))
        digit = np.asarray(Image.fromarray(images[index]).resize((side, side), Image.Resampling.BILINEAR))
        for top, left in rng.integers(size - side + 1, size=(20, 2)):
            place = np.s_[top : top + side, left : left + side]
            if not taken[place].any():
                scene[place], taken[place] = digit, True
                placed.append(int(index))
                break
    return scene, placed


def write_digit_scenes(
    root: str | Path,
    num_train: int = 2000,
    num_validation: int = 500,
    *,
    size: int = 64,
    sides: tuple[int, int] = (10, 28),
    max_digits: int = 6,
    seed: int = 0,
) -> Path:
    """Write multi-label scenes as a CSV data set (see `csv_list`) and return `root`.

    The labels of a scene are the names of the digits in it. Digits of the training scenes and of the validation
    scenes are disjoint.

    Args:
        root: Folder to write.
        num_train: Number of training scenes.
        num_validation: Number of validation scenes.
        size: Side of a scene in pixels.
        sides: Smallest and largest side of a digit in pixels.
        max_digits: Most digits in a scene.
        seed: Determines every scene.

    Raises:
        ValueError: If the largest digit does not fit a scene.
    """
    if not 0 < sides[0] <= sides[1] <= size:
        raise ValueError(f'Digits with sides {sides} do not fit a scene of {size} pixels: 0 < smallest <= largest.')
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / 'classes.txt').write_text('\n'.join(NAMES) + '\n', encoding='utf-8')
    for stream, (split, count) in enumerate(zip(SPLITS, (num_train, num_validation), strict=True)):
        rng = np.random.default_rng([seed, stream])
        images, classes = load_split(split)
        (root / split).mkdir(exist_ok=True)
        with (root / f'{split}.csv').open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(['path', 'labels'])
            for number in range(count):
                scene, placed = compose_scene(images, rng, size, sides, max_digits)
                path = f'{split}/{number:05d}.png'
                Image.fromarray(scene).save(root / path)
                writer.writerow([path, SEPARATOR.join(NAMES[digit] for digit in np.unique(classes[placed]))])
    return root


def main(arguments: list[str] | None = None) -> None:
    """Write one of the two data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='folder to write')
    parser.add_argument('--scenes', action='store_true', help='multi-label scenes instead of single digits')
    parser.add_argument('--seed', type=int, default=0, help='determines the scenes (default: 0)')
    options = parser.parse_args(arguments)
    if options.scenes:
        write_digit_scenes(options.folder, seed=options.seed)
    else:
        write_digits(options.folder)
    print(f'wrote {sum(1 for _ in options.folder.rglob("*.png"))} images to {options.folder}')


if __name__ == '__main__':
    main()
