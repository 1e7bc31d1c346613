"""What every multi-label format is read into: image files, class names and a sparse table of labels."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1  # IGNORED: not annotated, or marked difficult


class Annotations:
    """Labels of a set of images, kept sparse so that millions of images by thousands of classes fit in memory.

    Args:
        class_names: Name of each class, in the order of the target vector.
        paths: One image file per image, relative to the root of the data.
        image: Image index of each annotation, [A].
        label: Class index of each annotation, [A].
        value: POSITIVE, NEGATIVE or IGNORED for each annotation, [A]; of several values for one image and class the
            largest holds.
        unlisted: Value of the classes an image has no annotation for: NEGATIVE where the annotation is exhaustive
            (COCO, VOC), IGNORED where it is partial (Open Images).
    """

    def __init__(
        self,
        class_names: Sequence[str],
        paths: Sequence[str | Path],
        image: Sequence[int],
        label: Sequence[int],
        value: Sequence[int],
        unlisted: int = NEGATIVE,
    ):
        self.class_names = list(class_names)
        self.unlisted = unlisted
        # One flat byte array instead of a list of str: worker processes would otherwise copy the whole list page by
        # page as reference counts change.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        image = np.asarray(image, dtype=np.int64)
        value = np.asarray(value, dtype=np.int8)
        order = np.lexsort((value, image))  # by image, then rising value: the largest is written last
        self._label = np.asarray(label, dtype=np.int32)[order]
        self._value = value[order]
        self._start = np.searchsorted(image[order], np.arange(len(self._paths) + 1))

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def has_ignored(self) -> bool:
        """Whether any target holds a label to ignore: then losses must know of it, and targets must not be mixed."""
        return self.unlisted == IGNORED or bool((self._value == IGNORED).any())

    def path(self, index: int) -> str:
        """File of image `index`, relative to the root of the data."""
        return os.fsdecode(self._paths[index])

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image index, class index and value of every annotation, each [A]."""
        image = np.repeat(np.arange(len(self)), np.diff(self._start))
        return image, self._label, self._value

    def target(self, index: int) -> torch.Tensor:
        """Dense float32 target of image `index`, [num_classes], of 1, 0 and -1 (ignored)."""
        listed = slice(self._start[index], self._start[index + 1])
        target = torch.full((len(self.class_names),), float(self.unlisted))
        # one by one, in order: for a repeated class, assignment by an index array leaves the winner undefined
        for label, value in zip(self._label[listed].tolist(), self._value[listed].tolist(), strict=True):
            target[label] = value
        return target


class MultiLabelDataset(Dataset):
    """Images with dense multi-label targets, in the form `timm.data.create_loader` expects.

    Yields `(image, target)`: a PIL image, or what `transform` makes of it, and a float32 tensor [num_classes].

    Unlike `timm.data.ImageDataset` an unreadable image is an error and not a warning and the next image in its place:
    a silently repeated image would change the metrics.

    Args:
        annotations: Images and their labels.
        root: Folder that the images' paths are relative to.
        transform: Applied to the PIL image.
        target_transform: Applied to the target.
        input_img_mode: PIL mode of the images.

    Attributes:
        num_seen: Of how many classes, the first, the model has seen images in training; None where it is of all.
    """

    num_seen: int | None = None

    def __init__(
        self,
        annotations: Annotations,
        root: str | Path = '',
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        input_img_mode: str = 'RGB',
    ):
        self.annotations = annotations
        self.root = root
        self.transform = transform
        self.target_transform = target_transform
        self.input_img_mode = input_img_mode

    @property
    def class_names(self) -> list[str]:
        """Name of each class, in the order of the target vector."""
        return self.annotations.class_names

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int):
        image = self._load(os.path.join(self.root, self.annotations.path(index)))
        target = self.annotations.target(index)
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def _load(self, path: str) -> Image.Image:
        try:
            with Image.open(path) as file:
                return file.convert(self.input_img_mode)
        except Exception as error:  # damaged files make decoders raise whatever they stumble over
            raise OSError(f'Cannot read the image {path}: {error}') from error  # PIL's own message may lack the path

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """File of image `index`: as timm's, relative to the root unless asked otherwise."""
        path = self.annotations.path(index)
        if basename:
            return os.path.basename(path)
        return os.path.join(self.root, path) if absolute else path

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """Files of all images, in order."""
        return [self.filename(index, basename, absolute) for index in range(len(self))]
