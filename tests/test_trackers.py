"""Experiment trackers get the row of every epoch."""

import shlex
import sqlite3
import sys
from types import SimpleNamespace

import pytest
from runs import call, summary, write_data

from timm_mldecoder.flags import parse_train
from timm_mldecoder.train.trackers import create_trackers

FLAGS = shlex.split("""
    --model test_resnet --img-size 32 --num-classes 3 --device cpu -b 4 -j 0 --epochs 2 --experiment run
    --log-tensorboard --log-trackio --log-wandb --wandb-project project
""")


@pytest.mark.slow
def test_trackers_get_the_rows_of_the_summary(tmp_path, monkeypatch):
    for package in ('tensorboard', 'trackio', 'wandb'):
        pytest.importorskip(package)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_DIR', str(tmp_path))
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
    data = write_data(tmp_path / 'data')
    process = call('train.py', data, *FLAGS, '--output', tmp_path)
    assert process.returncode == 0, process.stderr
    losses = [float(row['train_loss']) for row in summary(tmp_path / 'run')]
    assert len(losses) == 2

    events = EventAccumulator(str(tmp_path / 'run')).Reload()
    assert [(event.step, event.value) for event in events.Scalars('train/loss')] == [
        (epoch, pytest.approx(loss, rel=1e-6)) for epoch, loss in enumerate(losses)
    ]

    with sqlite3.connect(tmp_path / 'trackio' / 'project.db') as database:
        rows = database.execute("SELECT json_extract(metrics, '$.train_loss') FROM metrics ORDER BY step").fetchall()
    assert [float(loss) for (loss,) in rows] == pytest.approx(losses)
    assert list(tmp_path.glob('wandb/offline-run-*/run-*.wandb'))


@pytest.mark.parametrize('package', ['tensorboard', 'trackio', 'wandb'])
def test_a_missing_tracker_is_named_with_the_remedy(tmp_path, monkeypatch, package):
    pytest.importorskip(package)
    options = parse_train(['data', f'--log-{package}'])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'--log-{package}.*timm-mldecoder\[trackers\]'):
        create_trackers(options, tmp_path, {})


def test_wandb_gets_its_flags(tmp_path, monkeypatch):
    seen = {}
    wandb = SimpleNamespace(init=lambda **settings: seen.update(settings) or SimpleNamespace(log=None))
    flags = f'--log-wandb --wandb-project p --wandb-tags a b --wandb-resume-id 7 --resume {__file__}'
    options = parse_train(['data', *flags.split()])
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    create_trackers(options, tmp_path, {})
    assert seen.items() >= dict(project='p', tags=['a', 'b'], id='7', resume='must').items()


def test_a_tracker_that_does_not_start_is_named(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError('no key')

    options = parse_train(['data', '--log-wandb'])
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init))
    with pytest.raises(ValueError, match='--log-wandb: .*no key'):
        create_trackers(options, tmp_path, {})
