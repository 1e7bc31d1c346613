"""Pascal-VOC as distributed, for multi-label classification.

    ROOT/VOCdevkit/VOC2007/ImageSets/Main/{train,val,trainval,test}.txt     image numbers of a split
    ROOT/VOCdevkit/VOC2007/ImageSets/Main/CLASS_SPLIT.txt                   lines of an image number and 1, -1 or 0
    ROOT/VOCdevkit/VOC2007/JPEGImages/NUMBER.jpg
    ROOT/VOCdevkit/VOC2007/Annotations/NUMBER.xml                           only for `difficult` and `instances`

ROOT may also be `VOCdevkit` or `VOC2007` itself. A class of which an image shows only difficult objects (0 in the
lists) is ignored for that image in training and evaluation, as in the VOC evaluation. arXiv 2209.06585 counts it as
positive in both (`difficult='positive'`).
"""

import xml.etree.ElementTree as ET
from pathlib import Path

from timm_mldecoder.data.annotations import IGNORED, NEGATIVE, POSITIVE, Annotations, cached_annotations
from timm_mldecoder.data.text_files import read_text

CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
)  # fmt: skip
MEANINGS = {'1': POSITIVE, '-1': NEGATIVE, '0': IGNORED}
DIFFICULT = {'ignore': IGNORED, 'positive': POSITIVE, 'negative': NEGATIVE}
SPLITS = {'train': 'train', 'validation': 'val', 'trainval': 'trainval', 'test': 'test'}


def read_voc(root: Path, split: str, year: int, difficult: str = 'ignore', instances: bool = False) -> Annotations:
    """Read one split of Pascal-VOC.

    Args:
        root: Folder of the dataset.
        split: One of `SPLITS`.
        year: 2007 or 2012.
        difficult: Target of a class of which an image shows only difficult objects, one of `DIFFICULT`.
        instances: Keep the number of objects per image and class; difficult ones count only as `positive`.

    Raises:
        ValueError: If the folder is not VOC's, the split is unknown or has no public labels, or a file is malformed.
    """
    if split not in SPLITS:
        raise ValueError(f'Pascal-VOC has no split {split!r}, choose one of {sorted(SPLITS)}')
    if difficult not in DIFFICULT:
        raise ValueError(f'difficult must be one of {sorted(DIFFICULT)}, got {difficult!r}')
    homes = [root / 'VOCdevkit' / f'VOC{year}', root / f'VOC{year}', root]
    home = next((home for home in homes if (home / 'ImageSets' / 'Main').is_dir()), None)
    if home is None:
        raise ValueError(f'no folder ImageSets/Main in any of {[str(home) for home in homes]}')
    lists = home / 'ImageSets' / 'Main'
    listed = lists / f'{SPLITS[split]}.txt'
    numbers = _read(listed).split()
    of_lists = difficult == 'ignore' and not instances
    files = [lists / f'{name}_{SPLITS[split]}.txt' for name in CLASSES]
    if not of_lists:
        files = [home / 'Annotations' / f'{number}.xml' for number in numbers]

    def build(_: Path | None) -> Annotations:
        entries = _read_lists(listed, numbers, files) if of_lists else _read_annotations(files, difficult)
        image, label, value, count = zip(*entries, strict=True) if entries else ((), (), (), ())
        paths = [home.relative_to(root) / 'JPEGImages' / f'{number}.jpg' for number in numbers]
        return Annotations(CLASSES, paths, image, label, value, instances=count if instances else None)

    flags = [str(home.relative_to(root)), split, difficult, instances]
    return cached_annotations(root, f'voc{year}', flags, [listed, *files], build)


def read_objects(path: Path) -> dict[str, tuple[int, int]]:
    """Number of ordinary and of difficult objects of each class that a file of `Annotations/` lists.

    Raises:
        ValueError: If the file is missing, not XML, declares a document type (and with it entities), or has an object
            of an unknown class (naming file and object).
    """
    text = _read(path)
    if '<!DOCTYPE' in text or '<!ENTITY' in text:
        raise ValueError(f'{path}: document type declarations are refused, they may expand to any size')
    try:
        tree = ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise ValueError(f'{path} is not XML: {error}') from error
    counts: dict[str, tuple[int, int]] = {}
    for number, element in enumerate(tree.iterfind('object'), start=1):
        name, flag = (element.findtext(tag, default).strip() for tag, default in (('name', ''), ('difficult', '0')))
        if name not in CLASSES or flag not in ('0', '1'):
            raise ValueError(f'{path}, object {number}: expected a class and difficult 0 or 1, got {name!r}, {flag!r}')
        ordinary, hard = counts.get(name, (0, 0))
        counts[name] = (ordinary + (flag == '0'), hard + (flag == '1'))
    return counts


def _read_annotations(files: list[Path], difficult: str) -> list[tuple[int, int, int, int]]:
    """Image index, class index, value and number of objects of every class of every image."""
    entries = []
    for index, path in enumerate(files):
        for name, (ordinary, hard) in read_objects(path).items():
            value = POSITIVE if ordinary else DIFFICULT[difficult]
            counted = ordinary + hard if difficult == 'positive' else ordinary
            entries.append((index, CLASSES.index(name), value, counted))
    return entries


def _read_lists(listed: Path, numbers: list[str], files: list[Path]) -> list[tuple[int, int, int, int]]:
    """Image index, class index, value and number of objects (unknown, 0) of every line of the lists of the classes."""
    image_index = {number: index for index, number in enumerate(numbers)}
    entries = []
    for class_index, path in enumerate(files):
        for line, content in enumerate(_read(path).splitlines(), start=1):
            number, flag = (content.split() + ['', ''])[:2]
            if number not in image_index or flag not in MEANINGS:
                raise ValueError(f'{path}, line {line}: not an image of {listed.name} and 1, -1 or 0: {content!r}')
            entries.append((image_index[number], class_index, MEANINGS[flag], 0))
    # an image that is missing from the list of a class would count as a negative
    if len({entry[:2] for entry in entries}) != len(numbers) * len(CLASSES):
        raise ValueError(f'{listed}: the lists of the classes do not name the same images')
    return entries


def _read(path: Path) -> str:
    if not path.is_file():
        listed = path.name.partition('_')[2]  # the list of all images beside that of a class
        if listed and path.with_name(listed).is_file():
            raise ValueError(f'{path} is missing: voc20xx has the 20 classes of Pascal-VOC; give others as CSV or COCO')
        raise ValueError(f'{path} is missing: this split is not unpacked, or its labels are not public')
    return read_text(path)
