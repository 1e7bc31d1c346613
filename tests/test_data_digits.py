"""The embedded digits: real images, disjoint splits, the same bytes every time, and a command that writes them."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.digits import (
    KINDS,
    NAMES,
    SPLITS,
    SceneOptions,
    compose_scene,
    load_split,
    main,
    scenes,
    write_digit_scenes,
    write_digits,
)
from timm_mldecoder.data import create_dataset


def contents(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob('*')) if path.is_file()}


def test_the_folder_holds_every_digit_once_in_its_class(tmp_path):
    write_digits(tmp_path)
    written = Counter()
    for split in SPLITS:
        dataset = create_dataset('', str(tmp_path), split, input_img_mode='L')
        for image, target in dataset:
            written[target, np.asarray(image).tobytes()] += 1
    images, classes = load_digits(return_X_y=True)
    pixels = np.round(images * (255 / 16)).astype(np.uint8)
    assert written == Counter((digit, image.tobytes()) for digit, image in zip(classes, pixels, strict=True))
    assert len(create_dataset('', str(tmp_path), 'train')) == 1442


def test_validation_and_test_have_a_tenth_of_every_class_each():
    train, validation, test = (np.bincount(load_split(split)[1]) for split in SPLITS)
    for held_out in (validation, test):
        assert (np.abs(held_out / (train + validation + test) - 0.1) < 0.01).all()
    with pytest.raises(ValueError, match="'val'"):
        load_split('val')


def test_scenes_are_a_csv_dataset_determined_by_the_arguments(tmp_path):
    options = dict(num_train=30, num_validation=20, num_test=10)
    first, same, other, cluttered = (
        contents(write_digit_scenes(tmp_path / name, **options, **more))
        for name, more in (
            ('first', dict(seed=3)),
            ('same', dict(seed=3)),
            ('other', dict(seed=4)),
            ('cluttered', dict(seed=3, clutter=5)),
        )
    )
    assert first == same
    assert first != other and first != cluttered
    for split, count in (('train', 30), ('validation', 20), ('test', 10)):
        dataset = create_dataset('csv', str(tmp_path / 'first'), split)
        assert len(dataset) == count
        assert dataset.class_names == list(NAMES)
        assert all(image.size == (64, 64) and target.sum() >= 1 for image, target in dataset)


def test_a_scene_has_the_digits_it_names_each_in_its_own_place():
    images, classes = np.full((20, 8, 8), 255, dtype=np.uint8), np.arange(20) % 10  # white squares, counted by area
    options = SceneOptions(sides=(10, 10), max_digits=6)
    for seed in range(20):
        scene, placed = compose_scene(images, classes, np.random.default_rng(seed), options)
        assert 1 <= len(placed) <= 6
        assert (scene == 255).sum() == 100 * len(placed)


def test_targets_of_digits_and_pairs_describe_the_same_scenes():
    both = [list(scenes('test', 50, SceneOptions(kind=kind, min_digits=2))) for kind in KINDS]
    assert any(target.any() for _, target in both[1])
    for (scene, digits), (same, pairs) in zip(*both, strict=True):
        assert np.array_equal(scene, same)
        assert [bool(pair) for pair in pairs] == [bool(digits[k] and digits[(k + 1) % 10]) for k in range(10)]
    assert KINDS['pairs'][0] == 'zero and one' and KINDS['pairs'][9] == 'nine and zero'


@pytest.mark.parametrize('options', [
    dict(sides=(10, 70)), dict(sides=(0, 5)), dict(kind='words'), dict(min_digits=7), dict(max_classes=11),
    dict(max_classes=0), dict(clutter=-1),
])  # fmt: skip
def test_scene_options_out_of_range_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f'{name}.*{value[-1] if name == "sides" else value}'):
        SceneOptions(**options)


def test_the_command_writes_either_set(tmp_path, capsys):
    main([str(tmp_path / 'scenes'), '--scenes'])
    assert capsys.readouterr().out == f'wrote 3000 images to {tmp_path / "scenes"}\n'
    main([str(tmp_path / 'digits')])
    assert capsys.readouterr().out == f'wrote 1797 images to {tmp_path / "digits"}\n'
    with Image.open(tmp_path / 'digits' / 'train' / '0' / '0000.png') as image:
        assert image.size == (8, 8)
