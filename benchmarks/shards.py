"""Memory of a rank by number of ranks: weights, gradients and optimizer state, and the peak of a training step.

    python -m benchmarks.shards [--ranks 1 2 4] [--num-classes 1_000_000]

Gloo on the CPU, float32, AdamW. Memory is what torch allocated on the last rank: the shards that it holds, and the most
that a step allocates beside them. `planned` is what `benchmarks.plan` expects of weights, gradients and state.
"""

import argparse
import json
import subprocess
import sys

import timm
import torch
from timm.task import ClassificationTask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import MIB, markdown, parser, peak_memory
from benchmarks.plan import DDP, FSDP, sent_bytes, state_bytes
from timm_mldecoder.distributed.layout import create_layout
from timm_mldecoder.distributed.world import join_world, local
from timm_mldecoder.flags import train_options
from timm_mldecoder.train.optim import timm_optimizer

HEADER = (
    *('model', 'ranks', 'held by', 'state, MiB', 'planned', 'of one rank'),
    *('step, MiB', 'both, of one rank', 'sent, MiB', 'planned'),
)
DIM, BATCH = 64, 2
#: What a rank sends, by the tensor that a collective fills or reads, of which (ranks - 1) / ranks go to other ranks.
SENT = {'allgather_': 1, '_allgather_base_': 1, '_reduce_scatter_base_': 1, 'allreduce_': 2}


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=1)
    flags.add_argument('--ranks', type=int, nargs='+', default=[1, 2, 4])
    flags.add_argument('--models', nargs='*', default=['vit_small_patch16_224', 'resnet50'])
    flags.add_argument('--num-classes', type=int, default=1_000_000, help='of the ML-Decoder head; 0: without')
    flags.add_argument('--head-model', default='test_vit', help='backbone of that model')
    flags.add_argument('--work', help=argparse.SUPPRESS)
    args = flags.parse_args(argv)
    if args.work:
        return _measure(**json.loads(args.work))
    rows = []
    heads = [(args.head_model, args.num_classes)] if args.num_classes else []
    for name, classes in [*((model, 0) for model in args.models), *heads]:
        first = None
        for ranks in args.ranks:
            way = DDP if ranks == 1 else FSDP
            found = _start(ranks, dict(name=name, classes=classes, way=way))
            first = first or found
            planned = state_bytes(found['parameters'], ranks)
            state, both = found['state'] / first['state'], found['state'] + found['step']
            both /= first['state'] + first['step']
            label = f'{name}, {classes:,} classes' if classes else name
            memory = [found['state'], planned / MIB, state, found['step'], both]
            sent = [found['sent'] / MIB, sent_bytes(way, found['parameters'], ranks) / MIB]
            rows.append([label, ranks, way if ranks > 1 else '', *memory, *sent])
    return markdown(HEADER, rows)


class Sent(TorchDispatchMode):
    """Counts the bytes that a rank sends in collectives over rings."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition('.')[0]
        if function.namespace == 'c10d' and name in SENT:
            leaves = tree_leaves(args)
            largest = max(leaf.numel() * leaf.element_size() for leaf in leaves if torch.is_tensor(leaf))
            group = next(leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject))
            ranks = torch.distributed.ProcessGroup.unbox(group).size()
            self.bytes += SENT[name] * (ranks - 1) / ranks * largest
        return function(*args, **(kwargs or {}))


def _start(ranks: int, work: dict) -> dict[str, float]:
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={ranks}'] if ranks > 1 else []
    command = [sys.executable, *launcher, '-m', 'benchmarks.shards', '--work', json.dumps(work)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return next(json.loads(line) for line in process.stdout.splitlines() if line)


def _measure(name: str, classes: int, way: str) -> str:
    """Return what the last rank measured, as JSON; on the first rank, since lines of several ranks may mix."""
    with join_world('cpu') as world:
        options = train_options(
            data_dir='.',
            device='cpu',
            use_ml_decoder_head=int(bool(classes)),
            opt='adamw',
            lr=1e-4,
            parallel=way.split()[-1],
        )
        head = dict(num_of_groups=min(4000, classes), decoder_embedding=DIM, dim_feedforward=64, num_heads=4)
        settings = dict(num_classes=classes, ml_decoder=head) if classes else {}
        layout = create_layout(options, world)
        model = layout.create(lambda _: timm.create_model(name, **settings))
        layout.place(model, [model.get_classifier()])
        parameters = sum(parameter.numel() for parameter in model.parameters())
        size = model.pretrained_cfg['input_size']
        task = ClassificationTask(model, device=world.device, verbose=False)
        optimizer = timm_optimizer(options, task.get_trainable_module())
        layout.wrap(task)
        images, labels = torch.randn(BATCH, *size), torch.tensor([0, 1])

        def step() -> None:
            task(images, labels)['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()

        peak = peak_memory(step)
        with Sent() as sent:
            step()
        task(images, labels)['loss'].backward()
        tensors = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        state = sum(local(tensor).numel() * tensor.element_size() for tensor in tensors) / MIB
        found = world.all_gather(dict(parameters=parameters, state=state, step=peak, sent=sent.bytes))
    return json.dumps(found[-1]) if world.primary else ''


if __name__ == '__main__':
    print(main())
