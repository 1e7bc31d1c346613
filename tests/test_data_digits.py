"""The embedded digits: real images, disjoint splits, the same bytes every time, and a command that writes them."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from timm_mldecoder.data import create_dataset
from timm_mldecoder.data.digits import NAMES, compose_scene, load_split, main, write_digit_scenes, write_digits


def contents(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob('*')) if path.is_file()}


def test_the_folder_holds_every_digit_once_in_its_class(tmp_path):
    write_digits(tmp_path)
    written = Counter()
    for split in ('train', 'validation'):
        dataset = create_dataset('', str(tmp_path), split, input_img_mode='L')
        for image, target in dataset:
            written[target, np.asarray(image).tobytes()] += 1
    images, classes = load_digits(return_X_y=True)
    pixels = np.round(images * (255 / 16)).astype(np.uint8)
    assert written == Counter((digit, image.tobytes()) for digit, image in zip(classes, pixels, strict=True))
    assert len(create_dataset('', str(tmp_path), 'train')) == 1442


def test_validation_has_a_fifth_of_every_class():
    train, validation = (np.bincount(load_split(split)[1]) for split in ('train', 'validation'))
    assert (np.abs(validation / (train + validation) - 0.2) < 0.01).all()


def test_scenes_are_a_csv_data_set_determined_by_the_seed(tmp_path):
    options = dict(num_train=30, num_validation=20)
    first, same, other = (
        contents(write_digit_scenes(tmp_path / name, seed=seed, **options))
        for name, seed in (('first', 3), ('same', 3), ('other', 4))
    )
    assert first == same
    assert first != other
    for split, count in (('train', 30), ('validation', 20)):
        dataset = create_dataset('csv', str(tmp_path / 'first'), split)
        assert len(dataset) == count
        assert dataset.class_names == list(NAMES)
        assert all(image.size == (64, 64) and target.sum() >= 1 for image, target in dataset)


def test_a_scene_shows_the_digits_it_names_each_in_its_own_place():
    images = np.full((4, 8, 8), 255, dtype=np.uint8)  # white squares, to be counted by area
    for seed in range(20):
        scene, placed = compose_scene(images, np.random.default_rng(seed), size=64, sides=(10, 10), max_digits=6)
        assert 1 <= len(placed) <= 6
        assert (scene == 255).sum() == 100 * len(placed)


def test_scenes_of_the_two_splits_share_no_digit(tmp_path, monkeypatch):
    shown = {}

    def spy(images, rng, *arguments):
        scene, placed = compose_scene(images, rng, *arguments)
        shown.setdefault(len(images), set()).update(images[index].tobytes() for index in placed)
        return scene, placed

    monkeypatch.setattr('timm_mldecoder.data.digits.compose_scene', spy)
    write_digit_scenes(tmp_path, num_train=100, num_validation=100)
    train, validation = shown.values()
    assert len(train) > 100 and len(validation) > 100
    assert not train & validation


def test_digits_that_cannot_fit_are_an_error(tmp_path):
    with pytest.raises(ValueError, match='70.*64'):
        write_digit_scenes(tmp_path, sides=(10, 70))


def test_the_command_writes_either_set(tmp_path, capsys):
    main([str(tmp_path / 'scenes'), '--scenes'])
    assert capsys.readouterr().out == f'wrote 2500 images to {tmp_path / "scenes"}\n'
    command = [sys.executable, '-m', 'timm_mldecoder.data.digits', str(tmp_path / 'digits')]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f'wrote 1797 images to {tmp_path / "digits"}\n'
    with Image.open(tmp_path / 'digits' / 'train' / '0' / '0000.png') as image:
        assert image.size == (8, 8)
