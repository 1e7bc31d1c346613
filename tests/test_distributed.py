"""Several ranks: the same training as one, exact metrics, and every launcher's environment."""

import csv
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from image_folders import write_images
from runs import ROOT, call, command, environment, last, summary

from timm_mldecoder.distributed.world import first_node

SMALL = shlex.split('--num-classes 3 --device cpu --model test_resnet --img-size 32 -j 0 --epochs 1')
# no batch norm, no augmentation, no dropout: what is left is the same for any number of ranks
PLAIN = shlex.split(
    '--num-classes 3 --device cpu --model test_vit --img-size 160 -j 0 --epochs 2 --warmup-epochs 0 --opt sgd '
    '--lr 0.02 --no-aug --smoothing 0 --use-ml-decoder-head 1 --decoder-embedding 64 --num-of-groups 2 '
    '--ml-decoder-kwargs dropout=0.0'
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Write a validation split that two ranks cannot share evenly."""
    return write_images(tmp_path_factory.mktemp('images'), train=8, validation=5)


def rounding(value):
    """Return what float32 gives a result of some steps: relative, and to the size of the weights near zero."""
    return pytest.approx(value, rel=1e-5, abs=1e-6)


def test_two_ranks_train_as_one_on_the_same_global_batches(data, tmp_path):
    flags = [data, *PLAIN, '--model-ema', '--model-ema-decay', '0.5', '--grad-accum-steps', '2', '--output', tmp_path]
    two = call('train.py', *flags, '-b', '3', '--experiment', 'two', processes=2)
    assert two.returncode == 0, two.stderr[-3000:]
    one = call('tests/programs/as_two_ranks.py', *flags, '-b', '6', '--experiment', 'one')
    assert one.returncode == 0, one.stderr[-3000:]

    for ours, theirs in zip(summary(tmp_path / 'two'), summary(tmp_path / 'one'), strict=True):
        assert {name: float(value) for name, value in ours.items()} == rounding(
            {name: float(value) for name, value in theirs.items()}
        )
    weights, expected = last(tmp_path / 'two'), last(tmp_path / 'one')
    for key in ('state_dict', 'state_dict_ema'):
        for name, value in expected[key].items():
            torch.testing.assert_close(weights[key][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_metrics_are_exact_where_images_do_not_divide_evenly(data, tmp_path):
    """Fifteen images: two ranks pad one, four pad one too; one rank pads none."""
    trained = call('train.py', data, *PLAIN, '-b', '6', '--epochs', '1', '--output', tmp_path, '--experiment', 'run')
    assert trained.returncode == 0, trained.stderr[-3000:]
    checkpoint = tmp_path / 'run' / 'last.pth.tar'
    scores = []
    for processes in (2, 4):
        process = call(
            'validate.py',
            data,
            '--checkpoint',
            checkpoint,
            *shlex.split('-j 0 -b 2 --device cpu --metrics-avg macro'),
            processes=processes,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stdout.count('--result') == 1, 'printed once'
        scores.append(json.loads(process.stdout.split('--result\n')[1]))
    (row,) = csv.DictReader((tmp_path / 'run' / 'summary.csv').open())
    assert scores[0] == scores[1]
    assert scores[0]['top1'] == float(row['eval_top1'])


@pytest.mark.slow
def test_batch_norm_statistics_and_repeated_augmentation_across_ranks(data, tmp_path):
    flags = [data, *SMALL, '-b', '4', '-j', '1', '--output', tmp_path]
    for name, extra in (('reduced', ['--aug-repeats', '3']), ('not_shared', ['--dist-bn', '', '--no-ddp-bb'])):
        process = call('train.py', *flags, *extra, '--experiment', name, processes=2)
        assert process.returncode == 0, process.stderr[-3000:]
        assert len(summary(tmp_path / name)) == 1
        assert 'No effect' not in process.stderr

        # what each rank was left with; the checkpoint keeps both
        buffers = [rank['buffers'][False] for rank in last(tmp_path / name)['timm_mldecoder']['ranks']]
        means = [buffer for buffer in buffers[0] if 'running_mean' in buffer]
        same = all((buffers[0][mean] == buffers[1][mean]).all() for mean in means)
        assert same == (name == 'reduced')


def free_port():
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return str(server.getsockname()[1])


LAUNCHERS = {
    # torch.distributed.launch and its like: the variables of torchrun, and a flag
    'launch': (
        lambda rank: dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1'),
        lambda rank: ['--local-rank', str(rank)],
    ),
    # srun on one node: no address is given, it is the first node of the step
    'slurm': (
        lambda rank: dict(
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
            SLURM_NTASKS='2',
            SLURM_JOB_ID='77',
            SLURM_STEP_NODELIST='localhost',
        ),
        lambda rank: [],
    ),
}


@pytest.mark.parametrize('launcher', [pytest.param('launch', marks=pytest.mark.slow), 'slurm'])
def test_other_launchers_environments(data, tmp_path, launcher):
    variables, flags = LAUNCHERS[launcher]
    inherited = {name: value for name, value in environment().items() if not name.startswith('SLURM')}
    port = free_port()
    processes = [
        subprocess.Popen(
            command('train.py', data, *SMALL, '-b', '4', '--output', tmp_path, '--experiment', 'run', *flags(rank)),
            env={**inherited, 'MASTER_PORT': port, **variables(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    assert 'Training with 2 processes' in outputs[0][1]
    assert [out.count('--result') for out, _ in outputs] == [1, 0]
    assert last(tmp_path / 'run')['timm_mldecoder']['world_size'] == 2


@pytest.mark.parametrize(
    ('nodes', 'first'),
    [
        ('gpu1', 'gpu1'),
        ('gpu1,gpu2', 'gpu1'),
        ('gpu[03-05,9]', 'gpu03'),
        ('a[1,3]-ib,b2', 'a1-ib'),
        ('node-7-[12-13].cluster', 'node-7-12.cluster'),
    ],
)
def test_the_first_node_of_a_slurm_list(nodes, first):
    assert first_node(nodes) == first


def test_gradients_are_exchanged_once_per_optimizer_step(data, tmp_path):
    """Counted by a hook on the exchange itself."""
    flags = [*SMALL, '-b', '2', '--grad-accum-steps', '2', '--output', tmp_path, '--experiment', 'run']
    process = call('tests/programs/count_exchanges.py', data, *flags, processes=2)
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'exchanges 3' in process.stdout, 'six batches of two on each rank, two of them per step'


@pytest.mark.slow
def test_two_nodes_start_again_after_one_lost_a_process(data, tmp_path):
    """Two torchruns that meet on this machine, each for one of two nodes."""
    flags = [
        data,
        *PLAIN,
        *shlex.split('--epochs 6 -b 2 --log-interval 1 --recovery-interval 1 --output'),
        tmp_path,
        *shlex.split('--experiment run --resume auto'),
    ]
    launcher = [
        sys.executable,
        *shlex.split('-m torch.distributed.run --nnodes=2 --nproc-per-node=1 --max-restarts=3 --rdzv-backend=c10d'),
        f'--rdzv-endpoint=127.0.0.1:{free_port()}',
        '--monitor-interval=0.1',
    ]
    logs = [tmp_path / f'node{node}.log' for node in range(2)]
    nodes = []
    for log in logs:
        with log.open('w') as file:
            nodes.append(
                subprocess.Popen(
                    [*launcher, str(ROOT / 'train.py'), *map(str, flags)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**environment(), 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'},
                )
            )
    try:
        wait_for(r'Train: 1 \[', *logs, processes=nodes)
        (worker,) = children(nodes[1].pid)
        os.kill(worker, signal.SIGKILL)
        assert [node.wait(200) for node in nodes] == [0, 0], logs[0].read_text()[-3000:]
    finally:
        for node in nodes:
            node.kill()
    assert any('Resumed from' in log.read_text() for log in logs)
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == [str(epoch) for epoch in range(6)]


def wait_for(pattern, *logs, processes):
    end = time.monotonic() + 120
    while not any(re.search(pattern, log.read_text()) for log in logs):
        assert all(process.poll() is None for process in processes) and time.monotonic() < end, logs[0].read_text()
        time.sleep(0.05)


def children(pid):
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
