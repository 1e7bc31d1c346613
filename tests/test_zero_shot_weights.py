"""The reference repository's zero-shot layout: `wordvec_proj`, one shared pooling, no label embeddings in the file."""

import pytest
import timm
import torch
from reference_models import ReferenceHead
from torch import nn

from timm_mldecoder import add_ml_decoder_head, convert, convert_state_dict
from timm_mldecoder.checkpoint.published import head_options
from timm_mldecoder.data.word_embeddings import write_word_embeddings

FEATURES, WIDTH = 512, 300


class ZeroShotReference(nn.Module):
    """A timm backbone and the published head; the word vectors are a plain attribute, as they are there."""

    def __init__(self, width=WIDTH):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = timm.create_model('resnet10t', num_classes=0, global_pool='')
        self.fc = ReferenceHead(FEATURES, 1, 1)
        self.fc.decoder.duplicate_pooling = nn.Parameter(torch.randn(768, 1) * 0.05)
        self.fc.wordvec_proj = nn.Linear(width, 768) if width != 768 else nn.Identity()
        self.word_vectors = None

    def forward(self, x):
        """The plain head with a query for each word, and the same pooling and bias for all."""
        tensors, count = dict(self.fc.named_parameters()), len(self.word_vectors)
        tensors['decoder.query_embed.weight'] = torch.relu(self.fc.wordvec_proj(self.word_vectors))
        tensors['decoder.duplicate_pooling'] = tensors['decoder.duplicate_pooling'].expand(count, -1, -1)
        tensors['decoder.duplicate_pooling_bias'] = tensors['decoder.duplicate_pooling_bias'].expand(count)
        return torch.func.functional_call(self.fc, tensors, self.backbone(x))

    def published(self):
        tensors = {name.removeprefix('backbone.'): tensor.clone() for name, tensor in self.state_dict().items()}
        del tensors['fc.decoder.query_embed.weight']
        return tensors


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def words(count, seed=0, width=WIDTH):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('width', [WIDTH, 768])
def test_converted_file_gives_the_logits_of_the_reference_for_any_classes(width, x):
    reference = ZeroShotReference(width).eval()
    file = {'state_dict': {f'module.{name}': tensor for name, tensor in reference.published().items()}}
    options = head_options(file)
    assert options == dict(word_embeddings=width, decoder_embedding=768, dim_feedforward=2048, num_layers=1)
    model = timm.create_model('resnet10t', ml_decoder=dict(options, word_embeddings=words(9, width=width)))
    model.load_state_dict(convert_state_dict(file, model))
    model.eval()
    for vectors in (words(9, width=width), words(4, seed=1, width=width)):
        reference.word_vectors = vectors
        model.get_classifier().set_word_embeddings(vectors)
        expected = reference(x)
        assert (expected[0] - expected[1]).abs().max() > 1e-3
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_a_model_without_classes_is_told_to_get_some():
    file = ZeroShotReference().published()
    model = add_ml_decoder_head(timm.create_model('resnet10t'), **head_options(file))
    with pytest.raises(ValueError, match='set_word_embeddings'):
        convert_state_dict(file, model)
    model.get_classifier().set_word_embeddings(words(5))
    model.load_state_dict(convert_state_dict(file, model))


def test_own_checkpoint_converts_with_its_classes(x):
    def build(embeddings):
        options = dict(word_embeddings=embeddings, num_of_groups=3, group_size=3, decoder_embedding=32)
        return timm.create_model('resnet10t', ml_decoder=options).eval()

    trained = build(words(8))
    model = build(WIDTH)
    model.load_state_dict(convert_state_dict({'state_dict': trained.state_dict()}, model))
    torch.testing.assert_close(model(x), trained(x))
    with pytest.raises(ValueError, match='grouping'):
        head_options(trained.state_dict())


def test_command_writes_a_folder_with_the_classes(tmp_path, x):
    reference = ZeroShotReference().eval()
    torch.save({'state_dict': reference.published()}, tmp_path / 'file.pth')
    command = [str(tmp_path / 'file.pth'), str(tmp_path / 'folder'), '--model', 'resnet10t', '--input-size', '64']
    with pytest.raises(ValueError, match='--word-embeddings'):
        convert.main(command)
    names = ['zebra', 'traffic light', 'sky']
    write_word_embeddings(tmp_path / 'words.safetensors', words(3), names)
    convert.main([*command, '--word-embeddings', str(tmp_path / 'words.safetensors')])
    model = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()
    assert model.get_classifier().class_names == names and model.pretrained_cfg['label_names'] == names
    reference.word_vectors = words(3)
    torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)
