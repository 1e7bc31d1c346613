"""Files of class priors, and their effect on the class-aware selective loss."""

import pytest
import torch

from timm_mldecoder.data.class_files import read_priors, write_priors
from timm_mldecoder.losses import create_loss

NAMES = ['cat', 'dog, large', 'gnu']


def test_priors_are_read_in_the_order_of_the_classes(tmp_path):
    write_priors(tmp_path / 'priors.csv', NAMES, torch.tensor([0.5, 0.25, 1e-9]))
    priors = read_priors(tmp_path / 'priors.csv', ['gnu', 'cat', 'dog, large'])
    assert priors.tolist() == pytest.approx([1e-9, 0.5, 0.25])
    assert priors.dtype == torch.float32


def test_the_published_layout_is_read_with_and_without_its_header(tmp_path):
    for header in ('Classes,avg_pred\n', ''):
        (tmp_path / 'priors.csv').write_text(f'{header}cat,0.6\ndog,0.01\n')
        assert read_priors(tmp_path / 'priors.csv', ['cat', 'dog']).tolist() == pytest.approx([0.6, 0.01])


def test_priors_of_a_file_select_the_labels_that_the_loss_leaves_out(tmp_path):
    write_priors(tmp_path / 'priors.csv', ['cat', 'dog'], torch.tensor([0.5, 0.01]))
    loss = create_loss('csl', class_prior=read_priors(tmp_path / 'priors.csv', ['cat', 'dog']), likelihood_topk=0,
                       reduction='none')  # fmt: skip
    assert (loss(torch.zeros(1, 2), torch.full((1, 2), -1.0)) > 0).tolist() == [[False, True]]


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('cat,0.5\ndog', "line 2.*'dog'"),
        ('cat,many', "line 1.*'many'"),
        ('cat,1.5', "line 1.*'cat'.*1.5"),
        ('cat,0.5\ngnu,0.5', r"missing \['dog'\], unknown \['gnu'\]"),
    ],
)
def test_mistakes_are_named(tmp_path, content, message):
    (tmp_path / 'priors.csv').write_text(content)
    with pytest.raises(ValueError, match=message):
        read_priors(tmp_path / 'priors.csv', ['cat', 'dog'])
