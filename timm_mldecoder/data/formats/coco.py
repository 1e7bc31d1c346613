"""MS-COCO as distributed, for multi-label classification.

    ROOT/annotations/instances_{train,val}{2014,2017}.json
    ROOT/{train,val}{2014,2017}/*.jpg

The classes are the categories in the order of the annotation file (80, without the unused ids). As in the published
results, the images are those with at least one annotation (82,081 for training and 40,137 for validation in 2014), and
objects of every size, also crowds, count.
"""

import json
from pathlib import Path

from timm_mldecoder.data.annotations import POSITIVE, Annotations
from timm_mldecoder.data.text_files import normalize_path

SPLITS = {'train': 'train', 'validation': 'val'}


def read_coco(root: Path, split: str, year: int, instances: bool = False) -> Annotations:
    """Read one split of COCO.

    Args:
        root: Folder of the dataset.
        split: One of `SPLITS`.
        year: 2014 or 2017.
        instances: Keep the number of objects per image and class.

    Raises:
        ValueError: If the split is unknown, its file is missing or damaged, or an annotation refers to an image or a
            category that is not in the file.
    """
    if split not in SPLITS:
        raise ValueError(f'COCO has no split {split!r} with labels, choose one of {sorted(SPLITS)}')
    folder = f'{SPLITS[split]}{year}'
    path = root / 'annotations' / f'instances_{folder}.json'
    if not path.is_file():
        raise ValueError(f'{path} is missing: unpack the annotations of COCO {year} into {root}')
    try:
        content = json.loads(path.read_bytes())
        categories = {category['id']: category['name'] for category in content['categories']}
        files = {image['id']: image['file_name'] for image in content['images']}
        objects = [(entry['id'], entry['image_id'], entry['category_id']) for entry in content['annotations']]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{path} is not a complete COCO instances file: {error!r}') from error

    label_index = {category: index for index, category in enumerate(categories)}
    for annotation, image, category in objects:
        if image not in files or category not in label_index:
            raise ValueError(f'{path}, annotation {annotation}: unknown image {image} or category {category}')
    annotated = {image for _, image, _ in objects}
    image_index = {image: index for index, image in enumerate(image for image in files if image in annotated)}
    return Annotations(
        list(categories.values()),
        [normalize_path(f'{folder}/{files[image]}') for image in image_index],
        image=[image_index[image] for _, image, _ in objects],
        label=[label_index[category] for _, _, category in objects],
        value=[POSITIVE] * len(objects),
        instances=[1] * len(objects) if instances else None,
    )
