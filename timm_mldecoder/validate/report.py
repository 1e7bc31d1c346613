"""What `validate.py --report` writes: the page, its pictures of the images scored worst, and `scores.csv`.

Scores stay on the rank that saw the image. Rank 0 gets sums over images, the curves of a few classes, the pictures of
the worst images, and the rows of `scores.csv` a few thousand at a time.
"""

import heapq
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.task import ClassificationEvaluator
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from timm_mldecoder.data.images import image_path
from timm_mldecoder.distributed.world import World
from timm_mldecoder.evaluation.evaluate import create_autocast
from timm_mldecoder.flags.options import ReportOptions
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.loading.create_loaders import DataConfig, create_eval_loader
from timm_mldecoder.loading.loader import EvalLoader
from timm_mldecoder.metrics import MultiLabelEvaluator
from timm_mldecoder.models.attention_maps import attention_maps, attention_overlay, denormalise, thumbnail
from timm_mldecoder.runtime.files import utf8, write_atomically, write_csv
from timm_mldecoder.validate import report_page
from timm_mldecoder.validate.report_scores import Entry, MultiLabelScores, SingleLabelScores

_logger = logging.getLogger(__name__)

PAGE, SCORES = 'index.html', 'scores.csv'
WORST = 24  # images
MAPS = 3  # attention maps per image
SIDE = 160  # of a picture, in pixels
ROUND = 4096  # rows of scores.csv that a rank sends at once


class Worst(NamedTuple):
    """An image that was scored wrongly, by its index in the dataset; sorts by its loss."""

    loss: float
    index: int  # type: ignore[assignment]  # hides tuple.index
    name: str
    entries: list[Entry]


@dataclass
class Report:
    """Sees the scores of an evaluation, and writes its page and `scores.csv` once all are there."""

    options: ReportOptions
    dataset: Any
    names: list[str] | None  # of the classes of the dataset
    evaluator: ClassificationEvaluator  # of the same scores
    loader: EvalLoader
    max_samples: int | None  # images of this rank that are not padding, None for all
    world: World

    def __post_init__(self) -> None:
        self._scores: SingleLabelScores | MultiLabelScores = SingleLabelScores()
        if isinstance(self.evaluator, MultiLabelEvaluator):
            self._scores = MultiLabelScores(self.evaluator)

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in logits [B, C] and targets."""
        self._scores.update(output, target)

    def write(self, model: nn.Module, config: DataConfig, metrics: dict[str, float | str]) -> None:
        """Write the page and `scores.csv`; a collective call, after the metrics were computed.

        The model is as it was built, neither compiled nor wrapped.
        """
        o, world, scores = self.options, self.world, self._scores
        folder, num_classes = Path(o.report), max(world.all_gather(scores.num_classes))
        names = [utf8(name) for name in (self.names or [])[:num_classes]]
        names += [str(index) for index in range(len(names), num_classes)]
        indices = self._indices()
        scores.finish(names, len(indices), world)
        if world.primary:
            folder.mkdir(exist_ok=True)
        rows = self._rows(scores.header(), scores.rows(), indices)
        if world.primary:
            write_csv(folder / SCORES, rows)
        else:
            for _ in rows:
                pass
        sections = scores.sections()
        mistakes = self._mistakes(model, config, names, indices)
        if not world.primary:
            return
        if mistakes:
            text = 'The images with the highest loss among those with a wrong prediction or a missed label.'
            sections.append(report_page.section('Worst errors', text, report_page.gallery(mistakes), 'errors'))
        facts = {'Dataset': utf8(f'{o.dataset or ""} {o.data_dir or ""} {o.split}'.strip())}
        facts |= {'Checkpoint': utf8(o.checkpoint)} if o.checkpoint else {}
        facts |= {name: f'{value:.3f}' if isinstance(value, float) else str(value) for name, value in metrics.items()}
        html = report_page.render(f'Results of {utf8(o.model)}', facts, sections)
        write_atomically(folder / PAGE, lambda file: file.write(html.encode()))
        _logger.info(f'Report written: {folder / PAGE} and {folder / SCORES}')

    def _indices(self) -> Sequence[int]:
        """Return the dataset index of each image of this rank that was scored; consecutive numbers for a stream."""
        if isinstance(self.dataset, IterableDataset):
            number = self._scores.num_images if self.max_samples is None else self.max_samples
            return range(self.world.rank, number * self.world.size, self.world.size)
        sampler = self.loader.sampler
        indices = range(len(self.dataset)) if sampler is None else list(sampler)[: self.max_samples]
        bad = {image.path for image in self.loader.bad_images}
        return [index for index in indices if image_path(self.dataset, index) not in bad] if bad else indices

    def _name(self, index: int) -> str:
        if isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, 'filename'):
            return f'image {index} of the dataset'
        return utf8(str(self.dataset.filename(index)))

    def _rows(self, header: list[str], rows: Iterator[list], indices: Sequence[int]) -> Iterator[Sequence[Any]]:
        """Yield the rows of `scores.csv` in the order of the dataset on rank 0; a collective iterator."""
        yield header
        size = max((max(found) + 1 for found in self.world.all_gather(indices[-1:]) if found), default=0)
        own = zip(indices, rows, strict=False)
        index, row = next(own, (size, None))
        for end in range(ROUND, size + ROUND, ROUND):
            chunk = []
            while row is not None and index < end:
                chunk.append((index, [self._name(index), *row]))
                index, row = next(own, (size, None))
            every = self.world.all_gather(chunk)
            if self.world.primary:
                yield from (row for _, row in sorted((pair for part in every for pair in part), key=itemgetter(0)))

    def _mistakes(
        self, model: nn.Module, config: DataConfig, names: list[str], indices: Sequence[int]
    ) -> list[report_page.Mistake]:
        """Return the worst images, with the attention of what was wrong where the head has it; a collective call."""
        if isinstance(self.dataset, IterableDataset):
            _logger.info('no pictures of errors: a stream cannot be read at an image again')
            return []
        own = heapq.nlargest(WORST, self._scores.losses())
        found = [Worst(loss, indices[row], self._name(indices[row]), self._scores.entries(row)) for loss, row in own]
        worst = sorted((item for part in self.world.all_gather(found) for item in part), reverse=True)[:WORST]
        pictures = self._pictures(model, config, names, worst)
        every = {place: item for part in self.world.all_gather(pictures) for place, item in part.items()}
        return [
            report_page.Mistake(item.name, f'loss {item.loss:.3f}', every[place])
            for place, item in enumerate(worst)
            if place in every
        ]

    def _pictures(
        self, model: nn.Module, config: DataConfig, names: list[str], worst: list[Worst]
    ) -> dict[int, list[report_page.Picture]]:
        """Return the pictures of some of the worst images; the ranks share them."""
        if not worst:
            return {}
        chosen = _Chosen(self.dataset, [item.index for item in worst])
        options = self.options.replace(workers=0)
        crop: dict[str, Any] = dict(bad_image='skip', remedy='', crop_border_pixels=options.crop_border_pixels)
        loader = create_eval_loader(options, chosen, config, self.world, batch_size=1, **crop)
        autocast = create_autocast(options, self.world.device)
        attends = any(isinstance(module, MLDecoder) for module in model.modules())
        found: dict[int, list[report_page.Picture]] = {}
        model.eval()
        for images, number in loader.batches():
            assert isinstance(images, Tensor)
            place = int(number)
            item = worst[place]
            entries = item.entries[:MAPS]
            pixels = denormalise(images[0].float().cpu(), config['mean'], config['std'])
            captions = [f'{"missed" if e.missed else "wrong"}: {names[e.index]} ({e.score:.2f})' for e in entries]
            kinds = ['missed' if entry.missed else 'wrong' for entry in entries]
            maps: Any = []
            if attends:
                classes = torch.tensor([entry.index for entry in entries], device=images.device)
                try:
                    with autocast():
                        maps = attention_maps(model, images.expand(len(entries), -1, -1, -1), classes).float().cpu()
                except ValueError as error:  # features of several scales, or tokens without a grid
                    _logger.info(f'no attention in the report: {error}')
                    attends = False
            shown = [report_page.Picture(thumbnail(pixels, SIDE), '' if len(maps) else ', '.join(captions))]
            shown += [
                report_page.Picture(attention_overlay(pixels, attention, SIDE), caption, kind)
                for attention, caption, kind in zip(maps, captions, kinds, strict=False)
            ]
            found[place] = shown
        return found


class _Chosen(Dataset):
    """Some images of a dataset, with their place among them for a target."""

    def __init__(self, dataset: Any, indices: list[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        return self.dataset[self.indices[place]][0], place

    def filename(self, place: int, absolute: bool = False) -> str:
        return image_path(self.dataset, self.indices[place])

    def __setattr__(self, name: str, value: Any) -> None:
        # the loader sets the transform, which belongs to the dataset that reads the images
        setattr(self.dataset, name, value) if name == 'transform' else super().__setattr__(name, value)


def report_folder(folder: str, name: str) -> Path:
    """Return the folder of one of several models, which is in `folder` whatever its name is; creates `folder`."""
    Path(folder).mkdir(exist_ok=True)
    return Path(folder, ''.join(c if c.isalnum() or c in '-_.' else '_' for c in name).strip('.') or '_')
