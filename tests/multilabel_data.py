"""Small multi-label datasets, written to disk in each format as it is distributed."""

import csv
import json
from pathlib import Path

from PIL import Image

from timm_mldecoder.data.formats.voc import CLASSES as VOC_CLASSES

# image number: its classes in every format below; the images differ in colour
LABELS = {11: {'dog'}, 12: {'cat', 'dog'}, 13: set()}


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (20, 10), (number, 0, 0)).save(path, quality=100)


def write_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')


COCO_LABELS = {11: {'dog': 1}, 12: {'cat': 1, 'dog': 1}, 13: {}}  # 13 without annotations is kept


def write_coco(root: Path, year: int = 2014) -> None:
    ids = {'dog': 18, 'cat': 17}  # classes are in the order of the file, not of the ids
    for part in ('train', 'val'):
        folder = f'{part}{year}'
        content = dict(
            images=[dict(id=number, file_name=f'COCO_{folder}_{number:012}.jpg') for number in LABELS],
            categories=[dict(id=identifier, name=name, supercategory='animal') for name, identifier in ids.items()],
            annotations=[],
        )
        for number, names in LABELS.items():
            write_image(root / folder / f'COCO_{folder}_{number:012}.jpg', number)
            for name in names:
                for area in (9.0, 10_000.0):  # two objects, a small one and a large one
                    entry = dict(id=len(content['annotations']), image_id=number, category_id=ids[name], area=area)
                    content['annotations'].append({**entry, 'iscrowd': int(area < 10)})
        write_text(root / 'annotations' / f'instances_{folder}.json', json.dumps(content))


def write_voc(root: Path, year: int = 2007) -> None:
    home = root / 'VOCdevkit' / f'VOC{year}'
    for number in LABELS:
        write_image(home / 'JPEGImages' / f'{number:06}.jpg', number)
    for split in ('train', 'val', 'trainval', 'test'):
        write_text(home / 'ImageSets' / 'Main' / f'{split}.txt', *(f'{number:06}' for number in LABELS))
        for name in VOC_CLASSES:
            flags = {number: 1 if name in names else -1 for number, names in LABELS.items()}
            if name == 'bird':
                flags[13] = 0  # difficult
            lines = (f'{number:06} {flag:2d}' for number, flag in flags.items())
            write_text(home / 'ImageSets' / 'Main' / f'{name}_{split}.txt', *lines)
    for number, names in LABELS.items():  # two objects of each class, of the cat one of them difficult
        objects = [(name, name == 'cat' and copy == 1) for name in sorted(names) for copy in range(2)]
        objects += [('bird', True)] * 3 if number == 13 else []
        content = ''.join(
            f'<object><name>{name}</name><difficult>{int(difficult)}</difficult></object>'
            for name, difficult in objects
        )
        write_text(home / 'Annotations' / f'{number:06}.xml', f'<annotation>{content}</annotation>')


def write_open_images(root: Path) -> None:
    write_text(root / 'oidv6-class-descriptions.csv', 'LabelName,DisplayName', '/m/0bt9lr,dog', '/m/01yrx,cat',
               '/m/1,"jaguar"', '/m/2,jaguar', '/m/3,"nobody, nowhere"')  # fmt: skip
    write_text(root / 'oidv6-classes-trainable.txt', '/m/01yrx', '/m/0bt9lr', '/m/1', '/m/2')
    for split, prefix in (('train', 'oidv6-'), ('validation', ''), ('test', '')):
        write_text(
            root / f'{prefix}{split}-annotations-human-imagelabels.csv',
            'ImageID,Source,LabelName,Confidence',
            '00000b,verification,/m/0bt9lr,1',
            '00000b,verification,/m/2,0',
            '00000c,verification,/m/01yrx,1',
            '00000c,crowdsource-verification,/m/0bt9lr,1',
            '00000c,verification,/m/0bt9lr,0',  # verified twice: present counts
            '00000d,verification,/m/3,1',  # not trainable: no label of this image is left
        )
        write_text(root / f'{split}-annotations-human-imagelabels-boxable.csv', 'not read')
        for number in LABELS:
            write_image(root / split / f'{number:06x}.jpg', number)


def write_csv(root: Path) -> None:
    for split in ('train', 'validation'):
        rows = [[f'images/{number}.png', ';'.join(sorted(names)), ''] for number, names in LABELS.items()]
        rows[2][2] = 'cat; dog'
        root.mkdir(parents=True, exist_ok=True)
        with (root / f'{split}.csv').open('w', newline='') as file:
            csv.writer(file).writerows([['path', 'labels', 'ignored'], *rows])
    for number in LABELS:
        write_image(root / 'images' / f'{number}.png', number)


def write_json(root: Path) -> None:
    images = [[f'images/{number}.png', sorted(names) * 2] for number, names in LABELS.items()]  # two objects each
    for split in ('train', 'val'):
        write_text(root / f'{split}.json', json.dumps({'classes': ['dog', 'cat'], 'images': images}))
    for number in LABELS:
        write_image(root / 'images' / f'{number}.png', number)


VOC_TARGETS = {11: {'dog': 1}, 12: {'cat': 1, 'dog': 1}, 13: {'bird': -1}}
# format: its writer, its classes, the targets of each image that are not the default, and the default
WRITTEN = {
    'coco2014': (write_coco, ['dog', 'cat'], COCO_LABELS, 0),
    'coco2017': (lambda root: write_coco(root, 2017), ['dog', 'cat'], COCO_LABELS, 0),
    'voc2007': (write_voc, list(VOC_CLASSES), VOC_TARGETS, 0),
    'voc2012': (lambda root: write_voc(root, 2012), list(VOC_CLASSES), VOC_TARGETS, 0),
    'openimages': (
        write_open_images,
        ['cat', 'dog', 'jaguar (/m/1)', 'jaguar (/m/2)'],
        {11: {'dog': 1, 'jaguar (/m/2)': 0}, 12: {'cat': 1, 'dog': 1}},
        -1,
    ),
    'json': (write_json, ['cat', 'dog'], {11: {'dog': 1}, 12: {'cat': 1, 'dog': 1}, 13: {}}, 0),
    'csv': (write_csv, ['cat', 'dog'], {11: {'dog': 1}, 12: {'cat': 1, 'dog': 1}, 13: {'cat': -1, 'dog': -1}}, 0),
}
