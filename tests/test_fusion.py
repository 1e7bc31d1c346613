"""BatchNorm folded into convolutions: the same logits, and nothing folded that other layers read."""

import json
import logging

import pytest
import timm
import torch
from image_folders import write_images
from torch import nn

import validate
from timm_mldecoder.models.fusion import fuse_batch_norm
from timm_mldecoder.predict.__main__ import main as predict


def build(name: str, **options) -> nn.Module:
    """A timm model whose BatchNorm layers do something."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)


def count(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ('name', 'options', 'left'),
    [
        ('test_resnet', {}, 0),
        ('test_resnet', dict(ml_decoder=dict(decoder_embedding=32, num_heads=4)), 0),
        ('test_efficientnet', {}, 0),
        ('test_byobnet', {}, 0),
        ('tf_mobilenetv3_small_minimal_100', {}, 0),  # "same" padding
        ('tresnet_m', {}, 0),
        ('densenet121', {}, 62),  # norms before convolutions
        ('test_convnext', {}, 0),  # no BatchNorm
    ],
)
def test_fused_models_have_the_same_logits(name, options, left):
    model, images = build(name, **options), torch.randn(2, 3, 64, 64)
    before, norms = model(images), count(model)
    assert fuse_batch_norm(model, images[:1]) == norms - left
    assert count(model) == left
    scale = before.abs().max().item()
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-5 * scale)
    assert fuse_batch_norm(model, images[:1]) == 0


class Shared(nn.Module):
    """Convolutions: a shortcut reads the output of one, two norms that of another, one runs twice; one is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(6))

    def forward(self, x):
        x = self.convs[0](x)
        x = x + self.norms[0](x)
        x = self.convs[1](x)
        x = self.norms[1](x) * self.norms[2](x)
        x = self.norms[4](self.convs[2](self.norms[3](self.convs[2](x))))
        return self.norms[5](self.convs[3](x)).mean(dim=(2, 3))


def test_outputs_that_other_layers_read_are_left_alone():
    torch.manual_seed(0)
    model, images = Shared().eval(), torch.randn(2, 3, 4, 4)
    randomize(model)
    before = model(images)
    assert fuse_batch_norm(model, images) == 1
    assert [type(norm) for norm in model.norms] == [*[nn.BatchNorm2d] * 5, nn.Identity]
    torch.testing.assert_close(model(images), before)


class Switching(nn.Module):
    """Another path on the second call: what was observed does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.calls = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), 0

    def forward(self, x):
        self.calls += 1
        x = self.conv(x)
        return (self.norm(x) if self.calls == 1 else x.abs()).mean(dim=(2, 3))


def test_logits_that_change_and_training_mode_are_refused():
    model = Switching().eval()
    randomize(model)
    with pytest.raises(ValueError, match='1 BatchNorm.*changed'):
        fuse_batch_norm(model, torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match='eval'):
        fuse_batch_norm(model.train(), torch.randn(1, 3, 4, 4))


def test_validate_and_predict_give_the_same_with_fused_norms(tmp_path, capsys, caplog):
    data = write_images(tmp_path / 'data', train=1, validation=4, classes=5)
    checkpoint = tmp_path / 'weights.pth'
    torch.save(build('test_resnet').state_dict(), checkpoint)
    flags = ['--model', 'test_resnet', '--num-classes', '5', '--img-size', '64', '--device', 'cpu', '-j', '0']
    results = []
    with caplog.at_level(logging.INFO):
        for fuse in ([], ['--fuse-bn']):
            validate.main([str(data), *flags, '--checkpoint', str(checkpoint), *fuse])
            results.append(json.loads(capsys.readouterr().out.split('--result\n')[1]))
    assert '15 BatchNorm layers' in caplog.text
    plain, fused = results
    assert {key: fused[key] for key in ('top1', 'top5')} == {key: plain[key] for key in ('top1', 'top5')}

    timm.models.save_for_hf(build('test_resnet'), tmp_path / 'folder')
    scores = []
    for fuse in ([], ['--fuse-bn']):
        out = tmp_path / f'{len(scores)}.jsonl'
        base = [str(data / 'validation'), '--model', f'local-dir:{tmp_path / "folder"}', '--device', 'cpu', '-j', '0']
        predict([*base, '--top-k', '5', '--out', str(out), *fuse])
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        scores.append({(line['image'], found['label']): found['score'] for line in lines for found in line['labels']})
    assert len(scores[0]) == 100 and scores[1] == pytest.approx(scores[0], rel=1e-3)
    assert caplog.text.count('15 BatchNorm layers') >= 1
