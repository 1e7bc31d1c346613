"""`timm-mldecoder check` finds what is planted in a dataset, and nothing else; what it finds is remembered."""

import logging
import shutil
import tarfile

import numpy as np
import pytest
from image_folders import write_images
from PIL import Image
from runs import MODEL, build, call

from timm_mldecoder.check.__main__ import main
from timm_mldecoder.check.duplicates import equal_content, near
from timm_mldecoder.loading.scan import describe
from timm_mldecoder.runtime.errors import RunFailed

CLASSES = ['cat', 'Cat', 'dog', 'rare', 'nowhere', 'photo']


def picture(number: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A smooth image of its own."""
    values = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def write_faults(root):
    """A dataset with 30 mistakes; return them as (kind, names of files or words of the text)."""
    (root / 'train').mkdir(parents=True)
    (root / 'validation').mkdir()
    rows, expected = {'train': [], 'validation': []}, []

    def add(split, name, image, labels='cat', **save):
        path = root / split / name
        (image if isinstance(image, Image.Image) else Image.open(image)).save(path, **save)
        rows[split].append((f'{split}/{name}', f'{labels};photo'))
        return path

    common = ['cat', 'Cat', 'dog', 'dog;cat']
    for number in range(60):
        add('train', f'{number:02}.png', picture(number), common[number % 4] if number % 10 else 'rare')
    for number in range(40):
        labels = 'rare' if number < 4 else 'nowhere' if number < 10 else common[number % 4]
        add('validation', f'{number:02}.png', picture(100 + number), labels)

    def copy(source, split, name, labels, kind):
        add(split, name, picture(0), labels)
        shutil.copy(root / source, root / split / name)
        expected.append((kind, {source.rpartition('/')[2], name}))

    for number in (1, 2, 3, 5):
        copy(f'train/{number:02}.png', 'train', f'same{number}.png', common[number % 4], 'duplicate')
    for number in (6, 7, 8, 9):
        copy(f'train/{number:02}.png', 'validation', f'leak{number}.png', common[number % 4], 'leak')
    copy('train/11.png', 'train', 'odd11.png', 'dog;Cat', 'contradiction')
    copy('train/12.png', 'validation', 'odd12.png', 'dog', 'contradiction')

    changed = {
        13: lambda image: image.resize((192, 144)),
        14: lambda image: image.point(lambda value: min(255, value + 4)),
        15: lambda image: image.crop((1, 1, 95, 71)),
        16: lambda image: image,
        17: lambda image: image.resize((64, 48)),
        18: lambda image: image.resize((120, 90)),
        19: lambda image: image,
        21: lambda image: image,
        22: lambda image: image.resize((48, 36)),
    }
    for number, change in changed.items():
        split = 'train' if number < 17 or number == 21 else 'validation'
        labels = common[number % 4] if number < 20 else 'nowhere' if split == 'validation' else 'dog;Cat'
        add(split, f'near{number}.jpg', change(picture(number)), labels, quality=85)
        kind = 'contradiction' if number > 20 else 'near duplicate' if split == 'train' else 'near leak'
        expected.append((kind, {f'{number:02}.png', f'near{number}.jpg'}))

    broken = {'empty.png': b'', 'text.jpg': b'<html>404</html>', 'zero.png': bytes(100)}
    whole = {suffix: (root / 'train' / f'whole.{suffix}') for suffix in ('png', 'jpg')}
    for suffix, path in whole.items():
        picture(200).save(path)
        broken[f'half.{suffix}'] = path.read_bytes()[: path.stat().st_size // 2]
        path.unlink()
    for number, (name, content) in enumerate(broken.items()):
        split = 'validation' if number == 0 else 'train'
        add(split, name, picture(201), 'cat').write_bytes(content)
        expected.append(('unreadable', {name}))

    exif = Image.Exif()
    exif[0x0112] = 8
    for number in (30, 31):
        add('train', f'turned{number}.jpg', picture(300 + number), 'dog', exif=exif)
    expected.append(('rotated', {'turned30.jpg', 'turned31.jpg'}))
    expected += [('class names', {"'cat', 'Cat'"}), ('rare class', {'rare (4 images)'}), ('empty class', {'nowhere'})]
    expected += [('constant class', {'photo'}), ('cut off', {'validation: 43% of the area'})]
    for split, entries in rows.items():
        lines = [f'{path},{labels}' for path, labels in entries]
        (root / f'{split}.csv').write_text('\n'.join(['path,labels', *lines]) + '\n')
    (root / 'classes.txt').write_text('\n'.join(CLASSES) + '\n')
    return expected


FLAGS = ['--dataset', 'csv', '--task', 'multilabel', '-j', '0']


@pytest.fixture(scope='module')
def faulty(tmp_path_factory):
    root = tmp_path_factory.mktemp('faulty') / 'data'
    return root, write_faults(root)


def findings_of(root, monkeypatch, *flags):
    found = []
    monkeypatch.setattr('timm_mldecoder.check.__main__._log', found.extend)
    main([str(root), *flags])
    return found


def test_thirty_planted_mistakes_are_found_and_none_else(faulty, monkeypatch, tmp_path):
    root, expected = faulty
    assert len(expected) == 30
    found = findings_of(root, monkeypatch, *FLAGS, '--report', str(tmp_path / 'page'))
    left = list(expected)
    unexpected = []
    for finding in found:
        files = {file.rpartition('/')[2] for file in finding.files}
        match = next(
            (
                (kind, words)
                for kind, words in left
                if kind == finding.kind
                and (words == files or not files and all(word in finding.text for word in words))
            ),
            None,
        )
        if match is None:
            unexpected.append(finding)
        else:
            left.remove(match)
    assert not unexpected and not left
    page = (tmp_path / 'page' / 'check.html').read_text()
    assert page.count('<section') == len({kind for kind, _ in expected}) + 1
    assert page.count('data:image/jpeg') == 2 * 19, 'a thumbnail of each image of a pair'


def test_the_log_names_kinds_and_files_and_strict_fails(faulty, caplog):
    root, _ = faulty
    caplog.set_level(logging.INFO)
    with pytest.raises(RunFailed, match='30 findings'):
        main([str(root), *FLAGS, '--strict'])
    assert '5 unreadable: files that cannot be read' in caplog.text
    assert '4 leak: images of the validation split that are trained on' in caplog.text
    assert 'empty.png: an empty file' in caplog.text and 'text.jpg: not an image' in caplog.text
    assert 'train: random crops show 8% to 100% of the area' in caplog.text
    assert 'half.jpg: image file is truncated' in caplog.text and 'train: modes: ' in caplog.text


def test_good_data_is_good(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    write_images(tmp_path / 'data', train=6, validation=5)
    main([str(tmp_path / 'data'), '-j', '2', '--strict'])
    assert caplog.messages[-1] == 'nothing found'


def test_tar_files_and_hugging_face_datasets_are_checked(tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    folder = write_images(tmp_path / 'data', train=6, validation=5) / 'train'
    shutil.copy(folder / 'class_0' / '000.png', folder / 'class_2' / 'copy.png')
    (folder / 'class_1' / '000.png').write_bytes(b'')
    with tarfile.open(tmp_path / 'all.tar', 'w') as tar:
        tar.add(folder, '')
    images = sorted(folder.rglob('*.png'))
    rows = {'image': [dict(bytes=path.read_bytes(), path=None) for path in images]}
    rows['label'] = [int(path.parent.name[-1]) for path in images]
    features = {'image': datasets.Image(decode=False), 'label': datasets.ClassLabel(names=['a', 'b', 'c'])}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    data.to_parquet(tmp_path / 'rows' / 'train-00000-of-00001.parquet')
    for root, *flags in ([tmp_path / 'all.tar'], [tmp_path / 'cache', '--dataset', f'hfds/{tmp_path}/rows']):
        found = findings_of(root, monkeypatch, *flags, '--val-split', '', '-j', '0')
        assert [finding.kind for finding in found] == ['unreadable', 'contradiction']
        assert found[0].text == ('a row without bytes and path' if flags else 'an empty file')
    assert found[1].text == 'image 0 of the dataset = image 18 of the dataset (copies): a | c'


def test_streams_and_other_flags_are_refused(tmp_path):
    with pytest.raises(ValueError, match='--lr has no effect on check'):
        main([str(tmp_path), '--lr', '1'])


def test_the_command_exits_with_one(tmp_path):
    (write_images(tmp_path / 'data', train=6, validation=5) / 'train' / 'class_0' / '000.png').write_bytes(b'x')
    done = call('timm_mldecoder/check/__main__.py', tmp_path / 'data', '--strict', '-j', '0')
    assert done.returncode == 1 and '1 findings' in done.stderr.splitlines()[-1]


def bad_validation(folder):
    data = write_images(folder / 'data', train=4, validation=3)
    (data / 'validation' / 'class_1' / '000.png').write_bytes(b'x')
    return data


def test_what_cannot_be_read_is_told_before_the_first_epoch(tmp_path, caplog):
    data = bad_validation(tmp_path)
    build(data, tmp_path).close()  # nothing is known yet, and nothing is decoded
    main([str(data), '-j', '0'])
    with pytest.raises(RunFailed, match=r'1 of 9 images cannot be read, such as .*000\.png .*--val-bad-image skip'):
        build(data, tmp_path)
    caplog.clear()
    build(data, tmp_path, '--val-bad-image', 'skip').close()
    assert '1 of 9 images cannot be read' in caplog.text
    shutil.copy(data / 'train' / 'class_1' / '000.png', data / 'validation' / 'class_1' / '000.png')
    build(data, tmp_path).close()  # another file


def test_validation_images_are_decoded_once_where_requested(tmp_path, monkeypatch):
    data = bad_validation(tmp_path)
    with pytest.raises(RunFailed, match='1 of 9 images cannot be read'):
        build(data, tmp_path, '--check-images')
    monkeypatch.setattr('timm_mldecoder.loading.scan._read', lambda *_: pytest.fail('read again'))
    with pytest.raises(RunFailed, match='1 of 9 images cannot be read'):
        build(data, tmp_path, '--check-images', *MODEL[:2])


def test_images_without_structure_are_told_apart_by_colour():
    flat = [Image.new('RGB', (50, 40), colour) for colour in ('red', 'blue', (250, 0, 0), 'white')]
    assert near(*zip(*map(describe, flat), strict=True)) == [[0, 2]]
    assert near([], []) == [] and equal_content([b'a', b'b', b'a']) == [[0, 2]]


def test_many_images_of_their_own_are_not_near(tmp_path):
    facts = [describe(picture(number)) for number in range(2000)]
    assert near(*zip(*facts, strict=True)) == []
    facts += [describe(picture(number).resize((1100, 700))) for number in (3, 1999)]
    assert near(*zip(*facts, strict=True)) == [[3, 2000], [1999, 2001]]
