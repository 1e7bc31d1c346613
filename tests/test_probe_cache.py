"""Cached features: what is read is what was written, in any order, and no file stays open."""

import os
from functools import partial

import numpy as np
import pytest
import torch

from timm_mldecoder.loading.randomness import Draw
from timm_mldecoder.probe import cache as module
from timm_mldecoder.probe.cache import FeatureCache
from timm_mldecoder.probe.features import scoring_groups, training_groups
from timm_mldecoder.runtime.errors import RunFailed

NUMBER, SHAPE, VIEWS, SHARD = 50, (3, 5), 2, 7


@pytest.fixture
def features():
    """Tokens of each view and image, [V, N, T, F], exact in float16."""
    return torch.randn(VIEWS, NUMBER, *SHAPE).half().float()


@pytest.fixture(params=[False, True], ids=['tokens', 'class token'])
def written(request, features, tmp_path):
    """A function that opens a complete cache."""
    settings = dict(number=NUMBER, shape=SHAPE, views=VIEWS, shard=SHARD, device=torch.device('cpu'))
    open_cache = partial(FeatureCache, tmp_path / 'train', {}, class_token=request.param, **settings)

    def images(groups):
        for group in groups:
            yield (
                torch.stack([features[draw.epoch, draw.index] for draw in group]),
                torch.tensor([draw.index for draw in group]),
            )

    def backbone(tokens):
        return (tokens[:, 1:], tokens[:, 0]) if request.param else (tokens, None)

    cache = open_cache()
    cache.begin()
    cache.write(cache.missing(), backbone, images, 4, 0)
    return open_cache


def assert_read(cache, groups, features):
    for group, batch in zip(groups, cache.read(groups), strict=True):
        first = [] if batch.class_token is None else [batch.class_token.unsqueeze(1)]
        expected = torch.stack([features[draw.epoch % VIEWS, draw.index] for draw in group])
        assert torch.equal(torch.cat([*first, batch.tokens], dim=1), expected)
        assert batch.target.tolist() == [draw.index for draw in group]
        assert batch.tokens.dtype == torch.float16


@pytest.mark.parametrize('ahead', [0, 2**26], ids=['one batch ahead', 'all batches ahead'])
@pytest.mark.parametrize('read_bytes', [1, 2**20], ids=['a row per task', 'a batch per task'])
def test_rows_are_those_that_were_written_in_any_order(written, features, ahead, read_bytes, monkeypatch):
    monkeypatch.setattr(module, 'AHEAD_BYTES', ahead)
    monkeypatch.setattr(module, 'READ_BYTES', read_bytes)
    cache = written()
    for epoch in range(3):
        assert_read(cache, training_groups(NUMBER, 8, 0, epoch), features)
    assert_read(cache, scoring_groups(NUMBER, 8), features)
    assert_read(cache, [[Draw(index, 0, 0, 0)] * 3 for index in (4, 4, 20)], features)
    assert list(cache.read([])) == []


def test_a_batch_stays_as_it_is_while_later_ones_are_read(written, features):
    groups = scoring_groups(NUMBER, 8)
    batches = list(written().read(groups))
    expected = features[0] if batches[0].class_token is None else features[0, :, 1:]
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), expected)


def test_no_file_stays_open(written):
    before = len(os.listdir('/proc/self/fd')) if os.path.exists('/proc/self/fd') else pytest.skip('needs /proc')
    batches = written().read(training_groups(NUMBER, 8, 0, 0))
    kept = []
    for batch in batches:
        kept.append(batch)
        assert len(os.listdir('/proc/self/fd')) <= before + module.READERS + 1  # mapping a file takes two
    del batches
    assert len(os.listdir('/proc/self/fd')) == before


def test_a_damaged_shard_is_named(written, tmp_path):
    path = tmp_path / 'train' / '000003.tokens.npy'
    size = path.stat().st_size
    for cut in (1, size):
        os.truncate(path, size - cut)
        with pytest.raises(RunFailed, match=f'{path}.*remove'):
            list(written().read(scoring_groups(NUMBER, 8)))
    cache = written()
    np.save(path, np.zeros((SHARD, *SHAPE), dtype=np.float16))
    list(cache.read(scoring_groups(NUMBER, 8)))
    os.truncate(path, size - 1)
    with pytest.raises(RunFailed, match=f'{path}.*remove'):
        list(cache.read(scoring_groups(NUMBER, 8)))
