"""Open Images: the readers agree, the cache is shared and renewed, the names of V7, the distribution of CSL."""

import csv
import multiprocessing
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from multilabel_data import write_image, write_open_images, write_text

from timm_mldecoder.data import annotations, create_dataset
from timm_mldecoder.data.formats import open_images

LABELS = 'train-annotations-human-imagelabels.csv'


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A user's cache folder of the test's own, for small files too."""
    monkeypatch.setattr(annotations, 'CACHED', 0)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'user-cache'))


def write_labels(path: Path, rows: int, seed: int = 0, quoted: bool = False) -> None:
    """Random labels of images of names of several lengths, not in order, with repeats."""
    random = np.random.default_rng(seed)
    with path.open('w', newline='') as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
        writer.writerow(open_images.COLUMNS)
        for image, label, present in random.integers([1, 0, 0], [10**6, 40, 2], size=(rows, 3)).tolist():
            writer.writerow([f'{image % 300:x}', 'verification', f'/m/{label}', present])


@pytest.mark.parametrize('quoted', [False, True])
def test_pyarrow_and_csv_give_the_same_table(tmp_path, quoted):
    pytest.importorskip('pyarrow')
    path = tmp_path / LABELS
    write_labels(path, 2000, quoted=quoted)
    classes = {f'/m/{index}': index - 30 if index >= 30 else open_images.SKIPPED for index in range(40)}
    arrow = open_images._read_with_pyarrow(path, classes, 'train')
    plain = open_images._read_with_csv(path, classes, 'train')
    assert arrow[0].tolist() == [name.encode() for name in plain[0]]
    assert 0 < len(plain[0]) < 300, 'some images have none of the classes'
    for ours, theirs in zip(arrow[1:], plain[1:], strict=True):
        assert ours.tolist() == list(theirs)


def test_a_mistake_beyond_the_first_block_is_named_with_its_line(tmp_path):
    path = tmp_path / LABELS
    write_labels(path, 3000)
    with path.open('a') as file:
        file.write('1,verification,/m/99,1\n')
    with pytest.raises(ValueError, match=f'{LABELS}, line 3002.*/m/99'):
        open_images.read_labels(path, {f'/m/{index}': index for index in range(40)}, 'train')


def test_it_works_without_pyarrow(tmp_path, monkeypatch):
    write_open_images(tmp_path)
    expected = create_dataset('openimages', str(tmp_path), 'train')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)  # importing it fails
    write_open_images(tmp_path / 'again')
    dataset = create_dataset('openimages', str(tmp_path / 'again'), 'train')
    assert dataset.filenames() == expected.filenames()
    assert [target.tolist() for _, target in dataset] == [target.tolist() for _, target in expected]


def cache_folders(root: Path) -> list[str]:
    return sorted(path.name for path in (root / '.timm_mldecoder').iterdir() if path.is_dir())


def test_the_cache_is_used_until_a_file_changes(tmp_path, monkeypatch):
    write_open_images(tmp_path)
    first = create_dataset('openimages', str(tmp_path), 'train')
    (folder,) = cache_folders(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(open_images, 'read_labels', None)  # calling it would fail
        second = create_dataset('openimages', str(tmp_path), 'train')
    assert [target.tolist() for _, target in second] == [target.tolist() for _, target in first]
    path = tmp_path / f'oidv6-{LABELS}'
    path.write_text(path.read_text() + '00000d,verification,/m/1,1\n')
    assert len(create_dataset('openimages', str(tmp_path), 'train')) == len(first) + 1
    (renewed,) = cache_folders(tmp_path)
    assert renewed != folder, 'the old one is removed'


def test_a_damaged_cache_is_built_again(tmp_path):
    write_open_images(tmp_path)
    expected = [target.tolist() for _, target in create_dataset('openimages', str(tmp_path), 'train')]
    (path,) = (tmp_path / '.timm_mldecoder').glob('*/label.npy')
    content = path.read_bytes()
    for damage in (lambda: path.write_bytes(content[:-1]), path.unlink, lambda: path.write_bytes(b'')):
        damage()
        assert [target.tolist() for _, target in create_dataset('openimages', str(tmp_path), 'train')] == expected
        assert path.read_bytes() == content


def test_the_cache_of_a_read_only_root_is_in_the_cache_folder_of_the_user(tmp_path, caplog):
    root = tmp_path / 'data'
    write_open_images(root)
    (root / '.timm_mldecoder').write_text('a file: no folder can be made here, not even by root')
    expected = create_dataset('openimages', str(root), 'train')
    assert len(list((tmp_path / 'user-cache').rglob('label.npy'))) == 1
    (tmp_path / 'user-cache').rename(tmp_path / 'moved')
    (tmp_path / 'user-cache').write_text('nor here')
    uncached = create_dataset('openimages', str(root), 'train')
    assert [target.tolist() for _, target in uncached] == [target.tolist() for _, target in expected]
    assert str(tmp_path / 'user-cache') in caplog.text


def read_train(root: str) -> tuple[int, int]:
    """Number of images, and of tables that this process built."""
    annotations.CACHED, built = 0, []
    read_labels = open_images.read_labels
    open_images.read_labels = lambda *arguments: built.append(1) or read_labels(*arguments)
    return len(create_dataset('openimages', root, 'train')), len(built)


def test_of_several_processes_one_builds_the_table(tmp_path):
    write_open_images(tmp_path)
    write_labels(tmp_path / f'oidv6-{LABELS}', 60_000)
    write_text(tmp_path / 'oidv6-class-descriptions.csv', *(f'/m/{index},name {index}' for index in range(40)))
    (tmp_path / 'oidv6-classes-trainable.txt').unlink()
    for index in range(300):
        write_image(tmp_path / 'train' / f'{index:x}.jpg', 0)
    with multiprocessing.get_context('spawn').Pool(3) as pool:
        results = pool.map(read_train, [str(tmp_path)] * 3, chunksize=1)
    assert [images for images, _ in results] == [300] * 3
    assert sum(built for _, built in results) == 1
    assert [name.startswith('openimages-') for name in cache_folders(tmp_path)] == [True], 'nothing is left over'


def test_workers_map_the_table_instead_of_receiving_it(tmp_path):
    write_labels(tmp_path / LABELS, 20_000)
    write_text(tmp_path / 'class-descriptions.csv', *(f'/m/{index},name {index}' for index in range(40)))
    dataset = create_dataset('openimages', str(tmp_path), 'train', missing=None)
    sent = pickle.dumps(dataset.annotations)
    assert len(sent) < 5_000 < sum(array.nbytes for array in dataset.annotations.entries())
    received = pickle.loads(sent)
    assert isinstance(received._table['label'], np.memmap)
    assert torch.equal(received.target(7), dataset.annotations.target(7))


@pytest.mark.parametrize(
    ('prefix', 'split', 'folder'),
    [('oidv7-', 'val', 'validation'), ('', 'validation', 'val'), ('v', 'val', 'val')],
)
def test_the_file_names_of_every_version_are_read(tmp_path, prefix, split, folder):
    write_text(tmp_path / f'{prefix}class-descriptions.csv', '/m/0,cat', '/m/1,dog')
    labels = tmp_path / f'{prefix}{split}-annotations-human-imagelabels.csv'
    write_text(labels, ','.join(open_images.COLUMNS), 'a,verification,/m/1,1')
    write_image(tmp_path / folder / 'a.jpg', 3)
    ((image, target),) = create_dataset('openimages', str(tmp_path), 'val')
    assert image.size == (20, 10) and target.tolist() == [-1, 1]


def write_csl(root: Path) -> None:
    write_text(root / 'data.csv', 'path,pos,neg,split', '''train/0/a.jpg,"['/m/0', '/m/1']","['/m/2']",train''',
               '''train/0/b.jpg,[],"['/m/0', '/m/7']",train''', '''val/c.jpg,"['/m/2']",[],val''')  # fmt: skip
    torch.save({'/m/2': '"jaguar"', '/m/0': 'cat', '/m/1': 'jaguar'}, root / 'mid_to_classes.pth')
    for name in ('train/0/a.jpg', 'train/0/b.jpg', 'val/c.jpg'):
        write_image(root / name, 5)


def test_the_distribution_of_csl_is_read(tmp_path, monkeypatch):
    write_csl(tmp_path)
    train, validation = (create_dataset('openimages', str(tmp_path), split) for split in ('train', 'val'))
    assert train.class_names == validation.class_names == ['jaguar (/m/2)', 'cat', 'jaguar (/m/1)']
    assert [target.tolist() for _, target in train] == [[0, 1, 1], [-1, 0, -1]]
    assert [target.tolist() for _, target in validation] == [[1, -1, -1]]
    monkeypatch.setattr(open_images, 'make_table', None)  # calling it would fail
    assert len(create_dataset('openimages', str(tmp_path), 'train')) == 2


@pytest.mark.parametrize(
    ('row', 'split', 'message'),
    [
        ('a.jpg,/m/0,[],train', 'train', 'data.csv, line 5'),
        ('a.jpg,[],[],training', 'train', 'data.csv, line 5'),
        ('a.jpg,[]', 'train', 'data.csv, line 5'),
        ('a.jpg,[],[],train', 'test', "data.csv.*'test'"),
    ],
)
def test_a_malformed_distribution_of_csl_is_named(tmp_path, row, split, message):
    write_csl(tmp_path)
    with (tmp_path / 'data.csv').open('a') as file:
        file.write(row + '\n')
    with pytest.raises(ValueError, match=message):
        create_dataset('openimages', str(tmp_path), split)
    torch.save([1], tmp_path / 'mid_to_classes.pth')
    with pytest.raises(ValueError, match='mid_to_classes.pth'):
        create_dataset('openimages', str(tmp_path), 'train')


def test_two_versions_in_one_folder_are_refused(tmp_path):
    write_open_images(tmp_path)
    os.link(tmp_path / f'oidv6-{LABELS}', tmp_path / f'oidv7-{LABELS}')
    with pytest.raises(ValueError, match=f'oidv6-{LABELS}.*oidv7-{LABELS}'):
        create_dataset('openimages', str(tmp_path), 'train')
