"""Sharpness-aware minimization: the steps of a plain loop, and no trace of a skipped one."""

import copy
import os
import shlex
import signal

import pytest
import timm
import torch
from marks import few
from runs import BATCHES, MOVING, assert_same_run, build, call, fit_until_stopped, train
from torch import nn

from timm_mldecoder.flags import parse_train
from timm_mldecoder.train.loop import fit
from timm_mldecoder.train.optim import perturbed

RHO, RATE, DECAY = 0.05, 0.02, 0.8
PLAIN = shlex.split(f"""
    --epochs 1 --opt momentum --lr {RATE} --weight-decay 0 --sched none --warmup-epochs 0 --smoothing 0
    --model-ema --model-ema-decay {DECAY} --clip-grad 0.5 --sam {RHO}
""")


def sam_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_of) -> None:
    """A step of the paper's algorithm 1, on a copy of the model in place of the model itself."""
    loss_of(model).backward()
    norm = sum(parameter.grad.double().pow(2).sum() for parameter in model.parameters()).sqrt()
    worse = copy.deepcopy(model)
    with torch.no_grad():
        for moved, parameter in zip(worse.parameters(), model.parameters(), strict=True):
            moved += RHO * parameter.grad / norm.float()
    loss_of(worse).backward()
    for moved, parameter in zip(worse.parameters(), model.parameters(), strict=True):
        parameter.grad = moved.grad
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()


def assert_close(model: nn.Module, reference: nn.Module) -> None:
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        # the norm of all gradients and the sums of two ranks are rounded in another order
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('scaler', [False, True])
def test_steps_are_those_of_a_plain_loop(data, tmp_path, scaler):
    run = build(data, tmp_path, *PLAIN)
    if scaler:  # float16 is scaled on a GPU only; the scaler does the same anywhere
        run.state.scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    model = run.state.task.get_trainable_module()
    reference, averaged, batches = copy.deepcopy(model), copy.deepcopy(model), []
    run.state.task.register_forward_pre_hook(lambda _, inputs: batches.append([x.clone() for x in inputs]))
    fit(run)

    assert len(batches) == 2 * BATCHES
    optimizer = torch.optim.SGD(reference.parameters(), lr=RATE, momentum=0.9)
    reference.train()
    for step, ((images, target), again) in enumerate(zip(batches[::2], batches[1::2], strict=True)):
        assert torch.equal(images, again[0]) and torch.equal(target, again[1])

        def loss_of(model, images=images, target=target):
            return nn.functional.cross_entropy(model(images), target)

        sam_step(reference, optimizer, loss_of)
        with torch.no_grad():
            for average, parameter in zip(averaged.parameters(), reference.parameters(), strict=True):
                average.lerp_(parameter, 1 - DECAY if step else 1)  # timm's begins with a copy
    assert_close(model, reference)
    assert_close(run.state.task.get_trainable_module(ema=True).module, averaged)
    for name, buffer in reference.named_buffers():  # running statistics are those of the first pass alone
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)


def test_both_passes_are_in_mixed_precision(data, tmp_path):
    run, seen = build(data, tmp_path, *PLAIN, '--amp', '--val-split', ''), []
    model = run.state.task.get_trainable_module()
    model.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = model.fc.weight.detach().clone()
    fit(run)
    assert seen == [torch.bfloat16] * (2 * BATCHES)
    assert model.fc.weight.dtype == torch.float32 and not torch.equal(model.fc.weight, before)


@pytest.mark.parametrize('nonfinite', few(['second loss', 'first gradient', 'first loss', 'second gradient'], 2))
def test_a_skipped_step_leaves_no_trace(data, tmp_path, nonfinite):
    run = build(data, tmp_path, *PLAIN)
    task, model, states = run.state.task, run.state.task.get_trainable_module(), []
    passes = {'first': 3, 'second': 4}  # of the second step
    when, what = nonfinite.split()

    def snapshot(*_):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def nonfinite_loss(module, inputs, result):
        if what == 'loss' and len(states) == passes[when]:
            result['loss'] = result['loss'] * float('nan')

    def nonfinite_gradient(gradient):
        return gradient / 0 if what == 'gradient' and len(states) == passes[when] else gradient

    task.register_forward_pre_hook(snapshot)
    task.register_forward_hook(nonfinite_loss)
    next(model.parameters()).register_hook(nonfinite_gradient)
    fit(run)
    first, second, third, fourth = states[:7:2]
    assert all(torch.equal(second[name], third[name]) for name in second)
    for before, after in ((first, second), (third, fourth)):
        assert not torch.equal(before['fc.weight'], after['fc.weight'])
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_weights_are_restored_to_the_last_bit_whatever_happens(dtype):
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).to(dtype)
    model[1].bias.requires_grad_(False)
    model(torch.randn(6, 5, dtype=dtype)).square().sum().backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match='within'), perturbed(model, 3.0):
        moved = [(new.detach() - old).float() for new, old in zip(model.parameters(), before, strict=True)]
        length = torch.cat([step.flatten() for step in moved]).norm().item()
        assert length == pytest.approx(3.0, rel=2 * torch.finfo(dtype).eps)
        assert not moved[-1].any(), 'what is not trained does not move'
        raise RuntimeError('within')
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
    model(torch.zeros(1, 5, dtype=dtype)).mul(0).sum().backward()
    with perturbed(model, 3.0):
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True)), 'no gradient'


def test_a_run_stopped_between_the_two_passes_resumes_to_the_last_bit(data, tmp_path):
    flags = [*MOVING, '--sam', '0.1']
    whole = train(data, tmp_path / 'whole', *flags)
    run = build(data, tmp_path, *flags)
    passes = iter(range(1, 1000))

    def stop(module, _):
        if module.training and next(passes) == 2 * BATCHES + 4:
            os.kill(os.getpid(), signal.SIGTERM)

    run.state.task.get_trainable_module().register_forward_pre_hook(stop)
    assert fit_until_stopped(run) == 143
    assert (tmp_path / 'run' / 'recovery-1-2.pth.tar').exists()
    assert_same_run(train(data, tmp_path, *flags, '--resume', 'auto'), whole)


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one(data, tmp_path):
    flags = shlex.split('--model test_vit --img-size 160 --num-classes 3 --device cpu -j 0 -b 3')
    flags += [*PLAIN, '--val-split', '', '--output', tmp_path, tmp_path / 'saved']
    call('tests/programs/sam_rank.py', data, *flags, processes=2).check_returncode()
    first, second = (torch.load(tmp_path / f'saved.{rank}') for rank in range(2))
    assert all(torch.equal(value, second['after'][name]) for name, value in first['after'].items())

    reference = timm.create_model('test_vit', num_classes=3).train()
    reference.load_state_dict(first['before'])
    optimizer = torch.optim.SGD(reference.parameters(), lr=RATE, momentum=0.9)
    for one, two in zip(first['batches'][::2], second['batches'][::2], strict=True):
        images, target = (torch.cat(pair) for pair in zip(one, two, strict=True))
        sam_step(reference, optimizer, lambda model, x=images, y=target: nn.functional.cross_entropy(model(x), y))
    finished = timm.create_model('test_vit', num_classes=3)
    finished.load_state_dict(first['after'])
    assert_close(finished, reference)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--sam 0.05 --grad-accum-steps 2', '--sam .*--grad-accum-steps 2'),
        ('--sam 0.05 --opt adahessian', '--sam .*--opt adahessian'),
        ('--sam 0.05 --opt lookahead_adahessian', '--opt lookahead_adahessian'),
        ('--sam -1', '--sam -1'),
    ],
)
def test_flags_that_contradict_it_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_train(['DIR', *flags.split()])
