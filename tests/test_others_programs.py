"""ML-Decoder models in programs of others: timm's scripts, Hugging Face transformers, fx; and timm without a head.

timm's scripts are not installed with timm: the tests do what they do with a model, through the same functions.
"""

import json

import pytest
import timm
import torch
from marks import few
from timm.models import load_checkpoint, save_for_hf
from timm.models._features_fx import create_feature_extractor
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from timm.utils.onnx import onnx_export, onnx_forward
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_extractor
from torchvision.models.feature_extraction import get_graph_node_names

from timm_mldecoder import MLDecoder

NAMES = ['test_resnet', 'test_vit', 'test_convnext']  # timm's smallest
CLASSES = 7


def test_model_kwargs_of_timms_scripts(program):
    cases = {
        (): ['Linear', CLASSES],
        ('--model-kwargs', 'ml_decoder=True'): ['MLDecoder', CLASSES],
        ('--model-kwargs', "ml_decoder={'num_of_groups': 3}"): ['MLDecoder', 3],
        ('--model-kwargs', 'ml_decoder=False'): ['Linear', CLASSES],
    }
    lines = [json.dumps(line) for line in (*cases, ('--model-kwargs', 'ml_decoder=yes'))]
    *built, (error, message) = map(json.loads, program('script_model_kwargs.py', *lines).stdout.splitlines())
    assert built == list(cases.values())
    assert error == 'ValueError' and 'ml_decoder' in message and "'yes'" in message


@pytest.mark.parametrize('name', few(NAMES, 1))
def test_train_then_validate(name, tmp_path):
    """The order of timm's train.py, then what its validate.py and inference.py load."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, ml_decoder=True)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.01, layer_decay=0.75)
    ema = ModelEmaV3(model, decay=0.5)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path))
    images, targets = torch.randn(4, 3, 160, 160), torch.arange(4)
    before = {name: value.clone() for name, value in model.get_classifier().named_parameters()}
    loss = nn.functional.cross_entropy(model(images), targets)
    loss.backward()
    optimizer.step()
    ema.update(model)
    saver.save_checkpoint(epoch=0, metric=1.0)
    for parameter, value in model.get_classifier().named_parameters():
        assert not torch.equal(before[parameter], value), f'{parameter} was not trained'

    path = str(tmp_path / 'last.pth.tar')
    for use_ema, trained in ((True, ema.module), (False, model)):
        validated = timm.create_model(name, num_classes=CLASSES, ml_decoder=True)
        load_checkpoint(validated, path, use_ema=use_ema)
        with torch.inference_mode():
            assert torch.equal(validated.eval()(images), trained.eval()(images))


@pytest.mark.parametrize('training', [False, True])
def test_benchmark(training):
    """timm's benchmark.py: parameter count, channels_last, mixed precision, with and without gradients."""
    model = timm.create_model('test_resnet', ml_decoder=True).to(memory_format=torch.channels_last).train(training)
    plain = timm.create_model('test_resnet')
    head = MLDecoder(model.num_classes, initial_num_features=plain.num_features)
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in
             dict(model=model, plain=plain, head=head, linear=plain.fc).items()}  # fmt: skip
    assert count['model'] == count['plain'] - count['linear'] + count['head']
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(training), torch.autocast('cpu', dtype=torch.bfloat16):
        logits = model(images)
    assert logits.shape == (2, model.num_classes)
    assert logits.isfinite().all()
    if training:
        logits.float().logsumexp(dim=1).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('use_dynamo', few([True, False], 1))
@pytest.mark.filterwarnings('ignore')  # the exporters warn about themselves
def test_onnx_export(use_dynamo, tmp_path):
    pytest.importorskip('onnxruntime')
    model = timm.create_model('test_resnet', num_classes=CLASSES, ml_decoder=True, exportable=True)
    path = str(tmp_path / 'model.onnx')
    onnx_export(model, path, batch_size=2, input_size=(3, 64, 64), use_dynamo=use_dynamo)
    images = torch.randn(5, 3, 64, 64)  # the batch stays free
    with torch.inference_mode():
        expected = model(images)
    torch.testing.assert_close(torch.from_numpy(onnx_forward(path, images)), expected, atol=1e-4, rtol=1e-4)


class TestTransformers:
    """The timm wrapper of Hugging Face transformers, from a local folder."""

    @pytest.fixture
    def folder(self, tmp_path):
        config = {
            'architecture': 'test_resnet',
            'num_classes': CLASSES,
            'model_args': {'ml_decoder': True},
            'label_names': [f'class {index}' for index in range(CLASSES)],
            'pretrained_cfg': {'input_size': [3, 64, 64], 'num_classes': CLASSES},
        }
        (tmp_path / 'config.json').write_text(json.dumps(config))
        return tmp_path

    def test_forward_save_reload(self, folder):
        transformers = pytest.importorskip('transformers')
        images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForImageClassification.from_config(config).eval()
        assert isinstance(model.timm_model.get_classifier(), MLDecoder)
        assert model.config.id2label[3] == 'class 3'

        output = model(pixel_values=images, labels=labels, output_hidden_states=True)
        assert output.logits.shape == (2, CLASSES)
        assert torch.equal(output.logits, model.timm_model(images))
        output.loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

        model.save_pretrained(folder / 'saved')
        again, info = transformers.AutoModelForImageClassification.from_pretrained(
            folder / 'saved', output_loading_info=True
        )
        assert not any(info.values()), info
        assert torch.equal(again.eval()(pixel_values=images).logits, output.logits)

    def test_folder_written_by_timm(self, tmp_path):
        """num_classes goes to the top level: transformers refuses it twice, of any timm model."""
        transformers = pytest.importorskip('transformers')
        model = timm.create_model('test_resnet', ml_decoder=dict(num_of_groups=5))
        model.reset_classifier(CLASSES)
        save_for_hf(model, tmp_path, safe_serialization=True)
        config = json.loads((tmp_path / 'config.json').read_text())
        del config['model_args']['num_classes']
        (tmp_path / 'config.json').write_text(json.dumps(config))
        wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(wrapped.eval()(pixel_values=images).logits, model.eval()(images))

    @pytest.mark.parametrize(
        'args',
        few(
            [
                {'ml_decoder': True},
                {'ml_decoder': {'classifier': 'cosine', 'num_of_groups': 3}},
                {'ml_decoder': {'learnable_queries': True, 'num_layers': 2}},
                {'ml_decoder': {'word_embeddings': 16}},
                {'ml_decoder': {'word_embeddings': 16, 'group_size': 3}},
                {'cosine_classifier': 5.0},
            ],
            2,
        ),
        ids=str,
    )
    def test_a_fresh_classifier_on_a_plain_folder_is_initialised(self, args, tmp_path):
        transformers = pytest.importorskip('transformers')
        plain = timm.create_model('test_resnet', num_classes=CLASSES)
        save_for_hf(plain, tmp_path, safe_serialization=True)
        edit_args(tmp_path, lambda stored: args)
        model = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
        expected = timm.create_model('test_resnet', num_classes=CLASSES, **args)
        for (name, ours), theirs in zip(
            model.timm_model.state_dict().items(), expected.state_dict().values(), strict=True
        ):
            if 'fc.' in name and ours.numel():
                torch.testing.assert_close(ours.std(correction=0), theirs.std(correction=0), rtol=0.5, atol=0.02)
            else:
                assert torch.equal(ours, plain.state_dict().get(name, ours)), name
        if 'word_embeddings' in str(args):
            model.timm_model.get_classifier().set_word_embeddings(torch.randn(CLASSES, 16))
        assert model(pixel_values=torch.randn(2, 3, 64, 64)).logits.isfinite().all()

    @pytest.mark.parametrize('options', [{'ml_decoder': {'num_of_groups': 5}}, {'cosine_classifier': 5.0}], ids=str)
    def test_a_stored_classifier_for_other_classes_is_initialised_where_it_does_not_fit(self, options, tmp_path):
        transformers = pytest.importorskip('transformers')
        stored = timm.create_model('test_resnet', num_classes=CLASSES, **options)
        save_for_hf(stored, tmp_path, safe_serialization=True)
        edit_args(tmp_path, lambda args: {name: args[name] for name in args if name != 'num_classes'})
        model = transformers.TimmWrapperForImageClassification.from_pretrained(
            tmp_path, num_labels=12, ignore_mismatched_sizes=True
        )
        for name, tensor in model.timm_model.state_dict().items():
            if tensor.shape == stored.state_dict()[name].shape:
                assert torch.equal(tensor, stored.state_dict()[name]), name
            else:
                assert tensor.isfinite().all() and tensor.abs().max() < 10, name

    def test_automodel_gives_timms_backbone(self, tmp_path):
        transformers = pytest.importorskip('transformers')
        plain = timm.create_model('test_resnet', num_classes=CLASSES).eval()
        images, outputs = torch.randn(2, 3, 64, 64), []
        for name, options in (('plain', {}), ('head', {'ml_decoder': {'num_of_groups': 3}})):
            model = timm.create_model('test_resnet', num_classes=CLASSES, **options).eval()
            model.load_state_dict({k: v for k, v in plain.state_dict().items() if 'fc' not in k}, strict=False)
            save_for_hf(model, tmp_path / name, safe_serialization=True)
            edit_args(tmp_path / name, lambda args: {k: v for k, v in args.items() if k != 'num_classes'})
            outputs.append(transformers.AutoModel.from_pretrained(tmp_path / name).eval()(images))
        assert torch.equal(outputs[0].last_hidden_state, outputs[1].last_hidden_state)
        assert torch.equal(outputs[0].pooler_output, outputs[1].pooler_output)


def edit_args(folder, edit) -> None:
    config = json.loads((folder / 'config.json').read_text())
    config['model_args'] = edit(config.get('model_args', {}))
    (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize(
    'options', [{}, dict(learnable_queries=True, num_layers=2), dict(classifier='cosine')], ids=str
)
@pytest.mark.parametrize(
    'trace',
    [
        lambda model: create_feature_extractor(model, ['fc']),
        lambda model: torchvision_extractor(model, [get_graph_node_names(model)[1][-1]]),
        torch.fx.symbolic_trace,
    ],
    ids=['timm', 'torchvision', 'symbolic_trace'],
)
def test_fx_tracing(trace, options):
    model = timm.create_model('test_resnet', num_classes=CLASSES, ml_decoder=options).eval()
    traced, images = trace(model).eval(), torch.randn(2, 3, 64, 64)
    output = traced(images)
    output = next(iter(output.values())) if isinstance(output, dict) else output
    assert torch.equal(output, model.eval()(images))


@pytest.mark.filterwarnings('ignore')
def test_fx_quantisation():
    model, images = (
        timm.create_model('test_resnet', num_classes=CLASSES, ml_decoder=True).eval(),
        torch.randn(2, 3, 64, 64),
    )
    prepared = prepare_fx(model, get_default_qconfig_mapping('x86'), (images,))
    prepared(images)
    expected = model(images)
    assert (convert_fx(prepared)(images) - expected).abs().max() < 0.2 * expected.abs().max()


def test_scripting_is_refused_with_what_works_instead():
    with pytest.raises(ValueError, match=r'torch\.compile.*torch\.export'):
        torch.jit.script(timm.create_model('test_resnet', ml_decoder=True))


def test_timm_without_a_head_gives_the_same_results(program):
    off = program('plain_timm.py', TIMM_MLDECODER_AUTOLOAD='0').stdout
    assert 'test_resnet' in off and 'MLDecoder' not in off
    for arguments in ([], ['activate']):
        assert program('plain_timm.py', *arguments).stdout == off
