"""Knowledge distillation: timm's tasks with teachers from everywhere, and all that a run promises holds with them."""

import os
import shlex
import signal
import time

import pytest
import timm
import torch
from marks import few
from runs import BATCHES, assert_same, assert_same_run, build, call, fit_until_stopped, last, start, summary, train
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch.nn import functional as F

import validate
from timm_mldecoder.flags import parse_train
from timm_mldecoder.train.loop import fit

HEAD = shlex.split('--use-ml-decoder-head 1 --decoder-embedding 32 --ml-decoder-kwargs dropout=0')
FEATURE = ['--kd-distill-type', 'feature']
DISTILLED = shlex.split(
    '--model deit_tiny_distilled_patch16_224 --model-kwargs img_size=32 depth=1 embed_dim=48 --kd-distill-type token'
)
#: A run in which everything changes that a resumed run needs.
MOVING = shlex.split("""
    --epochs 3 --opt adamw --lr 1e-2 --warmup-epochs 0 --model-ema --model-ema-decay 0.8 --grad-accum-steps 2
    --mixup 0.2 --cutmix 1 --reprob 0.3 --drop 0.1
""")
# no batch norm, no augmentation, no dropout: what is left is the same for any number of ranks
PLAIN = shlex.split("""
    --num-classes 3 --device cpu --model test_vit --img-size 160 -j 0 --epochs 2 --warmup-epochs 0 --opt sgd
    --lr 0.02 --no-aug --smoothing 0 --model-ema --model-ema-decay 0.5 --grad-accum-steps 2
""")


@pytest.fixture(scope='module')
def checkpoint(data, tmp_path_factory):
    """A teacher with an ML-Decoder head, trained by train.py on images with a normalization of its own."""
    flags = shlex.split(
        '--epochs 1 --lr 0.05 --warmup-epochs 0 --model-ema --model-ema-decay 0.9998 --mean 0.4 --std 0.3'
    )
    return str(train(data, tmp_path_factory.mktemp('teacher'), *flags, *HEAD) / 'last.pth.tar')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A teacher of another family, with its own classifier, as a model folder."""
    path = tmp_path_factory.mktemp('folder') / 'teacher'
    torch.manual_seed(1)
    model = timm.create_model('test_efficientnet', num_classes=3)
    with torch.no_grad():
        model.train()(torch.rand(16, 3, 32, 32))  # statistics of BatchNorm that let outputs differ
    save_for_hf(model, path)
    return f'local-dir:{path}'


def cross_entropy(logits, target):
    return F.cross_entropy(logits.double(), target, label_smoothing=0.1)


def divergence(logits, teacher, temperature):
    """Return T^2 KL(teacher || student) of softened probabilities (arXiv 1503.02531), the mean over the batch."""
    ours, theirs = ((x.double() / temperature).softmax(1) for x in (logits, teacher))
    return temperature**2 * (theirs * (theirs / ours).log()).sum(1).mean()


def learned(kind, logits, teacher):
    """Return the loss of the second classifier (arXiv 2012.12877, section 4)."""
    return F.cross_entropy(logits.double(), teacher.argmax(1)) if kind == 'hard' else divergence(logits, teacher, 4)


WEIGHTS = {
    '': (1, 1),
    '--task-loss-weight 0.3': (0.3, 0.7),
    '--distill-loss-weight 5': (1, 5),
    '--distill-loss-weight 5 --task-loss-weight 0': (0, 5),
}


@pytest.mark.parametrize('flags', few(WEIGHTS, ['', '--distill-loss-weight 5']))
@pytest.mark.parametrize('student', [[], HEAD], ids=['gap', 'head'])
def test_the_loss_of_logits_is_that_of_the_paper(data, tmp_path, checkpoint, student, flags):
    flags = shlex.split(f'{flags} --kd-temperature 3 --mean 0.5 0.45 0.4 --std 0.2')
    run = build(data, tmp_path, *student, '--kd-checkpoint', checkpoint, *flags)
    task = run.state.task
    images, target = next(iter(run.train_loader.epoch(0)))
    run.close()
    logits = task.get_trainable_module().train()(images)
    pixels = images * 0.2 + torch.tensor([0.5, 0.45, 0.4]).view(1, 3, 1, 1)
    teacher = task.teacher.model((pixels - 0.4) / 0.3)
    task_weight, weight = WEIGHTS[shlex.join(flags[:-8])]
    expected = task_weight * cross_entropy(logits, target) + weight * divergence(logits, teacher, 3)
    torch.testing.assert_close(task(images, target)['loss'].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('student', [[], HEAD], ids=['gap', 'head'])
@pytest.mark.parametrize('head', few([False, True], 1))
def test_the_loss_of_features_compares_pooled_ones(data, tmp_path, checkpoint, folder, student, head):
    teacher = ['--kd-checkpoint', checkpoint] if head else ['--kd-model-name', folder]
    run = build(data, tmp_path, *student, *teacher, *FEATURE, '--distill-loss-weight', '2', '--mean', '0.4')
    task = run.state.task
    images, target = next(iter(run.train_loader.epoch(0)))
    run.close()
    module = task.get_trainable_module().train()
    features = module.student.forward_features(images)
    logits = module.student.forward_head(features)
    pooled = features.mean((2, 3))
    assert (module.projection is None) == head, 'only the widths of the folder differ'
    pooled = pooled if head else module.projection(pooled)
    own = task.teacher.normalize_input(images)
    teacher = task.teacher.model
    theirs = teacher.forward_head(teacher.forward_features(own), pre_logits=True)
    expected = cross_entropy(logits, target) + 2 * F.mse_loss(pooled.double(), theirs.double())
    torch.testing.assert_close(task(images, target)['loss'].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_the_second_classifier_of_a_distilled_model_learns_from_the_teacher(data, tmp_path, folder, kind):
    run = build(data, tmp_path, *DISTILLED, '--kd-model-name', folder, '--kd-token-distill-type', kind)
    task = run.state.task
    images, target = next(iter(run.train_loader.epoch(0)))
    run.close()
    own, distilled = task.get_trainable_module().train()(images)
    teacher = task.teacher.model(task.teacher.normalize_input(images))
    expected = cross_entropy(own, target) + learned(kind, distilled, teacher)
    torch.testing.assert_close(task(images, target)['loss'].double(), expected, rtol=1e-4, atol=1e-6)
    mean = run.eval_model.eval()(images)
    assert mean.shape == own.shape, 'evaluated as one model'


@pytest.mark.parametrize('model', ['test_resnet', 'deit_tiny_distilled_patch16_224'])
@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_beside_a_head_a_linear_classifier_learns_from_the_teacher(data, tmp_path, folder, kind, model):
    flags = [*DISTILLED, '--kd-model-name', folder, '--kd-token-distill-type', kind, *HEAD, '--model', model]
    run = build(data, tmp_path, *flags, *(['--model-kwargs', ''] if model == 'test_resnet' else []))
    task = run.state.task
    images, target = next(iter(run.train_loader.epoch(0)))
    run.close()
    student, second = (task.get_trainable_module().train().get_submodule(name) for name in ('student', 'projection'))
    features = student.forward_features(images)
    distilled = second(student.forward_head(features, pre_logits=True))
    teacher = task.teacher.model(task.teacher.normalize_input(images))
    expected = cross_entropy(student(images), target) + learned(kind, distilled, teacher)
    torch.testing.assert_close(task(images, target)['loss'].double(), expected, rtol=1e-4, atol=1e-6)
    assert run.eval_model is student


@pytest.mark.parametrize(
    'flags', few([FEATURE, ['--amp'], [], [*HEAD, '--channels-last'], ['--model-dtype', 'bfloat16']], 2), ids=' '.join
)
def test_a_teacher_stays_as_it_is_and_out_of_checkpoints(data, tmp_path, folder, flags):
    run = build(data, tmp_path, '--epochs', '1', '--lr', '0.05', '--kd-model-name', folder, *flags)
    teacher = run.state.task.teacher.model
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    modes, dtypes = set(), set()

    def record(module, inputs, output):
        modes.add(module.training)
        dtypes.add(output.dtype)

    teacher.conv_stem.register_forward_hook(record)
    fit(run)
    assert modes == {False}
    assert dtypes == {torch.bfloat16 if flags in (['--amp'], ['--model-dtype', 'bfloat16']) else torch.float32}
    assert_same(dict(teacher.state_dict()), before)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    content = last(tmp_path / 'run')
    student = timm.create_model('test_resnet', num_classes=3, ml_decoder=False)
    if flags[:2] != HEAD[:2]:
        assert content['state_dict'].keys() == student.state_dict().keys()
    assert not any('teacher' in name for name in content['state_dict'])
    stepped = {id(p) for group in run.state.optimizer.param_groups for p in group['params']}
    assert stepped.isdisjoint(map(id, teacher.parameters()))
    assert summary(tmp_path / 'run')[-1]['train_loss']


def stop_within_the_second_epoch(run):
    passes = iter(range(1, 1000))

    def stop(module, _):
        if module.training and next(passes) == BATCHES + 3:
            os.kill(os.getpid(), signal.SIGTERM)

    run.state.task.get_trainable_module().register_forward_pre_hook(stop)


@pytest.mark.parametrize(
    'flags',
    [
        pytest.param(HEAD, id='logit', marks=pytest.mark.slow),
        pytest.param(FEATURE, id='feature'),
        pytest.param(DISTILLED, id='token', marks=pytest.mark.slow),
        pytest.param([*DISTILLED, *HEAD], id='token and head', marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_within_an_epoch_resumes_to_the_last_bit(data, tmp_path, folder, flags):
    flags = [*MOVING, *flags, '--kd-model-name', folder]
    whole = train(data, tmp_path / 'whole', *flags)
    run = build(data, tmp_path, *flags)
    stop_within_the_second_epoch(run)
    assert fit_until_stopped(run) == 143
    assert_same_run(train(data, tmp_path, *flags, '--resume', 'auto'), whole)
    content = last(whole)
    projected = 'feature' in flags or {*DISTILLED, *HEAD} <= {*flags}
    assert ('task_state' in content) == ('task_state_ema' in content) == projected


def test_the_student_is_evaluated_as_in_training_without_its_teacher(data, tmp_path, folder, capsys):
    path = train(data, tmp_path, *HEAD, *FEATURE, '--epochs', '1', '--kd-model-name', folder) / 'last.pth.tar'
    capsys.readouterr()
    validate.main([str(data), '-j', '0', '--device', 'cpu', '--checkpoint', str(path)])
    assert f'"top1": {summary(path.parent)[-1]["eval_top1"]}' in capsys.readouterr().out


def test_a_frozen_backbone_stays_while_head_and_projection_learn(data, tmp_path, folder):
    flags = ['--epochs', '1', '--lr', '0.05', '--warmup-epochs', '0', *FEATURE, '--kd-model-name', folder]
    run = build(data, tmp_path, *flags, '--freeze-backbone')
    module = run.state.task.get_trainable_module()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fit(run)
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {'student.fc.weight', 'student.fc.bias', 'projection.weight', 'projection.bias'}


def test_weights_are_read_from_a_file_of_them(data, tmp_path):
    model = timm.create_model('test_efficientnet', num_classes=3)
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    flags = ['--kd-checkpoint', str(tmp_path / 'weights.safetensors')]
    run = build(data, tmp_path, *flags, '--kd-model-name', 'test_efficientnet')
    assert_same(dict(run.state.task.teacher.model.state_dict()), dict(model.state_dict()))
    run.close()
    with pytest.raises(ValueError, match='--kd-model-name'):
        build(data, tmp_path, *flags)


def test_a_teacher_that_does_not_fit_is_refused(data, tmp_path, checkpoint, folder):
    def refused(message, *flags):
        with pytest.raises(ValueError, match=message):
            build(data, tmp_path, '--num-classes', '3', *flags)

    save_for_hf(timm.create_model('vit_tiny_patch16_224', num_classes=3), tmp_path / 'vit')
    save_for_hf(timm.create_model('test_resnet', num_classes=4), tmp_path / 'four')
    refused('--kd-model-name local-dir:.*does not take images', '--kd-model-name', f'local-dir:{tmp_path}/vit')
    refused('4 classes, the student 3', '--kd-model-name', f'local-dir:{tmp_path}/four')
    refused('--kd-model-name local-dir:.*nowhere', '--kd-model-name', f'local-dir:{tmp_path}/nowhere')
    refused('--kd-checkpoint .*class 0', '--kd-checkpoint', checkpoint, '--class-map', write_map(tmp_path, '102'))
    refused('--kd-teacher-feature-dim 5', '--kd-model-name', folder, *FEATURE, '--kd-teacher-feature-dim', '5')
    refused('--kd-student-feature-dim 5', '--kd-model-name', folder, *FEATURE, '--kd-student-feature-dim', '5')
    refused('--kd-distill-type token', '--kd-model-name', folder, '--kd-distill-type', 'token')
    # features have no classes
    others = ['--kd-checkpoint', checkpoint, '--class-map', write_map(tmp_path, '102')]
    for flags in (['--kd-model-name', f'local-dir:{tmp_path}/four'], others):
        build(data, tmp_path, *flags, *FEATURE).close()


def write_map(folder, order):
    path = folder / 'classes.txt'
    path.write_text('\n'.join(f'class_{index}' for index in order))
    return str(path)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--kd-model-name resnet', '--kd-model-name resnet'),
        ('--kd-model-name resnet18 --task multilabel', '--kd-model-name resnet18.*--task'),
        ('--kd-model-name resnet18 --task-loss-weight 1.5', '--task-loss-weight 1.5.*--distill-loss-weight'),
        ('--kd-model-name resnet18 --kd-temperature 0', '--kd-temperature 0'),
        ('--kd-model-name resnet18 --kd-loss-type mse', '--kd-loss-type'),
        ('--kd-model-name resnet18 --kd-distill-type token --torchscript', 'token .*--torchscript'),
        ('--kd-checkpoint nowhere.pth', '--kd-checkpoint nowhere.pth'),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_train(['DIR', *flags.split()])


@pytest.mark.slow
def test_ranks_start_from_the_same_weights_and_exchange_no_gradients_of_the_teacher(data, tmp_path, folder):
    flags = [data, *PLAIN, '-b', '3', *FEATURE, '--kd-model-name', folder, '--output', tmp_path, tmp_path / 'start']
    process = call('tests/programs/start_of_rank.py', *flags, processes=2)
    assert process.returncode == 0, process.stderr[-3000:]
    first, second = (torch.load(tmp_path / f'start.{rank}') for rank in (0, 1))
    assert_same(first, second)
    assert_same(first['ema'], first['model'])


@pytest.mark.slow
@pytest.mark.parametrize('flags', [HEAD, FEATURE], ids=['logit', 'feature'])
def test_two_ranks_train_as_one_and_resume_after_a_kill(data, tmp_path, flags):
    torch.manual_seed(1)
    save_for_hf(timm.create_model('test_vit2', num_classes=3, img_size=160, embed_dim=48), tmp_path / 'teacher')
    flags = [data, *PLAIN, *flags, '--kd-model-name', f'local-dir:{tmp_path}/teacher', '--output', tmp_path]
    two = call('train.py', *flags, '-b', '3', '--experiment', 'two', processes=2)
    assert two.returncode == 0, two.stderr[-3000:]
    one = call('tests/programs/as_two_ranks.py', *flags, '-b', '6', '--experiment', 'one')
    assert one.returncode == 0, one.stderr[-3000:]
    for ours, theirs in zip(summary(tmp_path / 'two'), summary(tmp_path / 'one'), strict=True):
        assert {name: float(value) for name, value in ours.items()} == pytest.approx(
            {name: float(value) for name, value in theirs.items()}, rel=1e-5, abs=1e-6
        )

    killed = [*flags, '-b', '3', '--experiment', 'killed', '--recovery-interval', '1', '--resume', 'auto']
    process = start('train.py', *killed, log=tmp_path / 'log', processes=2)
    while not list((tmp_path / 'killed').glob('recovery*')):
        assert process.poll() is None, (tmp_path / 'log').read_text()[-3000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    again = call('train.py', *killed, processes=2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same_run(tmp_path / 'killed', tmp_path / 'two')


@pytest.mark.slow
@pytest.mark.parametrize('flags', [HEAD, FEATURE, DISTILLED, [*DISTILLED, *HEAD]], ids=' '.join)
def test_compiled_runs_have_the_losses_of_others(data, tmp_path, folder, flags):
    plain = '--epochs 2 --opt sgd --lr 0.01 --model-ema --model-ema-decay 0.9998 --kd-model-name'
    flags = [*plain.split(), folder, *flags]
    plain = summary(train(data, tmp_path / 'plain', *flags))
    run = build(data, tmp_path, *flags, '--torchcompile', 'aot_eager')
    fit(run)
    for ours, theirs in zip(summary(tmp_path / 'run'), plain, strict=True):
        for name in ('train_loss', 'eval_loss'):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3)
    whole = last(tmp_path / 'run')
    train(data, tmp_path / 'parts', *flags, '--torchcompile', 'aot_eager', '--stop-epoch', '1')
    train(data, tmp_path / 'parts', *flags, '--torchcompile', 'aot_eager', '--resume', 'auto')
    assert_same(last(tmp_path / 'parts' / 'run')['state_dict'], whole['state_dict'])
