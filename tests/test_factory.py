"""`create_model` and weights: what is loaded, what stays fresh, and what a new process gets back."""

import asyncio
import copy
import itertools
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from marks import few

from timm_mldecoder import add_ml_decoder_head

HEAD = dict(num_of_groups=4, decoder_embedding=32, num_heads=4, dim_feedforward=32)
IMAGE = (2, 3, 96, 96)


def build(name: str = 'test_resnet', **kwargs) -> torch.nn.Module:
    return timm.create_model(name, **{'ml_decoder': HEAD, 'num_classes': 7, **kwargs}).eval()


def backbone(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    head = model.pretrained_cfg['classifier'] + '.'
    return {name: value for name, value in model.state_dict().items() if not name.startswith(head)}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope='module')
def imagenet_file(tmp_path_factory) -> tuple[str, dict]:
    """A file as timm's own pretrained weights are: a backbone and a 1000-class linear classifier."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=1000)
    path = tmp_path_factory.mktemp('weights') / 'pretrained.pth'
    torch.save(model.state_dict(), path)
    return str(path), backbone(model)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> tuple[str, torch.nn.Module]:
    """A model with a head, saved as timm saves them."""
    torch.manual_seed(1)
    model = build()
    path = tmp_path_factory.mktemp('folder')
    timm.models.save_for_hf(model, path)
    return str(path), model


@pytest.mark.parametrize('num_classes', [1000, 7])
def test_pretrained_loads_the_backbone_and_leaves_the_head_fresh(num_classes, imagenet_file):
    path, weights = imagenet_file
    torch.manual_seed(2)
    model = build(num_classes=num_classes, pretrained=True, pretrained_cfg_overlay=dict(file=path))
    assert same(backbone(model), weights)
    assert model(torch.randn(IMAGE)).shape == (2, num_classes)
    again = build(num_classes=num_classes, pretrained=True, pretrained_cfg_overlay=dict(file=path))
    assert not torch.equal(again.get_classifier().weight, model.get_classifier().weight)


def test_checkpoint_path_loads_a_trained_model(tmp_path):
    model = build()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model_best.pth.tar')
    x = torch.randn(IMAGE)
    assert torch.equal(build(checkpoint_path=tmp_path / 'model_best.pth.tar')(x), model(x))
    with pytest.raises(RuntimeError, match='Missing key'):
        timm.create_model('test_resnet', num_classes=7, checkpoint_path=tmp_path / 'model_best.pth.tar')


def test_saved_folders_give_the_same_logits_in_a_new_process(tmp_path, program):
    expected = {}
    for name, pool in itertools.product(['test_resnet', 'test_vit', 'test_convnext', 'test_mambaout'], [None, 'avg']):
        model = build(name, **({'global_pool': pool} if pool else {}))
        folder, x = tmp_path / f'{name}-{pool}', torch.randn(2, *model.pretrained_cfg['input_size'])
        timm.models.save_for_hf(model, folder, model_config=dict(label_names=list('abcdefg')))
        torch.save(x, folder / 'x.pt')
        expected[folder] = model(x)
    program('load_folders.py', *map(str, expected))
    for folder, logits in expected.items():
        assert torch.equal(torch.load(folder / 'y.pt'), logits), folder.name


def test_a_saved_head_for_other_classes_warns(folder, caplog):
    path, saved = folder
    model = timm.create_model(f'local-dir:{path}', pretrained=True, num_classes=3)
    assert same(backbone(model), backbone(saved)) and model(torch.randn(IMAGE)).shape == (2, 3)
    assert '7 classes' in caplog.text and 'has 3' in caplog.text


def test_a_saved_folder_without_its_weights_or_its_classifier(folder):
    path, saved = folder
    fresh = timm.create_model(f'local-dir:{path}')
    assert fresh(torch.randn(IMAGE)).shape == (2, 7) and not same(backbone(fresh), backbone(saved))
    x = torch.randn(IMAGE)
    pooled = timm.create_model(f'local-dir:{path}', pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(pooled(x), saved.forward_head(saved.forward_features(x), pre_logits=True))
    maps = timm.create_model(f'local-dir:{path}', pretrained=True, features_only=True).eval()(x)
    torch.testing.assert_close(maps[-1], saved.forward_features(x))


@pytest.mark.parametrize('arguments', [
    dict(num_classes=0), dict(num_classes=0, global_pool=''), dict(features_only=True),
    dict(features_only=True, out_indices=(1, 2)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize('name', few(['test_vit', 'test_resnet', 'test_convnext'], 1))
def test_a_backbone_is_timms_own_from_every_source(name, arguments, tmp_path):
    plain = timm.create_model(name, num_classes=7).eval()
    timm.models.save_for_hf(plain, tmp_path / 'plain')
    head = add_ml_decoder_head(copy.deepcopy(plain), **HEAD)
    timm.models.save_for_hf(head, tmp_path / 'head')
    x = torch.randn(2, *plain.pretrained_cfg['input_size'])

    def outputs(source, **options):
        model = timm.create_model(source, **arguments, **options).eval()
        assert 'MLDecoder' not in type(model).__name__
        found = model(x)
        return found if isinstance(found, list) else [found]

    expected = outputs(f'local-dir:{tmp_path}/plain', pretrained=True)
    for one, other in zip(outputs(f'local-dir:{tmp_path}/head', pretrained=True), expected, strict=True):
        assert torch.equal(one, other)
    unloaded = outputs(name, ml_decoder=HEAD)
    assert [one.shape for one in unloaded] == [one.shape for one in expected]


def test_ml_decoder_false_loads_the_backbone_under_a_fresh_linear_classifier(folder, caplog):
    path, saved = folder
    model = timm.create_model(f'local-dir:{path}', pretrained=True, ml_decoder=False)
    assert type(model.fc) is torch.nn.Linear and model.fc.out_features == 7
    assert same(backbone(model), backbone(saved))
    assert 'fc.weight' in caplog.text and model(torch.randn(IMAGE)).shape == (2, 7)


def test_modules_that_a_head_removes_start_fresh_in_a_plain_backbone(tmp_path, caplog):
    model = timm.create_model('cait_xxs24_224', depth=1, img_size=64, num_classes=3, ml_decoder=HEAD)
    timm.models.save_for_hf(model, tmp_path)
    plain = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=0)
    assert torch.equal(plain.patch_embed.proj.weight, model.patch_embed.proj.weight)
    assert 'blocks_token_only' in caplog.text


def test_options_that_are_not_given_are_those_of_the_stored_head(folder):
    path, saved = folder
    x = torch.randn(IMAGE)
    for option in (True, {}, dict(num_of_groups=-1), dict(dropout=0.3), HEAD):
        model = timm.create_model(f'local-dir:{path}', pretrained=True, ml_decoder=option).eval()
        assert torch.equal(model(x), saved(x))
    assert timm.create_model(f'local-dir:{path}', pretrained=True, ml_decoder=dict(dropout=0.3)).fc.dropout == 0.3


@pytest.mark.parametrize('option, value', [('decoder_embedding', 64), ('num_heads', 2), ('num_of_groups', 7)])
def test_options_that_contradict_the_stored_head_are_named_with_both_values(option, value, folder):
    with pytest.raises(ValueError, match=rf'{option} is {value}, .* {HEAD[option]}'):
        timm.create_model(f'local-dir:{folder[0]}', pretrained=True, ml_decoder={option: value})


def test_other_classes_keep_what_belongs_to_no_class(folder, caplog):
    path, saved = folder
    model = timm.create_model(f'local-dir:{path}', pretrained=True, num_classes=3)
    assert torch.equal(model.fc.embed.weight, saved.fc.embed.weight)
    assert torch.equal(model.fc.layers[0].linear1.weight, saved.fc.layers[0].linear1.weight)
    assert not torch.equal(model.fc.queries.weight[:3], saved.fc.queries.weight[:3])
    assert len([record for record in caplog.records if 'group_fc' in record.message]) == 1
    for option in (dict(fresh_head=True), dict(fresh_head=True, decoder_embedding=64)):
        fresh = timm.create_model(f'local-dir:{path}', pretrained=True, num_classes=3, ml_decoder=option)
        assert same(backbone(fresh), backbone(saved))
        assert not same(fresh.fc.embed.state_dict(), saved.fc.embed.state_dict())
        assert fresh.fc.layers[0].multihead_attn.num_heads == 4


def test_a_reduced_number_of_groups_is_logged(caplog):
    assert build(ml_decoder=dict(HEAD, num_of_groups=50)).fc.weight.shape[0] == 7
    assert '50' in caplog.text


@pytest.mark.parametrize('spoil, named', [
    (lambda state: state.pop('conv1.0.weight'), 'conv1.0.weight'),
    (lambda state: state.update(extra=torch.zeros(1)), 'extra'),
    (lambda state: state.pop('fc.group_fc.bias'), 'fc.group_fc.bias'),
    (lambda state: state.update({'fc.embed.weight': torch.zeros(2, 2)}), 'fc.embed.weight'),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_whole(spoil, named, folder, tmp_path):
    shutil.copytree(folder[0], tmp_path, dirs_exist_ok=True)
    state = torch.load(tmp_path / 'pytorch_model.bin')
    spoil(state)
    torch.save(state, tmp_path / 'pytorch_model.bin')
    with pytest.raises(RuntimeError, match=named):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


def test_another_image_size_resizes_what_timm_resizes(tmp_path):
    model = build('test_vit')
    timm.models.save_for_hf(model, tmp_path)
    small = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=96).eval()
    assert small(torch.randn(IMAGE)).shape == (2, 7)
    assert torch.equal(small.get_classifier().weight, model.get_classifier().weight)


@pytest.fixture
def stored_models(tmp_path):
    """Folders of models with an ML-Decoder head, with a cosine classifier and without either, and their tensors."""
    models = {
        'head': build(),
        'other head': build('test_vit'),
        'cosine': timm.create_model('test_resnet', num_classes=7, cosine_classifier=5.0),
        'resnet': timm.create_model('test_resnet', num_classes=7),
        'vit': timm.create_model('test_vit', num_classes=7),
    }
    for name, model in models.items():
        timm.models.save_for_hf(model, tmp_path / name)
    return {f'local-dir:{tmp_path / name}': model.state_dict() for name, model in models.items()}


@pytest.mark.parametrize('seconds', few([1, 20], 1))
@pytest.mark.parametrize('in_asyncio', [False, True])
def test_threads_that_load_at_the_same_time_get_their_own_weights(seconds, in_asyncio, stored_models):
    timm.create_model('test_resnet', ml_decoder=True)
    end, loads = time.monotonic() + seconds, []

    def load_in_a_loop(source: str) -> None:
        while time.monotonic() < end or source not in loads:
            assert same(timm.create_model(source, pretrained=True).state_dict(), stored_models[source]), source
            loads.append(source)

    async def gather() -> None:
        await asyncio.gather(*(asyncio.to_thread(load_in_a_loop, source) for source in stored_models))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        if in_asyncio:
            asyncio.run(gather())
        else:
            with ThreadPoolExecutor(len(stored_models)) as pool:
                list(pool.map(load_in_a_loop, stored_models))
    finally:
        sys.setswitchinterval(interval)
    assert set(loads) == set(stored_models)
