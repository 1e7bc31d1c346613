"""Pascal-VOC as distributed, for multi-label classification.

    ROOT/VOCdevkit/VOC2007/ImageSets/Main/{train,val,trainval,test}.txt     image numbers of a split
    ROOT/VOCdevkit/VOC2007/ImageSets/Main/CLASS_SPLIT.txt                   lines of an image number and 1, -1 or 0
    ROOT/VOCdevkit/VOC2007/JPEGImages/NUMBER.jpg

ROOT may also be `VOCdevkit` or `VOC2007` itself. 0 marks a class that only difficult objects show; the VOC evaluation
leaves such an image out for the class, and so do training and evaluation here.
"""

from pathlib import Path

from timm_mldecoder.data.annotations import IGNORED, NEGATIVE, POSITIVE, Annotations

CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
)  # fmt: skip
MEANINGS = {'1': POSITIVE, '-1': NEGATIVE, '0': IGNORED}
SPLITS = {'train': 'train', 'validation': 'val', 'trainval': 'trainval', 'test': 'test'}


def read_voc(root: Path, split: str, year: int) -> Annotations:
    """Read one split of Pascal-VOC.

    Raises:
        ValueError: If the folder is not VOC's, the split is unknown or has no public labels, or a line is malformed.
    """
    if split not in SPLITS:
        raise ValueError(f'Pascal-VOC has no split {split!r}, choose one of {sorted(SPLITS)}.')
    homes = [root / 'VOCdevkit' / f'VOC{year}', root / f'VOC{year}', root]
    home = next((home for home in homes if (home / 'ImageSets' / 'Main').is_dir()), None)
    if home is None:
        raise ValueError(f'No folder ImageSets/Main in any of {[str(home) for home in homes]}.')
    lists = home / 'ImageSets' / 'Main'

    numbers = _read(lists / f'{SPLITS[split]}.txt').split()
    image_index = {number: index for index, number in enumerate(numbers)}
    image, label, value = [], [], []
    for class_index, name in enumerate(CLASSES):
        path = lists / f'{name}_{SPLITS[split]}.txt'
        for line, content in enumerate(_read(path).splitlines(), start=1):
            number, flag = (content.split() + ['', ''])[:2]
            if number not in image_index or flag not in MEANINGS:
                raise ValueError(
                    f'{path}, line {line}: expected an image of {SPLITS[split]}.txt and one of {sorted(MEANINGS)}, '
                    f'got {content!r}.'
                )
            image.append(image_index[number])
            label.append(class_index)
            value.append(MEANINGS[flag])
    paths = [home.relative_to(root) / 'JPEGImages' / f'{number}.jpg' for number in numbers]
    # an image that a class's list leaves out would pass for a negative
    if len(set(zip(image, label, strict=True))) != len(numbers) * len(CLASSES):
        raise ValueError(f'{lists}: the lists of the classes do not name the same images as {SPLITS[split]}.txt.')
    return Annotations(CLASSES, paths, image, label, value)


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f'{path} is missing: this split is not unpacked, or its labels are not public.')
    return path.read_text(encoding='utf-8')
