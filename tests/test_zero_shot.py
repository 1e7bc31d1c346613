"""Text queries on timm models: the classes travel with everything that carries a model, and change after training."""

import copy
import pickle

import pytest
import timm
import torch
from marks import few
from timm.models import save_for_hf
from timm.utils import ModelEmaV3

import timm_mldecoder
from timm_mldecoder.data.word_embeddings import write_word_embeddings

HEAD = dict(decoder_embedding=32, num_heads=4, dim_feedforward=64)
WAYS = {
    'full': {},
    'groups': dict(num_of_groups=3),
    'learned query': dict(num_of_groups=3, learnable_queries=True),
    'learned pooling': dict(num_of_groups=3, classifier='learned'),
}
NAMES = ['zebra', 'traffic light', 'Fußgänger', 'sky', 'dog', 'road', 'tree', 'cat']


def words(num_classes=8, seed=0, width=12):
    return torch.randn(num_classes, width, generator=torch.Generator().manual_seed(seed))


def create(embeddings=None, class_names=NAMES, name='test_resnet', **options):
    options = {**HEAD, 'word_embeddings': words() if embeddings is None else embeddings, **options}
    return timm.create_model(name, ml_decoder=dict(options, class_names=class_names)).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext'])
def test_number_of_classes_follows_the_embeddings_wherever_they_come_from(name, x):
    size = dict(img_size=64) if name == 'test_vit' else {}
    model = timm.create_model(name, ml_decoder=dict(HEAD, word_embeddings=words()), **size).eval()
    assert model.num_classes == 8 and model(x).shape == (2, 8)
    model.get_classifier().set_word_embeddings(words(3, seed=1))
    assert model.num_classes == 3 and model(x).shape == (2, 3) and model.get_classifier().class_names is None
    again = timm_mldecoder.add_ml_decoder_head(model, word_embeddings=words(5), **HEAD)
    assert again.num_classes == 5
    with pytest.raises(ValueError, match='8 classes, num_classes is 7'):
        timm.create_model(name, num_classes=7, ml_decoder=dict(HEAD, word_embeddings=words()))


def test_embeddings_are_read_from_a_file_and_picked_by_name(tmp_path, x):
    path = tmp_path / 'words.safetensors'
    write_word_embeddings(path, words(), NAMES)
    model = create(str(path), class_names=None)
    assert model.get_classifier().class_names == NAMES
    torch.testing.assert_close(model.get_classifier().vocabulary.embeddings, words())
    picked = create(path, class_names=['dog', 'zebra'])
    assert picked.num_classes == 2 and picked.get_classifier().class_names == ['dog', 'zebra']
    torch.testing.assert_close(picked.get_classifier().vocabulary.embeddings, words()[[4, 0]])
    with pytest.raises(ValueError, match=r"no embedding of \['dgo', 'zbera'\]"):
        create(path, class_names=['dgo', 'zebra', 'zbera'])


@pytest.mark.parametrize('way', WAYS)
def test_checkpoint_of_many_classes_loads_into_a_model_with_others(way, x):
    trained = create(words(60), class_names=None, **WAYS[way] and {**WAYS[way], 'num_of_groups': 12})
    head = trained.get_classifier()
    grouping = dict(num_of_groups=head.config.num_queries, group_size=head.config.group_size)
    others = create(**{**WAYS[way], **grouping})
    others.load_state_dict(trained.state_dict())
    head.set_word_embeddings(words(), NAMES)
    assert others.get_classifier().class_names == NAMES
    torch.testing.assert_close(others(x), trained(x))


def test_state_dict_brings_its_classes_unless_the_model_has_others(x):
    trained = create()
    for own, takes in [
        (create(torch.zeros(8, 12), class_names=None), True),
        (create(torch.zeros(8, 12)), True),
        (create(12, class_names=None), True),
        (create(torch.zeros(8, 12), class_names=list('abcdefgh')), False),
        (create(torch.zeros(7, 12), class_names=None), False),
    ]:
        classes = own.get_classifier().class_names
        own.load_state_dict(trained.state_dict())
        assert own.get_classifier().class_names == (NAMES if takes else classes)
        assert takes == (own(x).shape == (2, 8) and torch.equal(own(x), trained(x)))
    with pytest.raises(RuntimeError, match='size mismatch for fc.vocabulary.embeddings'):
        create(words(width=5)).load_state_dict(trained.state_dict())


CARRIERS = {
    'deepcopy': copy.deepcopy,
    'pickle': lambda model: pickle.loads(pickle.dumps(model)),
    'to': lambda model: model.to(torch.float64).to(torch.float32),
    'average': lambda model: ModelEmaV3(model).module,
}


@pytest.mark.parametrize('carrier', CARRIERS)
@pytest.mark.parametrize('way', few(WAYS, ['learned query']))
def test_classes_are_carried(carrier, way, x):
    model = create(**WAYS[way])
    model.get_classifier().set_word_embeddings(words(5, seed=3), NAMES[::-1][:5])
    logits = model(x)
    carried = CARRIERS[carrier](model)
    assert carried.num_classes == 5 and carried.get_classifier().class_names == NAMES[::-1][:5]
    torch.testing.assert_close(carried(x), logits)


def test_an_average_keeps_the_embeddings_exactly():
    model = create().train()
    average = ModelEmaV3(model, decay=0.9)
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    average.update(model)
    assert torch.equal(average.module.get_classifier().vocabulary.embeddings, words())
    assert average.module.get_classifier().class_names == NAMES


@pytest.mark.parametrize('way', WAYS)
def test_folder_round_trip(way, tmp_path, x):
    model = create(**WAYS[way])
    model.get_classifier().set_word_embeddings(words(5, seed=3), NAMES[:5])
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert loaded.num_classes == 5 and loaded.get_classifier().class_names == NAMES[:5]
    torch.testing.assert_close(loaded(x), model(x))
    # the whole vocabulary comes back, and goes out again
    model.get_classifier().set_word_embeddings(words(), NAMES)
    loaded.get_classifier().set_word_embeddings(words(), NAMES)
    torch.testing.assert_close(loaded(x), model(x))
    save_for_hf(loaded, tmp_path / 'again')
    again = timm.create_model(f'local-dir:{tmp_path / "again"}', pretrained=True).eval()
    assert again.get_classifier().class_names == NAMES
    torch.testing.assert_close(again(x), model(x))


def test_stored_folder_takes_other_classes_as_it_is_created(tmp_path, x):
    model = create()
    save_for_hf(model, tmp_path)
    other = dict(HEAD, word_embeddings=words(3, seed=5), class_names=['a', 'b', 'c'])
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, ml_decoder=other).eval()
    model.get_classifier().set_word_embeddings(words(3, seed=5))
    assert loaded.get_classifier().class_names == ['a', 'b', 'c']
    torch.testing.assert_close(loaded(x), model(x))


def test_a_fresh_head_for_as_many_classes_is_for_the_same_ones(x):
    model = create()
    before = model(x)
    model.reset_classifier(8)
    assert model.get_classifier().class_names == NAMES and not torch.equal(model(x), before)
    model.reset_classifier(3)
    with pytest.raises(RuntimeError, match='does not have its classes'):
        model(x)
    model.get_classifier().set_word_embeddings(words(4))
    assert model(x).shape == (2, 4)


@pytest.mark.parametrize('way', [pytest.param('full', marks=pytest.mark.slow), 'groups'])
def test_compile_and_export(way, x):
    model = create(**WAYS[way])
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    for count, seed in ((8, 0), (5, 1), (5, 2)):
        model.get_classifier().set_word_embeddings(words(count, seed))
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
