"""One contract for all readers: the same odd files and names give the same images, or the same refusal."""

import csv
import io
import json
import os
import tarfile
from unittest.mock import patch

import numpy as np
import pytest
from multilabel_data import VOC_CLASSES, write_text
from PIL import Image
from runs import MODEL

from timm_mldecoder.data import annotations
from timm_mldecoder.data.compact import TableBuilder
from timm_mldecoder.data.images import Reading
from timm_mldecoder.flags import parse_train
from timm_mldecoder.loading.datasets import create_split
from timm_mldecoder.predict.sources import SourceDataset, open_source

RAMP = np.linspace(0, 1, 24)[None].repeat(16, 0)


def encoded(image, kind='PNG', **save):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **save)
    return file.getvalue()


def colour(number):
    """An image of its own."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(colour(1), 'JPEG', exif=exif)


NAMES = [
    'plain.png', 'UPPER.PNG', 'space in name.png', ' leading.png', 'trailing .png', 'comma,.png', 'semi;colon.png',
    'quote".png', "apostrophe's.png", 'percent%20.png', 'hash#.png', 'plus+&=.png', 'bracket[1].png', 'brace{1}.png',
    'star*.png', 'question?.png', 'dollar$HOME.png', 'back\\slash.png', '\u00fcml\u00e4ut.png',
    'u\u0308mla\u0308ut.png', '\u65e5\u672c\u8a9e.png', 'face \U0001f600.png', 'dots.in.name.png',
    'two..dots.png', '-dash.png', '~tilde.png',
    'long' * 60 + '.png', '001.png', '1.png', 'pipe|.png', 'tab\u00a0nbsp.png',
]  # fmt: skip
FILES = {name: encoded(colour(number)) for number, name in enumerate(NAMES)}
FILES |= {
    'photo.jfif': encoded(colour(40), 'JPEG'),
    'picture.webp': encoded(colour(41), 'WEBP'),
    'picture.bmp': encoded(colour(42), 'BMP'),
    'picture.tif': encoded(colour(43), 'TIFF'),
    'moving.gif': encoded(colour(44).quantize(8), 'GIF', save_all=True, append_images=[colour(45).quantize(8)]),
    'a jpeg.png': encoded(colour(46), 'JPEG'),
    'deep.png': encoded((RAMP * 65535).astype(np.uint16)),
    'float.tiff': encoded(RAMP.astype(np.float32), 'TIFF'),
    'wide.tif': encoded((RAMP * 60000).astype(np.int32), 'TIFF'),
    'bits.png': encoded(colour(47).convert('1')),
    'ink.jpg': encoded(colour(48).convert('CMYK'), 'JPEG'),
    'glass.png': encoded(Image.new('RGBA', (24, 16), (255, 0, 0, 60))),
    'grey glass.png': encoded(Image.new('LA', (24, 16), (9, 60))),
    'turned.jpg': rotated(),
}
BROKEN = {'empty.png': b'', 'page.jpg': b'<html>404</html>', 'half.png': FILES['plain.png'][:300]}
BROKEN['out of range.tif'] = encoded(RAMP.astype(np.float32) * 300, 'TIFF')
IGNORED = ['notes.txt', '._plain.png', 'Thumbs.db', '.ipynb_checkpoints/plain.png', '__MACOSX/plain.png']
EXPECTED = {name: np.asarray(Reading().open(io.BytesIO(content), 'RGB')) for name, content in FILES.items()}
ALL = {**FILES, **BROKEN}


def write_files(folder):
    folder.mkdir(parents=True)
    for name, content in ALL.items():
        (folder / name).write_bytes(content)


def split_of(root, *flags):
    options = parse_train([str(root), *MODEL[:2], '--device', 'cpu', '--cache-dir', f'{root}-cache', *flags])
    dataset = create_split(options, 'train')
    if annotations.CACHED:
        return dataset
    with patch.object(annotations, 'make_table', None), patch.object(TableBuilder, 'add', None):  # it is only mapped
        again = create_split(options, 'train')
    assert again.class_names == dataset.class_names and isinstance(again.annotations._table['label'], np.memmap)
    assert all(again.annotations.target(n).equal(dataset.annotations.target(n)) for n in range(len(dataset)))
    return again


def read_all(dataset, names=None):
    """Images by name, of those that can be read, and the names of the others."""
    images, broken = {}, {}
    for number in range(len(dataset)):
        name = names[number] if names else os.path.basename(dataset.filename(number))
        try:
            images[name] = np.asarray(dataset[number][0])
        except OSError as error:
            broken[name] = str(error)
    return images, broken


def folders(root):
    write_files(root / 'train' / 'a')
    for name in IGNORED:
        (root / 'train' / 'a' / name).parent.mkdir(exist_ok=True)
        (root / 'train' / 'a' / name).write_bytes(FILES['plain.png'])
    return read_all(split_of(root))


def tar(root):
    write_files(root / 'files' / 'a')
    with tarfile.open(root / 'all.tar', 'w') as file:
        file.add(root / 'files', '.')
        for name in IGNORED:
            file.add(root / 'files' / 'a' / 'plain.png', f'a/{name}')
    return read_all(split_of(root / 'all.tar', '--val-split', ''))


def csv_list(root):
    write_files(root / 'x')
    with (root / 'train.csv').open('w', newline='') as file:
        csv.writer(file).writerows([['path', 'labels'], *([f'x/{name}', 'a'] for name in ALL)])
    return read_all(split_of(root, '--dataset', 'csv', '--task', 'multilabel'))


def json_list(root):
    write_files(root / 'x')
    content = {'classes': ['a'], 'images': [[f'x/{name}', ['a']] for name in ALL]}
    (root / 'train.json').write_text(json.dumps(content))
    return read_all(split_of(root, '--dataset', 'json', '--task', 'multilabel'))


def coco(root):
    write_files(root / 'train2017')
    (root / 'annotations').mkdir()
    content = dict(
        images=[dict(id=number, file_name=name) for number, name in enumerate(ALL)],
        categories=[dict(id=1, name='a')],
        annotations=[],
    )
    (root / 'annotations' / 'instances_train2017.json').write_text(json.dumps(content))
    return read_all(split_of(root, '--dataset', 'coco2017', '--task', 'multilabel'))


def voc(root):
    """Its files have numbers, all with the suffix jpg."""
    home = root / 'VOCdevkit' / 'VOC2007'
    (home / 'JPEGImages').mkdir(parents=True)
    numbers = [f'{number:06}' for number in range(len(ALL))]
    for number, content in zip(numbers, ALL.values(), strict=True):
        (home / 'JPEGImages' / f'{number}.jpg').write_bytes(content)
    write_text(home / 'ImageSets' / 'Main' / 'train.txt', *numbers)
    for name in VOC_CLASSES:
        write_text(home / 'ImageSets' / 'Main' / f'{name}_train.txt', *(f'{number} -1' for number in numbers))
    return read_all(split_of(root, '--dataset', 'voc2007', '--task', 'multilabel'), list(ALL))


def write_rows(root, labels, kind):
    datasets = pytest.importorskip('datasets')
    rows = {'image': [dict(bytes=content, path=name) for name, content in ALL.items()], 'label': labels}
    features = datasets.Features({'image': datasets.Image(decode=False), 'label': kind(datasets)})
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(root / 'rows' / 'train-00000-of-00001.parquet')
    return ['--dataset', f'hfds/{root}/rows']


def hugging_face(root):
    flags = write_rows(root, [0] * len(ALL), lambda datasets: datasets.ClassLabel(names=['a']))
    return read_all(split_of(root / 'cache', *flags), list(ALL))


def hugging_face_names(root):
    flags = write_rows(root, [*['a b'] * (len(ALL) - 1), ''], lambda datasets: datasets.Value('string'))
    return read_all(split_of(root / 'cache', *flags, '--task', 'multilabel'))


def webdataset(root):
    """Keys are numbers, which WebDataset ends at the first dot; a stream leaves out what cannot be read."""
    pytest.importorskip('webdataset')
    root.mkdir(parents=True)
    with tarfile.open(root / 'train-0.tar', 'w') as file:
        for number, content in enumerate(ALL.values()):
            for suffix, part in (('png', content), ('cls', str(number).encode())):
                entry = tarfile.TarInfo(f'{number:04}.{suffix}')
                entry.size = len(part)
                file.addfile(entry, io.BytesIO(part))
    split = dict(name='train', filenames=['train-0.tar'], shard_lengths=[len(ALL)], num_samples=len(ALL))
    (root / '_info.json').write_text(json.dumps({'splits': {'train': split}}))
    options = parse_train(
        [str(root), *MODEL[:2], '--device', 'cpu', '--dataset', 'wds/odd', '--train-num-samples', '99']
    )
    images = {}
    for image, number in create_split(options, 'train'):
        images[list(ALL)[number]] = np.asarray(image)
    return images, dict.fromkeys(BROKEN, '')


def prediction(root):
    write_files(root / 'a')
    for name in IGNORED:
        (root / 'a' / name).parent.mkdir(exist_ok=True)
        (root / 'a' / name).write_bytes(FILES['plain.png'])
    dataset = SourceDataset(open_source(root / 'a'), lambda image: image)
    return read_all(dataset)


LISTS = [csv_list, json_list, coco, voc, hugging_face_names]


@pytest.mark.parametrize(
    'read',
    [folders, tar, *LISTS, hugging_face, webdataset, prediction],
    ids=lambda f: f.__name__,
)
def test_the_same_files_give_the_same_images(read, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    images, broken = read(tmp_path / 'data')
    assert len(ALL) > 40
    assert images.keys() == FILES.keys() and broken.keys() == BROKEN.keys()
    different = [name for name, pixels in images.items() if not np.array_equal(pixels, EXPECTED[name])]
    assert not different
    assert all('--image-range' in broken[name] for name in ('out of range.tif',) if broken[name])


@pytest.mark.parametrize('read', LISTS, ids=lambda f: f.__name__)
def test_a_cache_of_annotations_gives_the_same_images(read, tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, 'CACHED', 0)
    test_the_same_files_give_the_same_images(read, tmp_path, monkeypatch)
