"""Squash-resize and Cutout, and their position in the training transform of timm."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torchvision.transforms import Compose, RandomChoice, Resize

from timm_mldecoder.data.transforms import Cutout, cut_out, squash

GREY = Image.new('RGB', (40, 20), (7, 7, 7))


def painted(image: Image.Image) -> np.ndarray:
    return (np.asarray(image) != 7).any(-1)


def test_cutout_paints_one_rectangle_of_one_colour_anywhere():
    random.seed(0)
    colours, areas = set(), []
    for _ in range(200):
        image = Cutout(0.5)(GREY)
        mask = painted(image)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # one full rectangle
        assert len(rows) <= 10 and len(columns) <= 20
        colour = np.unique(np.asarray(image)[mask], axis=0)
        assert len(colour) == 1
        colours.add(tuple(colour[0]))
        areas.append(mask.sum())
    assert len(colours) > 190
    assert max(areas) == 200 and min(areas) < 70  # complete in the middle, cut off at a corner
    assert not painted(GREY).any()  # the original is not changed


def test_cutout_has_a_probability_and_takes_grey_images():
    random.seed(0)
    share = np.mean([painted(Cutout(0.5, probability=0.3)(GREY)).any() for _ in range(500)])
    assert 0.25 < share < 0.35
    assert Cutout(0.5)(GREY.convert('L')).mode == 'L'


@pytest.mark.parametrize('prefetch', [True, False])
def test_squash_keeps_the_whole_image(prefetch):
    transform = create_transform((10, 10), is_training=True, use_prefetcher=prefetch, hflip=0, color_jitter=None,
                                 mean=(0, 0, 0), std=(1, 1, 1))  # fmt: skip
    wide = Image.new('RGB', (40, 20))
    wide.paste((255, 0, 0), (0, 0, 20, 20))
    result = squash(transform)(wide)
    red = torch.as_tensor(np.asarray(result))[0].float()
    assert red.shape == (10, 10)
    assert (red[:, :4] == red.max()).all() and (red[:, 6:] == 0).all()


def test_the_steps_come_in_the_published_order():
    transform = create_transform(16, is_training=True, auto_augment='rand-m9-n2', hflip=0, interpolation='bilinear')
    steps = cut_out(squash(transform), Cutout(0.5)).transforms
    assert [type(step) for step in steps[:3]] == [Resize, Cutout, RandAugment]
    assert steps[2:] == transform.transforms[1:]


def test_random_interpolation_chooses_a_filter_each_time():
    transform = squash(create_transform(16, is_training=True), 'random')
    assert isinstance(transform.transforms[0], RandomChoice)
    assert transform(GREY).shape == (3, 16, 16)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match='1.5'):
        Cutout(1.5)
    with pytest.raises(ValueError, match='-0.1'):
        Cutout(0.5, probability=-0.1)
    with pytest.raises(ValueError, match='Resize'):
        squash(Compose([Resize(3)]))
