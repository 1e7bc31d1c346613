"""Real images small enough to embed: scikit-learn's digits, alone and composed into multi-label scenes.

    python -m benchmarks.digits FOLDER                    1,797 single digits, an image folder
    python -m benchmarks.digits FOLDER --scenes           scenes of several digits, a CSV dataset
    python -m benchmarks.digits FOLDER --scenes --kind pairs --clutter 12 --size 96

The 8 x 8 grey images are those of `sklearn.datasets.load_digits` (UCI optical recognition of handwritten digits).
Nothing is downloaded, and the arguments determine every pixel. Training, validation and test have disjoint digits.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from timm_mldecoder.data.formats.csv_list import write_csv

SPLITS = ('train', 'validation', 'test')
NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
# the classes of each kind of scene
KINDS = {
    'digits': NAMES,  # a class is a digit
    'pairs': tuple(f'{a} and {b}' for a, b in zip(NAMES, (*NAMES[1:], NAMES[0]), strict=True)),  # ... both digits
}
PLACEMENT_TRIES = 20
LARGEST = 4096  # side of a scene in pixels, and number of digits


def load_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Load the digits of one split: four fifths of each class for training, a tenth each for validation and test.

    Args:
        split: 'train', 'validation' or 'test'.

    Returns:
        uint8 images [N, 8, 8] and their classes [N].

    Raises:
        ValueError: If there is no such split.
        ImportError: If scikit-learn is missing.
    """
    if split not in SPLITS:
        raise ValueError(f'split must be one of {", ".join(SPLITS)}, got {split!r}')
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'timm-mldecoder[demo]'") from error
    images, classes = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    rank = np.empty(len(classes), dtype=int)  # rank of each image within its class
    for digit in range(10):
        members = np.flatnonzero(classes == digit)
        rank[members] = np.arange(len(members))
    chosen = {'validation': rank % 10 == 4, 'test': rank % 10 == 9, 'train': rank % 5 != 4}[split]
    return images[chosen], classes[chosen]


def write_digits(root: str | Path) -> Path:
    """Write the digits as an image folder, `root/{train,validation,test}/{0..9}/NNNN.png`, and return `root`."""
    root = Path(root)
    for split in SPLITS:
        images, classes = load_split(split)
        for digit in range(10):
            folder = root / split / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images[classes == digit]):
                Image.fromarray(image).save(folder / f'{number:04d}.png')
    return root


@dataclass(frozen=True)
class SceneOptions:
    """What a scene looks like.

    Raises:
        ValueError: If the digits do not fit, or another option is out of range.
    """

    # what the classes are: 'digits', or 'pairs' of successive digits that are both in the scene, anywhere. The evidence
    # for a pair lies in two places, of which each alone does not tell the class
    kind: str = 'digits'
    size: int = 64  # side of the scene in pixels
    sides: tuple[int, int] = (10, 28)  # smallest and largest side of a digit in pixels
    min_digits: int = 1  # least digits to place. One that finds no free place is left out
    max_digits: int = 6  # most digits to place
    max_classes: int = 10  # most distinct digits in a scene
    clutter: int = 0  # number of scrambled digits to place: a digit cut in four, whose parts are permuted and rotated

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f'kind must be one of {", ".join(KINDS)}, got {self.kind!r}')
        for name in ('size', 'max_digits', 'clutter'):
            if getattr(self, name) > LARGEST:
                raise ValueError(f'{name} must be at most {LARGEST}, got {getattr(self, name)}')
        if not 0 < self.sides[0] <= self.sides[1] <= self.size:
            raise ValueError(f'sides must be 0 < smallest <= largest <= size ({self.size}), got {self.sides}')
        if not 1 <= self.min_digits <= self.max_digits:
            raise ValueError(f'1 <= min_digits <= max_digits is needed, got {self.min_digits} and {self.max_digits}')
        if not 1 <= self.max_classes <= 10 or self.clutter < 0:
            raise ValueError(f'max_classes is 1 to 10, clutter at least 0, got {self.max_classes} and {self.clutter}')

    @property
    def class_names(self) -> tuple[str, ...]:
        return KINDS[self.kind]


def compose_scene(
    images: np.ndarray, classes: np.ndarray, rng: np.random.Generator, options: SceneOptions
) -> tuple[np.ndarray, list[int]]:
    """Compose one scene of digits that do not overlap.

    Args:
        images: Digits to draw from, uint8 [N, 8, 8].
        classes: Their classes [N].
        rng: Source of every random choice.
        options: What the scene looks like.

    Returns:
        The uint8 scene [size, size], and the index in `images` of each digit in it.
    """
    size = options.size
    scene = np.zeros((size, size), dtype=np.uint8)
    taken = np.zeros((size, size), dtype=bool)

    def place(image: np.ndarray) -> bool:
        side = int(rng.integers(options.sides[0], options.sides[1] + 1))
        for top, left in rng.integers(size - side + 1, size=(PLACEMENT_TRIES, 2)):
            window = np.s_[top : top + side, left : left + side]
            if not taken[window].any():
                scene[window] = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
                taken[window] = True
                return True
        return False

    kinds = rng.permutation(np.unique(classes))[: rng.integers(1, options.max_classes + 1)]
    candidates = np.flatnonzero(np.isin(classes, kinds)) if options.max_classes < 10 else np.arange(len(images))
    chosen = rng.choice(candidates, size=rng.integers(options.min_digits, options.max_digits + 1))
    placed = [int(index) for index in chosen if place(images[index])]
    for index in rng.integers(len(images), size=options.clutter):
        place(_scramble(images[index], rng))
    return scene, placed


def _scramble(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A digit with its quarters moved (each to another place) and rotated."""
    half = len(image) // 2
    quarters = [image[y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
    shift = int(rng.integers(1, 4))
    a, b, c, d = (np.rot90(quarters[(i + shift) % 4], rng.integers(4)) for i in range(4))
    return np.block([[a, b], [c, d]])


def scenes(split: str, count: int, options: SceneOptions, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Generate `count` scenes of a split.

    Args:
        split: 'train', 'validation' or 'test'; scenes of different splits share no digit.
        count: Number of scenes. A smaller number gives the first scenes of a larger one.
        options: What the scenes look like.
        seed: Determines every scene.

    Yields:
        A uint8 scene [size, size] and its multi-hot target [C], uint8.
    """
    images, classes = load_split(split)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    for _ in range(count):
        scene, placed = compose_scene(images, classes, rng, options)
        present = np.isin(np.arange(10), classes[placed])
        target = present & np.roll(present, -1) if options.kind == 'pairs' else present
        yield scene, target.astype(np.uint8)


def write_digit_scenes(
    root: str | Path,
    num_train: int = 2000,
    num_validation: int = 500,
    num_test: int = 0,
    *,
    seed: int = 0,
    **options,
) -> Path:
    """Write multi-label scenes as a CSV dataset (see `csv_list`) and return `root`.

    Args:
        root: Folder to write.
        num_train: Number of training scenes.
        num_validation: Number of validation scenes.
        num_test: Number of test scenes; 0 writes no test split.
        seed: Determines every scene.
        **options: Attributes of `SceneOptions`.

    Raises:
        ValueError: If an option is out of range.
    """
    scene_options = SceneOptions(**options)
    names = np.array(scene_options.class_names)
    counts = dict(zip(SPLITS, (num_train, num_validation, num_test), strict=True))
    splits = {
        split: ((scene, names[target == 1]) for scene, target in scenes(split, count, scene_options, seed))
        for split, count in counts.items()
        if count
    }
    write_csv(Path(root), scene_options.class_names, splits)
    return Path(root)


def main(arguments: list[str] | None = None) -> None:
    """Write single digits or scenes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('folder', type=Path, help='folder to write')
    parser.add_argument('--scenes', action='store_true', help='multi-label scenes instead of single digits')
    parser.add_argument('--seed', type=int, default=0, help='determines the scenes (default: 0)')
    add = parser.add_argument_group('scenes').add_argument
    add('--kind', choices=tuple(KINDS), help='classes: digits, or pairs of successive digits (default: digits)')
    add('--size', type=int, help='side of a scene in pixels (default: 64)')
    add('--sides', type=int, nargs=2, help='smallest and largest side of a digit in pixels (default: 10 28)')
    add('--min-digits', type=int, help='least digits to place (default: 1)')
    add('--max-digits', type=int, help='most digits to place (default: 6)')
    add('--max-classes', type=int, help='most distinct digits in a scene (default: 10)')
    add('--clutter', type=int, help='scrambled digits to place (default: 0)')
    given = vars(parser.parse_args(arguments))
    folder, seed, is_scenes = (given.pop(name) for name in ('folder', 'seed', 'scenes'))
    options = {name: tuple(value) if name == 'sides' else value for name, value in given.items() if value is not None}
    if options and not is_scenes:
        parser.error(f'{", ".join("--" + name.replace("_", "-") for name in options)} need --scenes')
    if seed < 0:
        parser.error(f'--seed {seed}: must be at least 0')
    try:
        if is_scenes:
            write_digit_scenes(folder, num_test=500, seed=seed, **options)
        else:
            write_digits(folder)
    except (ValueError, ImportError, OSError) as error:
        parser.error(' '.join(str(error).split()))
    print(f'wrote {sum(1 for _ in folder.rglob("*.png"))} images to {folder}')


if __name__ == '__main__':
    main()
