"""Learning rates and seeds of one head in one computation: the numbers of each run on its own."""

from functools import partial

import pytest
import torch
from torch import nn

from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import train_options
from timm_mldecoder.models.probes import PROBES
from timm_mldecoder.probe.features import Batch
from timm_mldecoder.probe.options import HeadSpec
from timm_mldecoder.probe.train import Run, Trainer

F, C, STEPS = 16, 5, 6
CPU = torch.device('cpu')


def train(name, rates, seeds, batches, **flags):
    """Train; the losses [steps, runs], and the runs."""
    options = train_options(**{'data_dir': '.', 'device': 'cpu', 'task': 'multilabel', 'opt': 'adamw', **flags})
    runs = [Run(HeadSpec(name, name, {}), rate, seed) for rate in rates for seed in seeds]
    build = partial(PROBES[name], F, C, **({'dim': 16, 'num_heads': 4} if 'decoder' in name else {}))
    trainer = Trainer(options, runs, lambda spec: build(), nn.BCEWithLogitsLoss(), lambda: None, World(CPU))
    losses = [torch.stack(trainer.step(batch, step, 1 / (step + 1))) for step, batch in enumerate(batches)]
    return torch.stack(losses), runs


@pytest.fixture
def batches():
    torch.manual_seed(0)
    tokens = torch.randn(STEPS, 8, 9, F)
    return [Batch(x, x[:, 0], (torch.rand(8, C) < 0.3).float()) for x in tokens]


@pytest.mark.parametrize('name', PROBES)
@pytest.mark.parametrize('flags', [{}, {'opt': 'lamb', 'clip_grad': 0.1}], ids=['adamw', 'lamb, clipped'])
def test_runs_together_have_the_numbers_of_each_alone(name, flags, batches):
    rates, seeds = (1e-3, 3e-2), (0, 1)
    losses, runs = train(name, rates, seeds, batches, **flags)
    assert len({tuple(row) for row in losses.T.tolist()}) == 4  # no run is another one
    for index, run in enumerate(runs):
        alone, (other,) = train(name, (run.rate,), (run.seed,), batches, **flags)
        torch.testing.assert_close(losses[:, index], alone[:, 0], rtol=1e-6, atol=0)
        logits = (each.head.eval()(batches[0].tokens, batches[0].class_token) for each in (run, other))
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)
        for buffer, expected in zip(run.head.buffers(), other.head.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', ['linear', 'max', 'class_token', 'logsumexp'])
def test_tokens_are_pooled_and_normalized_once_for_all_runs(name, batches, monkeypatch):
    calls = []
    features = type(PROBES[name](F, C)).features
    monkeypatch.setattr(type(PROBES[name](F, C)), 'features', lambda *args: calls.append(0) or features(*args))
    train(name, (1e-3, 1e-2), (0, 1, 2), batches)
    assert len(calls) == STEPS


def test_a_diverged_run_leaves_the_others_as_they_are(batches):
    losses, _ = train('efficient_probing', (1e-3, 1e30), (0,), batches)
    alone, _ = train('efficient_probing', (1e-3,), (0,), batches)
    assert not losses[-1, 1].isfinite()
    torch.testing.assert_close(losses[:, 0], alone[:, 0], rtol=1e-6, atol=0)
