"""EMA weights of runs that are too short for their decay."""

import pytest
import torch
from runs import build, train

from timm_mldecoder.checkpoint.read import read_checkpoint
from timm_mldecoder.metrics import MultiLabelEvaluator


@pytest.mark.parametrize(
    ('flags', 'warmup', 'warned'),
    [
        ('--epochs 3', True, True),
        ('--epochs 3 --model-ema-force-cpu', True, True),
        ('--epochs 3 --no-model-ema-warmup', False, True),
        ('--epochs 3 --model-ema-decay 0.9998', False, True),
        ('--epochs 9 --model-ema-decay 0.9', False, False),
        ('--epochs 3 --better-of-ema', False, False),
        ('--epochs 3 --model-ema-warmup', True, False),
        ('--epochs 2000', False, False),
        ('--epochs 2000 --stop-epoch 3', True, True),
    ],
)
def test_a_run_too_short_for_its_decay_is_told_and_by_default_made_right(data, tmp_path, caplog, flags, warmup, warned):
    run = build(data, tmp_path, '--model-ema', *flags.split())
    assert run.state.task.trainable_module_ema.use_warmup == run.options.model_ema_warmup == warmup
    steps = run.epochs * run.steps_per_epoch
    numbers = f'{run.options.model_ema_decay**steps:.0%} of the initial weights'
    assert (numbers in caplog.text and f'the {steps} optimizer steps' in caplog.text) == warned
    run.close()


def test_the_ema_weights_of_a_short_run_are_those_of_a_trained_model(data, tmp_path):
    folder = train(data, tmp_path, '--epochs', '3', '--model-ema', '--opt', 'adamw', '--lr', '1e-2', '--seed', '5')
    first = build(data, tmp_path / 'first', '--seed', '5')
    content = read_checkpoint(folder / 'last.pth.tar')
    weights = dict(first.state.task.get_trainable_module().named_parameters())

    def moved(key: str) -> float:
        return sum((content[key][name] - weight.detach()).norm() for name, weight in weights.items()).item()

    assert moved('state_dict_ema') > 0.3 * moved('state_dict') > 0
    first.close()


@pytest.mark.parametrize('size', [1, 7, 40])
def test_an_evaluator_can_change_its_thresholds_afterwards(size):
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(40, 5, generator=generator)
    target = torch.randint(-1, 2, (40, 5), generator=generator).float()
    thresholds = torch.rand(5, generator=generator)
    changed, expected = MultiLabelEvaluator(max_samples=33), MultiLabelEvaluator(max_samples=33, threshold=thresholds)
    for evaluator in (changed, expected):
        for batch in zip(logits.split(size), target.split(size), strict=True):
            evaluator.update(*batch)
    before = changed.compute()
    changed.use_thresholds(thresholds)
    assert changed.compute() == pytest.approx(expected.compute()) != pytest.approx(before)
