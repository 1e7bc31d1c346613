"""Make a label graph from the labels of a dataset, for `timm_mldecoder.add_graph_classifier`.

    python -m timm_mldecoder.label_graph DATA --dataset voc2007 --split trainval --out voc_graph.safetensors

The file holds M [C, C], M[i, j] = (images that show classes i and j) / (occurrences of class i), with a zero diagonal,
and the class names. Occurrences are objects (--counts instances) or images (--counts images).
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from timm_mldecoder.data import FORMATS, cooccurrence, create_dataset
from timm_mldecoder.data.label_graph import write_label_graph
from timm_mldecoder.runtime.errors import CommandParser, run_command

_logger = logging.getLogger(__name__)

WITH_OBJECTS = tuple(name for name, (_, options) in FORMATS.items() if 'instances' in options)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser('python -m timm_mldecoder.label_graph', __doc__)
    add = parser.add_argument
    add('data', help='folder of the dataset')
    add('--dataset', required=True, choices=list(FORMATS), help='format of the dataset')
    add('--split', default='train', help='split to count [%(default)s]')
    add('--counts', choices=['instances', 'images'], help='occurrences [instances where the dataset has objects]')
    add('--out', type=Path, required=True, metavar='FILE', help='safetensors file to write')
    options = parser.parse_args(argv)
    counts = options.counts or ('instances' if options.dataset in WITH_OBJECTS else 'images')
    if counts == 'instances' and options.dataset not in WITH_OBJECTS:
        raise ValueError(f'--counts instances: {options.dataset} has no objects, only {", ".join(WITH_OBJECTS)} have')
    # the published graph of VOC counts difficult objects too
    settings: dict[str, Any] = dict(instances=True) if counts == 'instances' else {}
    settings |= dict(difficult='positive') if options.dataset.startswith('voc') and counts == 'instances' else {}
    annotations = create_dataset(options.dataset, options.data, options.split, missing=None, **settings).annotations
    adjacency, class_names = cooccurrence(annotations, counts)
    about = dict(counts=counts, dataset=options.dataset, split=options.split)
    write_label_graph(options.out, torch.from_numpy(adjacency), class_names, **about)
    isolated = [name for name, row in zip(class_names, adjacency, strict=True) if not row.any()]
    if isolated:
        _logger.warning(f'No image shows these classes with another class, their rows are zero: {", ".join(isolated)}')
    print(f'wrote {options.out}: {len(class_names)} classes, {len(annotations)} images, by {counts}')


if __name__ == '__main__':
    sys.exit(run_command(main))
