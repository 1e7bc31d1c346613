"""Small data in the layout of each dataset that has a recipe, and the flags that make a recipe train on it."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_folders import write_images
from multilabel_data import LABELS, WRITTEN, write_image, write_text
from PIL import Image
from timm.models import save_for_hf

from timm_mldecoder.data.class_files import write_priors
from timm_mldecoder.data.formats.voc import CLASSES as VOC_CLASSES
from timm_mldecoder.data.word_embeddings import write_word_embeddings

NUS_LABELS = {
    'train': ['sky, clouds', 'zebra', 'clouds, zebra'],
    'val': ['zebra, traffic light', 'traffic light', 'sky'],
}
NUS_SPLIT = {'train class': ['clouds', 'sky', 'zebra'], 'test class': ['traffic light']}


def write_all(root: Path) -> Path:
    """One folder for each folder of `hparams/`, named like it."""
    write_images(root / 'imagenet', train=2, validation=2, classes=2)
    write_images(root / 'finetune', train=2, validation=2, classes=2)
    for split in ('train', 'validation'):  # the same images with several labels
        rows = (f'{split}/class_{i}/00{j}.png,class_{i};class_{j}' for i in range(2) for j in range(2))
        write_text(root / 'finetune' / f'{split}.csv', 'path,labels', *rows)
    write_cifar(root / 'cifar100' / 'cifar-100-python')
    write_cars(root / 'stanford_cars' / 'stanford_cars')
    for folder, dataset in (('coco', 'coco2014'), ('openimages', 'openimages')):
        WRITTEN[dataset][0](root / folder)
    names = ['cat', 'dog', 'jaguar (/m/1)', 'jaguar (/m/2)']
    write_priors(root / 'openimages' / 'priors.csv', names, torch.tensor([0.5, 0.1, 0.0, 0.0]))
    write_voc(root / 'voc')
    write_nus_wide(root / 'nus_wide')
    for folder in ('nus_wide', 'visual_genome'):
        write_json(root / folder)
    names = [*VOC_CLASSES, 'clouds', 'sky', 'traffic light', 'zebra']
    generator = torch.Generator().manual_seed(0)
    write_word_embeddings(root / 'words.safetensors', torch.randn(len(names), 300, generator=generator), names)
    return root


def flags(root: Path, recipe: str) -> list[str]:
    """What a recipe needs to train on `root`: data, files, and a batch size that makes one optimizer step per epoch."""
    folder, _, name = recipe.partition('/')
    words = ['--word-embeddings', root / 'words.safetensors']
    own = {
        'imagenet': ['--num-classes', 2, '-b', 4],
        'cifar100': ['-b', 8],
        'stanford_cars': ['-b', 8],
        'coco': ['--num-classes', 2, '-b', 2],
        'openimages': ['--num-classes', 4, '-b', 2],
        'visual_genome': ['--num-classes', 2, '-b', 2],
        'nus_wide': ['--num-classes', 2, '-b', 2],
        'voc': ['-b', 2],
        'finetune': ['--num-classes', 2, '-b', 4],
    }[folder]
    if name.startswith('multilabel'):
        own += ['--dataset', 'csv']
    if folder == 'nus_wide' and 'aam' not in name:
        own = [*words, '--class-split', root / folder / 'benchmark_81_v0.json', '-b', 2]
    if 'selective' in name:
        own += ['--class-priors', root / folder / 'priors.csv']
    if 'graph' in name:
        own += [*words, '--graph', label_graph(root / folder)]
    if 'usi' in name:
        own += ['--kd-model-name', f'local-dir:{teacher(root / folder)}']
    return [str(flag) for flag in (root / folder, *own)]


def teacher(root: Path) -> Path:
    """A small teacher in place of a pretrained one."""
    path = root.parent / 'teacher'
    if not path.exists():
        save_for_hf(timm.create_model('test_efficientnet', num_classes=2), path)
    return path


def label_graph(root: Path) -> Path:
    """The graph of the labels, made by the command in the header of the recipe."""
    from timm_mldecoder.label_graph import main

    path = root / 'graph.safetensors'
    if not path.exists():
        main([str(root), '--dataset', 'voc2007', '--split', 'trainval', '--out', str(path)])
    return path


def write_cifar(folder: Path) -> None:
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    for name, count in (('train', 8), ('test', 6)):
        content = {
            'data': random.randint(0, 256, (count, 3072)).astype(np.uint8),
            'fine_labels': [index % 100 for index in range(count)],
            'filenames': [f'{index}.png' for index in range(count)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / 'meta').write_bytes(pickle.dumps({'fine_label_names': [f'class_{index}' for index in range(100)]}))


def write_cars(folder: Path) -> None:
    io = pytest.importorskip('scipy.io')
    random = np.random.RandomState(0)
    kind = [(name, object) for name in ('bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2', 'class', 'fname')]
    (folder / 'devkit').mkdir(parents=True)
    annotations = {'train': 'devkit/cars_train_annos.mat', 'test': 'cars_test_annos_withlabels.mat'}
    for split, count in (('train', 8), ('test', 6)):
        (folder / f'cars_{split}').mkdir()
        rows = np.empty(count, dtype=kind)
        for index in range(count):
            name = f'{index + 1:05d}.jpg'
            Image.fromarray(random.randint(0, 256, (60, 90, 3)).astype(np.uint8)).save(folder / f'cars_{split}' / name)
            rows[index] = (1, 1, 90, 60, index % 196 + 1, name)
        io.savemat(folder / annotations[split], {'annotations': rows})
    names = np.array([f'Car {index}' for index in range(196)], dtype=object)
    io.savemat(folder / 'devkit' / 'cars_meta.mat', {'class_names': names})


def write_voc(root: Path) -> None:
    """The lists of VOC 2007, and its annotations of objects."""
    WRITTEN['voc2007'][0](root)
    for number, names in LABELS.items():
        objects = [(name, 0) for name in sorted(names)] or [('bird', 1)]
        content = ''.join(
            f'<object><name>{name}</name><difficult>{hard}</difficult></object>' for name, hard in objects
        )
        path = root / 'VOCdevkit' / 'VOC2007' / 'Annotations' / f'{number:06}.xml'
        write_text(path, f'<annotation><filename>{number:06}.jpg</filename>{content}</annotation>')


def write_nus_wide(root: Path) -> None:
    """The files of the zero-shot distribution."""
    rows = [
        (f'zsl/{split}_{index}.jpg', labels, split)
        for split in NUS_LABELS
        for index, labels in enumerate(NUS_LABELS[split])
    ]
    write_text(
        root / 'data.csv', 'path,labels,split', *(f'{path},"[{labels}]",{split}' for path, labels, split in rows)
    )
    write_text(root / 'benchmark_81_v0.json', json.dumps(NUS_SPLIT))
    for number, (path, _, _) in enumerate(rows):
        write_image(root / path, number)


def write_json(root: Path) -> None:
    """The files of arXiv 2209.06585."""
    for number in LABELS:
        write_image(root / 'images' / f'{number}.jpg', number)
    images = [[f'images/{number}.jpg', sorted(names)] for number, names in LABELS.items()]
    for split in ('train', 'val'):
        write_text(root / f'{split}.json', json.dumps({'classes': ['cat', 'dog'], 'images': images}))
