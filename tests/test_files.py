"""Files as people have them: every reader follows one set of rules, which docs/data.md has."""

import json
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_mldecoder.data import class_to_index, create_dataset, overlap
from timm_mldecoder.data.images import Reading, strict
from timm_mldecoder.flags.parse import parse_train
from timm_mldecoder.loading.compare_classes import check_classes
from timm_mldecoder.loading.datasets import create_split
from timm_mldecoder.predict.sources import SourceDataset, open_source

RAMP = np.linspace(0, 1, 32)[None].repeat(8, 0)
GREY = (RAMP * 255).round()


def write(path: Path, image: Image.Image | np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    return path


def read_folder(path: Path, mode: str) -> Image.Image:
    return strict(create_dataset('', str(path.parent.parent.parent), 'train', input_img_mode=mode))[0][0]


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize(
    ('name', 'pixels'),
    [
        ('deep.png', (RAMP * 65535).round().astype(np.uint16)),
        ('deep.tiff', (RAMP * 65535).round().astype(np.uint16)),
        ('wide.tif', (RAMP * 65535).round().astype(np.int32)),
        ('narrow.tif', GREY.astype(np.int32)),
        ('float.tif', RAMP.astype(np.float32)),
    ],
)
def test_deep_images_are_scaled_by_their_range(mode, name, pixels, tmp_path):
    image = Reading().open(write(tmp_path / 'train' / 'a' / name, pixels), mode)
    assert image.mode == mode
    values = np.asarray(image, dtype=float).reshape(*GREY.shape, -1)
    assert np.abs(values - GREY[..., None]).max() <= 1


def transparent(mode: str) -> Image.Image:
    """A black left half, and a right half of nothing."""
    image = Image.new('RGBA', (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    if mode == 'P':
        image = image.quantize(4)
    elif mode == 'tRNS':
        image = Image.new('RGB', (8, 8), (1, 2, 3))
        image.paste((0, 0, 0), (0, 0, 4, 8))
        image.info['transparency'] = (1, 2, 3)
    return image if mode in ('P', 'tRNS') else image.convert(mode)


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'tRNS'])
def test_transparent_pixels_are_white(mode, tmp_path):
    image = np.asarray(Reading().open(write(tmp_path / 'x.png', transparent(mode)), 'RGB'))
    assert (image[:, :4] == 0).all()
    assert (image[:, 4:] == 255).all()


def test_reading_of_flags(tmp_path):
    path = write(tmp_path / 'x.tif', np.array([[-1000, 0, 1000]], dtype=np.int32))
    assert np.asarray(Reading(image_range=(-1000, 1000)).open(path, 'L')).tolist() == [[0, 128, 255]]
    with pytest.raises(OSError, match=r'-1000 to 1000 .* --image-range'):
        Reading().open(path, 'L')
    image = Reading(background='#0000ff').convert(transparent('RGBA'), 'RGB')
    assert image.getpixel((7, 0)) == (0, 0, 255)
    assert Reading().convert(transparent('RGBA'), 'RGBA').getpixel((7, 0)) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match='--background nocolour'):
        Reading(background='nocolour')


def test_first_frame_and_cmyk(tmp_path):
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
    path = tmp_path / 'train' / 'a' / 'x.gif'
    path.parent.mkdir(parents=True)
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert Reading().open(path, 'RGB').getpixel((0, 0)) == (255, 0, 0)
    path.unlink()
    image = Reading().open(write(path.with_suffix('.jpg'), Image.new('CMYK', (8, 8), (0, 255, 255, 0))), 'RGB')
    assert image.getpixel((0, 0))[0] > 200


def write_rotated(path: Path) -> Path:
    image, exif = Image.new('RGB', (8, 4)), Image.Exif()
    exif[0x0112] = 6
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif)
    return path


def test_exif_rotation_is_off_and_told(tmp_path):
    path = write_rotated(tmp_path / 'train' / 'a' / 'x.jpg')
    assert read_folder(path, 'RGB').size == (8, 4)
    assert Reading(exif_rotate=True).open(path, 'RGB').size == (4, 8)
    dataset = strict(create_dataset('', str(tmp_path), 'train'))
    (line,) = Reading().describe('train', dataset)
    assert '1 of 1' in line
    assert '--exif-rotate' in line
    assert not Reading(exif_rotate=True).describe('train', dataset)


def test_one_leaf_name_in_two_places_is_an_error(tmp_path):
    for folder in ('north/lake', 'south/lake', 'city'):
        write(tmp_path / 'train' / folder / 'x.png', Image.new('RGB', (8, 8)))
    with pytest.raises(ValueError, match=r'north/lake and south/lake .*lake'):
        create_dataset('', str(tmp_path), 'train')


def test_unicode_forms_of_a_folder_are_one_class(tmp_path, caplog):
    for split, form in (('train', 'NFD'), ('validation', 'NFC')):
        write(tmp_path / split / unicodedata.normalize(form, 'Müsli') / 'x.png', Image.new('RGB', (8, 8)))
    classes = [class_to_index(create_dataset('', str(tmp_path), split)) for split in ('train', 'validation')]
    assert classes[0] == classes[1] == {unicodedata.normalize('NFC', 'Müsli'): 0}
    check_classes(create_dataset('', str(tmp_path), 'train'), 1, given=False)
    assert 'without images' not in caplog.text
    write(tmp_path / 'test' / ' Mü\u200bsli ' / 'x.png', Image.new('RGB', (8, 8)))
    assert list(class_to_index(create_dataset('', str(tmp_path), 'test'))) == [unicodedata.normalize('NFC', 'Müsli')]
    write(tmp_path / 'train' / unicodedata.normalize('NFC', 'Müsli') / 'x.png', Image.new('RGB', (8, 8)))
    with pytest.raises(ValueError, match='one class by their name'):
        create_dataset('', str(tmp_path), 'train')


ROWS = [('x/0.png', 'cat'), ('x/1.png', 'cat;dog'), ('x/2.png', ''), ('x/3.png', 'dog')]


def write_table(root: Path, text: str, name: str = 'train.csv') -> None:
    for number in range(4):
        if not (root / f'x/{number}.png').exists():
            write(root / f'x/{number}.png', Image.new('RGB', (8, 8)))
    (root / name).write_bytes(text.encode())


def rows(separator: str = ',', labels=lambda names: names) -> str:
    return ''.join(f'{path}{separator}{labels(names)}\n' for path, names in ROWS)


def labels_of(root: Path, split: str = 'train', **options: str) -> dict[str, set[str]]:
    dataset = create_dataset('csv', str(root), split, **options)
    return {
        dataset.filename(index): {
            name
            for name, value in zip(dataset.class_names, dataset.annotations.target(index).tolist(), strict=True)
            if value == 1
        }
        for index in range(len(dataset))
    }


EXPECTED = {path: set(filter(None, names.split(';'))) for path, names in ROWS}


@pytest.mark.parametrize(
    ('text', 'options'),
    [
        ('path;labels\n' + rows(';', lambda names: f'"{names}"'), {}),
        ('path\tlabels\n' + rows('\t'), {}),
        ('PATH, Labels \n' + rows(', '), {}),
        ('sep=;\npath;labels\n' + rows(';', lambda names: f'"{names}"'), {}),
        ('sep=,\r\npath,labels\r\n' + rows(), {}),
        ('file,tags\n' + rows(), {'path_column': 'File', 'label_column': 'tags'}),
        ('path,labels\n' + rows(',', lambda names: names.replace(';', ' | ')), {'label_separator': '|'}),
        ('path,labels\n' + rows(',', lambda names: f'"{names.replace(";", ",")}"'), {'label_separator': ','}),
        (
            'path,labels\n' + rows(',', lambda names: f'"{names.split(";") if names else []}"'),
            {'label_separator': 'list'},
        ),
        ('path,dog,cat\n' + rows(',', lambda names: f'{int("dog" in names)},{float("cat" in names)}'), {}),
        ('path,labels\n' + rows(',', lambda names: names.replace('cat', 'c\u200bat\ufeff')), {}),
        ('path,labels\n' + rows().replace('x/', './x//'), {}),
        (',path,labels\n' + rows().replace('x/', '5,x/'), {}),
    ],
)
def test_tables_as_people_write_them(text, options, tmp_path):
    write_table(tmp_path, text)
    assert labels_of(tmp_path, **options) == EXPECTED


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('path,labels\nx/0.png,"cat\n' + rows(), r'train\.csv, line 2: .*quote'),
        ('path,labels\n' + rows() + '"x/0.png,cat\nx/1.png,dog\n', r'train\.csv, line 6: .*quote'),
        ('path,labels\n', r'train\.csv: .*no image'),
        ('path,labels\nx/0.png,c\0at\n', r"train\.csv, line 2: .*'\\x00'"),
        ('path,labels\nx/0.png,"cat,dog"\nx/1.png,"dog,cat"\nx/2.png,cat\n', "--label-separator ','"),
        ('path,labels\nx/0.png,cat|dog\nx/1.png,dog|cow\nx/2.png,cat|cow\n', r"--label-separator '\|'"),
        ('path,labels\nx/0.png,"[1, 2]"\nx/1.png,[1]\n', '--label-separator list'),
        ('path,cat,dog\nx/0.png,1,many\n', r"train\.csv, line 2: .*'dog'.*--label-column"),
        ('file,names\n' + rows(), '--path-column'),
        ('file;names\n' + rows(';'), r"got \['file', 'names'\], .*; --path-column"),
        ('path,labels\n' + rows() + 'x/1.png,NaN\n', r"train\.csv, line 6: .*'NaN'.*empty cell"),
        ('path,labels\nx\\0.png,cat\nx\\9.png,dog\n', r'2 of 2 images are missing .*Windows'),
    ],
)
def test_broken_tables_are_one_line(text, message, tmp_path):
    write_table(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        labels_of(tmp_path)
    assert '\n' not in str(error.value)
    assert '--num-classes' not in str(error.value)


def test_commas_within_class_names_are_kept(tmp_path):
    write_table(tmp_path, 'path,labels\nx/0.png,"tench, Tinca tinca"\nx/1.png,"ray, manta"\n')
    assert labels_of(tmp_path) == {'x/0.png': {'tench, Tinca tinca'}, 'x/1.png': {'ray, manta'}}


def test_leaks_are_found_in_any_spelling(tmp_path):
    write_table(tmp_path, 'path,labels\n' + rows())
    write_table(tmp_path, 'path,labels\n./x/1.png,cat\nx//2.png,dog\n', 'validation.csv')
    splits = [create_dataset('csv', str(tmp_path), split) for split in ('train', 'validation')]
    assert overlap(*splits) == ['x/1.png', 'x/2.png']
    images = [[path, ['a']] for path in ('x/0.png', './x/0.png', 'x//0.png', 'x/1.png')]
    (tmp_path / 'train.json').write_text(json.dumps({'classes': ['a'], 'images': images}))
    assert create_dataset('json', str(tmp_path), 'train').filenames() == ['x/0.png', 'x/1.png']


@pytest.mark.parametrize(
    'text',
    [
        'path;tags\nx/1.png;a\nx/2.png;b\n',
        'n\t Path\n1\tx/1.png\n2\tx/2.png\n',
        'x/1.png\nx/2.png\n',
        'file;tags\nx/1.png;a,b\nx/2.png;b\n',
        'File name,tags\nx/1.png,a\nx/2.png,b\n',
        'x/1.png;a\nx/2.png;b\n',
        '\ufeffpath\nx/1.png\nx/2.png',
    ],
)
def test_lists_of_a_prediction_are_separated_as_tables_are(text, tmp_path):
    write_table(tmp_path, text, 'new.csv')
    source = open_source(tmp_path / 'new.csv')
    assert source.names.tolist() == [b'x/1.png', b'x/2.png'] and SourceDataset(source, lambda image: image)[1][1] == 1


@pytest.mark.parametrize('path', ['{}', 'x/{}', '{}.png', 'x/{}.PNG', 'x\\{}.png', 'x\\{}'])
def test_paths_of_lists_lead_to_the_files_that_they_mean(path, tmp_path, caplog):
    write_table(tmp_path, rows('path,labels'))
    (tmp_path / 'train.csv').write_text('path,labels\n' + ''.join(f'{path.format(n)},cat\n' for n in range(4)))
    dataset = create_dataset('csv', str(tmp_path), 'train')
    assert dataset.filenames() == [f'x/{n}.png' for n in range(4)] and dataset[3][1].tolist() == [1]
    assert f'{path.format(0)} and the others are read as x/0.png' in caplog.text


def test_a_path_that_may_be_two_files_is_refused(tmp_path):
    for name in ('images/0.jpg', 'masks/0.png'):
        write(tmp_path / name, Image.new('RGB', (8, 8)))
    (tmp_path / 'train.csv').write_text('path,labels\n0,cat\n')
    with pytest.raises(ValueError, match='0 may be images/0.jpg or masks/0.png: write the path into the list'):
        create_dataset('csv', str(tmp_path), 'train')


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('path;labels;;\nx/0.png;cat;;\n;;;\nx/1.png;dog;;\n', [['cat'], ['dog']]),
        (',path,cat,dog\n0,x/0.png,1,0\n1,x/1.png,0,1\n', [['cat'], ['dog']]),
        ('Unnamed: 0,path,cat,dog\n0,x/0.png,True,False\n1,x/1.png,FALSE,yes\n', [['cat'], ['dog']]),
    ],
)
def test_what_spreadsheets_leave_behind_is_no_class(text, expected, tmp_path):
    write_table(tmp_path, text)
    dataset = create_dataset('csv', str(tmp_path), 'train')
    assert dataset.class_names == ['cat', 'dog']
    assert [[dataset.class_names[i] for i in dataset[n][1].nonzero()[:, 0]] for n in range(2)] == expected


def test_every_column_of_labels_is_a_class_and_so_is_every_ignored_label(tmp_path):
    write_table(tmp_path, 'path,dog,cat,gnu,owl\nx/0.png,1,0,0,-1\nx/1.png,0,1,0,-1\n')
    dataset = create_dataset('csv', str(tmp_path), 'train')
    assert dataset.class_names == ['cat', 'dog', 'gnu', 'owl']
    assert [dataset[n][1].tolist() for n in range(2)] == [[0, 1, 0, -1], [1, 0, 0, -1]]
    write_table(tmp_path, 'path,cat,yak\nx/0.png,1,0\n', 'validation.csv')  # one more column, without a label
    assert create_dataset('csv', str(tmp_path), 'validation')[0][1].tolist() == [1, 0, 0, 0]
    write_table(tmp_path, 'path,labels,ignored\nx/0.png,cat,owl\nx/1.png,dog,owl\n', 'train.csv')
    dataset = create_dataset('csv', str(tmp_path), 'train')
    assert dataset.class_names == ['cat', 'dog', 'owl'] and dataset[1][1].tolist() == [0, 1, -1]


def test_some_columns_are_chosen_among_others(tmp_path, caplog):
    caplog.set_level('INFO')
    write_table(tmp_path, 'path,photographer,dog,is_valid,Cat\nx/0.png,Anna,1,0,0\nx/1.png,Bert,0,1,1\n')
    dataset = create_dataset('csv', str(tmp_path), 'train', label_column='cat,dog')
    assert [dataset[n][1].tolist() for n in range(2)] == [[0, 1], [1, 0]]
    assert 'columns of 0 and 1 are the classes: Cat, dog' in caplog.text
    with pytest.raises(ValueError, match="no column 'gnu', of .*photographer"):
        create_dataset('csv', str(tmp_path), 'train', label_column='cat,gnu')
    with pytest.raises(ValueError, match="line 2: expected 0, 1 or -1 .*'photographer', got 'Anna'; --label-column"):
        create_dataset('csv', str(tmp_path), 'train')
    write_table(tmp_path, 'path,red\nx/0.png,1\nx/1.png,0\n')
    assert [target.tolist() for _, target in create_dataset('csv', str(tmp_path), 'train')] == [[1], [0]]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('path,red,Red\nx/0.png,1,0\n', r"each once, got \['red'\] more than once"),
        ('x/0.png,cat\nx/1.png,dog\n', 'which may be a row without a header'),
        ('path,red,blue\nx/0.png,1,-1\nx/1.png,-1,1\n', r'1 and -1 and no 0 in 2 columns \(blue, red\): -1 says that'),
    ],
)
def test_tables_that_would_be_misread_are_refused(text, message, tmp_path):
    write_table(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        create_dataset('csv', str(tmp_path), 'train')


def test_a_table_that_is_no_text_is_to_be_saved_as_csv(tmp_path):
    (tmp_path / 'tags.xlsx').write_bytes(b'PK\x03\x04\x14\x00\xff\xfe')
    with pytest.raises(ValueError, match=r'tags\.xlsx is not a text file: save it as CSV'):
        create_dataset('csv', str(tmp_path / 'tags.xlsx'), 'train')
    with pytest.raises(ValueError, match=r'gone\.csv. is not there'):
        create_dataset('csv', str(tmp_path / 'gone.csv'), 'train')


@pytest.mark.parametrize('kind', ['json', 'coco'])
def test_a_list_in_place_of_an_object_is_answered_with_its_layout(kind, tmp_path):
    (tmp_path / 'train.json').write_text('[{"path": "x/0.png", "labels": ["cat"]}]')
    with pytest.raises(ValueError, match=r'train\.json is a list, not an object with the lists "classes" and "images"'):
        create_dataset(kind, str(tmp_path / 'train.json'), 'train')


def test_a_column_of_0_and_1_may_name_two_classes_of_which_an_image_has_one(tmp_path):
    write_table(tmp_path, 'path,label\nx/0.png,0\nx/1.png,1\nx/2.png,1\n')
    flags = [str(tmp_path), '--dataset', 'csv', '--val-split', '']
    with pytest.raises(ValueError, match='pass --task multilabel, or --label-column label'):
        create_split(parse_train(flags), 'train')
    dataset = create_split(parse_train([*flags, '--label-column', 'label']), 'train')
    assert [target for _, target in dataset] == [0, 1, 1]


def test_a_column_in_which_minus_1_may_say_no_is_warned_of(tmp_path, caplog):
    write_table(tmp_path, 'path,red,blue\nx/0.png,1,-1\nx/1.png,0,1\n')
    assert create_dataset('csv', str(tmp_path), 'train')[0][1].tolist() == [-1, 1]
    assert '1 and -1 and no 0 in 1 columns (blue)' in caplog.text
    write_table(tmp_path, 'path,red,blue\nx/2.png,1,-1\nx/3.png,-1,1\n', 'validation.csv')  # a few of the labels
    assert create_dataset('csv', str(tmp_path), 'validation')[0][1].tolist() == [-1, 1]


def test_a_list_of_a_prediction_as_excel_and_pandas_write_it(tmp_path):
    write_table(tmp_path, 'sep=;\npath;n\nx/1.png;1\n', 'new.csv')
    assert open_source(tmp_path / 'new.csv').names.tolist() == [b'x/1.png']
    pandas = pytest.importorskip('pandas')
    frame = pandas.DataFrame(dict(id=[1], file=['x/1.png']))
    frame.to_parquet(tmp_path / 'new.parquet')
    with pytest.raises(ValueError, match=r"pass --path-column, the column of paths, of \['id', 'file'\]"):
        open_source(tmp_path / 'new.parquet')
    assert open_source(tmp_path / 'new.parquet', path_column='file').names.tolist() == [b'x/1.png']


def test_the_column_of_a_list_of_a_prediction_can_be_named(tmp_path):
    write_table(tmp_path, 'tags;File\na;x/1.png\nb;x/2.png\n', 'new.csv')
    assert open_source(tmp_path / 'new.csv', path_column='file').names.tolist() == [b'x/1.png', b'x/2.png']
    with pytest.raises(ValueError, match=r"no column 'image'; the first line is \['tags', 'File'\]"):
        open_source(tmp_path / 'new.csv', path_column='image')


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write(tmp_path / 'pictures' / 'train' / 'a' / 'x.png', Image.new('RGB', (8, 8)))
    Path(tmp_path / 'run.yaml').write_text('data_dir: ~/pictures\nval_split: ""\n')
    options = parse_train(['--config', str(tmp_path / 'run.yaml'), '--output=~/runs'])
    assert options.data_dir == str(tmp_path / 'pictures')
    assert options.output == str(tmp_path / 'runs')


def test_flags_of_images_reach_the_dataset(tmp_path):
    write(tmp_path / 'train' / 'a' / 'x.png', transparent('RGBA'))
    flags = ['--background', 'black', '--image-range', '0', '100', '--exif-rotate']
    dataset = create_split(parse_train([str(tmp_path), '--val-split', '', *flags]), 'train')
    assert dataset.reading == Reading('black', (0, 100), True)
    assert dataset[0][0].getpixel((7, 0)) == (0, 0, 0)


def test_split_folders_count_in_any_case_and_are_no_classes(tmp_path, caplog):
    for split in ('Train', 'VAL'):
        for name in ('cat', 'dog'):
            write(tmp_path / 'data' / split / name / 'x.png', Image.new('RGB', (8, 8)))
    for split in ('train', 'validation'):
        dataset = create_dataset('', str(tmp_path / 'data'), split)
        assert dataset.filenames() == ['cat/x.png', 'dog/x.png']
    with pytest.raises(ValueError, match='the folders Train, VAL are splits, not classes: give .*/data$'):
        create_dataset('', str(tmp_path), 'train')
    with tarfile.open(tmp_path / 'all.tar', 'w') as tar:
        tar.add(tmp_path / 'data', '.')
    with pytest.raises(ValueError, match='the folders Train, VAL are splits, not classes: unpack it, or make a tar'):
        create_dataset('', str(tmp_path / 'all.tar'), 'train')
    (tmp_path / 'tars').mkdir()
    with tarfile.open(tmp_path / 'tars' / 'train.tar', 'w') as tar:
        tar.add(tmp_path / 'data' / 'Train', '.')
    with pytest.raises(ValueError, match='no images in class folders .*--train-split train.tar'):
        create_dataset('', str(tmp_path / 'tars'), 'train')
    assert len(create_dataset('', str(tmp_path / 'tars'), 'train.tar')) == 2
    (tmp_path / 'all.zip').write_bytes(b'PK')
    with pytest.raises(ValueError, match='all.zip: no images in class folders .*: unpack it'):
        create_dataset('', str(tmp_path / 'all.zip'), 'train')
    write(tmp_path / 'data' / 'Train' / 'cat' / 'old' / 'x.png', Image.new('RGB', (8, 8)))
    assert len(class_to_index(create_dataset('', str(tmp_path / 'data'), 'train'))) == 3
    assert 'cat/old is a folder within a class, and a class of its own' in caplog.text


def test_the_classes_of_lists_are_those_of_the_training_list_whatever_its_name(tmp_path):
    write_table(tmp_path, 'path,labels\nx/0.png,cat\nx/1.png,dog\n', 'training.csv')
    write_table(tmp_path, 'path,labels\nx/2.png,dog\n', 'validation.csv')
    assert create_dataset('csv', str(tmp_path), 'validation').class_names == ['cat', 'dog']


@pytest.mark.parametrize('name', ['Dev', 'evaluation', 'valid'])
def test_folders_of_a_split_have_the_names_that_lists_have(name, tmp_path):
    for split in ('training', name):
        write(tmp_path / split / 'cat' / 'x.png', Image.new('RGB', (8, 8)))
        assert create_dataset('', str(tmp_path), 'train').reader.root == str(tmp_path / 'training')
    assert create_dataset('', str(tmp_path), 'validation').reader.root == str(tmp_path / name)


@pytest.mark.parametrize('name', ['val', 'valid', 'validation', 'dev'])
def test_the_validation_split_of_lists_has_any_of_its_names(name, tmp_path):
    write_table(tmp_path, 'path,labels\nx/0.png,cat\n')
    write_table(tmp_path, 'path,labels\nx/1.png,cat\n', f'{name}.csv')
    (tmp_path / f'{name}.json').write_text('{"classes": ["cat"], "images": [["x/2.png", ["cat"]]]}')
    assert create_dataset('csv', str(tmp_path), 'validation').filenames() == ['x/1.png']
    assert create_dataset('json', str(tmp_path), 'validation').filenames() == ['x/2.png']
    assert create_dataset('json', str(tmp_path / f'{name}.json'), 'train').filenames() == ['x/2.png']
