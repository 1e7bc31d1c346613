"""One file or folder for all splits: --val-fraction and --split-column."""

import csv
import json
import shutil
import tarfile

import numpy as np
import pytest
from image_folders import write_images
from marks import few
from multilabel_data import write_coco, write_image
from runs import MODEL, build, call, summary

import validate
from timm_mldecoder.data import create_dataset, overlap, summarize
from timm_mldecoder.data.hold_out import stratify
from timm_mldecoder.flags import parse_train, parse_validate
from timm_mldecoder.flags.parse import inherit
from timm_mldecoder.loading.datasets import create_split
from timm_mldecoder.predict.__main__ import main as predict_main
from timm_mldecoder.train.loop import fit


def test_each_class_has_the_same_share_in_both_parts():
    random = np.random.default_rng(0)
    targets = random.random((4000, 12)) < np.geomspace(0.4, 0.005, 12)
    image, label = np.nonzero(targets)
    chosen = stratify(image, label, 4000, 0.25, seed=3)
    assert abs(chosen.sum() - 1000) <= 12
    counts = targets.sum(0)
    assert np.abs(targets[chosen].sum(0) - counts / 4).max() <= 1
    assert abs((~targets[chosen].any(1)).sum() - (~targets.any(1)).sum() / 4) <= 1
    assert (chosen == stratify(image, label, 4000, 0.25, seed=3)).all()
    other = stratify(image, label, 4000, 0.25, seed=4)
    assert (chosen != other).mean() > 0.2
    plain = random.permutation(4000) < 1000
    assert np.abs(targets[plain].sum(0) - counts / 4).max() > 5, 'a plain draw is worse, so that the test can fail'


def test_a_class_of_two_images_is_trained_on():
    chosen = stratify(np.arange(102), np.repeat([0, 1], [100, 2]), 102, 0.1, seed=0)
    assert chosen[:100].sum() == 10 and not chosen[100:].all()


def write_table(folder, rows, header='path,labels', name='photos.csv'):
    folder.mkdir(exist_ok=True)
    for number in range(len(rows)):
        write_image(folder / 'images' / f'{number}.png', number)
    lines = [f'images/{number}.png,{row}' for number, row in enumerate(rows)]
    (folder / name).write_text('\n'.join([header, *lines]) + '\n')
    return folder / name


def splits_of(*flags):
    options = parse_train([*map(str, flags), '--num-classes', '2'])
    return [create_split(options, split) for split in ('train', 'validation')]


def test_one_table_is_divided(tmp_path):
    table = write_table(tmp_path / 'data', ['cat', 'dog', 'cat;dog', ''] * 10)
    flags = [table, '--dataset', 'csv', '--task', 'multilabel', '--val-fraction', '0.25']
    train, validation = splits_of(*flags)
    assert len(train) + len(validation) == 40 and abs(len(validation) - 10) <= 2
    assert overlap(train, validation) == []
    assert summarize(train).positives.tolist() == [15, 15] and summarize(validation).positives.tolist() == [5, 5]
    assert train[0][0].size == (20, 10)
    again, other = splits_of(*flags, '--seed', '7')[1], splits_of(*flags, '--split-seed', '7')[1]
    assert again.filenames() == validation.filenames() != other.filenames()


def test_an_image_of_several_rows_is_in_one_part(tmp_path):
    table = write_table(tmp_path / 'data', ['cat'] * 20)
    table.write_text(table.read_text() + ''.join(f'./images/{number}.png,dog\n' for number in range(20)))
    train, validation = splits_of(table, '--dataset', 'csv', '--task', 'multilabel', '--val-fraction', '0.5')
    assert (len(train), len(validation)) == (10, 10) and overlap(train, validation) == []


def test_class_folders_and_json_are_divided(tmp_path):
    write_images(tmp_path / 'data', train=10, validation=2)
    train, validation = splits_of(tmp_path / 'data' / 'train', '--val-fraction', '0.2')
    assert summarize(train).positives.tolist() == [8] * 3 and summarize(validation).positives.tolist() == [2] * 3
    assert overlap(train, validation) == []
    table = write_table(tmp_path / 'json', ['a'] * 8)
    images = [[f'images/{number}.png', ['a', 'b'][: 1 + number % 2]] for number in range(8)]
    (table.parent / 'train.json').write_text(json.dumps({'classes': ['a', 'b'], 'images': images}))
    parts = splits_of(table.parent, '--dataset', 'json', '--task', 'multilabel', '--val-fraction', '0.5')
    assert [summarize(part).positives.tolist() for part in parts] == [[4, 2], [4, 2]]


def test_tars_coco_and_hugging_face_datasets_are_divided(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    write_images(tmp_path / 'data', train=10, validation=2)
    with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
        tar.add(tmp_path / 'data' / 'train', '.')
    parts = splits_of(tmp_path / 'x.tar', '--val-fraction', '0.2')
    assert [np.bincount(part.reader.targets).tolist() for part in parts] == [[8] * 3, [2] * 3]
    assert [summarize(part).positives.tolist() for part in parts] == [[8] * 3, [2] * 3]
    assert not set(parts[0].filenames()) & set(parts[1].filenames()) and parts[1][0][0].size == (48, 48)

    write_coco(tmp_path / 'coco')
    (tmp_path / 'coco' / 'annotations' / 'instances_val2014.json').unlink()
    flags = ['--dataset', 'coco', '--task', 'multilabel', '--val-fraction', '0.4']
    parts = splits_of(tmp_path / 'coco', *flags)
    assert [len(part) for part in parts] == [2, 1] and overlap(*parts) == []
    (tmp_path / 'coco' / 'annotations' / 'instances_val.json').write_text('{}')
    with pytest.raises(ValueError, match='instances_val.json is there, which is a validation split'):
        splits_of(tmp_path / 'coco', *flags)

    datasets = pytest.importorskip('datasets')
    images = [dict(path=str(path)) for path in sorted((tmp_path / 'data' / 'train').glob('*/*'))]
    for labels, kind, task in (
        ([number // 10 for number in range(30)], datasets.ClassLabel(names=['a', 'b', 'c']), []),
        ([['x'] if number % 3 else ['x', 'y'] for number in range(30)], None, ['--task', 'multilabel']),
    ):
        features = datasets.Features(
            {'image': datasets.Image(decode=False), 'label': kind or datasets.Sequence(datasets.Value('string'))}
        )
        rows = datasets.Dataset.from_dict({'image': images, 'label': labels}, features=features)
        rows.to_parquet(tmp_path / f'rows{len(task)}' / 'train-00000-of-00001.parquet')
        name = f'hfds/{tmp_path}/rows{len(task)}'
        parts = splits_of(tmp_path / 'cache', '--dataset', name, '--val-fraction', '0.2', *task)
        assert [len(part) for part in parts] == [24, 6]
        if task:
            assert [sum(part[index][1].tolist()[1] for index in range(len(part))) for part in parts] == [8, 2]
        else:
            found = [np.bincount([part[index][1] for index in range(len(part))]).tolist() for part in parts]
            assert found == [[8] * 3, [2] * 3]


def test_a_column_names_the_split(tmp_path):
    rows = ['cat,Train', 'dog,train', 'cat;dog,VAL', 'dog,valid', 'cat,test']
    table = write_table(tmp_path / 'data', rows, 'path,labels,Fold')
    for root in (table, table.parent):
        counts = []
        for split in ('train', 'validation', 'val', 'test'):
            dataset = create_dataset('csv', str(root), split, split_column='fold')
            assert dataset.class_names == ['cat', 'dog']
            counts.append(summarize(dataset).positives.tolist())
        assert counts == [[1, 1], [1, 2], [1, 2], [1, 0]]
    hot = write_table(tmp_path / 'hot', ['1,1,train', '0,1,val'], 'path,cat,dog,split')
    dataset = create_dataset('csv', str(hot), 'validation', split_column='split')
    assert dataset.class_names == ['cat', 'dog'] and summarize(dataset).positives.tolist() == [0, 1]


@pytest.mark.parametrize(
    ('column', 'values'),
    [
        ('partition', ['0', '0', '1', '2']),  # of CelebA
        ('is_valid', ['False', 'False', 'True', 'False']),  # of fastai
        ('is_valid', ['0', '0', '1', '0']),
    ],
)
def test_splits_as_published_tables_have_them(column, values, tmp_path):
    rows = [f'{labels},{value}' for labels, value in zip(['cat', 'dog', 'cat;dog', 'dog'], values, strict=True)]
    table = write_table(tmp_path / 'data', rows, f'path,labels,{column}')
    counts = {'train': values.count(values[0]), 'validation': 1, **({'test': 1} if '2' in values else {})}
    for split, count in counts.items():
        assert len(create_dataset('csv', str(table), split, split_column=column)) == count
    stored = dict(zip(['train', 'train', 'validation', 'test'], values, strict=True))
    for split, value in stored.items() if 'partition' in column else ():  # by what the column has
        assert len(create_dataset('csv', str(table), value, split_column=column)) == counts[split]
    turned = write_table(tmp_path / 'turned', ['cat,1', 'dog,1', 'cat,0'], 'path,labels,train_test_split')
    with pytest.raises(ValueError, match="no row of the split 'train'"):  # 1 means train there
        create_dataset('csv', str(turned), 'train', split_column='train_test_split')
    folds = write_table(tmp_path / 'folds', ['cat,0', 'dog,1', 'cat,2'], 'path,labels,fold')
    with pytest.raises(ValueError, match="no row of the split 'train'"):
        create_dataset('csv', str(folds), 'train', split_column='fold')


def test_validation_images_are_held_out_of_the_training_rows_where_a_column_has_a_test_split_alone(tmp_path):
    table = write_table(tmp_path / 'data', ['cat,train', 'dog,train'] * 10 + ['cat,test'] * 3, 'path,labels,split')
    flags = ['--dataset', 'csv', '--task', 'multilabel', '--split-column', 'split', '--val-fraction', '0.2']
    assert [len(part) for part in splits_of(table, *flags)] == [16, 4]
    assert len(create_split(parse_train([str(table), *flags]), 'test')) == 3
    write_table(tmp_path / 'data', ['cat,train', 'dog,train'] * 10 + ['cat,val'] * 3, 'path,labels,split')
    with pytest.raises(ValueError, match="the column 'split' has rows for validation; leave one out"):
        splits_of(table, *flags)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('', r'photos\.csv is one file for all splits: .*--val-fraction 0\.2.*--split-column'),
        ('--split-column part', r"no column 'part' for --split-column"),
        ('--split-column fold', r"no row of the split 'validation' .* train \(2 rows\), holdout \(1 rows\)"),
        ('--val-fraction 0.6', r'0\.6.*0\.5'),
    ],
)
def test_what_cannot_be_divided_is_one_line(flags, message, tmp_path):
    table = write_table(tmp_path / 'data', ['cat,train', 'dog,train', 'cat,holdout'], 'path,labels,fold')
    with pytest.raises(ValueError, match=message) as error:
        splits_of(table, '--dataset', 'csv', '--task', 'multilabel', *flags.split())
    assert '\n' not in str(error.value)


def test_a_validation_split_of_its_own_is_not_divided(tmp_path):
    table = write_table(tmp_path / 'data', ['cat', 'dog'] * 4, name='train.csv')
    for name in ('val.csv', 'Dev.csv'):
        (table.parent / name).write_text(table.read_text())
        with pytest.raises(ValueError, match=rf'{name} is there'):
            splits_of(table.parent, '--dataset', 'csv', '--task', 'multilabel', '--val-fraction', '0.5')
        (table.parent / name).unlink()
    write_images(tmp_path / 'folders', train=4, validation=2)
    with pytest.raises(ValueError, match=r'folders/validation is there'):
        splits_of(tmp_path / 'folders', '--val-fraction', '0.5')


def test_an_empty_cell_of_the_split_is_named_with_its_line(tmp_path):
    table = write_table(tmp_path / 'data', ['cat,train', 'dog,'], 'path,labels,fold')
    with pytest.raises(ValueError, match=r'photos\.csv, line 3: no split'):
        create_dataset('csv', str(table), 'train', split_column='fold')


def test_validation_of_a_checkpoint_uses_the_images_that_were_held_out(tmp_path):
    table = write_table(tmp_path / 'data', ['cat', 'dog', 'cat;dog'] * 8)
    table.write_text(table.read_text().replace('path,labels', 'File,Tags'))
    flags = '--dataset csv --task multilabel --val-fraction 0.25 --epochs 1 --num-classes 2'
    run = build(table, tmp_path, *flags.split(), '--path-column', 'file', '--label-column', 'tags')
    held_out = run.eval_loader.dataset.filenames()
    assert summarize(run.eval_loader.dataset).positives.tolist() == [4, 4]
    fit(run)
    (row,) = summary(tmp_path / 'run')
    last = str(tmp_path / 'run' / 'last.pth.tar')
    done = call('validate.py', table, '--checkpoint', last, '--device', 'cpu', '-j', '0')
    assert json.loads(done.stdout.split('--result\n')[1])['map'] == float(row['eval_map'])
    given = [table, '--checkpoint', last, '--threshold', '0', '--device', 'cpu', '-j', '0', '--out', tmp_path / 'x.csv']
    predict_main([str(flag) for flag in (*given, '--dataset', 'csv')])
    with (tmp_path / 'x.csv').open() as file:
        assert {line['image'] for line in csv.DictReader(file)} == set(held_out)


@pytest.mark.parametrize('change', few(['appended', 'deleted', 'sorted', 'corrected'], 2))
def test_what_was_held_out_stays_held_out_when_the_table_changes(change, tmp_path, monkeypatch, caplog):
    table = write_table(tmp_path / 'data', ['cat', 'dog', 'cat;dog'] * 8)
    monkeypatch.chdir(tmp_path)
    flags = '--dataset csv --task multilabel --val-fraction 0.25 --epochs 1 --num-classes 2'
    run = build('data/photos.csv', tmp_path, *flags.split())
    held_out = set(run.eval_loader.dataset.filenames())
    fit(run)
    header, *rows = table.read_text().splitlines()
    gone = sorted(held_out)[0]
    if change == 'appended':
        for number in range(24, 30):
            write_image(tmp_path / 'data' / 'images' / f'{number}.png', number)
        rows += [f'images/{number}.png,cat' for number in range(24, 30)]
    elif change == 'sorted':
        rows.sort(reverse=True)
    elif change == 'corrected':
        rows[0] = rows[0].replace('cat', 'dog')
    else:
        rows = [row for row in rows if not row.startswith(f'{gone},')]
        held_out.remove(gone)
    table.write_text('\n'.join([header, *rows]) + '\n')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')  # the path of the data is that of another working directory
    caplog.clear()
    given = ['../data/photos.csv', '--checkpoint', '../run/last.pth.tar', '--threshold', '0', '--device', 'cpu']
    predict_main([*given, '-j', '0', '--out', 'x.csv', '--dataset', 'csv'])
    with open('x.csv') as file:
        assert {line['image'] for line in csv.DictReader(file)} == held_out
    assert (f'1 of the {len(held_out) + 1} images that training held out are no longer there' in caplog.text) == (
        change == 'deleted'
    )
    validate.main([*given[:3], '--device', 'cpu', '-j', '0', '--report', 'report'])
    with open('report/scores.csv') as file:
        assert {line['image'] for line in csv.DictReader(file)} == held_out
    assert 'other data' not in caplog.text


@pytest.mark.parametrize('kind', ['folders', 'csv'])
def test_a_resumed_run_holds_out_what_it_held_out(kind, tmp_path):
    write_images(tmp_path / 'data', train=10, validation=1)
    root = tmp_path / 'data' / 'train'
    flags = ['--val-fraction', '0.2', '--epochs', '2']
    if kind == 'csv':
        rows = [f'{path.relative_to(root)},{path.parent.name}' for path in sorted(root.glob('*/*'))]
        (root / 'list.csv').write_text('\n'.join(['path,labels', *rows]))
        flags += ['--dataset', 'csv', '--task', 'multilabel']
    data = root / 'list.csv' if kind == 'csv' else root
    run = build(data, tmp_path, *flags, '--stop-epoch', '1')
    held_out = set(run.eval_loader.dataset.filenames())
    fit(run)
    new = []
    for name in ('class_0', 'class_1'):
        for number in range(3):
            new.append(f'{name}/new{number}.png')
            shutil.copy(root / name / '001.png', root / new[-1])
    if kind == 'csv':
        (root / 'list.csv').write_text('\n'.join(['path,labels', *(f'{name},{name[:7]}' for name in new), *rows]))
    run = build(data, tmp_path, *flags, '--resume', 'auto')
    assert run.state.epoch == 1 and set(run.eval_loader.dataset.filenames()) == held_out
    assert not held_out & set(run.train_loader.dataset.filenames())
    fresh = build(data, tmp_path / 'fresh', *flags)
    assert set(fresh.eval_loader.dataset.filenames()) != held_out, (
        'a fresh draw is another one, so that the test can fail'
    )


def test_records_without_names_are_held_out_by_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    datasets = pytest.importorskip('datasets')
    write_images(tmp_path / 'data', train=10, validation=1)
    contents = [path.read_bytes() for path in sorted((tmp_path / 'data' / 'train').glob('*/*'))]
    features = datasets.Features(
        {'image': datasets.Image(decode=False), 'label': datasets.ClassLabel(names=['a', 'b', 'c'])}
    )

    def split(order, known=None):
        order = list(order)
        rows = {'image': [dict(bytes=contents[n], path=None) for n in order], 'label': [n // 10 for n in order]}
        folder = tmp_path / f'rows{len(list(tmp_path.glob("rows*")))}'
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / 'train-00000-of-00001.parquet')
        flags = [
            '--dataset',
            f'hfds/{folder}',
            '--val-fraction',
            '0.2',
            '--num-classes',
            '3',
            '--data-dir',
            str(tmp_path / 'c'),
        ]
        part = create_split(parse_train(flags), 'validation', known=known)
        return {part.reader.dataset[n]['image']['bytes'] for n in range(len(part))}, part.held_out

    shown, known = split(range(30))
    assert len(shown) == len(known) == 6
    assert split(reversed(range(30)), known)[0] == shown != split(reversed(range(30)))[0]


def test_names_of_splits_of_divided_data(tmp_path):
    table = write_table(tmp_path / 'data', ['cat', 'dog'] * 10)
    write_images(tmp_path / 'folders', train=10, validation=2)
    for flags in ([table, '--dataset', 'csv', '--task', 'multilabel'], [tmp_path / 'folders' / 'train']):
        options = parse_validate([*map(str, flags), '--val-fraction', '0.2'])
        parts = [set(create_split(options, split).filenames()) for split in ('validation', 'val', 'valid', 'dev')]
        assert parts[0] == parts[1] == parts[2] == parts[3] and len(parts[0]) < 10
        with pytest.raises(ValueError, match="has no split 'test': --val-fraction 0.2 divides it"):
            create_split(options, 'test')
    (tmp_path / 'folders' / 'validation').rename(tmp_path / 'folders' / 'Val')
    with pytest.raises(ValueError, match='folders/Val is there, which is a validation split'):
        splits_of(tmp_path / 'folders', '--val-fraction', '0.5')


def test_a_new_table_is_evaluated_whole(tmp_path, capsys):
    table = write_table(tmp_path / 'data', ['cat', 'dog', 'cat;dog', 'fox'] * 6)
    flags = '--dataset csv --task multilabel --val-fraction 0.25 --epochs 1'
    fit(build(table, tmp_path, *flags.split(), '--num-classes', '3'))
    new = write_table(tmp_path / 'new', ['dog', 'cat', ''] * 3)
    for given in (new, tmp_path / 'whole'):
        if given != new:
            given.mkdir()
            (given / 'images').symlink_to(tmp_path / 'new' / 'images')
            (given / 'validation.csv').write_text(new.read_text())
        capsys.readouterr()
        flags = ['--dataset', 'csv', '--checkpoint', tmp_path / 'run' / 'last.pth.tar', '--device', 'cpu', '-j', '0']
        validate.main(
            [
                str(flag)
                for flag in (given, *flags, '--report', tmp_path / 'report', '--class-report', tmp_path / 'c.csv')
            ]
        )
        with (tmp_path / 'report' / 'scores.csv').open() as file:
            assert len(list(csv.DictReader(file))) == 9
        with (tmp_path / 'c.csv').open() as file:
            assert [(row['class'], row['positives']) for row in csv.DictReader(file)] == [
                ('cat', '3'),
                ('dog', '3'),
                ('fox', '0'),
            ]


def test_other_data_is_evaluated_as_it_is(tmp_path, caplog):
    table = write_table(tmp_path / 'data', ['cat', 'dog'])
    trained = parse_train([str(table), '--dataset', 'csv', '--task', 'multilabel', '--val-fraction', '0.25', *MODEL])
    caplog.clear()
    same = inherit(parse_validate([str(table), '--dataset', 'csv']), trained.to_dict())
    assert same.val_fraction == 0.25 and 'other data' not in caplog.text
    other = inherit(parse_validate([str(tmp_path), '--dataset', 'csv']), trained.to_dict())
    assert other.val_fraction == 0 and 'other data' in caplog.text


def test_a_run_that_skipped_missing_images_is_validated_and_predicted(tmp_path):
    table = write_table(tmp_path / 'data', ['red', 'blue'] * 6)
    (tmp_path / 'data/images/3.png').unlink()
    flags = [*MODEL, '--dataset', 'csv', '--task', 'multilabel', '--val-fraction', '0.25', '--missing-images', 'skip']
    fit(build(table, tmp_path, *flags, '--num-classes', '2', '--epochs', '1', '-b', '2'))
    common = [str(table), '--dataset', 'csv', '--checkpoint', str(tmp_path / 'run/last.pth.tar'), '--device', 'cpu']
    validate.main([*common, '-j', '0'])
    predict_main([*common, '-j', '0', '--out', str(tmp_path / 'labels.csv')])
    whole = [*common, '-j', '0', '--out', str(tmp_path / 'whole.csv'), '--missing-images', 'error']
    with pytest.raises(ValueError, match=r'1 of 12 images .*3\.png'):
        predict_main(whole)
    assert (tmp_path / 'labels.csv').is_file()
