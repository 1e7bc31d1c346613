"""Images that cannot be read: named, counted, and either the end of the run or left out.

timm logs such an image by its index and takes the next one in its place, in evaluation too, where a score over other
images than those asked for is not that score.
"""

import csv
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_mldecoder.engine.checkpoint.files import write_atomically
from timm_mldecoder.engine.runtime.failure import RunFailed
from timm_mldecoder.engine.runtime.signals import DeafWorkerInit

_logger = logging.getLogger(__name__)

SKIP, ABORT = POLICIES = ('skip', 'abort')
FILE = 'bad_images.csv'
STAND_INS = 10  # as many in a row as timm tries: more are a fault of the disk, not of the files


class BadImage(NamedTuple):
    """A file that cannot be read, and why."""

    path: str
    reason: str


class StrictImageDataset(ImageDataset):
    """timm's data set of image files, in which one that cannot be read is an OSError rather than the next image."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            file, target = self.reader[index][:2]
            with file:
                image = Image.open(file)
                image = image.convert(self.input_img_mode or image.mode)
        except Exception as error:  # a damaged file makes PIL's decoders raise whatever they stumble over
            raise OSError(str(error)) from error
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


def strict(dataset: Dataset) -> Dataset:
    """A data set that raises an OSError for an image it cannot read; streamed ones deal with theirs themselves."""
    if type(dataset) is not ImageDataset:
        return dataset
    return StrictImageDataset(
        None,
        reader=dataset.reader,
        input_img_mode=dataset.input_img_mode,
        transform=dataset.transform,
        target_transform=dataset.target_transform,
    )


class Guarded(Dataset):
    """A data set that tells of the images it could not read instead of raising an error.

    Yields `(sample, bad)`, where the sample is None if neither the image nor any that may stand in for it can be read.

    Args:
        dataset: A map-style data set; unreadable images are OSErrors.
        stand_ins: How many of the images that follow an unreadable one are tried in its place.
    """

    def __init__(self, dataset: Any, stand_ins: int = 0) -> None:
        self.dataset = dataset
        self._stand_ins = stand_ins

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> tuple[Any, list[BadImage]]:
        bad = []
        first, *size = index if isinstance(index, tuple) else (index,)  # batches of changing sizes have pairs
        for place in range(first, first + self._stand_ins + 1):
            place %= len(self)
            try:
                return self.dataset[(place, *size) if size else place], bad
            except OSError as error:
                bad.append(BadImage(_path(self.dataset, place), str(error)))
        return None, bad


class CollateGood:
    """Collate the samples of a `Guarded` data set into `(batch, places, bad)`.

    `places` are those of the samples of the batch among the ones asked for.

    Args:
        collate: Makes a batch of samples.
        fewer: Whether a batch may have fewer of them; without, `batch` is None where one is missing.
    """

    def __init__(self, collate: Callable, fewer: bool) -> None:
        self._collate, self._fewer = collate, fewer

    def __call__(self, samples: list[tuple[Any, list[BadImage]]]) -> tuple[Any, list[int], list[BadImage]]:
        bad = [image for _, found in samples for image in found]
        places = [place for place, (sample, _) in enumerate(samples) if sample is not None]
        if not places or not self._fewer and len(places) < len(samples):
            return None, [], bad
        return self._collate([samples[place][0] for place in places]), places, bad


class GuardedEvalLoader:
    """The torch loader of an evaluation, wired anew to leave out unreadable images or to end the run for them.

    Args:
        loader: The loader to wire anew, of a map-style data set.
        policy: One of `POLICIES`.

    Attributes:
        bad_images: Those met in the present pass.
    """

    def __init__(self, loader: DataLoader, policy: str) -> None:
        self.dataset, self.sampler = loader.dataset, loader.sampler
        self.bad_images: list[BadImage] = []
        self._policy = policy
        self._loader = DataLoader(
            Guarded(loader.dataset),
            batch_sampler=loader.batch_sampler,
            num_workers=loader.num_workers,
            collate_fn=CollateGood(loader.collate_fn, fewer=True),
            pin_memory=loader.pin_memory,
            worker_init_fn=DeafWorkerInit(loader.worker_init_fn),
            persistent_workers=loader.persistent_workers,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Batches without the unreadable images and, where there were any, without the padding of distributed runs."""
        self.bad_images = []
        first = 0
        for batch, places, bad in self._loader:
            if bad:
                self._meet(bad)
            if self.bad_images:
                batch = self._without_padding(batch, [first + place for place in places])
            first += len(places) + len(bad)
            if batch is not None:
                yield batch

    def _without_padding(self, batch: Any, places: list[int]) -> Any:
        """Evaluators find the padding by counting samples, and would count too few once some have been left out."""
        limit = getattr(self.sampler, 'num_valid_samples', None)
        valid = len(places) if limit is None else sum(place < limit for place in places)
        return tuple(part[:valid] for part in batch) if valid else None

    def _meet(self, bad: list[BadImage]) -> None:
        if self._policy == ABORT:
            raise RunFailed(
                f'{bad[0].path} cannot be read ({bad[0].reason}); a score over fewer images would not be '
                f'that score, but "skip" for unreadable images gives it'
            )
        tell(bad)
        self.bad_images += bad


def guard_evaluation(loader: DataLoader, policy: str) -> 'DataLoader | GuardedEvalLoader':
    """The loader of an evaluation with `policy` for unreadable images; a streamed one as it is."""
    return loader if isinstance(loader.dataset, IterableDataset) else GuardedEvalLoader(loader, policy)


def cannot_go_on(bad: list[BadImage], policy: str) -> RunFailed:
    """The end of a run that was to stop at the first unreadable image, or found nothing but those."""
    path, reason = bad[-1]
    remedy = '--bad-image skip trains on without it' if policy == ABORT else f'nor can the {STAND_INS} before it'
    return RunFailed(f'{path} cannot be read ({reason}); {remedy}')


def tell(bad: list[BadImage]) -> None:
    """Log the path of each image."""
    for path, reason in bad:
        _logger.warning('Bad image left out: %s (%s)', path, reason)


def gather(bad: list[BadImage]) -> list[BadImage]:
    """Those of all processes, each file once; a collective call."""
    parts: list[Any] = [bad]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, bad)
    return list(dict.fromkeys(image for part in parts for image in part))


def record(bad: list[BadImage], folder: Path) -> None:
    """Add the images to the list in the folder of the run, each file once."""
    path = folder / FILE
    known = dict(csv.reader(io.StringIO(path.read_text()))) if path.exists() else {'path': 'reason'}
    text = io.StringIO()
    csv.writer(text).writerows({**known, **dict(bad)}.items())
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _path(dataset: Any, index: int) -> str:
    if not hasattr(dataset, 'filename'):
        return f'image {index} of the data set'
    return dataset.filename(index, absolute=True)
