"""Partial annotation, simulated on a dataset whose labels are all known (arXiv 2110.10955, experiments on MS-COCO)."""

import numpy as np

from timm_mldecoder.data.annotations import IGNORED, NEGATIVE, POSITIVE, Annotations


def parse_partial(way: str) -> tuple[str, float]:
    """Split 'fpc=1000' or 'rps=0.5' into its name and its number.

    Raises:
        ValueError: If it is neither, or the number is out of range.
    """
    name, _, text = way.partition('=')
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if (name == 'fpc' and number >= 1 and number.is_integer()) or (name == 'rps' and 0 <= number <= 1):
        return name, number
    raise ValueError(f'{way!r}: give fpc=N (a whole number from 1 on) or rps=P (a probability in [0, 1])')


def leave_out_labels(annotations: Annotations, way: str, seed: int = 0) -> Annotations:
    """The same images with some of their labels, the others not annotated, as in the published code.

    Args:
        annotations: Images and labels.
        way: 'fpc=N', fixed per class: N positive and N negative labels of each class, drawn at random, or all where
            there are fewer. 'rps=P', random per sample: each label is left out with probability P.
        seed: Seed of the draw.

    Raises:
        ValueError: For another way.
    """
    name, number = parse_partial(way)
    random = np.random.default_rng(seed)
    image, label, value = annotations.entries()
    order = np.argsort(label, kind='stable')
    ends = np.cumsum(np.bincount(label, minlength=len(annotations.class_names)))
    images, values = [], []
    for listed in np.split(order, ends[:-1]):
        column = np.full(len(annotations), annotations.unlisted, dtype=np.int8)
        column[image[listed]] = value[listed]
        if name == 'rps':
            kept = np.flatnonzero((column != IGNORED) & (random.random(len(column)) >= number))
        else:
            parts = [np.flatnonzero(column == meaning) for meaning in (POSITIVE, NEGATIVE)]
            kept = np.concatenate([random.permutation(part)[: int(number)] for part in parts])
        images.append(kept)
        values.append(column[kept])
    labels = np.repeat(np.arange(len(images)), [len(kept) for kept in images])
    return Annotations(
        annotations.class_names, annotations.paths, np.concatenate(images), labels, np.concatenate(values), IGNORED
    )
