"""A synthetic multi-label dataset for zero-shot recognition: objects of every shape, colour and texture.

    python -m benchmarks.shapes FOLDER

A class is one combination, such as `striped red ring`; a scene holds a few objects of different classes. The label
embedding of a class consists of the embeddings of its three attributes, so that it also describes combinations that are
not in the training scenes. FOLDER is a CSV dataset (see `csv_list`) with two more files: `split.json` names the seen
classes (see `class_split`) and `words.safetensors` holds the label embeddings. No training scene shows an unseen class.

Every pixel is computed with numpy and determined by the arguments; nothing is downloaded.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch

from timm_mldecoder.data.formats.csv_list import write_csv
from timm_mldecoder.data.word_embeddings import write_word_embeddings

SIDE = 48  # of a scene, in pixels
SIDES = (16, 22)  # smallest and largest side of an object, in pixels
ATTRIBUTE_WIDTH = 16  # of the embedding of an attribute; that of a label is three times as wide

# Whether a point is inside of a shape, in coordinates from -1 to 1 around its centre; `r` is the distance from it.
SHAPES = {
    'disc': lambda x, y, r: r < 0.9,
    'ring': lambda x, y, r: (r < 0.95) & (r > 0.5),
    'square': lambda x, y, r: np.maximum(abs(x), abs(y)) < 0.8,
    'triangle': lambda x, y, r: (y < 0.8) & (y > 1.9 * abs(x) - 0.9),
    'cross': lambda x, y, r: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.95),
}
COLOURS = {
    'red': (220, 40, 40),
    'green': (40, 180, 60),
    'blue': (50, 80, 230),
    'yellow': (235, 215, 50),
    'white': (245, 245, 245),
}
# Whether a pixel of the object is bright or dark.
TEXTURES = {
    'plain': lambda row, column: np.ones_like(row, dtype=bool),
    'striped': lambda row, column: row // 3 % 2 == 0,
    'chequered': lambda row, column: (row // 3 + column // 3) % 2 == 0,
}
ATTRIBUTES = (tuple(TEXTURES), tuple(COLOURS), tuple(SHAPES))
CLASSES = [' '.join(combination) for combination in itertools.product(*ATTRIBUTES)]
LARGEST = 100_000  # number of scenes of a split
UNSEEN_EVERY = 5


def split_classes(seed: int = 0) -> tuple[list[str], list[str]]:
    """Seen and unseen classes: every fifth of a random order is unseen; every attribute occurs in a seen class.

    Raises:
        ValueError: If the seed leaves an attribute out of the seen classes.
    """
    order = np.random.default_rng(seed).permutation(len(CLASSES))
    unseen = {CLASSES[index] for index in order[::UNSEEN_EVERY]}
    seen = [name for name in CLASSES if name not in unseen]
    missing = {*itertools.chain(*ATTRIBUTES)} - {word for name in seen for word in name.split()}
    if missing:
        raise ValueError(f'seed {seed} leaves no seen class with {sorted(missing)}: pass another seed')
    return seen, [name for name in CLASSES if name in unseen]


def embed_classes(seed: int = 0) -> torch.Tensor:
    """Label embeddings [C, 3 * ATTRIBUTE_WIDTH] of `CLASSES`: those of the three attributes, concatenated."""
    rng = np.random.default_rng([seed, 1])
    vectors = {word: rng.standard_normal(ATTRIBUTE_WIDTH) for word in itertools.chain(*ATTRIBUTES)}
    rows = [np.concatenate([vectors[word] for word in name.split()]) for name in CLASSES]
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def draw_object(name: str, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One object of a class: its pixels, float [side, side, 3] in 0..255, and its mask, bool [side, side]."""
    texture, colour, shape = name.split()
    row, column = np.mgrid[:side, :side]
    x, y = (2 * column + 1) / side - 1, (2 * row + 1) / side - 1
    turn = rng.uniform(-0.25, 0.25)
    x, y = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
    inside = SHAPES[shape](x, y, np.hypot(x, y))
    lit = TEXTURES[texture](row + rng.integers(6), column + rng.integers(6))
    tint = np.array(COLOURS[colour]) * rng.uniform(0.8, 1.0, size=3)
    return tint * np.where(lit, 1.0, 0.35)[..., None], inside


def compose_scene(names: list[str], rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """A uint8 scene [SIDE, SIDE, 3] of objects that do not overlap, and the classes of those that fitted in."""
    scene = rng.uniform(60, 130) + rng.normal(0, 12, size=(SIDE, SIDE, 3))
    taken = np.zeros((SIDE, SIDE), dtype=bool)
    placed = []
    for name in names:
        side = int(rng.integers(SIDES[0], SIDES[1] + 1))
        pixels, inside = draw_object(name, side, rng)
        for top, left in rng.integers(SIDE - side + 1, size=(20, 2)):
            area = np.s_[top : top + side, left : left + side]
            if not taken[area].any():
                scene[area] = np.where(inside[..., None], pixels, scene[area])
                taken[area] = True
                placed.append(name)
                break
    return scene.clip(0, 255).astype(np.uint8), placed


def draw_scenes(
    classes: list[str], count: int, rng: np.random.Generator, max_objects: int = 3
) -> tuple[np.ndarray, list[list[str]]]:
    """Scenes of one to `max_objects` classes: uint8 [count, SIDE, SIDE, 3], and the classes of each."""
    picks = [rng.choice(len(classes), size=rng.integers(1, max_objects + 1), replace=False) for _ in range(count)]
    scenes = [compose_scene([classes[index] for index in pick], rng) for pick in picks]
    return np.stack([image for image, _ in scenes]), [placed for _, placed in scenes]


def write_shapes(root: str | Path, num_train: int = 4000, num_validation: int = 1000, *, seed: int = 0) -> Path:
    """Write the dataset, its class split and its label embeddings, and return `root`."""
    seen, unseen = split_classes(seed)
    root = Path(root)
    parts = [('train', seen, num_train), ('validation', CLASSES, num_validation)]
    splits = {
        split: zip(*draw_scenes(classes, count, np.random.default_rng([seed, 2, number])), strict=True)
        for number, (split, classes, count) in enumerate(parts)
    }
    write_csv(root, CLASSES, splits)
    (root / 'split.json').write_text(json.dumps({'seen': seen, 'unseen': unseen}, indent=1) + '\n', encoding='utf-8')
    write_word_embeddings(
        root / 'words.safetensors', embed_classes(seed), CLASSES, made_by='shapes', rule='attributes, concatenated'
    )
    return root


def main(arguments: list[str] | None = None) -> None:
    """Write the dataset from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('folder', type=Path, help='folder to write')
    parser.add_argument('--num-train', type=int, default=4000, help='training scenes (default: %(default)s)')
    parser.add_argument('--num-validation', type=int, default=1000, help='validation scenes (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='determines every pixel (default: %(default)s)')
    options = parser.parse_args(arguments)
    for name, least, most in (('num_train', 1, LARGEST), ('num_validation', 1, LARGEST), ('seed', 0, 2**31 - 1)):
        value = vars(options)[name]
        if not least <= value <= most:
            parser.error(f'--{name.replace("_", "-")} {value}: must be in [{least}, {most}]')
    try:
        write_shapes(options.folder, options.num_train, options.num_validation, seed=options.seed)
    except (ValueError, OSError) as error:
        parser.error(' '.join(str(error).split()))
    print(f'wrote {options.num_train} + {options.num_validation} scenes of {len(CLASSES)} classes to {options.folder}')


if __name__ == '__main__':
    main()
