"""Images per second of `python -m timm_mldecoder.predict` beside a plain loop over the same loader.

    python -m benchmarks.predict [--device cuda]

Both read the same JPEG files with the same transform, batch size and workers, and compute the same scores. The plain
loop keeps them in a list; predict writes labels in finished parts.
"""

import contextlib
import io
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Step, markdown, paired_times, parser
from timm_mldecoder.checkpoints.folders import save_folder
from timm_mldecoder.predict import main as predict

HEADER = ('loop', 'img/s', 'of the plain loop')


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=3)
    flags.add_argument('--model', default='resnet18')
    flags.add_argument('--img-size', type=int, default=128)
    flags.add_argument('--batch-size', type=int, default=32)
    flags.add_argument('--images', type=int, default=1024)
    flags.add_argument('--workers', type=int, default=1)
    args = flags.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = timm.create_model(args.model, num_classes=10, ml_decoder=True).eval()
        config = {**resolve_data_config({}, model=model), 'input_size': (3, args.img_size, args.img_size)}
        save_folder(model, folder / 'model', data_config=config)
        _write_images(folder / 'images', args)
        loops = {'plain': _plain(folder / 'images', model, config, args), 'predict': _predict(folder, args)}
        times = paired_times(loops, args.rounds, args.device, workers=args.workers)
    plain, ours = (args.images / min(times[loop]) for loop in ('plain', 'predict'))
    return markdown(HEADER, [['plain', plain, '1.000'], ['`predict`', ours, f'{ours / plain:.3f}']])


class _Images(Dataset):
    def __init__(self, folder: Path, transform) -> None:
        self.paths, self.transform = sorted(folder.iterdir()), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert('RGB'))


def _plain(folder: Path, model: torch.nn.Module, config: dict, args: Namespace) -> Step:
    """The loop that one would write by hand."""
    loader = DataLoader(
        _Images(folder, create_transform(**config, is_training=False)), args.batch_size, num_workers=args.workers
    )
    model = model.to(args.device)

    @torch.inference_mode()
    def step() -> list[torch.Tensor]:
        return [model(images.to(args.device)).softmax(dim=1).cpu() for images in loader]

    return step


def _predict(folder: Path, args: Namespace) -> Step:
    out = folder / 'labels.csv'
    command = [str(folder / 'images'), '--model', f'local-dir:{folder / "model"}', '--out', str(out), '-b']
    command += [str(args.batch_size), '-j', str(args.workers), '--device', args.device]

    def step() -> None:
        out.unlink(missing_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):  # standard output is for the table
            predict(command)

    return step


def _write_images(folder: Path, args: Namespace) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(args.images):
        pixels = rng.integers(0, 256, (args.img_size // 8, args.img_size // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((2 * args.img_size,) * 2).save(folder / f'{number:05d}.jpg')


if __name__ == '__main__':
    print(main())
