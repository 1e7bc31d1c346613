"""Images that are copies of each other, within and across splits: byte by byte, or nearly, by a perceptual hash."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from timm_mldecoder.check.findings import Finding, Split
from timm_mldecoder.data.same_files import repeated

DISTANCE = 7  # of 128 bits of the perceptual hash, at most
DIFFERENCE = 6.0  # mean of the absolute difference of thumbnails, in grey values, at most
_ROWS = 256  # of a comparison at a time
_POPCOUNT = np.array([bin(number).count('1') for number in range(256)], dtype=np.uint8)


def find_copies(splits: Mapping[str, Split]) -> Iterator[Finding]:
    """Find copies: leaks across the splits, duplicates within one, and contradictions where their labels differ."""
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


def _finding(splits: Mapping[str, Split], images: list[tuple[str, int]], prefix: str) -> Finding:
    files = tuple(splits[role].facts[position].path for role, position in images)
    labels = list(dict.fromkeys(splits[role].shown(position) for role, position in images))
    across = len({role for role, _ in images}) > 1
    text = ' = '.join(files[:3]) + (f' = {len(files) - 3} more' if len(files) > 3 else '')
    if len(labels) > 1:
        text += f' ({prefix}{"copies in both splits" if across else "copies"}): {" | ".join(labels)}'
        return Finding('contradiction', files, text, tuple(images))
    return Finding(f'{prefix}{"leak" if across else "duplicate"}', files, text, tuple(images))


def equal_content(contents: Sequence[bytes]) -> list[list[int]]:
    """Groups of positions with the same digest."""
    groups = defaultdict(list)
    for position, content in enumerate(contents):
        groups[content].append(position)
    return [group for group in groups.values() if len(group) > 1]


def near(looks: Sequence[bytes], thumbnails: Sequence[bytes]) -> list[list[int]]:
    """Groups of positions whose images nearly look the same.

    Pairs are equal in one band of the hash, differ in few bits of the rest, and have thumbnails of nearly the same
    colours, which tells apart images without structure.

    Args:
        looks: Perceptual hashes of 128 bits.
        thumbnails: RGB values, all of one length.

    Returns:
        Groups of at least two, each connected by such pairs.
    """
    if len(looks) < 2:
        return []
    hashes = np.frombuffer(b''.join(looks), np.uint8).reshape(len(looks), -1)
    colours = np.frombuffer(b''.join(thumbnails), np.uint8).reshape(len(looks), -1)
    pairs = set()
    for band in hashes.view(np.uint16).T:  # 8 of 16 bits: two hashes that differ in at most 7 bits are equal in one
        for bucket in repeated(band.astype(np.int64)):
            pairs |= _pairs(bucket, hashes, colours)
    return _connected(pairs)


def _pairs(bucket: np.ndarray, hashes: np.ndarray, colours: np.ndarray) -> set[tuple[int, int]]:
    found = set()
    for first in range(0, len(bucket), _ROWS):
        rows = bucket[first : first + _ROWS]
        others = bucket[first:]
        distance = _POPCOUNT[hashes[rows, None] ^ hashes[None, others]].sum(2, dtype=np.uint16)
        for row, column in np.argwhere(np.triu(distance <= DISTANCE, 1)).tolist():
            a, b = int(rows[row]), int(others[column])
            if np.abs(colours[a].astype(np.int16) - colours[b]).mean() <= DIFFERENCE:
                found.add((min(a, b), max(a, b)))
    return found


def _connected(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Groups that pairs connect, in the order of their first member."""
    leader: dict[int, int] = {}

    def find(position: int) -> int:
        while leader.setdefault(position, position) != position:
            leader[position] = leader[leader[position]]
            position = leader[position]
        return position

    for a, b in sorted(pairs):
        leader[max(find(a), find(b))] = min(find(a), find(b))
    groups = defaultdict(list)
    for position in sorted(leader):
        groups[find(position)].append(position)
    return list(groups.values())
