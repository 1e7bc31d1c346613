"""torchvision's data sets that recipes here use: Stanford-Cars, which timm lacks, and the files that CIFAR needs."""

from pathlib import Path

from torch.utils.data import Dataset

_CIFAR = 'unpack https://www.cs.toronto.edu/~kriz/{}.tar.gz there, or pass --dataset-download'
_CARS = "torchvision's layout is expected; the original site is gone, mirrors keep the archives under the same names"
# name: its folder, the files of each split, and where they come from
FILES = {
    'torch/cifar10': (
        'cifar-10-batches-py',
        {'train': ['data_batch_1'], 'test': ['test_batch']},
        _CIFAR.format('cifar-10-python'),
    ),
    'torch/cifar100': (
        'cifar-100-python',
        {'train': ['meta', 'train'], 'test': ['meta', 'test']},
        _CIFAR.format('cifar-100-python'),
    ),
    'torch/stanford_cars': (
        'stanford_cars',
        {
            'train': ['devkit/cars_meta.mat', 'devkit/cars_train_annos.mat', 'cars_train'],
            'test': ['devkit/cars_meta.mat', 'cars_test_annos_withlabels.mat', 'cars_test'],
        },
        _CARS,
    ),
}


def check_files(name: str, root: str | None, split: str) -> None:
    """Raise a ValueError that names the first missing file of a data set in `FILES`, and where to get it."""
    folder, splits, source = FILES[name]
    for file in splits[_torch_split(split)]:
        path = Path(root or '') / folder / file
        if not path.exists():
            raise ValueError(f'--dataset {name}: {path} is missing; {source}')


def create_stanford_cars(root: str, split: str) -> Dataset:
    """Stanford-Cars (196 classes) in torchvision's layout: `stanford_cars/{cars_train,cars_test,devkit}` under `root`.

    Raises:
        ValueError: If scipy, which reads its annotations, is not installed.
    """
    try:
        import scipy.io  # noqa: F401 - torchvision needs it
    except ImportError as error:
        raise ValueError('--dataset torch/stanford_cars reads .mat files: pip install scipy') from error
    from torchvision.datasets import StanfordCars

    return StanfordCars(root, split=_torch_split(split))


def _torch_split(split: str) -> str:
    return 'train' if split in ('train', 'training') else 'test'
