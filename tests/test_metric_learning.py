"""Cosine classifiers on pooled features, from the module to the command line, and the rates of the recipes."""

import copy
import csv
import json
import pickle
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch.nn.functional import cosine_similarity

from benchmarks.digits import write_digit_scenes
from timm_mldecoder import CosineClassifier, MLDecoder, add_cosine_classifier
from timm_mldecoder.flags import parse_train
from timm_mldecoder.loading.datasets import create_split
from timm_mldecoder.modeling.create import create_train_model
from timm_mldecoder.predict.__main__ import main as predict
from timm_mldecoder.train.optim import create_optimizer, create_schedule
from train import main as train
from validate import main as validate

SCALE = 12.0
SMALL = shlex.split("""
    --dataset csv --model test_resnet --img-size 32 --num-classes 10 --device cpu -j 0 -b 5 --task multilabel
    --output output --experiment run
""")
METRIC = shlex.split(f"""
    --cosine-classifier {SCALE} --loss aam --loss-kwargs scale={SCALE} margin=0.0 balance=0.7 scaled_logits=True
    --opt momentum --lr 0.02 --weight-decay 5e-4 --bias-lr-scale 2 --sam 0.05
    --sched onecycle --warmup-lr 2e-4 --min-lr 2e-7 --warmup-epochs 1 --epochs 2 --val-interval 2
""")


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with data and a run of the metric-learning recipe on it."""
    folder = tmp_path_factory.mktemp('trained')
    write_digit_scenes(folder / 'scenes', num_train=30, num_validation=20, size=32, sides=(8, 14))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(['scenes', *SMALL, *METRIC])
    return folder


def read(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def test_logits_are_the_scaled_cosine():
    classifier = CosineClassifier(6, 3, scale=5.0)
    torch.testing.assert_close(classifier.weight.norm(dim=1), torch.ones(3))  # at the start
    x = torch.randn(4, 2, 6)
    expected = 5 * cosine_similarity(x[:, :, None], classifier.weight, dim=-1)
    torch.testing.assert_close(classifier(x), expected)
    torch.testing.assert_close(classifier(1e4 * x), expected, msg='the length does not count')
    assert classifier.bias is None and list(classifier.state_dict()) == ['weight']
    along = classifier.weight.detach() * torch.logspace(-3, 3, 1000)[:, None, None]
    assert classifier(along).abs().max() <= 5.0, 'rounding does not leave [-1, 1]'
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match=str(bad)):
            CosineClassifier(6, 3, scale=bad)


@pytest.mark.parametrize(
    ('name', 'place'),
    [('test_resnet', 'fc'), ('test_vit', 'head'), ('test_efficientnet', 'classifier'), ('test_convnext', 'head.fc')],
)
def test_it_takes_the_place_of_a_models_classifier(name, place):
    model = timm.create_model(name, num_classes=4).eval()
    before = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(place)}
    assert add_cosine_classifier(model, 9.0) is model
    classifier = model.get_classifier()
    assert model.get_submodule(place) is classifier and isinstance(classifier, CosineClassifier)
    after = model.state_dict()
    assert after.keys() == {*before, f'{place}.weight'}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    x = torch.randn(2, *model.pretrained_cfg['input_size'])
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    expected = 9 * cosine_similarity(pooled[:, None], classifier.weight, dim=-1)
    logits = model(x)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.sum().backward()  # also where the linear classifier started from zeros
    assert 0 < classifier.weight.grad.abs().max() < 1e3


@pytest.mark.parametrize(
    ('name', 'found'), [('deit_tiny_distilled_patch16_224', 'Linear and Linear'), ('resnetv2_50', 'Conv2d')]
)
def test_a_model_without_one_linear_classifier_is_refused(name, found):
    model = timm.create_model(name, num_classes=3)
    with pytest.raises(ValueError, match=found):
        add_cosine_classifier(model)


def test_a_model_with_an_ml_decoder_head_is_refused():
    with pytest.raises(ValueError, match='MLDecoder'):
        add_cosine_classifier(timm.create_model('test_resnet', num_classes=3, ml_decoder=True))


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext'])
def test_a_saved_folder_gives_the_same_logits(name, tmp_path):
    model = add_cosine_classifier(timm.create_model(name, num_classes=3), SCALE).eval()
    save_for_hf(model, tmp_path)
    x = torch.randn(2, *model.pretrained_cfg['input_size'])
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert all(type(other) is type(model) and torch.equal(other(x), model(x)) for other in copies)


def test_a_saved_classifier_for_other_classes_or_of_another_kind_is_initialized(tmp_path, caplog):
    model = add_cosine_classifier(timm.create_model('test_resnet', num_classes=3), SCALE)
    save_for_hf(model, tmp_path)
    for options, kind, shape in (
        (dict(num_classes=5), CosineClassifier, (5, 96)),
        (dict(cosine_classifier=False), torch.nn.Linear, (3, 96)),
        (dict(cosine_classifier=False, ml_decoder=dict(num_of_groups=3)), MLDecoder, (3, 768, 1)),
    ):
        caplog.clear()
        other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **options)
        assert type(other.fc) is kind and other.fc.weight.shape == shape
        assert torch.equal(other.conv1[0].weight, model.conv1[0].weight)
        assert 'initialized' in caplog.text
    with pytest.raises(ValueError, match=r'9\.0.*12\.0'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, cosine_classifier=9.0)
    with pytest.raises(ValueError, match='ml_decoder, cosine_classifier'):
        timm.create_model('test_resnet', ml_decoder=True, cosine_classifier=9.0)


def test_reset_classifier_makes_a_linear_one_and_saves_it(tmp_path):
    model = timm.create_model('test_resnet', num_classes=3, cosine_classifier=SCALE)
    model.reset_classifier(4)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert type(again.fc) is torch.nn.Linear and torch.equal(again.fc.bias, model.fc.bias)


def test_it_can_be_scripted():
    model = timm.create_model('test_resnet', num_classes=3, cosine_classifier=SCALE).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_a_checkpoint_is_scored_and_predicts_as_it_was_trained(trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    checkpoint = 'output/run/last.pth.tar'
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    assert state['fc.weight'].shape[0] == 10 and 'fc.bias' not in state
    row = read('output/run/summary.csv')[-1]
    capsys.readouterr()
    validate(['scenes', '--dataset', 'csv', '--checkpoint', checkpoint, '--device', 'cpu', '-j', '0', '-b', '7'])
    found = json.loads(capsys.readouterr().out.split('--result')[1])
    assert found['map'] == pytest.approx(float(row['eval_map']), abs=1e-9)

    predict(
        [
            'scenes/validation/00000.png',
            '--checkpoint',
            checkpoint,
            '--top-k',
            '10',
            '--threshold',
            '0',
            '--out',
            'scores.csv',
        ]
    )
    scores = {line['label']: float(line['score']) for line in read('scores.csv')}
    model = timm.create_model('test_resnet', num_classes=10)
    add_cosine_classifier(model)
    model.load_state_dict(state)
    config = {**resolve_data_config({}, model=model), 'input_size': (3, 32, 32)}
    image = create_transform(**config)(Image.open('scenes/validation/00000.png').convert('RGB'))[None]
    with torch.no_grad():
        expected = torch.sigmoid(SCALE * model.eval()(image))[0]
    names = Path('scenes/classes.txt').read_text().split('\n')
    assert [scores[name] for name in names if name] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_run_starts_from_a_checkpoint_with_the_classifier(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(trained)
    checkpoint = 'output/run/last.pth.tar'
    options = parse_train(['scenes', *SMALL, *METRIC, '--initial-checkpoint', checkpoint])
    model = create_train_model(options, create_split(options, 'train', training=True))
    assert torch.equal(model.fc.weight, torch.load(checkpoint, weights_only=False)['state_dict']['fc.weight'])
    assert model.fc.scale == SCALE


def test_biases_have_their_own_rate_and_nothing_short_decays():
    flags = [
        'DIR',
        '--model',
        'test_vit',
        '--num-classes',
        '3',
        '--task',
        'multilabel',
        *METRIC,
        '--layer-decay',
        '0.5',
    ]
    for layered in (False, True):
        options = parse_train(flags if layered else flags[:-2])
        model = timm.create_model('test_vit', num_classes=3, ml_decoder=True)
        optimizer = create_optimizer(options, model)
        schedule, _ = create_schedule(options, optimizer, 50, False)
        settings = {id(parameter): group for group in optimizer.param_groups for parameter in group['params']}
        assert len(settings) == sum(len(group['params']) for group in optimizer.param_groups)
        for update in (0, 20, 49, 77):
            schedule.step_update(update)
            for name, parameter in model.named_parameters():
                layer = name.rpartition('.')[0]
                beside = [other for path, other in model.named_parameters() if path == f'{layer}.weight']
                group = settings[id(parameter)]
                if name.endswith('.bias') and beside:
                    assert group['lr'] == pytest.approx(2 * settings[id(beside[0])]['lr']), name
        for name, parameter in model.named_parameters():
            decays = parameter.ndim > 1 and not name.endswith('bias') and not re.search('cls_token|pos_embed', name)
            assert settings[id(parameter)]['weight_decay'] == (5e-4 if decays else 0), name


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--cosine-classifier 12 --use-ml-decoder-head 1', '--ml-decoder-kwargs classifier=cosine cosine_scale=12'),
        ('--cosine-classifier 0', '--cosine-classifier 0'),
        ('--cosine-classifier 12 --loss aam', 'scale=12 scaled_logits=True'),
        ('--cosine-classifier 12 --loss aam --loss-kwargs scale=12', 'scaled_logits=True'),
        ('--cosine-classifier 12 --loss aam --loss-kwargs scale=7 scaled_logits=True', 'scale=12'),
        ('--use-ml-decoder-head 1 --ml-decoder-kwargs classifier=cosine cosine_scale=9.5 --loss aam', 'scale=9.5'),
        ('--bias-lr-scale -2', '--bias-lr-scale -2'),
    ],
)
def test_mistakes_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_train(['DIR', '--task', 'multilabel', *flags.split()])
