"""JSON lists of images and labels, the format in which arXiv 2209.06585 distributes its splits.

    ROOT/train.json, ROOT/validation.json (or val.json)
        {"classes": [name, ...], "images": [[path, [name, ...]], ...]}
    ROOT/<path>     the images

The authors publish COCO, VOC, NUS-WIDE (81 classes) and Visual Genome (500 classes) in it. As in their code, the
classes are sorted by name, and a label occurs once per object. Every class that is not listed is absent.
"""

import json
from collections import Counter
from pathlib import Path

from timm_mldecoder.data.annotations import POSITIVE, Annotations, cached_annotations
from timm_mldecoder.data.text_files import normalize_name, normalize_path, read_text, split_names, warn_about_case


def read_json(root: Path, split: str, instances: bool = False) -> Annotations:
    """Read `ROOT/SPLIT.json`, or the file of all splits.

    Args:
        root: Folder of the dataset.
        split: Name of the file; `validation` is also read from `val.json` and `valid.json`.
        instances: Keep the number of objects per image and class.

    Raises:
        ValueError: If the file is missing or malformed, or a label is not one of the classes (naming file and entry).
    """
    if root.is_file():
        if split != 'train':
            raise ValueError(f'{root} is one file for all splits: pass --val-fraction 0.2')
        return cached_annotations(root.parent, 'json', [root.name, instances], [root], lambda _: _read(root, instances))
    candidates = [root / f'{name}.json' for name in split_names(split)]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        found = sorted(file.stem for file in root.glob('*.json'))
        raise ValueError(f'{candidates[0]} is missing, for split {split!r}; {root} holds the splits {found}')
    annotations = cached_annotations(root, 'json', [path.name, instances], [path], lambda _: _read(path, instances))
    warn_about_case(annotations.class_names, path)
    return annotations


def _read(path: Path, instances: bool) -> Annotations:
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ('classes', 'images')):
        raise ValueError(f'{path}: expected an object with the lists "classes" and "images"')

    class_names = content['classes']
    if not class_names or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f'{path}: "classes" must be a list of names')
    class_names = sorted(normalize_name(name) for name in class_names)
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated:
        raise ValueError(f'{path}: repeated in "classes": {repeated}')
    class_index = {name: index for index, name in enumerate(class_names)}

    paths, image, label = [], [], []
    for index, entry in enumerate(content['images']):
        match entry:
            case [str(file), [*labels]] if file and all(isinstance(name, str) for name in labels):
                pass
            case _:
                raise ValueError(f'{path}, images[{index}]: expected [path, [label, ...]], got {entry!r:.200}')
        names = [normalize_name(name) for name in labels]
        unknown = [name for name in names if name not in class_index]
        if unknown:
            raise ValueError(f'{path}, images[{index}] ({file}): not in "classes": {unknown}')
        paths.append(normalize_path(file))
        image += [index] * len(names)
        label += [class_index[name] for name in names]
    values = [POSITIVE] * len(label)
    return Annotations(class_names, paths, image, label, values, instances=[1] * len(label) if instances else None)
