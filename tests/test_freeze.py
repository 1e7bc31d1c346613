"""--freeze-backbone trains the head alone, with every kind of head, and --unfreeze-epoch the rest later."""

import shlex

import pytest
import torch
from runs import MODEL, assert_same_run, build, call, fit_until_stopped, last, train
from test_reliability_resume import stop_at

from timm_mldecoder.train.loop import fit

FROZEN = shlex.split('--epochs 2 --opt adamw --lr 1e-2 --weight-decay 0.1 --warmup-epochs 0 --freeze-backbone')
HEADS = {
    'pooling': '',
    'ML-Decoder': '--use-ml-decoder-head 1 --decoder-embedding 32',
    'cosine': '--cosine-classifier 10',
}


def head_names(model):
    head = model.get_classifier()
    return {name for name, module in model.named_modules() if module is head}.pop()


@pytest.mark.parametrize('head', HEADS)
def test_the_backbone_stays_bit_equal_and_the_head_learns(data, tmp_path, head):
    run = build(
        data, tmp_path, *FROZEN, *HEADS[head].split(), '--model-ema', '--model-ema-decay', '0.5', '--drop-path', '0.3'
    )
    before = {name: tensor.clone() for name, tensor in run.eval_model.state_dict().items()}
    slot = head_names(run.eval_model)
    trained = {id(parameter) for group in run.state.optimizer.param_groups for parameter in group['params']}
    assert trained == {id(parameter) for parameter in run.eval_model.get_classifier().parameters()}
    fit(run)
    content = last(tmp_path / 'run')
    for key in ('state_dict', 'state_dict_ema'):
        for name, tensor in content[key].items():
            if not name.startswith(slot):
                assert torch.equal(tensor, before[name]), name
    learned = [name for name in before if name.startswith(slot) and name.endswith('weight')]
    assert any(not torch.equal(content['state_dict'][name], before[name]) for name in learned)


def test_no_graph_of_the_backbone_is_kept(data, tmp_path):
    run = build(data, tmp_path, *FROZEN)
    seen = []
    run.eval_model.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    fit(run)
    assert seen and not any(seen)


def test_the_backbone_is_trained_from_its_epoch_on_and_a_resumed_run_is_equal(data, tmp_path):
    flags = [*FROZEN, '--epochs', '3', '--unfreeze-epoch', '1', '--layer-decay', '0.8']
    run = build(data, tmp_path / 'whole', *flags)
    before = run.eval_model.conv1[0].weight.detach().clone()
    stages = []
    run.state.task.register_forward_pre_hook(
        lambda *_: stages.append((run.state.epoch, torch.equal(run.eval_model.conv1[0].weight, before)))
    )
    fit(run)
    assert all(equal for epoch, equal in stages if epoch == 0)
    assert not any(equal for epoch, equal in stages if epoch == 2)

    stopped = build(data, tmp_path, *flags)
    stop_at(stopped, 9)
    assert fit_until_stopped(stopped) == 143
    assert_same_run(train(data, tmp_path, *flags, '--resume', 'auto'), tmp_path / 'whole' / 'run')


@pytest.mark.slow
def test_two_ranks_freeze_and_unfreeze(data, tmp_path):
    flags = [data, *MODEL, *FROZEN, '--epochs', '2', '-b', '2', '--unfreeze-epoch', '1', '--output', tmp_path]
    call('train.py', *flags, '--experiment', 'run', processes=2).check_returncode()
    buffers = [rank['buffers'][False] for rank in last(tmp_path / 'run')['timm_mldecoder']['ranks']]
    assert all(torch.equal(tensor, buffers[1][name]) for name, tensor in buffers[0].items())


def test_the_head_has_a_learning_rate_of_its_own(data, tmp_path):
    run = build(data, tmp_path, '--epochs', '1', '--lr', '0.1', '--sched', 'cosine', '--head-lr-scale', '5')
    head = {id(parameter) for parameter in run.eval_model.get_classifier().parameters()}
    run.step_schedule(metric=None)
    for group in run.state.optimizer.param_groups:
        own = {id(parameter) for parameter in group['params']} <= head
        assert group.get('lr_scale', 1.0) == (5.0 if own else 1.0)
