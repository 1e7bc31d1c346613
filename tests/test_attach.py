"""What a timm user may expect of a model with an ML-Decoder head, whatever its family."""

import copy
import pickle

import pytest
import timm
import torch
from marks import few
from timm.layers import SelectAdaptivePool2d
from timm.models import group_parameters
from timm.utils import ModelEmaV3
from torch import nn

from timm_mldecoder import MLDecoder, add_ml_decoder_head
from timm_mldecoder.models.attach import MLDecoderModel
from timm_mldecoder.models.classifier_model import extend_class

HEAD = dict(num_of_groups=4, decoder_embedding=32, num_heads=4, dim_feedforward=32)
SWIN = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), img_size=64, window_size=2)
VIT = dict(embed_dim=48, depth=2, num_heads=3, img_size=64)

# name, how to make it small, image size, tokens that the head sees (a tuple for several scales)
MODELS = [
    pytest.param('test_resnet', {}, 96, 9, id='NCHW and fc'),
    pytest.param('test_byobnet', {}, 96, 9, id='head.fc'),
    pytest.param('test_efficientnet', {}, 96, 9, id='classifier'),
    pytest.param('lcnet_035', {}, 64, 4, id='classifier with conv_head'),
    pytest.param('test_convnext', {}, 96, 9, id='NormMlp head'),
    pytest.param('hgnetv2_b0', {}, 64, 4, id='head with last_conv'),
    pytest.param('swin_tiny_patch4_window7_224', SWIN, 64, 4, id='NHWC'),
    pytest.param('test_mambaout', {}, 96, 9, id='NHWC and pre-logits'),
    pytest.param('test_vit', {}, 160, 100, id='ViT class token'),
    pytest.param('vit_little_patch16_reg4_gap_256', VIT, 64, 16, id='ViT register tokens'),
    pytest.param('vit_base_patch16_siglip_224', VIT, 64, 16, id='ViT attention pooling'),
    pytest.param('vit_tiny_patch16_dinov3_qkvb', VIT, 64, 16, id='EVA'),
    pytest.param('deit_tiny_distilled_patch16_224', VIT, 64, 16, id='distilled'),
    pytest.param('levit_128s', {}, 224, 16, id='distilled convolution'),
    pytest.param('crossvit_9_240', dict(img_size=240), 240, (400, 196), id='two scales'),
    pytest.param('coat_tiny', dict(img_size=64), 64, (64, 16, 4), id='three scales'),
    pytest.param('efficientvim_m1', {}, 224, (49, 25, 9, 16), id='scales as [B, F, N]'),
    pytest.param('vit_tiny_r_s16_p8_224', dict(img_size=64, depth=1), 64, 4, id='hybrid'),
    pytest.param('pit_ti_224', dict(img_size=64), 64, 4, id='features are class tokens'),
    pytest.param('cait_xxs24_224', dict(depth=2, img_size=64), 64, 16, id='class attention'),
    pytest.param('volo_d1_224', dict(img_size=64), 64, 16, id='class attention, two heads'),
    pytest.param('xcit_nano_12_p8_224', dict(depth=2, img_size=64), 64, 64, id='cross-covariance'),
    pytest.param('efficientvit_b0', {}, 64, 4, id='MLP on the pooled vector'),
    pytest.param('repvit_m0_9', {}, 64, 4, id='classifier of several parts'),
    pytest.param('resnet50_clip', dict(img_size=64), 64, 4, id='attention pooling of a CNN'),
]  # fmt: skip


@pytest.mark.parametrize('name, small, size, tokens', few(MODELS, MODELS[::3]))
class TestContract:
    """Every model; built anew each time, since the head is attached in place."""

    def build(self, name: str, small: dict, **kwargs) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name, **{'ml_decoder': HEAD, 'num_classes': 7, **small, **kwargs}).eval()

    def test_forward_and_its_parts(self, name, small, size, tokens):
        model, x = self.build(name, small), torch.randn(2, 3, size, size)
        head, seen = model.get_classifier(), []
        head.register_forward_pre_hook(lambda module, args: seen.extend(args))
        logits = model(x)
        assert isinstance(head, MLDecoder) and logits.shape == (2, 7) and model.num_classes == 7
        seen = seen[0] if isinstance(seen[0], list) else seen
        assert tuple(scale.shape[1] for scale in seen) == (tokens if isinstance(tokens, tuple) else (tokens,))
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), logits)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert model.get_submodule(model.pretrained_cfg['classifier']) is head

    def test_backbone_keeps_its_class_names_and_values(self, name, small, size, tokens):
        torch.manual_seed(0)
        plain = timm.create_model(name, num_classes=7, **small)
        before = {key: value.clone() for key, value in plain.state_dict().items()}
        base = type(plain)
        model = add_ml_decoder_head(plain, **HEAD)
        assert model is plain and isinstance(model, base)
        prefix = model.pretrained_cfg['classifier'] + '.'
        for key, value in model.state_dict().items():
            assert key.startswith(prefix) or torch.equal(value, before[key]), key

    def test_every_parameter_trains_once(self, name, small, size, tokens):
        model = self.build(name, small).train()
        model(torch.randn(2, 3, size, size)).square().sum().backward()
        assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        names = [key for key, p in model.named_parameters(remove_duplicate=False) if p is model.get_classifier().weight]
        assert len(names) == 1
        dropouts = [m.p for key, m in model.named_modules() if isinstance(m, nn.Dropout) and 'head_drop' in key]
        assert not any(dropouts)

    def test_reset_classifier(self, name, small, size, tokens):
        model, x = self.build(name, small), torch.randn(2, 3, size, size)
        old = model.get_classifier()
        model.reset_classifier(11)
        assert isinstance(model.get_classifier(), MLDecoder) and model.get_classifier() is not old
        assert model(x).shape == (2, 11) and model.num_classes == 11
        assert model.get_classifier().queries.weight.shape == (4, 32), 'the options stay'
        model.reset_classifier(0)
        pooled = model(x)
        assert pooled.shape == (2, model.head_hidden_size) and model.num_classes == 0
        torch.testing.assert_close(pooled, model.forward_head(model.forward_features(x), pre_logits=True))
        model.reset_classifier(5)
        assert model(x).shape == (2, 5)
        with pytest.raises(ValueError, match="global_pool='avg'"):
            model.reset_classifier(5, 'avg')

    def test_copies(self, name, small, size, tokens):
        model, x = self.build(name, small), torch.randn(2, 3, size, size)
        with torch.no_grad():  # timm's LeViT keeps what it computed in eval, and a tensor with a graph has no copy
            logits = model(x)
        loaded = self.build(name, small)
        loaded.load_state_dict(model.state_dict())
        ema = ModelEmaV3(model).module
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, ema):
            assert type(other) is type(model)
            assert torch.equal(other.eval()(x), logits)

    def test_layer_decay_puts_the_head_last(self, name, small, size, tokens):
        model = self.build(name, small)
        if not hasattr(model, 'group_matcher'):
            assert name == 'pit_ti_224', 'the one timm class without layer decay'
            return
        groups = group_parameters(model, model.group_matcher(coarse=False))
        prefix = model.pretrained_cfg['classifier'] + '.'
        for names in list(groups.values())[:-1]:
            assert not [key for key in names if key.startswith(prefix)]

    def test_pruned_to_a_backbone(self, name, small, size, tokens):
        model, x = self.build(name, small), torch.randn(2, 3, size, size)
        if not hasattr(model, 'forward_intermediates'):
            assert not hasattr(timm.create_model(name, **small), 'forward_intermediates')
            return
        whole = model.forward_intermediates(x, indices=1, intermediates_only=True)[-1]
        model.prune_intermediate_layers(1)
        assert model.num_classes == 0
        torch.testing.assert_close(model.forward_intermediates(x, indices=1, intermediates_only=True)[-1], whole)

    def test_folder_round_trip_in_this_process(self, name, small, size, tokens, tmp_path):
        model, x = self.build(name, small), torch.randn(2, 3, size, size)
        with torch.no_grad():
            for p in model.get_classifier().parameters():
                p.add_(torch.randn_like(p) * 0.1)
        args = {key: value for key, value in small.items() if key != 'img_size'}
        timm.models.save_for_hf(model, tmp_path, model_args=args)
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        assert torch.equal(loaded(x), model(x))


def one(name: str = 'test_vit', **kwargs) -> nn.Module:
    return timm.create_model(name, **{'ml_decoder': HEAD, 'num_classes': 7, **kwargs}).eval()


@pytest.mark.parametrize(
    'name',
    [
        'test_vit',
        *(pytest.param(name, marks=pytest.mark.slow) for name in ('test_resnet', 'test_convnext', 'test_mambaout')),
    ],
)
def test_compile_export_and_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    model, x = one(name), torch.randn(2, 3, 160, 160)
    logits = model(x)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), logits)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), logits)
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), logits, atol=1e-4, rtol=1e-4)


def test_intermediates_features_and_checkpointing():
    model, x = one(), torch.randn(2, 3, 160, 160)
    final, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(model.forward_head(final), model(x))
    assert all(map.shape[:2] == (2, 64) for map in intermediates)
    model.set_grad_checkpointing()
    model.train()(x).sum().backward()
    assert model.patch_embed.proj.weight.grad is not None
    assert model.prune_intermediate_layers(1, prune_head=True) and model.num_classes == 0


def test_channels_and_image_size():
    model = one(in_chans=1, img_size=96)
    assert model(torch.randn(2, 1, 96, 96)).shape == (2, 7)
    model.set_input_size((64, 64))
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    assert model._model_args['img_size'] == (64, 64) and model._model_args['ml_decoder']


def test_a_mode_dtype_and_device_carry_over():
    model = timm.create_model('test_resnet', num_classes=5).to(torch.bfloat16).train()
    head = add_ml_decoder_head(model, num_classes=9, num_of_groups=3).get_classifier()
    assert head.weight.dtype is torch.bfloat16 and head.training and head.weight.shape[0] == 3
    with torch.device('meta'):
        assert timm.create_model('test_resnet', ml_decoder=True).get_classifier().weight.is_meta


def test_attaching_again_changes_the_head():
    model = add_ml_decoder_head(timm.create_model('test_resnet', num_classes=50), num_of_groups=5)
    add_ml_decoder_head(model, num_classes=20, num_of_groups=10)
    assert model.get_classifier().weight.shape == (10, 768, 2)
    assert type(model).__mro__.count(extend_class(MLDecoderModel, timm.models.ResNet)) == 1


def test_a_model_built_from_its_class():
    model = timm.models.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=5)
    assert add_ml_decoder_head(model, **HEAD)(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize('build, named', [
    (lambda: add_ml_decoder_head(nn.Linear(2, 2)), 'Linear'),
    (lambda: add_ml_decoder_head(timm.create_model('test_resnet', num_classes=0)), 'num_classes is 0'),
    (lambda: add_ml_decoder_head(timm.create_model('test_resnet'), heads=2), 'heads; .*num_of_groups'),
    (lambda: timm.create_model('mobilenetv5_300m_enc', ml_decoder=True), 'MobileNetV5Encoder'),
    (lambda: timm.create_model('test_resnet', ml_decoder=dict(num_of_groups=0)), 'num_of_groups'),
])  # fmt: skip
def test_mistakes_are_named(build, named):
    with torch.device('meta'), pytest.raises(ValueError, match=named):
        build()


def test_a_failed_attachment_leaves_the_model_whole():
    model = timm.create_model('test_resnet', num_classes=5)
    with pytest.raises(ValueError):
        add_ml_decoder_head(model, decoder_embedding=100)
    assert isinstance(model.fc, nn.Linear) and isinstance(model.global_pool, SelectAdaptivePool2d)
