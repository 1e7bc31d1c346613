"""The one-cycle schedule gives torch's values, from any step on, and with timm's layer-wise decay."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from timm_mldecoder.train.optim import OneCycleScheduler

OPTIMIZERS = {
    'adam': lambda parameters: torch.optim.Adam(parameters, lr=1e-4),
    'sgd': lambda parameters: torch.optim.SGD(parameters, lr=0.007, momentum=0.9),
}


def make(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    return model, OPTIMIZERS[name](model.parameters())


def settings(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    group = optimizer.param_groups[0]
    return group['lr'], group['betas'][0] if 'betas' in group else group['momentum']


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize(
    ('num_steps', 'options', 'torchs'),
    [
        (30, {}, dict(pct_start=0.2)),
        (101, dict(warmup_fraction=0.33), dict(pct_start=0.33)),
        (40, dict(div_factor=100.0, final_div_factor=1e3), dict(pct_start=0.2, div_factor=100.0, final_div_factor=1e3)),
    ],
)
def test_every_step_has_torchs_learning_rate_and_momentum(name, num_steps, options, torchs):
    (_, ours), (_, theirs) = make(name), make(name)
    schedule = OneCycleScheduler(ours, num_steps, **options)
    reference = OneCycleLR(theirs, theirs.param_groups[0]['lr'], total_steps=num_steps, **torchs)
    for step in range(num_steps):
        assert settings(ours) == pytest.approx(settings(theirs), rel=1e-12)
        theirs.step()
        if step + 1 < num_steps:
            reference.step()
        schedule.step(step // 10)  # the end of an epoch changes nothing
        schedule.step_update(step + 1)
    assert settings(ours) == pytest.approx(settings(theirs), rel=1e-12)  # one call past the end


def test_it_depends_on_the_number_of_steps_alone():
    (_, once), (_, resumed) = make('adam'), make('adam')
    OneCycleScheduler(once, 30).step_update(17)
    schedule = OneCycleScheduler(resumed, 30)
    for step in (3, 29, 17):
        schedule.step_update(step)
    assert settings(once) == settings(resumed)


def test_layer_decay_scales_the_whole_cycle():
    model = nn.Linear(3, 2)
    groups = [dict(params=[model.weight], lr_scale=0.5), dict(params=[model.bias])]
    optimizer = torch.optim.Adam(groups, lr=1.0)
    schedule = OneCycleScheduler(optimizer, 30)
    for step in range(30):
        schedule.step_update(step)
        low, high = (group['lr'] for group in optimizer.param_groups)
        assert low == pytest.approx(0.5 * high)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match='3 steps'):
        OneCycleScheduler(make('adam')[1], 3)
    with pytest.raises(ValueError, match='1.5'):
        OneCycleScheduler(make('adam')[1], 100, warmup_fraction=1.5)
    with pytest.raises(ValueError, match='Adagrad'):
        OneCycleScheduler(torch.optim.Adagrad(nn.Linear(2, 2).parameters()), 100)
