"""A run that is stopped and resumed comes to the same, bit for bit, as one that was not."""

import os
import re
import shutil
import signal
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from marks import few
from runs import BATCHES, MOVING, assert_same_run, build, fit, fit_until_stopped, last, summary, train

from timm_mldecoder.checkpoint.files import CheckpointFolder
from timm_mldecoder.checkpoint.read import ENTRIES, RUN, RUN_ENTRIES
from timm_mldecoder.data import MultiLabelDataset
from timm_mldecoder.data.annotations import Annotations
from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import parse_train
from timm_mldecoder.loading.create_loaders import balanced_weights
from timm_mldecoder.loading.randomness import EpochBatches, EpochStart, Order
from timm_mldecoder.train.build_run import build_run


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory):
    """Return the folder of a run to the end, by number of workers and further flags."""
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
        (0, ('--opt', 'lookahead_sgd', '--grad-accum-steps', '4', '--use-ml-decoder-head', '1')),
        *(
            pytest.param(0, flags, marks=pytest.mark.slow)
            for flags in (
                ('--sched', 'plateau', '--patience-epochs', '0', '--no-prefetcher'),
                ('--model-dtype', 'bfloat16'),  # EMA weights in bfloat16 are rounded at random
                ('--opt', 'adahessian'),  # owns a generator
            )
        ),
    ],
)
def test_stopped_between_epochs(data, undisturbed, tmp_path, workers, flags):
    stopped = [*MOVING, '-j', str(workers), *flags]
    train(data, tmp_path, *stopped, '--stop-epoch', '1')
    assert_same_run(train(data, tmp_path, *stopped, '--resume', 'auto'), undisturbed(workers, *flags))


def stop_at(run, step):
    """Send this process a SIGTERM during the given optimizer step, counted from 1 over the run."""
    steps = iter(range(1, 100))

    def count(model, _):
        if model.training and next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    run.state.task.get_trainable_module().register_forward_pre_hook(count)


@pytest.mark.parametrize(
    ('workers', 'step', 'flags'),
    few(
        [
            (0, BATCHES + 1, ()),
            (2, BATCHES + 3, ()),
            (0, BATCHES + 2, ('--clip-grad', '0.5')),  # the summary has the mean norm of the gradients
            (2, 2 * BATCHES, ()),
            (0, 2, ('--model-dtype', 'bfloat16')),
            (0, 2, ('--sched', 'tanh')),
            (0, BATCHES + 2, ('--opt', 'adahessian')),
        ],
        3,
    ),
)
def test_stopped_by_a_signal_within_an_epoch(data, undisturbed, tmp_path, workers, step, flags):
    flags = [*MOVING, '-j', str(workers), *flags]
    run = build(data, tmp_path, *flags)
    stop_at(run, step)
    assert fit_until_stopped(run) == 143
    epoch, batch = divmod(step - 1, BATCHES)
    assert (tmp_path / 'run' / f'recovery-{epoch}-{batch + 1}.pth.tar').exists(), 'the step was finished first'
    assert_same_run(train(data, tmp_path, *flags, '--resume', 'auto'), undisturbed(workers, *flags[len(MOVING) + 2 :]))
    assert not list((tmp_path / 'run').glob('recovery-*'))


def test_the_number_of_workers_changes_nothing(undisturbed):
    summaries = [(undisturbed(workers) / 'summary.csv').read_text() for workers in (0, 1, 3)]
    assert summaries[0] == summaries[1] == summaries[2]


def test_stopped_by_a_signal_in_the_validation(data, undisturbed, tmp_path):
    run = build(data, tmp_path, *MOVING, '-j', '2')
    run.eval_model.register_forward_pre_hook(
        lambda model, _: None if model.training else os.kill(os.getpid(), signal.SIGINT)
    )
    assert fit_until_stopped(run) == 130
    assert not (tmp_path / 'run' / 'last.pth.tar').exists()
    resumed = train(data, tmp_path, *MOVING, '-j', '2', '--resume', 'auto')
    assert_same_run(resumed, undisturbed(2))


def test_a_run_resumed_by_its_name_keeps_its_flags(data, undisturbed, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    name = ('--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto')
    train(data, tmp_path, *MOVING, '--stop-epoch', '1')
    options = parse_train([*name])
    assert (options.data_dir, options.opt, options.epochs, options.mixup) == (str(data), 'adamw', 3, 0.2)
    assert options.stop_epoch is None, 'it was for one start of the run'
    with join_world(options.device) as world:
        fit(build_run(options, world))
    assert_same_run(tmp_path / 'run', undisturbed(0))
    caplog.set_level('WARNING')
    options = parse_train([*name, '--epochs', '4', '--no-aug', str(data)])
    assert (options.epochs, options.no_aug, options.opt) == (4, True, 'adamw'), 'what is given counts'
    with join_world(options.device) as world:
        build_run(options, world).close()
    assert 'epochs was 3 and is 4' in caplog.text
    assert parse_train([str(data), '--experiment', 'other', '--resume', 'auto']).opt == 'sgd'


def test_the_norm_of_the_gradients_is_that_before_clipping(data, tmp_path, caplog):
    caplog.set_level('INFO')
    run = build(data, tmp_path, '--epochs', '1', '--clip-grad', '1e-3', '--lr', '1e-9', '--sched', 'none', '--no-aug')
    norms = []

    def record(*_):
        gradients = [p.grad.double().flatten() for p in run.state.task.get_trainable_module().parameters()]
        norms.append(torch.cat(gradients).norm().item())

    clip = run.clip_parameters
    run.clip_parameters = lambda: (record(), clip())[1]
    fit(run)
    (row,) = summary(tmp_path / 'run')
    assert len(norms) == BATCHES and float(row['train_grad_norm']) == pytest.approx(np.mean(norms), rel=1e-4)
    shown = [float(text) for text in re.findall(r'Grad: (\S+)', caplog.text)]
    assert shown == pytest.approx(np.cumsum(norms) / np.arange(1, BATCHES + 1), rel=6e-3)
    assert 'train_grad_norm' not in summary(train(data, tmp_path / 'unclipped', '--epochs', '1'))[0]


def test_recovery_checkpoints_are_kept_while_they_are_of_use(data, tmp_path):
    run = build(data, tmp_path, *MOVING, '--recovery-interval', '2')
    stop_at(run, BATCHES + 5)
    assert fit_until_stopped(run) == 143
    names = sorted(path.name for path in (tmp_path / 'run').glob('recovery-*'))
    assert names == ['recovery-1-4.pth.tar', 'recovery-1-5.pth.tar']


def order(num_samples, seed=3, **settings):
    return Order(num_samples, seed, torch.Generator().manual_seed(seed).get_state(), **settings)


def drawn(batches, epoch, first=0, start=None, until=None):
    """Return the samples of an epoch with their places, on one rank, and the sizes of the batches."""
    batches.begin(epoch, first, start)
    found = list(batches)[: None if until is None else until - first]
    return [draw for batch in found for draw in batch], [len(batch) for batch in found]


@pytest.mark.parametrize(
    ('samples', 'size', 'pairs', 'epoch'), [(24, 2, False, 0), (61, 4, False, 1), (64, 4, True, 1), (300, 2, False, 2)]
)
def test_every_sample_of_an_epoch_is_seen_once_wherever_it_is_cut_and_however_it_is_divided(
    samples, size, pairs, epoch
):
    """Cut after some batches, continued on other ranks with another batch size, cut and continued again."""
    for ranks, others, thirds in product((1, 2), (1, 3), (1, 2)):
        loaders = [EpochBatches(order(samples), size, rank, ranks, pairs) for rank in range(ranks)]
        whole = [draw for loader in loaders for draw in drawn(loader, epoch)[0]]
        assert len(set(whole)) == len(whole) == len(loaders[0]) * size * ranks
        for batch in (1, len(loaders[0]) // 2, len(loaders[0])):
            seen = [draw for loader in loaders for draw in drawn(loader, epoch, until=batch)[0]]
            start, done = loaders[0].restart(EpochStart(), batch), None
            for count, other in ((others, 2 * size), (thirds, size)):
                again = [EpochBatches(order(samples), other, rank, count, pairs) for rank in range(count)]
                resumed = again[0].continued(start)
                found = [drawn(loader, epoch, resumed.batch, resumed) for loader in again]
                if done is None:  # cut after the first of its batches
                    done = min(resumed.batch + 1, len(again[0]))
                    found = [drawn(loader, epoch, resumed.batch, resumed, until=done) for loader in again]
                    start = again[0].restart(resumed, done)
                assert len({len(sizes) for _, sizes in found}) == 1, 'ranks wait for each other'
                assert all(number >= 2 and not (pairs and number % 2) for _, sizes in found for number in sizes)
                seen += [draw for draws, _ in found for draw in draws]
            assert len(set(seen)) == len(seen) and set(seen) <= set(whole)
            left = len(whole) - len(seen)
            assert left < 2 * max(others, thirds), 'fewer than two for each rank'


def test_draws_depend_on_seed_epoch_and_position_alone():
    first = drawn(EpochBatches(order(40), 4), 1)[0]
    assert drawn(EpochBatches(order(40), 4), 1)[0] == first
    assert Counter(draw.index for draw in first) == Counter(range(40))
    for other in (drawn(EpochBatches(order(40), 4), 2)[0], drawn(EpochBatches(order(40, seed=4), 4), 1)[0]):
        assert [draw.index for draw in other] != [draw.index for draw in first]
        assert not set(other) & set(first)


def test_balanced_weights_draw_each_class_equally_often():
    labels = [0] * 900 + [1] * 100
    images = type('Images', (list,), {'targets': labels})(labels)
    draws, _ = drawn(EpochBatches(order(1000, weights=balanced_weights(images)), 10), 0)
    share = np.mean([labels[draw.index] for draw in draws])
    assert share == pytest.approx(0.5, abs=0.06)  # four standard deviations

    several = Annotations(['a', 'b'], ['0', '1', '2', '3'], [0, 1, 1, 2], [0, 0, 1, 1], [1, 1, 1, 0])
    assert balanced_weights(MultiLabelDataset(several)).tolist() == [0.5, 1.5, 0.5, 0.5]


def test_the_balanced_sampler_is_used(data, tmp_path):
    few = shutil.copytree(data, tmp_path / 'few')
    for path in sorted((few / 'train' / 'class_1').iterdir())[1:]:
        path.unlink()
    targets = []
    run = build(few, tmp_path, '--epochs', '8', '--sampler', 'balanced', '--val-split', '')
    run.state.task.register_forward_pre_hook(lambda _, inputs: targets.extend(inputs[1].tolist()))
    fit(run)
    assert targets.count(1) / len(targets) == pytest.approx(1 / 3, abs=0.16)  # four standard deviations; 1/17 otherwise


def random_states(content, where=''):
    """Return the places of a checkpoint that look like the state of a generator of torch, numpy or python."""
    if isinstance(content, torch.Tensor):
        return [where] if content.dtype == torch.uint8 else []
    if isinstance(content, dict):
        return [found for name, value in content.items() for found in random_states(value, f'{where}.{name}')]
    if isinstance(content, (list, tuple)):
        if len(content) > 600 and all(isinstance(value, int) for value in content):
            return [where]
        return [found for index, value in enumerate(content) for found in random_states(value, f'{where}[{index}]')]
    return [where] if isinstance(content, np.ndarray) else []


@pytest.mark.parametrize(('flags', 'states'), [((), []), (('--opt', 'adahessian'), [f'.{RUN}.optimizer_generator'])])
def test_a_checkpoint_has_the_keys_of_the_schema_and_no_rng_state(undisturbed, flags, states):
    content = last(undisturbed(0, *flags))
    assert content.keys() <= ENTRIES.keys()
    assert content[RUN].keys() == RUN_ENTRIES.keys()
    assert random_states(content) == states


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
    is_best, dropped = checkpoints.rank(epoch, metric)
    weight = torch.tensor(float(epoch))
    content = dict(epoch=epoch, metric=metric, weight=weight, saver=checkpoints.state_dict())
    checkpoints.save_epoch(epoch, content, is_best, dropped)


def test_a_run_killed_before_a_milestone_was_kept_keeps_it_when_resumed(data, tmp_path):
    flags = ['--epochs', '3', '--save-epochs', '1', '2']
    folder = train(data, tmp_path, *flags, '--stop-epoch', '1')
    content = (folder / 'milestone-1.pth.tar').read_bytes()
    (folder / 'milestone-1.pth.tar').unlink()
    train(data, tmp_path, *flags, '--resume', 'auto')
    assert (folder / 'milestone-1.pth.tar').read_bytes() == content
    (folder / 'milestone-2.pth.tar').unlink()  # the run has gone on since
    train(data, tmp_path, *flags, '--epochs', '4', '--resume', 'auto')
    assert {path.name for path in folder.glob('milestone*')} == {'milestone-1.pth.tar'}
    (folder / 'milestone-1.pth.tar').unlink()
    last = str(folder / 'last.pth.tar')  # the end of another epoch than the one to start from
    train(data, tmp_path, *flags, '--epochs', '4', '--resume', last, '--start-epoch', '2')
    assert not list(folder.glob('milestone*'))


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


def test_another_batch_size_warns_and_resumes_within_an_epoch_too(data, tmp_path, caplog):
    folder = train(data, tmp_path, *MOVING, '--stop-epoch', '1')
    train(data, tmp_path, *MOVING, '-b', '6', '--resume', 'auto', '--stop-epoch', '2')
    assert 'batch_size was 4 and is 6' in caplog.text
    assert last(folder)[RUN]['batch_size'] == 6

    run = build(data, tmp_path, *MOVING, '-b', '6', '--resume', 'auto')
    stop_at(run, 2)
    assert fit_until_stopped(run) == 143
    resumed = build(data, tmp_path, *MOVING, '--resume', 'auto')
    assert 'batch_size was 6 and is 4' in caplog.text
    images = []
    resumed.state.task.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0])))
    fit(resumed)
    assert images == [4, 4, 4], 'twelve of 24 images are left'
    assert resumed.state.loss.samples == 0 and [row['epoch'] for row in summary(folder)] == ['0', '1', '2']
    assert 'epochs was' not in caplog.text
    build(data, tmp_path, *MOVING, '--resume', 'auto', '--epochs', '4')
    assert 'epochs was 3 and is 4' in caplog.text


def test_scheduled_sizes_are_not_divided_anew(data, tmp_path):
    flags = ['--train-img-sizes', '24', '32']
    run = build(data, tmp_path, '--epochs', '1', *flags)
    stop_at(run, 2)
    assert fit_until_stopped(run) == 143
    with pytest.raises(ValueError, match='batch_size was 4 and is 6.*--train-img-sizes'):
        build(data, tmp_path, '--epochs', '1', *flags, '-b', '6', '--resume', 'auto')


def test_another_model_or_optimizer_is_refused(data, tmp_path):
    folder = train(data, tmp_path, '--epochs', '1')
    with pytest.raises(ValueError, match='--opt .*betas'):
        build(data, tmp_path, '--resume', str(folder / 'last.pth.tar'), '--opt', 'adamw')
    with pytest.raises(ValueError, match='fc.embed.weight'):
        build(data, tmp_path, '--resume', str(folder / 'last.pth.tar'), '--use-ml-decoder-head', '1')


def checkpoints(folder):
    return {path.name.removesuffix('.pth.tar') for path in folder.glob('*.pth.tar')}


def test_a_fresh_start_is_refused_the_folder_of_another_run(data, tmp_path, monkeypatch):
    folder = train(data, tmp_path, '--epochs', '2')
    fresh = ['--epochs', '2', '--stop-epoch', '1']
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for restarts in ('0', '1'):  # torchrun starts it again after it was refused
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', restarts)
        with pytest.raises(ValueError, match=f'{folder} .*--resume auto.*--experiment'):
            build(data, tmp_path, *fresh)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_that_torchrun_starts_again_resumes(data, tmp_path, monkeypatch):
    flags = ['--epochs', '2', '--recovery-interval', '2']
    run = build(data, tmp_path, *flags)
    stop_at(run, BATCHES + 3)
    assert fit_until_stopped(run) == 143
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    again = build(data, tmp_path, *flags)
    assert (again.state.epoch, again.state.batch) == (1, 3)


def test_checkpoints_ahead_of_a_resumed_one_are_set_aside(data, tmp_path, caplog):
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
    assert f'{folder}/set-aside-1' in caplog.text
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
    saved = CheckpointFolder(tmp_path).save_recovery(0, 2, {})
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
    assert (resumed.state.epoch, resumed.state.batch) == (3, 0), 'another batch size does not matter then'


@pytest.mark.parametrize('flags', [(), ('--sched', 'plateau')])
def test_another_metric_starts_the_ranking_anew(data, tmp_path, caplog, flags):
    folder = train(data, tmp_path, '--epochs', '2', *flags)
    train(data, tmp_path, '--epochs', '3', *flags, '--resume', 'auto', '--eval-metric', 'loss')
    assert 'ranked by top1, new ones by loss' in caplog.text
    saver = last(folder)['saver']
    loss = float(summary(folder)[-1]['eval_loss'])
    assert (saver['best_epoch'], saver['best_metric']) == (2, loss)
    assert saver['checkpoint_files'] == [('checkpoint-2.pth.tar', loss)]
    assert {'checkpoint-0', 'checkpoint-1'} < checkpoints(folder)


def test_files_of_other_names_are_not_checkpoints(data, tmp_path):
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
        with pytest.raises(ValueError, match="class 1 is 'class_2' in the data and 'class_1' in the checkpoint"):
            build(renamed, tmp_path, '--resume', source)


def test_milestones_are_saved_between_validations(data, tmp_path):
    folder = train(data, tmp_path, '--epochs', '4', '--val-interval', '2', '--save-epochs', '1', '3')
    assert {'milestone-1', 'milestone-3'} < checkpoints(folder)
    assert [row['epoch'] for row in summary(folder)] == ['0', '1', '2', '3']


def test_names_in_a_ranking_that_are_not_those_of_checkpoints_are_ignored(tmp_path):
    """What drops out of the ranking is deleted, so a name must not lead anywhere else."""
    (tmp_path / 'outside.pth.tar').touch()
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'mine.pth.tar').touch()
    checkpoints = CheckpointFolder(folder, max_history=1)
    names = ['../outside.pth.tar', 'mine.pth.tar', str(tmp_path / 'outside.pth.tar')]
    checkpoints.load_state_dict(dict(checkpoint_files=[(name, 0.0) for name in names]), folder)
    assert checkpoints.ranked == []
    checkpoints.load_state_dict(dict(pending=(3, None)), folder)  # timm's, of an epoch that was not scored
    assert checkpoints.best_metric is None
    for epoch in range(3):
        save(checkpoints, epoch, float(epoch))
    assert (tmp_path / 'outside.pth.tar').exists() and (folder / 'mine.pth.tar').exists()


@pytest.mark.parametrize('change', few(['moved', 'more', 'fewer'], 1))
def test_other_training_images_within_an_epoch_are_refused_and_between_epochs_warned_of(data, tmp_path, change, caplog):
    own = shutil.copytree(data, tmp_path / 'own')
    run = build(own, tmp_path, '--epochs', '3')
    stop_at(run, BATCHES + 2)
    fit_until_stopped(run)
    image = sorted((own / 'train' / 'class_0').iterdir())[0]
    match change:
        case 'more':
            shutil.copy(image, image.with_name('zz.png'))
        case 'fewer':
            image.unlink()
        case 'moved':
            shutil.move(image, own / 'train' / 'class_1' / 'zz.png')
    lines = {'more': '24 training images, the data has 25', 'fewer': '24 training images, the data has 23'}
    with pytest.raises(ValueError, match=lines.get(change, 'the 24 training images have other names or labels')):
        build(own, tmp_path, '--epochs', '3', '--resume', 'auto')
    shutil.rmtree(own)
    shutil.copytree(data, own)
    fit(build(own, tmp_path, '--epochs', '3', '--resume', 'auto', '--stop-epoch', '2'))
    assert 'training images' not in caplog.text
    image.unlink()
    fit(build(own, tmp_path, '--epochs', '3', '--resume', 'auto'))
    assert 'resumed with a change' in caplog.text and lines['fewer'] in caplog.text
    assert len(summary(tmp_path / 'run')) == 3
