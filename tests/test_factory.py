"""`create_model` and weights: what is loaded, what stays fresh, and what a new process gets back."""

import shutil

import pytest
import timm
import torch

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


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'test_mambaout'])
@pytest.mark.parametrize('pool', [None, 'avg'])
def test_a_saved_folder_gives_the_same_logits_in_a_new_process(name, pool, tmp_path, python):
    model = build(name, **({'global_pool': pool} if pool else {}))
    folder, size = tmp_path / 'model', model.pretrained_cfg['input_size']
    timm.models.save_for_hf(model, folder, model_config=dict(label_names=list('abcdefg')))
    x = torch.randn(2, *size)
    torch.save(x, tmp_path / 'x.pt')
    python(
        f'import timm, torch\nmodel = timm.create_model("local-dir:{folder}", pretrained=True).eval()\n'
        f'assert list(model.pretrained_cfg["label_names"]) == list("abcdefg")\n'
        f'torch.save(model(torch.load("x.pt")), "y.pt")'
    )
    assert torch.equal(torch.load(tmp_path / 'y.pt'), model(x))


def test_a_saved_head_with_other_classes_starts_fresh_and_says_so(folder, caplog):
    path, saved = folder
    model = timm.create_model(f'local-dir:{path}', pretrained=True, num_classes=3)
    assert same(backbone(model), backbone(saved)) and model(torch.randn(IMAGE)).shape == (2, 3)
    assert 'the weights are for 7 classes, the model has 3' in caplog.text.lower()


def test_a_saved_folder_without_its_weights_or_its_classifier(folder):
    path, saved = folder
    fresh = timm.create_model(f'local-dir:{path}')
    assert fresh(torch.randn(IMAGE)).shape == (2, 7) and not same(backbone(fresh), backbone(saved))
    x = torch.randn(IMAGE)
    pooled = timm.create_model(f'local-dir:{path}', pretrained=True, num_classes=0).eval()
    assert torch.equal(pooled(x), saved.forward_head(saved.forward_features(x), pre_logits=True))
    maps = timm.create_model(f'local-dir:{path}', pretrained=True, features_only=True).eval()(x)
    torch.testing.assert_close(maps[-1], saved.forward_features(x))


def test_a_saved_head_is_not_silently_left_out(folder):
    with pytest.raises(ValueError, match='this checkpoint holds an ML-Decoder head'):
        timm.create_model(f'local-dir:{folder[0]}', pretrained=True, ml_decoder=False)


@pytest.mark.parametrize('spoil, said', [
    (lambda state: state.pop('conv1.0.weight'), 'conv1.0.weight'),
    (lambda state: state.update(extra=torch.zeros(1)), 'extra'),
    (lambda state: state.pop('fc.group_fc.bias'), 'fc.group_fc.bias'),
    (lambda state: state.update({'fc.embed.weight': torch.zeros(2, 2)}), 'fc.embed.weight'),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_whole(spoil, said, folder, tmp_path):
    shutil.copytree(folder[0], tmp_path, dirs_exist_ok=True)
    state = torch.load(tmp_path / 'pytorch_model.bin')
    spoil(state)
    torch.save(state, tmp_path / 'pytorch_model.bin')
    with pytest.raises(RuntimeError, match=said):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


def test_another_image_size_resizes_what_timm_resizes(tmp_path):
    model = build('test_vit')
    timm.models.save_for_hf(model, tmp_path)
    small = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=96).eval()
    assert small(torch.randn(IMAGE)).shape == (2, 7)
    assert torch.equal(small.get_classifier().weight, model.get_classifier().weight)
