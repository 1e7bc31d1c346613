"""Images per second of `python -m timm_mldecoder.predict` beside a plain loop over the same loader.

    python -m benchmarks.predict [--device cuda]

Both have the model and the list of images already, read the same JPEG files with the same transform, batch size and
workers, and compute the same scores. The plain loop keeps the best label of each image in a list; predict writes labels
in finished parts and joins them. What the command does before, importing torch excepted, has a row of its own.
"""

import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Step, markdown, paired_times, parser, ratio
from timm_mldecoder.checkpoint.folders import save_folder
from timm_mldecoder.distributed.world import World
from timm_mldecoder.loading.loader import Placement
from timm_mldecoder.modeling.load import LoadedModel, load
from timm_mldecoder.predict.parts import Parts
from timm_mldecoder.predict.predict import predict
from timm_mldecoder.predict.sources import SourceDataset, open_source

HEADER = ('loop', 'seconds', 'img/s', 'of the plain loop')


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=3)
    flags.add_argument('--model', default='resnet18')
    flags.add_argument('--img-size', type=int, default=128)
    flags.add_argument('--batch-size', type=int, default=32)
    flags.add_argument('--images', type=int, default=1024)
    flags.add_argument('--part-size', type=int, default=1024)
    flags.add_argument('--workers', type=int, default=1)
    args = flags.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = timm.create_model(args.model, num_classes=10, ml_decoder=True).eval()
        config = {**resolve_data_config({}, model=model), 'input_size': (3, args.img_size, args.img_size)}
        save_folder(model, folder / 'model', data_config=config)
        _write_images(folder / 'images', args)
        start = time.perf_counter()
        loaded = load(str(folder / 'model'), device=args.device)
        dataset = SourceDataset(open_source(folder / 'images'), loaded.transform)
        startup = time.perf_counter() - start
        loops = {
            'plain': _plain(folder / 'images', loaded.model, loaded.transform, args),
            'predict': _predict(folder / 'labels.csv', loaded, dataset, args),
        }
        times = paired_times(loops, args.rounds, args.device, workers=args.workers)
    best = {loop: min(found) for loop, found in times.items()}
    rows = [
        ['plain', best['plain'], args.images / best['plain'], '1.000'],
        ['`predict`', best['predict'], args.images / best['predict'], f'{ratio(times["plain"], times["predict"]):.3f}'],
        ['load the model, list the images', startup, None, None],
    ]
    return markdown(HEADER, rows)


class _Images(Dataset):
    def __init__(self, folder: Path, transform) -> None:
        self.paths, self.transform = sorted(folder.iterdir()), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert('RGB'))


def _plain(folder: Path, model: torch.nn.Module, transform, args: Namespace) -> Step:
    """The loop that one would write by hand."""
    loader = DataLoader(_Images(folder, transform), args.batch_size, num_workers=args.workers)

    @torch.inference_mode()
    def step() -> list[torch.Tensor]:
        return [model(images.to(args.device)).softmax(dim=1).max(dim=1).indices.cpu() for images in loader]

    return step


def _predict(out: Path, loaded: LoadedModel, dataset: SourceDataset, args: Namespace) -> Step:
    world = World(torch.device(args.device))

    def step() -> None:
        out.unlink(missing_ok=True)
        parts = Parts(out, len(dataset), args.part_size, {'classes': loaded.class_names}, {})
        settings = dict(batch_size=args.batch_size, workers=args.workers, placement=Placement(world.device))
        predict(loaded, dataset, parts, world, **settings)
        parts.finish()

    return step


def _write_images(folder: Path, args: Namespace) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(args.images):
        pixels = rng.integers(0, 256, (args.img_size // 8, args.img_size // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((2 * args.img_size,) * 2).save(folder / f'{number:05d}.jpg')


if __name__ == '__main__':
    print(main())
