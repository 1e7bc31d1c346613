"""Each promise of the plug-in, in a new interpreter as a user meets it."""

import pytest

ASK = "timm.create_model('test_resnet', ml_decoder=True, num_classes=5)"
HAS_HEAD = f"assert type({ASK}.get_classifier()).__name__ == 'MLDecoder'"


@pytest.mark.parametrize(
    'imports',
    [
        'import timm',
        'import torch, timm',
        'import timm_mldecoder, timm',
        'import timm, timm_mldecoder, timm_mldecoder as again; again.plugin.activate(); again.plugin.activate()',
        'import timm.models._factory, timm',
        'import timm.layers, torchvision, timm',
    ],
)
def test_create_model_takes_the_option_after(imports, python):
    python(f'{imports}\n{HAS_HEAD}')


def test_names_imported_before_activation_take_it_too(python):
    python(
        'from timm import create_model\nfrom timm.models import create_model as also\nimport timm_mldecoder\n'
        "for create in (create_model, also):\n    assert 'MLDecoder' in repr(create('test_resnet', ml_decoder=True))",
        TORCH_DEVICE_BACKEND_AUTOLOAD='0',
    )


@pytest.mark.parametrize('switch', ['TIMM_MLDECODER_AUTOLOAD', 'TORCH_DEVICE_BACKEND_AUTOLOAD'])
def test_switched_off_leaves_timm_alone_until_imported(switch, python):
    python(
        f'import sys, timm\nassert not any(name.startswith("timm_mldecoder") for name in sys.modules)\n'
        f'try:\n    {ASK}\nexcept TypeError as error:\n    assert "ml_decoder" in str(error)\n'
        f'else:\n    raise SystemExit("the option was taken")\nimport timm_mldecoder\n{HAS_HEAD}',
        **{switch: '0'},
    )


def test_import_before_torch_survives_the_switch(python):
    python(f'import timm_mldecoder, timm\n{HAS_HEAD}', TIMM_MLDECODER_AUTOLOAD='0')


def test_activating_twice_changes_nothing(python):
    python(
        'import sys, timm, timm.models._factory as factory, timm_mldecoder\n'
        'before = factory.model_entrypoint, len(sys.meta_path)\n'
        'timm_mldecoder.plugin.activate(); timm_mldecoder.plugin.autoload()\n'
        'assert before == (factory.model_entrypoint, len(sys.meta_path))'
    )


def test_entry_point_imports_neither_timm_nor_numpy(python):
    python(
        'import sys\nimport timm_mldecoder.plugin as plugin\nplugin.autoload()\n'
        'assert not {"timm", "torch", "numpy"} & set(sys.modules)'
    )


def test_entry_point_costs_less_than_five_milliseconds(python):
    # time to load and call the entry point itself, in a process that has what `import torch` has loaded by then
    measure = (
        'import importlib.metadata, time, os, warnings, functools, re\n'
        'point, = importlib.metadata.entry_points(group="torch.backends", name="timm_mldecoder")\n'
        'start = time.perf_counter(); point.load()(); print(time.perf_counter() - start)'
    )
    seconds = min(float(python(measure).stdout) for _ in range(3))
    assert seconds < 0.005


def test_without_the_option_timm_is_as_it_was(python):
    build = (
        'import torch, timm\n'
        'for name in ("test_resnet", "test_vit", "test_convnext"):\n'
        '    torch.manual_seed(0); model = timm.create_model(name, num_classes=5{option})\n'
        '    print(type(model).__qualname__, type(model).__module__, [n for n, _ in model.named_modules()],\n'
        '          {{n: v.double().sum().item() for n, v in model.state_dict().items()}})\n'
    )
    plain = python(build.format(option=''), TIMM_MLDECODER_AUTOLOAD='0').stdout
    for option in ('', ', ml_decoder=None', ', ml_decoder=False'):
        assert python(build.format(option=option)).stdout == plain


@pytest.fixture
def fake_timm(tmp_path):
    """Write a package named timm that stands before the real one in a process started in ``tmp_path``."""

    def write(factory: str, name: str = '_factory', version: str = '1.0.31') -> None:
        models = tmp_path / 'timm' / 'models'
        models.mkdir(parents=True)
        (tmp_path / 'timm' / '__init__.py').write_text(
            f'__version__ = {version!r}\nfrom timm.models.{name} import create_model\n'
        )
        (models / '__init__.py').write_text('')
        (models / f'{name}.py').write_text(factory)

    return write


LOOKUP = (
    'def model_entrypoint(name):\n    return lambda **kwargs: kwargs\n'
    'def create_model(name, **kwargs):\n    return model_entrypoint(name)(**kwargs)\n'
)
REFUSED = (
    'import torch, timm, warnings\nassert timm.create_model("resnet18", num_classes=3) == {"num_classes": 3}\n'
    'with warnings.catch_warnings(record=True) as caught:\n    warnings.simplefilter("always")\n'
    '    try:\n        timm.create_model("resnet18", ml_decoder=True)\n'
    '    except RuntimeError as error:\n        assert str(error) == str(caught[0].message), caught\n'
    '    else:\n        raise SystemExit("not refused")\n'
    'assert len(caught) == 1\nprint(caught[0].message)\nassert torch.ones(2).sum() == 2'
)


@pytest.mark.parametrize(
    'factory, name, version, said',
    [
        (LOOKUP, '_factory', '0.9.16', 'needs timm 1.0.31'),
        (LOOKUP, 'factory', '0.4.12', 'needs timm 1.0.31'),
        ('def create_model(name, **kwargs):\n    return kwargs\n', '_factory', '3.0.0', 'factory has changed'),
        (LOOKUP, '_factory', '1.0.31', 'could not be loaded'),  # and the rest of timm is broken
    ],
    ids=['old', 'older', 'changed', 'broken'],
)
def test_another_timm_leaves_torch_usable_and_says_why(factory, name, version, said, fake_timm, python):
    fake_timm(factory, name, version)
    assert said in python(REFUSED).stdout


def test_timm_that_fails_to_import_leaves_torch_usable(fake_timm, python):
    fake_timm('raise OSError("half an installation")')
    python(
        'import torch\ntry:\n    import timm\nexcept OSError as error:\n    assert "half" in str(error)\n'
        'else:\n    raise SystemExit("imported")\nassert torch.ones(2).sum() == 2'
    )


def test_an_error_of_ours_leaves_torch_usable(python):
    process = python(
        'import timm_mldecoder.plugin as plugin\n'
        'def broken(): raise RuntimeError("ours")\n'
        'plugin.activate = broken\nimport torch\nassert torch.ones(2).sum() == 2'
    )
    assert 'could not start' in process.stderr and 'ours' in process.stderr


@pytest.mark.parametrize(
    'option, said',
    [
        ('ml_decoder=dict(groups=5)', 'unknown ML-Decoder option groups; valid options: num_of_groups'),
        ('ml_decoder=5', 'ml_decoder must be True, False or a dict'),
        ('ml_decoder=True, features_only=True', 'features_only=True'),
        ('ml_decoder=True, num_classes=0', 'num_classes=0'),
    ],
)
def test_a_wrong_option_is_named(option, said, python):
    process = python(f'import timm\ntimm.create_model("test_resnet", {option})', check=False)
    assert process.returncode and said in process.stderr.splitlines()[-1]


def test_weights_from_files_in_a_new_process(python):
    """`checkpoint_path=` gives the trained model; `pretrained=True` its backbone and a fresh head, for any classes."""
    python(
        'import torch, timm\n'
        'torch.manual_seed(0); torch.save(timm.create_model("test_resnet").state_dict(), "backbone.pth")\n'
        'torch.manual_seed(1); model = timm.create_model("test_resnet", num_classes=5, ml_decoder=True).eval()\n'
        'torch.save(model.state_dict(), "trained.pth")\n'
        'torch.save(model(torch.ones(1, 3, 64, 64)), "logits.pth")'
    )
    python(
        'import torch, timm\n'
        'model = timm.create_model("test_resnet", num_classes=5, ml_decoder=True, checkpoint_path="trained.pth")\n'
        'assert torch.equal(model.eval()(torch.ones(1, 3, 64, 64)), torch.load("logits.pth"))\n'
        'backbone = torch.load("backbone.pth")\n'
        'for classes in (1000, 7):\n'
        '    model = timm.create_model("test_resnet", pretrained=True, num_classes=classes, ml_decoder=True,\n'
        '                              pretrained_cfg_overlay=dict(file="backbone.pth"))\n'
        '    own = model.state_dict()\n'
        '    same = [name for name in own if name in backbone and torch.equal(own[name], backbone[name])]\n'
        '    assert set(same) == {name for name in backbone if not name.startswith("fc.")}, classes\n'
        '    assert model(torch.ones(1, 3, 64, 64)).shape == (1, classes)'
    )
