"""torchvision's datasets that recipes use: Stanford-Cars, which is not in timm, and checks of the files of CIFAR."""

from pathlib import Path

from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, StanfordCars
from torchvision.datasets.utils import check_integrity

CIFAR = {'torch/cifar10': CIFAR10, 'torch/cifar100': CIFAR100}
CARS = 'torch/stanford_cars'
CARS_FILES = {
    'train': ['devkit/cars_meta.mat', 'devkit/cars_train_annos.mat', 'cars_train'],
    'test': ['devkit/cars_meta.mat', 'cars_test_annos_withlabels.mat', 'cars_test'],
}
CARS_SOURCE = 'the original site is gone; mirrors have the archives under the same names'


def check_cifar(name: str, root: str | None) -> None:
    """Raise a ValueError that names the first missing or damaged file of CIFAR, and where to get it."""
    dataset = CIFAR[name]
    folder = Path(root or '') / dataset.base_folder
    meta = (dataset.meta['filename'], dataset.meta['md5'])
    for file, md5 in (*dataset.train_list, *dataset.test_list, meta):
        path = folder / file
        if path.is_file() and check_integrity(str(path), md5):
            continue
        state = f'is damaged (its MD5 checksum is not {md5})' if path.is_file() else 'is missing'
        raise ValueError(f'--dataset {name}: {path} {state}; unpack {dataset.url} there, or pass --dataset-download')


def create_stanford_cars(root: str | None, split: str, download: bool = False) -> Dataset:
    """Stanford-Cars (196 classes) in torchvision's layout: `stanford_cars/{cars_train,cars_test,devkit}` under `root`.

    Raises:
        ValueError: If a file is missing, a download is requested, or scipy, which reads the annotations, is not
            installed.
    """
    part = 'train' if split in ('train', 'training') else 'test'
    for file in CARS_FILES[part]:
        path = Path(root or '') / 'stanford_cars' / file
        if not path.exists():
            flag = '--dataset-download cannot help, ' if download else ''
            raise ValueError(f'--dataset {CARS}: {path} is missing; {flag}{CARS_SOURCE}')
    try:
        import scipy.io  # noqa: F401 - torchvision needs it
    except ImportError as error:
        raise ValueError(f'--dataset {CARS} reads .mat files: pip install scipy') from error
    return StanfordCars(root, split=part)
