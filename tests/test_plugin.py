"""Each promise of the plug-in, in a new interpreter as a user meets it."""

import inspect

import pytest
import timm
from marks import few

import timm_mldecoder


@pytest.mark.parametrize(
    'imports',
    few(
        [
            'timm',
            'timm_mldecoder timm',
            'torch timm',
            'timm timm_mldecoder timm_mldecoder.plugin',
            'timm.models._factory timm',
            'timm.layers torchvision timm',
        ],
        1,
    ),
)
def test_create_model_takes_the_option_after(imports, program):
    assert program('plugin_imports.py', *imports.split()).stdout == 'MLDecoder\n'


def test_names_imported_before_activation_take_it_too(program):
    program('plugin_late.py', TORCH_DEVICE_BACKEND_AUTOLOAD='0')


@pytest.mark.parametrize(
    'switch', ['TIMM_MLDECODER_AUTOLOAD', pytest.param('TORCH_DEVICE_BACKEND_AUTOLOAD', marks=pytest.mark.slow)]
)
def test_switched_off_leaves_timm_alone_until_imported(switch, program):
    program('plugin_off.py', **{switch: '0'})


@pytest.mark.slow
def test_import_before_torch_survives_the_switch(program):
    assert program('plugin_imports.py', 'timm_mldecoder', TIMM_MLDECODER_AUTOLOAD='0').stdout == 'MLDecoder\n'


@pytest.mark.slow
def test_activating_twice_changes_nothing(program):
    program('plugin_twice.py')


def test_entry_point_imports_neither_timm_nor_numpy(program):
    program('plugin_light.py')


@pytest.mark.slow
def test_timms_deprecated_factory_module_takes_the_option(program):
    assert program('plugin_shim.py').stdout == 'MLDecoder\n'


@pytest.mark.parametrize('option', few(['null', '', 'false'], 1))
def test_without_the_option_timm_is_as_it_was(option, program):
    plain = program('plugin_plain.py', TIMM_MLDECODER_AUTOLOAD='0').stdout
    assert program('plugin_plain.py', *option.split()).stdout == plain


LOOKUP = (
    'def model_entrypoint(name):\n    return lambda **kwargs: kwargs\n'
    'def create_model(name, **kwargs):\n    return model_entrypoint(name)(**kwargs)\n'
)


@pytest.mark.parametrize(
    'factory, printed',
    [
        (LOOKUP, 'RuntimeError timm_mldecoder does not work with the installed timm'),  # the rest of timm is missing
        ('def create_model(name, **kwargs):\n    return kwargs\n', "{'ml_decoder': True}"),  # nothing to hook
        ('raise OSError("half an installation")', 'OSError half an installation'),
    ],
    ids=['damaged', 'unknown', 'not importable'],
)
def test_a_timm_that_does_not_work_leaves_torch_usable(factory, printed, program, tmp_path):
    models = tmp_path / 'timm' / 'models'
    models.mkdir(parents=True)
    (tmp_path / 'timm' / '__init__.py').write_text('from timm.models._factory import create_model\n')
    (models / '__init__.py').write_text('')
    (models / '_factory.py').write_text(factory)
    assert program('plugin_broken_timm.py').stdout.startswith(printed)


def test_an_error_of_ours_leaves_torch_usable(program):
    assert 'ours' in program('plugin_own_error.py').stderr


@pytest.mark.parametrize(
    ('option', 'named'),
    [(dict(groups=5), 'groups; .*num_of_groups'), (5, '5'), ('yes', "'yes'"), (dict(num_heads=7), 'num_heads')],
)
def test_a_wrong_option_is_named(option, named):
    with pytest.raises(ValueError, match=named):
        timm.create_model('test_resnet', ml_decoder=option)


@pytest.mark.slow
def test_weights_from_files_in_a_new_process(program):
    """`checkpoint_path=` gives the trained model; `pretrained=True` its backbone and a fresh head, for any classes."""
    program('weights_write.py')
    program('weights_read.py')


SIGNATURES = {
    'MLDecoder': dict(num_classes=inspect.Parameter.empty, num_of_groups=-1, decoder_embedding=(-1, 768))
    | dict(initial_num_features=2048, zsl=0),
    'add_ml_decoder_head': dict(
        model=inspect.Parameter.empty, num_classes=-1, num_of_groups=-1, decoder_embedding=768, zsl=0
    ),
    'add_cosine_classifier': dict(model=inspect.Parameter.empty, scale=1.0),
    'convert_state_dict': dict(state_dict=inspect.Parameter.empty, model=inspect.Parameter.empty),
}


@pytest.mark.parametrize('name', SIGNATURES)
def test_public_signatures_are_fixed(name):
    parameters = inspect.signature(getattr(timm_mldecoder, name)).parameters.values()
    positional = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert [parameter.name for parameter in positional] == list(SIGNATURES[name])
    for parameter in positional:
        wanted = SIGNATURES[name][parameter.name]
        assert parameter.default in wanted if isinstance(wanted, tuple) else parameter.default == wanted
