"""A run that is stopped and resumed comes to the same, bit for bit, as one that was not."""

import os
import shutil
import signal
from collections import Counter

import pytest
import torch
from runs import BATCHES, MOVING, assert_same_run, build, fit_until_stopped, last, summary, train, write_data
from timm_mldecoder.engine.input.resumable import RestartableLoader
from torch.utils.data import DataLoader, Dataset

from timm_mldecoder.engine.checkpoint.files import CheckpointFolder
from timm_mldecoder.engine.checkpoint.state import RUN
from timm_mldecoder.engine.input import randomness as streams


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory):
    """The folder of a run to the end, by number of loader processes."""
    folders = {}

    def folder(workers, *flags):
        if (workers, flags) not in folders:
            output = tmp_path_factory.mktemp('undisturbed')
            folders[workers, flags] = train(data, output, *MOVING, '-j', str(workers), *flags)
        return folders[workers, flags]

    return folder


@pytest.mark.parametrize(
    ('workers', 'flags'),
    [
        (0, ('--sched-on-updates',)),
        (2, ()),
        (0, ('--sched', 'plateau', '--patience-epochs', '0', '--no-prefetcher')),
        (0, ('--opt', 'lookahead_sgd', '--grad-accum-steps', '4', '--use-ml-decoder-head', '1')),
    ],
)
def test_stopped_between_epochs(data, undisturbed, tmp_path, workers, flags):
    stopped = [*MOVING, '-j', str(workers), *flags]
    train(data, tmp_path, *stopped, '--stop-epoch', '1')
    assert_same_run(train(data, tmp_path, *stopped, '--resume', 'auto'), undisturbed(workers, *flags))


def stop_at(run, update):
    """Send this process a SIGTERM during the given update, counted from 1 over the run."""
    updates = iter(range(1, 100))

    def count(model, _):
        if model.training and next(updates) == update:
            os.kill(os.getpid(), signal.SIGTERM)

    run.state.task.get_trainable_module().register_forward_pre_hook(count)


@pytest.mark.parametrize(('workers', 'update'), [(0, BATCHES + 1), (2, BATCHES + 3), (2, 2 * BATCHES)])
def test_stopped_by_a_signal_within_an_epoch(data, undisturbed, tmp_path, workers, update):
    flags = [*MOVING, '-j', str(workers)]
    run = build(data, tmp_path, *flags)
    stop_at(run, update)
    assert fit_until_stopped(run) == 143
    batch = (update - 1) % BATCHES + 1
    assert (tmp_path / 'run' / f'recovery-1-{batch}.pth.tar').exists(), 'the step was finished first'
    assert_same_run(train(data, tmp_path, *flags, '--resume', 'auto'), undisturbed(workers))
    assert not list((tmp_path / 'run').glob('recovery-*'))


def test_stopped_by_a_signal_in_the_validation(data, undisturbed, tmp_path):
    run = build(data, tmp_path, *MOVING, '-j', '2')
    run.eval_model.register_forward_pre_hook(
        lambda model, _: None if model.training else os.kill(os.getpid(), signal.SIGINT)
    )
    assert fit_until_stopped(run) == 130
    assert not (tmp_path / 'run' / 'last.pth.tar').exists()
    resumed = train(data, tmp_path, *MOVING, '-j', '2', '--resume', 'auto')
    assert_same_run(resumed, undisturbed(2))


def test_recovery_checkpoints_are_kept_while_they_are_of_use(data, tmp_path):
    run = build(data, tmp_path, *MOVING, '--recovery-interval', '2')
    stop_at(run, BATCHES + 5)
    assert fit_until_stopped(run) == 143
    names = sorted(path.name for path in (tmp_path / 'run').glob('recovery-*'))
    assert names == ['recovery-1-4.pth.tar', 'recovery-1-5.pth.tar']


class Draws(Dataset):
    """An image that tells its index, and a number that its loader process draws."""

    def __len__(self):
        return 29

    def __getitem__(self, index):
        return index, torch.rand(())


@pytest.mark.parametrize('workers', [0, 3])
def test_every_sample_of_an_epoch_is_seen_once_wherever_it_is_cut(workers):
    def loader():
        return RestartableLoader(DataLoader(Draws(), batch_size=4, shuffle=True, num_workers=workers, drop_last=True))

    torch.manual_seed(5)
    whole = loader()
    batches, positions = [], []
    for batch in whole:
        batches.append(torch.stack(batch, dim=1))
        torch.rand(3)  # what a model might draw
        positions.append(whole.position(len(batches)))
    after = torch.rand(3)
    seen = Counter(torch.cat(batches)[:, 0].int().tolist())
    assert len(seen) == 28 and set(seen.values()) == {1}

    for position in positions[::2]:
        torch.manual_seed(77)
        resumed = loader()
        streams.restore(position.start)
        resumed.start(position)
        rest = []
        for batch in resumed:
            rest.append(torch.stack(batch, dim=1))
            torch.rand(3)
        assert torch.equal(torch.cat([*batches[: position.batch], *rest]), torch.cat(batches))
        assert torch.equal(torch.rand(3), after)


def test_history_and_best_metric_survive(data, tmp_path):
    flags = [*MOVING, '--checkpoint-hist', '2']
    folder = train(data, tmp_path, *flags, '--stop-epoch', '2')
    best = last(folder)['saver']
    train(data, tmp_path, *flags, '--resume', 'auto')
    assert [row['epoch'] for row in summary(folder)] == ['0', '1', '2']
    assert (folder / 'summary.csv').read_text().count('epoch,') == 1
    history = last(folder)['saver']
    assert history['best_metric'] >= best['best_metric']
    tops = sorted((float(row['eval_top1']) for row in summary(folder)), reverse=True)
    assert [metric for _, metric in history['checkpoint_files']] == tops[:2]
    assert len(list(folder.glob('checkpoint-*'))) == 2


def save(checkpoints, epoch, metric):
    checkpoints.save_epoch(
        epoch,
        metric,
        lambda: dict(epoch=epoch, metric=metric, weight=torch.tensor(float(epoch)), saver=checkpoints.state_dict()),
    )


@pytest.mark.parametrize(('decreasing', 'worse'), [(False, 10.0), (True, 90.0), (False, float('nan'))])
def test_a_worse_epoch_never_becomes_the_best(tmp_path, decreasing, worse):
    checkpoints = CheckpointFolder(tmp_path, decreasing)
    save(checkpoints, 0, 50.0)
    resumed = CheckpointFolder(tmp_path, decreasing)
    resumed.load_state_dict(last(tmp_path)['saver'], tmp_path)
    save(resumed, 1, worse)
    assert torch.load(tmp_path / 'model_best.pth.tar')['epoch'] == 0
    assert (resumed.best_metric, resumed.best_epoch) == (50.0, 0)
    assert last(tmp_path)['epoch'] == 1


def test_a_nan_ranks_last_even_where_it_came_first(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, max_history=2)
    for epoch, metric in enumerate([float('nan'), 1.0, float('nan'), 3.0]):
        save(checkpoints, epoch, metric)
    assert (checkpoints.best_metric, checkpoints.best_epoch) == (3.0, 3)
    assert torch.load(tmp_path / 'model_best.pth.tar')['epoch'] == 3
    kept = sorted(path.name for path in tmp_path.glob('checkpoint-*'))
    assert kept == ['checkpoint-1.pth.tar', 'checkpoint-3.pth.tar']


def test_another_batch_size_is_told_between_epochs_and_refused_within(data, tmp_path, caplog):
    folder = train(data, tmp_path, *MOVING, '--stop-epoch', '1')
    train(data, tmp_path, *MOVING, '-b', '6', '--resume', 'auto', '--stop-epoch', '2')
    assert 'Resumed with a change: batch_size was 4 and is 6' in caplog.text
    assert last(folder)[RUN]['batch_size'] == 6

    run = build(data, tmp_path, *MOVING, '-b', '6', '--resume', 'auto')
    stop_at(run, 2)
    assert fit_until_stopped(run) == 143
    with pytest.raises(ValueError, match='batch_size was 6 and is 4.*use the same'):
        build(data, tmp_path, *MOVING, '--resume', 'auto')


def test_another_model_or_optimizer_is_refused(data, tmp_path):
    folder = train(data, tmp_path, '--epochs', '1')
    with pytest.raises(ValueError, match='another optimizer than --opt.*betas'):
        build(data, tmp_path, '--resume', str(folder / 'last.pth.tar'), '--opt', 'adamw')
    with pytest.raises(ValueError, match='holds another model.*fc.embed.weight'):
        build(data, tmp_path, '--resume', str(folder / 'last.pth.tar'), '--use-ml-decoder-head', '1')


def checkpoints(folder):
    return {path.name.removesuffix('.pth.tar') for path in folder.glob('*.pth.tar')}


def test_a_fresh_start_is_refused_the_folder_of_another_run(data, tmp_path, monkeypatch):
    folder = train(data, tmp_path, '--epochs', '2')
    fresh = ['--epochs', '2', '--stop-epoch', '1']
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for restarts in ('0', '1'):  # torchrun starts it again after it was refused
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', restarts)
        with pytest.raises(ValueError, match=f'{folder} holds .*--resume auto.*--experiment, or remove'):
            build(data, tmp_path, *fresh)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_that_torchrun_starts_again_goes_on(data, tmp_path, monkeypatch):
    flags = ['--epochs', '2', '--recovery-interval', '2']
    run = build(data, tmp_path, *flags)
    stop_at(run, BATCHES + 3)
    assert fit_until_stopped(run) == 143
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    again = build(data, tmp_path, *flags)
    assert (again.state.epoch, again.state.batch) == (1, 3)


def test_what_a_run_goes_back_from_is_set_aside(data, tmp_path, caplog):
    flags = ['--epochs', '4', '--eval-metric', 'loss', '--lr', '0.02']
    run = build(data, tmp_path, *flags, '--save-epochs', '1', '3')
    stop_at(run, 3 * BATCHES + 2)
    assert fit_until_stopped(run) == 143
    folder = tmp_path / 'run'
    assert last(folder)['saver']['best_epoch'] > 0
    train(data, tmp_path, *flags, '--resume', str(folder / 'checkpoint-0.pth.tar'), '--stop-epoch', '2')

    assert checkpoints(folder) == {'last', 'model_best', 'checkpoint-0', 'checkpoint-1', 'milestone-1'}
    ahead = {'last', 'model_best', 'checkpoint-1', 'checkpoint-2', 'milestone-3', 'recovery-3-2'}
    assert checkpoints(folder / 'set-aside-1') == ahead
    assert len(summary(folder / 'set-aside-1')) == 3 and len(summary(folder)) == 2
    assert f'Moved to {folder}/set-aside-1' in caplog.text
    assert build(data, tmp_path, *flags, '--resume', 'auto').state.epoch == 2

    # the best so far is again the one of its time; another run's checkpoint finds none of this one's
    build(data, tmp_path, *flags, '--resume', str(folder / 'checkpoint-0.pth.tar'))
    assert checkpoints(folder) == {'model_best', 'checkpoint-0', 'milestone-1'}
    assert torch.load(folder / 'model_best.pth.tar', weights_only=False)['epoch'] == 0
    elsewhere = folder.rename(tmp_path / 'elsewhere')
    train(data, tmp_path, *flags, '--stop-epoch', '1')
    build(data, tmp_path, *flags, '--resume', str(elsewhere / 'checkpoint-0.pth.tar'))
    assert checkpoints(folder) == {'model_best'}
    assert checkpoints(folder / 'set-aside-1') == {'last', 'model_best', 'checkpoint-0'}


def test_the_position_just_saved_is_never_removed(tmp_path):
    for number in range(3):
        (tmp_path / f'recovery-7-{number}.pth.tar').touch()
    saved = CheckpointFolder(tmp_path).save_recovery(0, 2, dict)
    assert saved.exists()
    assert checkpoints(tmp_path) == {'recovery-0-2', 'recovery-7-2'}


def test_start_epoch_leaves_each_epoch_in_the_summary_once(data, tmp_path):
    folder = train(data, tmp_path, '--epochs', '3')
    flags = ['--epochs', '3', '--resume', str(folder / 'last.pth.tar'), '--start-epoch', '1']
    train(data, tmp_path, *flags)
    assert [row['epoch'] for row in summary(folder)] == ['0', '1', '2']

    run = build(data, tmp_path, '--epochs', '4', '--resume', 'auto')
    stop_at(run, 2)
    assert fit_until_stopped(run) == 143
    (recovery,) = folder.glob('recovery-*')
    resumed = build(data, tmp_path, '--epochs', '4', '-b', '6', '--resume', str(recovery), '--start-epoch', '3')
    assert (resumed.state.epoch, resumed.state.batch) == (3, 0), 'another batch size is no matter then'


@pytest.mark.parametrize('flags', [(), ('--sched', 'plateau')])
def test_another_metric_starts_the_ranking_anew(data, tmp_path, caplog, flags):
    folder = train(data, tmp_path, '--epochs', '2', *flags)
    train(data, tmp_path, '--epochs', '3', *flags, '--resume', 'auto', '--eval-metric', 'loss')
    assert 'ranked by top1, those to come by loss: the ranking starts anew' in caplog.text
    saver = last(folder)['saver']
    loss = float(summary(folder)[-1]['eval_loss'])
    assert (saver['best_epoch'], saver['best_metric']) == (2, loss)
    assert saver['checkpoint_files'] == [('checkpoint-2.pth.tar', loss)]
    assert {'checkpoint-0', 'checkpoint-1'} < checkpoints(folder)


def test_files_of_other_names_are_no_checkpoints(data, tmp_path):
    folder = train(data, tmp_path, '--epochs', '1')
    for name in ('checkpoint-old', 'checkpoint-1-2', 'recovery-x-1', 'recovery-9', 'mine'):
        (folder / f'{name}.pth.tar').touch()
    assert build(data, tmp_path, '--resume', 'auto').state.epoch == 1


def test_other_classes_are_refused(data, tmp_path):
    folder = train(data, tmp_path, '--epochs', '1')
    renamed = shutil.copytree(data, tmp_path / 'renamed')
    for split in ('train', 'validation'):
        (renamed / split / 'class_1').rename(renamed / split / 'dogs')
    for source in ('auto', str(folder / 'last.pth.tar')):
        with pytest.raises(ValueError, match="class 1 of the data is 'class_2', of the checkpoint 'class_1'"):
            build(renamed, tmp_path, '--resume', source)


def test_milestones_are_saved_between_validations(data, tmp_path):
    folder = train(data, tmp_path, '--epochs', '4', '--val-interval', '2', '--save-epochs', '1', '3')
    assert {'milestone-1', 'milestone-3'} < checkpoints(folder)
    assert [row['epoch'] for row in summary(folder)] == ['0', '1', '2', '3']
