"""The head and training runs on each device: `pytest -m cuda` runs what needs a GPU, the rest is its CPU twin."""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from marks import few
from runs import BATCHES, MODEL, MOVING, assert_same_run, build, last, summary, train
from torch.overrides import TorchFunctionMode

from timm_mldecoder import MLDecoder
from timm_mldecoder.distributed.world import World, join_world
from timm_mldecoder.flags import parse_train
from timm_mldecoder.head.layers import Dropout, ReLUDropout
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import backward, fit, step_optimizer
from timm_mldecoder.train.nonfinite import Buffers, TrainedBatch

SMALL = dict(decoder_embedding=32, initial_num_features=24, num_heads=4, dim_feedforward=48)
PLAIN = shlex.split("""
    --epochs 1 --opt sgd --lr 1e-2 --sched none --use-ml-decoder-head 1 --decoder-embedding 32
    --ml-decoder-kwargs num_heads=4 dim_feedforward=48
""")
NO_DROPOUT = ['dropout=0']  # after PLAIN
DTYPES = [torch.float16, torch.bfloat16]
cuda = pytest.mark.cuda


@pytest.fixture
def deterministic(device) -> Iterator[None]:
    """Deterministic kernels where they exist, and float32 products in full."""
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with flags if device == 'cuda' else contextlib.nullcontext():
        yield


# the head


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_low_precision_logits_are_close_to_float32(device, dtype, memory_format):
    torch.manual_seed(0)
    head = MLDecoder(30, 7, **SMALL).to(device).eval()
    x = torch.randn(4, 24, 5, 5, device=device)
    expected = head(x)
    with torch.autocast(device, dtype):
        mixed = head(x.to(dtype).contiguous(memory_format=memory_format))
    pure = head.to(dtype)(x.to(dtype).contiguous(memory_format=memory_format))
    scale = expected.abs().max().item()
    for logits in (mixed, pure):
        assert logits.isfinite().all()
        torch.testing.assert_close(logits.float(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize('dtype', [torch.float32, *DTYPES])
@pytest.mark.parametrize('kind', [Dropout, ReLUDropout])
def test_dropout_drops_its_share_and_its_gradient_is_its_scale(device, dtype, kind):
    torch.manual_seed(0)
    x = torch.ones(400_000, device=device, dtype=dtype, requires_grad=True)
    output = kind(0.25)(x * 1)
    output.sum().backward()
    kept = output != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.004)
    assert torch.equal(x.grad != 0, kept)
    torch.testing.assert_close(x.grad, kept / torch.tensor(0.75, dtype=dtype))


@cuda
def test_a_cuda_graph_replays_the_folded_head():
    torch.manual_seed(0)
    head = MLDecoder(30, 7, **SMALL).cuda().eval().fold()
    x = torch.randn(4, 24, 5, 5, device='cuda')
    with torch.inference_mode():
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            head(x)
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = head(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(logits, head(x))


# runs


@pytest.mark.parametrize(
    ('flags', 'dtype', 'tolerance'),
    few(
        [
            ('--amp --amp-dtype bfloat16 --channels-last', torch.bfloat16, 0.05),
            ('--channels-last', torch.float32, 1e-3),
            ('--amp --amp-dtype bfloat16', torch.bfloat16, 0.05),
            ('--model-dtype bfloat16', torch.bfloat16, 0.05),
        ],
        1,
    ),
)
def test_a_run_in_another_precision_or_layout_learns_as_in_float32(
    data, tmp_path, device, deterministic, flags, dtype, tolerance
):
    common = [*PLAIN, *NO_DROPOUT, '--device', device]
    expected = summary(train(data, tmp_path / 'float32', *common))
    run = build(data, tmp_path / 'other', *common, *shlex.split(flags))
    model, seen = run.state.task.get_trainable_module(), set()
    model.register_forward_pre_hook(
        lambda module, args: seen.add(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    model.get_classifier().embed.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    fit(run)
    assert seen == {'--channels-last' in flags, dtype}
    (row,), (other,) = expected, summary(tmp_path / 'other' / 'run')
    for name in ('train_loss', 'eval_loss'):
        assert float(other[name]) == pytest.approx(float(row[name]), rel=tolerance)


@cuda
def test_a_float16_run_scales_its_loss_and_learns(data, tmp_path):
    run = build(data, tmp_path, *PLAIN, '--device', 'cuda', *shlex.split('--amp --amp-dtype float16 --epochs 4'))
    fit(run)
    assert run.state.scaler.is_enabled()
    assert float(summary(tmp_path / 'run')[-1]['train_loss']) < 2


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags',
    [
        '--torchcompile aot_eager',
        '--torchcompile inductor',
        '--torchcompile inductor --torchcompile-mode reduce-overhead',
        '--torchcompile inductor --torchcompile-mode reduce-overhead --tta 2',
        '--torchcompile inductor --torchcompile-mode reduce-overhead --grad-accum-steps 2 --model-ema',
    ],
)
def test_a_compiled_run_learns_as_an_eager_one(data, tmp_path, device, deterministic, flags):
    """With mode reduce-overhead a GPU replays CUDA graphs, whose outputs the next replay overwrites."""
    flags = shlex.split(flags)
    common = [*PLAIN, *NO_DROPOUT, '--device', device]
    eager = [flag for flag in flags if flag in ('--tta', '2', '--grad-accum-steps', '--model-ema')]
    expected = summary(train(data, tmp_path / 'eager', *common, *eager))
    (row,), (other,) = expected, summary(train(data, tmp_path / 'compiled', *common, *flags))
    torch.compiler.reset()
    for name in ('train_loss', 'eval_loss'):
        assert float(other[name]) == pytest.approx(float(row[name]), rel=1e-3)


def test_a_resumed_run_is_the_undisturbed_one(data, tmp_path, device, deterministic):
    flags = [*MOVING, '--device', device]
    whole = train(data, tmp_path / 'whole', *flags)
    train(data, tmp_path / 'parts', *flags, '--stop-epoch', '1')
    resumed = train(data, tmp_path / 'parts', *flags, '--resume', 'auto')
    if device == 'cpu':
        assert_same_run(resumed, whole)
    else:  # some kernels of a GPU add in an order that changes
        torch.testing.assert_close(last(resumed)['state_dict'], last(whole)['state_dict'], rtol=1e-3, atol=1e-4)


def test_one_rank_under_ddp_trains_as_without(data, tmp_path, device, deterministic, monkeypatch):
    """One GPU takes one NCCL rank; several ranks on a CPU are in test_distributed.py."""
    flags = [*PLAIN, '--device', device, '--grad-accum-steps', '2']
    expected = train(data, tmp_path / 'plain', *flags)
    monkeypatch.setattr(World, 'distributed', True)
    store = dist.FileStore(str(tmp_path / 'store'), 1)
    dist.init_process_group('nccl' if device == 'cuda' else 'gloo', store=store, rank=0, world_size=1)
    options = parse_train([str(data), *MODEL, '--output', str(tmp_path / 'ddp'), '--experiment', 'run', *flags])
    with join_world(options.device) as world:
        run = build_run(options, world)
        assert isinstance(run.state.task.trainable_module, torch.nn.parallel.DistributedDataParallel)
        fit(run)
    weights = [last(folder)['state_dict'] for folder in (expected, tmp_path / 'ddp' / 'run')]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


# waiting for the device


class Waits(TorchFunctionMode):
    """Records the calls that wait for a device, by name; on a GPU every other wait raises an error."""

    NAMES = {'tolist', 'item', 'cpu', 'numpy', 'nonzero', '__bool__', '__int__', '__float__', '__index__'}

    def __init__(self, device: str) -> None:
        self.cuda = device == 'cuda'
        self.names: list[str] = []

    def __enter__(self) -> 'Waits':
        self._set_mode('error')
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._set_mode('default')

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, '__name__', '')
        waits = name in self.NAMES and args[0].device.type == ('cuda' if self.cuda else 'cpu')
        if not waits:
            return function(*args, **kwargs or {})
        self.names.append(name)
        self._set_mode('default')
        try:
            return function(*args, **kwargs or {})
        finally:
            self._set_mode('error')

    def _set_mode(self, mode: str) -> None:
        if self.cuda:
            torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize(
    'flags',
    [
        '',
        '--momentum 0.9 --clip-grad 1 --model-ema --model-ema-decay 0.9 --mixup 0.2 --smoothing 0.1',
        '--amp --amp-dtype bfloat16 --channels-last --clip-grad 0.1 --clip-mode agc',
    ],
)
def test_an_optimizer_step_waits_for_the_device_once(data, tmp_path, device, flags):
    """To know whether loss and gradients are finite, and whether to stop; see `step_optimizer`."""
    assert_waits_once(data, tmp_path, device, flags)


@cuda
@pytest.mark.parametrize('flags', ['--amp --amp-dtype float16', '--opt adamw --sam 0.05', '--opt lamb'])
def test_an_optimizer_step_waits_for_a_gpu_once(data, tmp_path, flags):
    assert_waits_once(data, tmp_path, 'cuda', flags)


def assert_waits_once(data: Path, tmp_path: Path, device: str, flags: str) -> None:
    run = build(data, tmp_path, *PLAIN, '--device', device, *shlex.split(flags))
    model = run.state.task.get_trainable_module()
    model.train()
    buffers = Buffers(model)
    names = []
    for images, target in run.train_loader.epoch(0, 0, run.state.start):
        with Waits(device) as waits:
            loss = backward(run, images, target, 1)
            stop = step_optimizer(run, [TrainedBatch(loss, len(images), [])], buffers)
        names.append(waits.names)
        assert not stop
    run.close()
    assert names[1:] == [['tolist']] * (BATCHES - 1), 'the first step may set up'
