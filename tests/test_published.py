"""Contract of checkpoints/published.py and convert.py: a file gives the logits of its source model, or an error."""

import argparse
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from reference_models import ReferenceHead, ReferenceTResNet
from timm.data import create_transform, resolve_data_config
from timm.layers.ml_decoder import MLDecoder as TimmMLDecoder
from torch import nn
from torchvision import transforms

from timm_mldecoder import MLDecoder, convert, convert_state_dict
from timm_mldecoder.checkpoint.published import head_options
from timm_mldecoder.checkpoint.read import read_checkpoint

TRESNETS = {
    'M': dict(blocks=(3, 4, 11, 3), width=64, bottlenecks=False),
    'L': dict(blocks=(3, 4, 23, 3), width=64, bottlenecks=True),
    'XL': dict(blocks=(3, 8, 34, 5), width=64, bottlenecks=True),
    'XL of the paper': dict(blocks=(4, 5, 24, 3), width=83, bottlenecks=False),
}
FEATURES, CLASSES = 512, 11  # of the small models


@torch.no_grad()
def logits(model: nn.Module, size: int = 64) -> torch.Tensor:
    """In double precision, so that 1e-5 is about the weights and not about the order of sums."""
    patches = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    return model.double().eval()(nn.functional.interpolate(patches, size=(size, size)))


def assert_same_logits(model: nn.Module, reference: nn.Module) -> None:
    expected = logits(reference)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # the images are told apart, so the backbone counts
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


class SmallReference(nn.Module):
    """A timm backbone, whose tensor names the reference repository keeps, and its head under ``fc``."""

    def __init__(self, classes: int = CLASSES, queries: int = CLASSES):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = timm.create_model('resnet10t', num_classes=0, global_pool='')
        self.fc = ReferenceHead(FEATURES, classes, queries)

    def forward(self, x):
        return self.fc(self.backbone(x))

    def published(self) -> dict:
        return {name.removeprefix('backbone.'): tensor for name, tensor in self.state_dict().items()}


def as_timm(state_dict: dict) -> dict:
    """The names of timm's own layer: only the layers stay under ``decoder``."""
    return {name if '.layers.' in name else name.replace('decoder.', ''): tensor for name, tensor in state_dict.items()}


def as_ours(state_dict: dict) -> dict:
    model = small_model()
    model.load_state_dict(convert_state_dict(state_dict, model))
    return model.state_dict()


def small_model(classes: int = CLASSES, **options) -> nn.Module:
    return timm.create_model('resnet10t', num_classes=classes, ml_decoder=options)


LAYOUTS = {'reference': dict, 'timm': as_timm, 'ours': as_ours}
WRAPPINGS = {
    'bare': lambda tensors: tensors,
    'model': lambda tensors: {'model': tensors, 'idx_to_class': {0: 'cat'}},
    'state_dict': lambda tensors: {'state_dict': tensors, 'epoch': 3},
    'module.': lambda tensors: {'model': {f'module.{name}': tensor for name, tensor in tensors.items()}},
}


class TestConvertStateDict:
    @pytest.mark.parametrize('layout', LAYOUTS)
    @pytest.mark.parametrize('wrapping', WRAPPINGS)
    def test_layout_and_wrapping(self, layout, wrapping):
        reference, model = SmallReference(), small_model()
        file = WRAPPINGS[wrapping](LAYOUTS[layout](reference.published()))
        model.load_state_dict(convert_state_dict(file, model))
        assert_same_logits(model, reference)

    @pytest.mark.parametrize('classes, queries', [(80, 20), (80, 80), (1000, 100), (401, 200), (9605, 200)])
    def test_options_come_from_shapes(self, classes, queries):
        head = ReferenceHead(FEATURES, classes, queries)
        for layout in (dict, as_timm):
            options = head_options({f'head.{name}': tensor for name, tensor in layout(head.state_dict()).items()})
            assert options == dict(
                num_classes=classes, num_of_groups=queries, decoder_embedding=768, dim_feedforward=2048, num_layers=1
            )
        model = MLDecoder(**options, initial_num_features=FEATURES)
        model.load_state_dict(convert_state_dict(head.state_dict(), model))
        features = torch.rand(2, FEATURES, 3, 3).double()
        torch.testing.assert_close(model.double().eval()(features), head.double()(features), atol=1e-5, rtol=0)

    def test_timm_layout_is_timms(self):
        assert set(TimmMLDecoder(7).state_dict()) == set(as_timm(ReferenceHead(2048, 7, 7).state_dict()))

    @pytest.mark.parametrize(
        'size, name, arguments, classes, queries',
        [
            ('M', 'tresnet_m', {}, 9605, 200),
            ('L', 'tresnet_v2_l', {}, 80, 80),
            pytest.param('XL', 'tresnet_v2_l', {'layers': [3, 8, 34, 5]}, 80, 20, marks=pytest.mark.slow),
            pytest.param('XL of the paper', 'tresnet_xl', {}, 196, 100, marks=pytest.mark.slow),
        ],
    )
    def test_tresnet(self, size, name, arguments, classes, queries):
        torch.manual_seed(0)
        reference = ReferenceTResNet(**TRESNETS[size], classes=classes, queries=queries)
        model = timm.create_model(name, num_classes=classes, ml_decoder=dict(num_of_groups=queries), **arguments)
        model.load_state_dict(convert_state_dict({'model': reference.state_dict()}, model))
        assert_same_logits(model, reference)

    def test_changes_neither_file_nor_model(self):
        tensors, model = SmallReference().published(), small_model()
        names, before = list(tensors), {name: tensor.clone() for name, tensor in model.state_dict().items()}
        convert_state_dict(tensors, model)
        assert list(tensors) == names
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_as_a_filter_of_timm(self, tmp_path):
        reference, model = SmallReference(), small_model()
        torch.save({'state_dict': reference.published()}, tmp_path / 'file.pth')
        timm.models.load_checkpoint(model, str(tmp_path / 'file.pth'), filter_fn=convert_state_dict)
        assert_same_logits(model, reference)

    def test_one_error_of_one_line_lists_every_misfit(self):
        tensors = SmallReference(queries=4).published()
        del tensors['layer1.0.conv1.weight'], tensors['fc.decoder.embed_standart.bias']
        tensors['surplus'] = torch.zeros(1)
        tensors['fc.decoder.extra.weight'] = torch.zeros(1)
        with pytest.raises(ValueError) as caught:
            convert_state_dict(tensors, small_model())
        for line in (
            'missing: layer1.0.conv1.weight, fc.embed.bias;',
            'unexpected: surplus, fc.extra.weight;',
            'mis-shaped: fc.queries.weight (file [4, 768], model [11, 768]), '
            'fc.group_fc.weight (file [4, 768, 3], model [11, 768, 1]);',
            'num_classes=11, num_of_groups=4, decoder_embedding=768',
        ):
            assert line in str(caught.value)
        assert '\n' not in str(caught.value) and len(str(caught.value)) <= 500

    @pytest.mark.parametrize(
        'file, model, message',
        [
            ({'fc.weight': torch.zeros(1)}, small_model, 'no ML-Decoder head in the checkpoint'),
            ({'a.group_fc.weight': torch.zeros(1), 'b.group_fc.weight': torch.zeros(1)}, small_model, '2 ML-Decoder'),
            ({'weights': {'fc.weight': torch.zeros(1)}}, small_model, 'weights is not a tensor'),
            ({'group_fc.weight': torch.zeros(1)}, lambda: nn.Linear(2, 2), 'Linear has 0 ML-Decoder heads'),
        ],
    )
    def test_refusal_says_why(self, file, model, message):
        with pytest.raises(ValueError, match=message):
            convert_state_dict(file, model())

    @pytest.mark.parametrize(
        'tensors, message',
        [
            ({'duplicate_pooling': torch.zeros(4, 8, 1)}, 'missing group_fc.bias, layers.0.linear1.weight'),
            (
                {
                    'group_fc.weight': torch.zeros(8, 1),
                    'group_fc.bias': torch.zeros(1),
                    'layers.0.linear1.weight': torch.zeros(4, 8),
                    'vocabulary.embeddings': torch.zeros(3, 5),
                },
                'grouping',
            ),
        ],
    )
    def test_options_that_no_shape_shows_are_an_error(self, tensors, message):
        with pytest.raises(ValueError, match=message):
            head_options(tensors)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), 'w')


class TestReadCheckpoint:
    @pytest.mark.parametrize('zipped', [True, False])
    def test_code_is_refused_and_not_run(self, tmp_path, zipped):
        mark = tmp_path / 'mark'
        content = {'model': {'fc.weight': torch.zeros(1)}, 'extra': Bomb(mark)}
        torch.save(content, tmp_path / 'file.pth', _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r'file.pth .*\S+open'):
            read_checkpoint(tmp_path / 'file.pth')
        assert not mark.exists()
        torch.load(tmp_path / 'file.pth', weights_only=False)  # the bomb is one
        assert mark.exists()

    def test_what_training_runs_leave_is_harmless(self, tmp_path):
        extras = {'args': argparse.Namespace(lr=0.1), 'metric': np.float64(0.5), 'names': {np.int64(0): np.str_('cat')}}
        torch.save({'model': {'fc.weight': torch.ones(2)}, **extras}, tmp_path / 'file.pth')
        checkpoint = read_checkpoint(tmp_path / 'file.pth')
        assert {name: checkpoint[name] for name in extras} == extras
        torch.save({'fc.weight': torch.ones(2), 'priors': np.arange(3.0)}, tmp_path / 'file.pth')
        assert read_checkpoint(tmp_path / 'file.pth')['priors'].tolist() == [0, 1, 2]
        torch.save({'priors': np.array([Bomb(tmp_path / 'mark')])}, tmp_path / 'file.pth')
        with pytest.raises(ValueError, match='is refused'):
            read_checkpoint(tmp_path / 'file.pth')
        assert not (tmp_path / 'mark').exists()


def write(folder, content):
    torch.save(content, folder / 'file.pth')
    return folder / 'file.pth'


class TestCommand:
    @pytest.mark.slow
    def test_published_tresnet(self, tmp_path, program):
        torch.manual_seed(0)
        reference = ReferenceTResNet(**TRESNETS['M'], classes=80, queries=80)
        names = {index: f'class {index}' for index in reversed(range(80))}
        write(tmp_path, {'model': reference.state_dict(), 'idx_to_class': names})
        printed = program('run_module.py', 'timm_mldecoder.convert', 'file.pth', 'folder').stdout
        for line in (
            'layout        the reference repository\n',
            'architecture  tresnet_m\n',
            'classes       80, class 0, class 1, class 2, ...\n',
            'groups        80\n',
        ):
            assert line in printed

        model = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True)
        assert_same_logits(model, reference)
        assert model.pretrained_cfg['label_names'] == [f'class {index}' for index in range(80)]

        config = resolve_data_config({}, model=model)
        assert config['input_size'] == (3, 224, 224)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8))
        published = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
        torch.testing.assert_close(create_transform(**config)(image), published(image))

    @pytest.mark.parametrize(
        'size, classes, name, arguments, pixels',
        [
            ('M', 9605, 'tresnet_m', {}, 224),
            ('L', 80, 'tresnet_v2_l', {}, 448),
            ('L', 196, 'tresnet_v2_l', {}, 384),
            ('XL', 80, 'tresnet_v2_l', {'layers': [3, 8, 34, 5]}, 640),
            ('XL of the paper', 80, 'tresnet_xl', {}, 640),
        ],
    )
    def test_knows_the_published_set(self, size, classes, name, arguments, pixels):
        with torch.device('meta'):
            tensors = ReferenceTResNet(**TRESNETS[size], classes=classes, queries=80).state_dict()
        shape = convert.tresnet_shape(tensors)
        assert convert.TRESNETS[shape] == (name, arguments)
        assert convert.INPUT_SIZES[shape, classes] == pixels

    def test_arguments_of_the_backbone_are_kept(self, tmp_path):
        file = write(tmp_path, {'model': SmallReference().published(), 'arch': 'resnet10t'})
        convert.main([str(file), str(tmp_path / 'folder'), '--input-size', '96', '--mean', '0.5', '0.5', '0.5'])
        stored = json.loads((tmp_path / 'folder' / 'config.json').read_text())
        assert stored['model_args']['ml_decoder'] == {'num_of_groups': CLASSES, 'global_pool': 'avg'}
        config = resolve_data_config({}, model=timm.create_model(f'local-dir:{tmp_path / "folder"}'))
        assert config['input_size'] == (3, 96, 96)
        assert tuple(config['mean']) == (0.5, 0.5, 0.5)

    def test_backbone_with_a_fixed_size(self, tmp_path):
        source = timm.create_model('vit_tiny_patch16_224', img_size=64, num_classes=CLASSES, ml_decoder=True)
        file = write(tmp_path, {'state_dict': source.state_dict(), 'arch': 'vit_tiny_patch16_224'})
        convert.main([str(file), str(tmp_path / 'folder'), '--input-size', '64'])
        model = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True)
        assert_same_logits(model, source)

    @pytest.mark.parametrize(
        'content, arguments, message',
        [
            ({}, [], 'pass --model'),
            ({'arch': 'resnet10t'}, [], 'pass --input-size'),
            ({'arch': 'resnet1'}, ['--input-size', '64'], '--model resnet1'),
            ({}, ['--model', 'resnet18', '--input-size', '64'], 'does not fit ResNet'),
        ],
    )
    def test_refusal_writes_nothing(self, tmp_path, content, arguments, message):
        file = write(tmp_path, {'model': SmallReference().published(), **content})
        with pytest.raises(ValueError, match=message):
            convert.main([str(file), str(tmp_path / 'folder'), *arguments])
        assert not (tmp_path / 'folder').exists()

    def test_folder_in_use_is_kept(self, tmp_path):
        folder = tmp_path / 'folder'
        folder.mkdir()
        (folder / 'notes.txt').write_text('kept')
        file = write(tmp_path, {'model': SmallReference().published(), 'arch': 'resnet10t'})
        with pytest.raises(ValueError, match='notes.txt|not empty|empty folder'):
            convert.main([str(file), str(folder), '--input-size', '64'])
        assert [path.name for path in folder.iterdir()] == ['notes.txt']

    def test_class_names(self):
        assert convert.names_of_file({1: 'b', 0: 'a'}, 2) == ['a', 'b']
        assert convert.names_of_file({'1': 'b', '0': 'a'}, 2) == ['a', 'b']
        assert convert.names_of_file({90: 'toothbrush', 1: 'person'}, 2) == ['toothbrush', 'person']
        assert convert.names_of_file({0: 'a'}, 2) is None
        assert convert.names_of_file(None, 2) is None
