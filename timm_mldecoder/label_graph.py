"""Make a label graph from the labels of a dataset, for `timm_mldecoder.add_graph_classifier`.

    python -m timm_mldecoder.label_graph DATA --dataset voc2007 --split trainval --out voc_graph.safetensors

The file holds M [C, C], M[i, j] = (images that show classes i and j) / (occurrences of class i), with a zero diagonal,
and the class names. Occurrences are objects (--counts instances) or images (--counts images).
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from timm_mldecoder.data import FORMATS, create_dataset
from timm_mldecoder.data.annotations import POSITIVE, Annotations
from timm_mldecoder.data.label_graph import write_label_graph
from timm_mldecoder.engine.runtime import cli

_logger = logging.getLogger(__name__)

WITH_OBJECTS = ('coco2014', 'coco2017', 'voc2007', 'voc2012')
CHUNK = 4096  # images whose labels are dense at a time


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    counts = options.counts or ('instances' if options.dataset in WITH_OBJECTS else 'images')
    if counts == 'instances' and options.dataset not in WITH_OBJECTS:
        raise ValueError(f'--counts instances: {options.dataset} has no objects, only {", ".join(WITH_OBJECTS)} have')
    if counts == 'instances' and options.dataset.startswith('voc'):
        raise ValueError(f'--counts instances: the reader of {options.dataset} gives no objects yet: --counts images')
    annotations = create_dataset(options.dataset, root=options.data, split=options.split).annotations
    adjacency, class_names = cooccurrence(annotations, counts)
    about = dict(counts=counts, dataset=options.dataset, split=options.split)
    write_label_graph(options.out, torch.from_numpy(adjacency), class_names, **about)
    isolated = [name for name, row in zip(class_names, adjacency, strict=True) if not row.any()]
    if isolated:
        _logger.warning(f'No image shows these classes with another class, their rows are zero: {", ".join(isolated)}')
    print(f'wrote {options.out}: {len(class_names)} classes, {len(annotations)} images, by {counts}')


def cooccurrence(annotations: Annotations, counts: str) -> tuple[np.ndarray, list[str]]:
    """M [C, C] and the class names; `counts` says what an occurrence of a class is, 'instances' or 'images'."""
    image, label, value = annotations.entries()
    image, label = image[value == POSITIVE], label[value == POSITIVE]
    num_classes = len(annotations.class_names)
    together = np.zeros((num_classes, num_classes))
    for first in range(0, len(annotations), CHUNK):
        part = slice(*np.searchsorted(image, [first, first + CHUNK]))
        shown = np.zeros((CHUNK, num_classes), dtype=np.float32)
        shown[image[part] - first, label[part]] = 1
        together += shown.T @ shown
    occurrences = np.bincount(label, minlength=num_classes) if counts == 'instances' else together.diagonal().copy()
    np.fill_diagonal(together, 0)
    return together / np.maximum(occurrences, 1)[:, None], annotations.class_names


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        'python -m timm_mldecoder.label_graph', description=__doc__, formatter_class=formatter
    )
    parser.add_argument('data', help='folder of the dataset')
    parser.add_argument('--dataset', required=True, choices=list(FORMATS), help='format of the dataset')
    parser.add_argument('--split', default='train', help='split to count [%(default)s]')
    parser.add_argument(
        '--counts',
        choices=['instances', 'images'],
        help='what an occurrence of a class is [instances where the dataset has objects]',
    )
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help='safetensors file to write')
    return parser


if __name__ == '__main__':
    sys.exit(cli.run(main))
