"""Features in files: float16 tokens of a split in shards, written once and read in any order at the speed of the disk.

A folder per split holds `setup.json` and, for each shard, `NNNNNN.targets.npy` and `NNNNNN.tokens.npy`
[n, tokens, F], of which the first token is the class token if there is one. A shard whose tokens are there is complete:
a kill loses the shards under way, and the same command writes those that are missing, whatever the number of ranks.
"""

import hashlib
import json
import logging
import os
import shutil
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_mldecoder.data import MultiLabelDataset, class_to_index
from timm_mldecoder.data.summary import class_indices
from timm_mldecoder.distributed.world import World
from timm_mldecoder.loading.randomness import Draw
from timm_mldecoder.probe.features import Backbone, Batch, ImageBatches
from timm_mldecoder.runtime.errors import RunFailed
from timm_mldecoder.runtime.files import write_atomically
from timm_mldecoder.runtime.log import logged

_logger = logging.getLogger(__name__)

SETUP = 'setup.json'
READERS = 8  # threads: a disk reaches its speed in random order only with several requests under way
READ_BYTES = 2**23  # of a task of a thread, at least one row: each piece of Python code between reads needs the GIL
AHEAD_BYTES = 2**25  # features under way beside the batch in use; at least one batch


class FeatureCache:
    """Cached features of one split.

    Args:
        setup: What the features depend on, in JSON form.
        shape: Tokens per image, with the class token, and their width.
        class_token: Whether the first token is the class token.
        views: Augmented views of each image; epoch e uses view e modulo `views`.
        shard: Images per shard.
    """

    def __init__(
        self,
        folder: Path,
        setup: dict[str, Any],
        *,
        number: int,
        shape: tuple[int, int],
        class_token: bool,
        views: int,
        shard: int,
        device: torch.device,
    ) -> None:
        self.folder = folder
        self.number = number
        self.views = views
        self._shape = shape
        self._class_token = class_token
        self._shard = shard
        self._shards_per_view = -(-number // shard)
        self._device = device
        self._opened: dict[int, tuple[int, Tensor]] = {}  # offset of the tokens in its file, and targets, by shard
        self._opening = Lock()  # numpy parses headers by ast, which raises SystemError in threads of Python 3.11
        self.setup = {**setup, 'images': number, 'tokens': list(shape), 'views': views, 'shard': shard}

    @property
    def bytes_per_image(self) -> int:
        return 2 * self._shape[0] * self._shape[1]

    def check(self) -> None:
        """Raise ValueError if the folder holds features of another model, transform or data."""
        path = self.folder / SETUP
        if not path.exists():
            return
        stored = json.loads(path.read_text())
        changed = [name for name in {**stored, **self.setup} if stored.get(name) != self.setup.get(name)]
        if changed:
            raise ValueError(
                f'--cache {self.folder}: {", ".join(changed)} changed since the features were written; remove the '
                'folder or choose another one'
            )

    def begin(self) -> None:
        """Create the folder; called on the first rank."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / SETUP).exists():
            text = json.dumps(self.setup, indent=1)
            write_atomically(self.folder / SETUP, lambda file: file.write(text.encode()))

    def missing(self) -> list[int]:
        """Return the shards that are still to be written."""
        done = {path.name for path in self.folder.glob('*.tokens.npy')}
        return [i for i in range(self.views * self._shards_per_view) if self._name(i, 'tokens') not in done]

    def missing_bytes(self) -> int:
        """Return the size of the tokens of the missing shards."""
        return sum(len(self._images(shard)) for shard in self.missing()) * self.bytes_per_image

    def write(
        self, shards: Sequence[int], backbone: Backbone, images: ImageBatches, batch_size: int, seed: int
    ) -> None:
        """Write shards.

        Raises:
            OSError: If the disk does not take them.
        """
        plan = []
        for shard in shards:
            view = shard // self._shards_per_view
            draws = [Draw(index, index, view, seed) for index in self._images(shard)]
            groups = [draws[first : first + batch_size] for first in range(0, len(draws), batch_size)]
            plan += [(shard, group, group is groups[-1]) for group in groups]
        tokens, targets = [], []
        batches = logged(f'Features of {self.folder.name}', images([group for _, group, _ in plan]), len(plan))
        for (shard, _, last), (batch, target) in zip(plan, batches, strict=True):
            found, class_token = backbone(batch)
            if class_token is not None:
                found = torch.cat([class_token.unsqueeze(1), found], dim=1)
            tokens.append(found.half().cpu().numpy())
            targets.append(target.cpu().numpy())
            if last:
                for kind, parts in (('targets', targets), ('tokens', tokens)):
                    array = np.concatenate(parts)
                    write_atomically(self.folder / self._name(shard, kind), partial(np.save, arr=array))
                tokens, targets = [], []

    def read(self, groups: Sequence[list[Draw]]) -> Iterator[Batch]:
        """Yield the features of each group in float16, as they are stored, while the disk reads the next ones."""
        with ThreadPoolExecutor(READERS) as pool:
            coming: deque[tuple[list[Draw], Tensor, list[Future]]] = deque()
            free: list[np.ndarray] = []
            under_way = 0  # bytes
            for group in groups:
                tokens = self._memory(len(group), free)
                coming.append((group, tokens, self._begin(group, tokens.numpy(), pool)))
                under_way += len(group) * self.bytes_per_image
                while under_way > AHEAD_BYTES and len(coming) > 1:
                    under_way -= len(coming[0][0]) * self.bytes_per_image
                    yield self._finish(*coming.popleft())
            while coming:
                yield self._finish(*coming.popleft())

    def _memory(self, number: int, free: list[np.ndarray]) -> Tensor:
        """Return float16 memory for images; it goes to `free` when no tensor uses it any more.

        New pages would cost as much time as reading into them.
        """
        rows = free.pop() if free else np.empty(0)
        if len(rows) < number:
            rows = np.empty((number, *self._shape), dtype=np.float16)
        part = rows[:number]
        weakref.finalize(part, free.append, rows)
        return torch.from_numpy(part)

    def _begin(self, group: list[Draw], rows: np.ndarray, pool: ThreadPoolExecutor) -> list[Future]:
        """Let threads read the tokens of a group, each some neighbours on the disk."""
        places = sorted((*self._place(draw), number) for number, draw in enumerate(group))
        step = max(1, READ_BYTES // self.bytes_per_image)
        return [pool.submit(self._fill, rows, places[first : first + step]) for first in range(0, len(places), step)]

    def _fill(self, rows: np.ndarray, places: list[tuple[int, int, int]]) -> None:
        """Read the tokens of images at places (shard, row, number in the batch)."""
        for shard, several in groupby(places, lambda place: place[0]):
            path = self.folder / self._name(shard, 'tokens')
            start, _ = self._open(shard)
            with open(path, 'rb', buffering=0) as file:  # none stays open: there may be more than a process may open
                # read ahead of random rows, a cache larger than memory would be read several times
                if hasattr(os, 'posix_fadvise'):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                for _, row, number in several:
                    file.seek(start + row * self.bytes_per_image)
                    if file.readinto(rows[number]) != self.bytes_per_image:
                        raise RunFailed(f'{path} is damaged (too short): remove it, and run the command again')

    def _finish(self, group: list[Draw], tokens: Tensor, tasks: list[Future]) -> Batch:
        for task in tasks:
            task.result()
        tokens = tokens.to(self._device)
        places = map(self._place, group)
        target = torch.stack([self._open(shard)[1][row] for shard, row in places]).to(self._device)
        first = tokens[:, 0] if self._class_token else None
        return Batch(tokens[:, 1:] if self._class_token else tokens, first, target)

    def _place(self, draw: Draw) -> tuple[int, int]:
        view = draw.epoch % self.views
        return view * self._shards_per_view + draw.index // self._shard, draw.index % self._shard

    def _open(self, shard: int) -> tuple[int, Tensor]:
        """Return the offset of the first row in the file of a shard, and the targets of its images."""
        with self._opening:
            if shard not in self._opened:
                path = self.folder / self._name(shard, 'tokens')
                try:
                    offset = np.load(path, mmap_mode='r').offset
                    self._opened[shard] = offset, torch.from_numpy(np.load(self.folder / self._name(shard, 'targets')))
                except (ValueError, EOFError) as error:
                    raise RunFailed(f'{path} is damaged ({error}): remove it, and run the command again') from error
            return self._opened[shard]

    def _images(self, shard: int) -> range:
        first = shard % self._shards_per_view * self._shard
        return range(first, min(first + self._shard, self.number))

    @staticmethod
    def _name(shard: int, kind: str) -> str:
        return f'{shard:06d}.{kind}.npy'


def fill(
    caches: Sequence[tuple[FeatureCache, ImageBatches]], backbone: Backbone, batch_size: int, seed: int, world: World
) -> None:
    """Write what is missing of several splits, every rank a part; a collective call.

    Raises:
        ValueError: If the features there are of another model, transform or data.
        RunFailed: If the disk is too small.
    """
    for cache, _ in caches:
        cache.check()
    needed = sum(cache.missing_bytes() for cache, _ in caches)
    total = sum(cache.number * cache.views * cache.bytes_per_image for cache, _ in caches)
    root = caches[0][0].folder.parent
    _logger.info(f'Cache {root}: {total:,} bytes of features, {needed:,} of them to write')
    world.barrier()  # every rank has seen the same shards before one is written
    missing = [cache.missing() for cache, _ in caches]
    try:
        if world.primary:
            for cache, _ in caches:
                cache.begin()
            if (free := shutil.disk_usage(root).free) < needed:
                raise OSError(f'only {free:,} bytes are free')
        world.barrier()
        for (cache, images), shards in zip(caches, missing, strict=True):
            cache.write(shards[world.rank :: world.size], backbone, images, batch_size, seed)
    except OSError as error:
        left = sum(cache.missing_bytes() for cache, _ in caches)
        raise RunFailed(
            f'--cache {root}: {error}; {left:,} more bytes are needed. Finished shards are kept: make room, and run '
            'the command again'
        ) from error
    world.barrier()


def data_digest(dataset: Any) -> str:
    """Return a digest of the images (names, sizes and times of their files) and labels of a split."""
    digest = hashlib.sha256(repr((len(dataset), class_to_index(dataset))).encode())
    records: Any = getattr(getattr(dataset, 'reader', None), 'dataset', None)
    if hasattr(records, '_fingerprint'):  # Hugging Face's digest of its files and columns
        digest.update(records._fingerprint.encode())
    elif hasattr(dataset, 'filename'):
        for index in range(len(dataset)):
            path = os.fspath(dataset.filename(index, absolute=True))
            found = os.stat(path) if os.path.exists(path) else None
            digest.update(repr((path, found and (found.st_size, found.st_mtime_ns))).encode())
    if isinstance(dataset, MultiLabelDataset):
        for part in range(3):  # image, class and value
            for block in dataset.annotations.blocks():
                digest.update(np.ascontiguousarray(block[part]).data)
        digest.update(repr(dataset.annotations.unlisted).encode())
    else:
        labels = class_indices(dataset)
        digest.update(b'' if labels is None else labels.tobytes())
    return digest.hexdigest()
