"""What is wrong with a dataset, from the facts of its files and its labels."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from timm_mldecoder.check.duplicates import equal_content, near
from timm_mldecoder.data import class_to_index
from timm_mldecoder.data.summary import shown_classes
from timm_mldecoder.data.transforms import lost_share
from timm_mldecoder.loading.compare_classes import likely_causes
from timm_mldecoder.loading.scan import ImageFacts

RARE = 5  # images of a class in the validation split, below which a threshold is noise
CUT = 0.05  # share of the area of images with several labels that evaluation may cut off
#: Kind of a finding -> what it means.
KINDS = {
    'unreadable': 'files that cannot be read',
    'contradiction': 'copies of one image with other labels',
    'leak': 'images of the validation split that are trained on',
    'duplicate': 'copies within a split',
    'near leak': 'images that look like one of the training split',
    'near duplicate': 'images that look alike within a split',
    'empty class': 'classes without a training image',
    'constant class': 'classes that every training image has',
    'rare class': f'classes with fewer than {RARE} validation images, whose scores and thresholds are noise',
    'class names': 'class names that look like a mistake',
    'rotated': 'images that EXIF data turns, which --exif-rotate applies',
    'cut off': 'images whose border evaluation cuts off',
}


class Finding(NamedTuple):
    """One mistake."""

    kind: str  # of KINDS
    files: tuple[str, ...]
    text: str
    images: tuple[tuple[str, int], ...] = ()  # split and position in its facts, to show


@dataclass
class Split:
    """A split that was read."""

    dataset: Any
    facts: list[ImageFacts]
    labels: list[tuple[int, ...]] | None  # classes of each image, None if they are not known
    class_names: list[str]

    def shown(self, position: int) -> str:
        """Labels of an image by name."""
        if self.labels is None:
            return ''
        names = [self.class_names[i] if i < len(self.class_names) else str(i) for i in self.labels[position]]
        return ', '.join(names) or 'no label'

    def counts(self) -> list[int]:
        """Number of images of each class."""
        counts = Counter(label for labels in self.labels or () for label in labels)
        return [counts[index] for index in range(max([*counts, len(self.class_names) - 1], default=-1) + 1)]


def labels_of(dataset: Any) -> list[tuple[int, ...]] | None:
    """Classes of each image, without reading an image; None where a dataset does not tell."""
    shown = shown_classes(dataset)
    if shown is None:
        return None
    label, ends = shown[1].tolist(), np.cumsum(np.bincount(shown[0], minlength=len(dataset))).tolist()
    return [tuple(label[first:last]) for first, last in zip([0, *ends], ends, strict=False)]


def make_split(dataset: Any, facts: Sequence[ImageFacts]) -> Split:
    """Join what was read with the labels of a dataset."""
    return Split(dataset, list(facts), labels_of(dataset), list(class_to_index(dataset) or ()))


def find(splits: Mapping[str, Split], config: dict[str, Any], exif_rotate: bool, multilabel: bool) -> list[Finding]:
    """Find mistakes in the splits `train` and, if there is one, `validation`, in the order of `KINDS`.

    Args:
        splits: Splits by role.
        config: Data configuration of timm, for what evaluation shows of an image.
        exif_rotate: Whether images are turned as EXIF data says.
        multilabel: Whether an image has several classes.
    """
    found = [*_copies(splits), *_classes(splits)]
    for role, split in splits.items():
        found += [Finding('unreadable', (image.path,), image.reason) for image in split.facts if image.reason]
        readable = [image for image in split.facts if not image.reason]
        if (rotated := [image.path for image in readable if image.rotated]) and not exif_rotate:
            found.append(Finding('rotated', tuple(rotated), f'{role}: {len(rotated)} of {len(readable)} images'))
        lost = lost_share([image.size for image in readable], config) if multilabel and role != 'train' else 0
        if lost > CUT:
            remedy = '--crop-mode squash --crop-pct 1 shows all of them'
            crop = f'crop {config["crop_mode"]}, {config["crop_pct"]:g}'
            found.append(Finding('cut off', (), f'{role}: {lost:.0%} of the area (the median) by {crop}; {remedy}'))
    order = list(KINDS)
    return sorted(found, key=lambda finding: order.index(finding.kind))


def _copies(splits: Mapping[str, Split]) -> Iterator[Finding]:
    images = [
        (role, position)
        for role, split in splits.items()
        for position, facts in enumerate(split.facts)
        if not facts.reason
    ]
    facts = [splits[role].facts[position] for role, position in images]
    equal = equal_content([image.content for image in facts])
    for group in equal:
        yield _finding(splits, [images[member] for member in group], '')
    copies = {member: group for group in equal for member in group}
    first = [member for member in range(len(images)) if copies.get(member, [member])[0] == member]
    alike = near([facts[member].look for member in first], [facts[member].thumbnail for member in first])
    for group in alike:
        yield _finding(splits, [images[first[member]] for member in group], 'near ')


def _finding(splits: Mapping[str, Split], images: list[tuple[str, int]], near: str) -> Finding:
    files = tuple(splits[role].facts[position].path for role, position in images)
    labels = list(dict.fromkeys(splits[role].shown(position) for role, position in images))
    across = len({role for role, _ in images}) > 1
    text = ' = '.join(files[:3]) + (f' = {len(files) - 3} more' if len(files) > 3 else '')
    if len(labels) > 1:
        text += f' ({near}{"copies in both splits" if across else "copies"}): {" | ".join(labels)}'
        return Finding('contradiction', files, text, tuple(images))
    return Finding(f'{near}{"leak" if across else "duplicate"}', files, text, tuple(images))


def _classes(splits: Mapping[str, Split]) -> Iterator[Finding]:
    train, validation = splits['train'], splits.get('validation')
    names = train.class_names
    for cause in likely_causes(names):
        yield Finding('class names', (), cause)
    if train.labels is not None:
        for name, count in zip(names, train.counts(), strict=False):
            if not count:
                yield Finding('empty class', (), name)
            elif count == len(train.facts):
                yield Finding('constant class', (), name)
    if validation and validation.labels is not None:
        for name, count in zip(validation.class_names, validation.counts(), strict=False):
            if count < RARE:
                yield Finding('rare class', (), f'{name} ({count} images)')
