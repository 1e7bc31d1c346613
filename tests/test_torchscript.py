"""`--torchscript`: models without an ML-Decoder head train and score as without it."""

import json
import shlex

import pytest
import timm
import torch
from runs import assert_same_run, build, last, summary, train

import validate
from timm_mldecoder.flags import parse_train, parse_validate
from timm_mldecoder.modeling.create import script

FLAGS = shlex.split("""
    --epochs 2 --opt sgd --lr 0.01 --warmup-epochs 0 --model-ema --model-ema-decay 0.8 --grad-accum-steps 2
    --mixup 0.2 --reprob 0.3
""")


@pytest.fixture(scope='module')
def teacher(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher')
    return str(train(data, folder, '--epochs', '1', '--model', 'test_efficientnet') / 'last.pth.tar')


@pytest.mark.parametrize('flags', ['', '--kd-distill-type feature'])
def test_a_scripted_model_trains_as_a_plain_one(data, tmp_path, teacher, flags):
    flags = [*FLAGS, *flags.split(), *(['--kd-checkpoint', teacher] if '--kd' in flags else [])]
    plain = train(data, tmp_path / 'plain', *flags)
    run = build(data, tmp_path / 'script', *flags, '--torchscript', '--fuser', 'te')
    assert isinstance(run.state.task.get_trainable_module(), torch.jit.ScriptModule)
    assert isinstance(run.eval_model, torch.jit.ScriptModule)
    run.close()
    scripted = train(data, tmp_path / 'script', *flags, '--torchscript', '--fuser', 'te')
    for ours, theirs in zip(summary(scripted), summary(plain), strict=True):
        assert {name: float(value) for name, value in ours.items()} == pytest.approx(
            {name: float(value) for name, value in theirs.items()}, rel=1e-3
        )
    contents = last(scripted), last(plain)
    for key in ('state_dict', 'state_dict_ema'):
        assert contents[0][key].keys() == contents[1][key].keys()
    assert contents[0].get('task_state', {}).keys() == contents[1].get('task_state', {}).keys()


@pytest.mark.slow
def test_a_scripted_run_resumes_to_the_last_bit(data, tmp_path):
    flags = [*FLAGS, '--torchscript']
    whole = train(data, tmp_path / 'whole', *flags)
    train(data, tmp_path, *flags, '--stop-epoch', '1')
    assert_same_run(train(data, tmp_path, *flags, '--resume', 'auto'), whole)


def test_validate_scores_a_scripted_model_as_a_plain_one(data, tmp_path, capsys):
    checkpoint = train(data, tmp_path, *FLAGS) / 'last.pth.tar'
    scores = []
    for flags in ([], ['--torchscript']):
        capsys.readouterr()
        validate.main([str(data), '-j', '0', '--device', 'cpu', '--checkpoint', str(checkpoint), *flags])
        scores.append(json.loads(capsys.readouterr().out.split('--result\n')[1]))
    assert scores[0] == scores[1]


@pytest.mark.parametrize('parse', [parse_train, parse_validate])
@pytest.mark.parametrize('flags', ['--use-ml-decoder-head 1', '--model-kwargs ml_decoder=True', '--torchcompile'])
def test_what_it_cannot_be_with_is_refused_by_name(parse, flags):
    with pytest.raises(ValueError, match='--torchscript .*--torchcompile'):
        parse(['DIR', '--torchscript', *flags.split()])


@pytest.mark.parametrize('flags', ['--sync-bn', '--split-bn', '--freeze-backbone'])
def test_what_it_does_not_work_with_in_training_is_refused_by_name(flags):
    with pytest.raises(ValueError, match=f'--torchscript .*{flags}'):
        parse_train(['DIR', '--torchscript', '--resplit', flags])


def test_a_stored_head_is_refused_with_what_compiles_it(data, tmp_path):
    with pytest.raises(ValueError, match='--torchscript.*--torchcompile'):
        script(timm.create_model('test_resnet', ml_decoder=True))
    checkpoint = train(data, tmp_path, '--epochs', '1', '--use-ml-decoder-head', '1') / 'last.pth.tar'
    with pytest.raises(ValueError, match='--torchscript.*--torchcompile'):
        validate.main([str(data), '-j', '0', '--device', 'cpu', '--torchscript', '--checkpoint', str(checkpoint)])
