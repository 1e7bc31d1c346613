"""A training step with a frozen backbone beside the forward pass alone and beside fine-tuning: time and peak memory.

    python -m benchmarks.freeze [--models vit_small_patch16_224 resnet50] [--batch-size 8] [--img-size 224]

A step is that of train.py with AdamW, without reading images: forward, backward, optimizer step. Forward alone is the
whole model in eval mode without gradients.
"""

import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.measure import Step, inference, markdown, paired_times, parser, peak_memory, ratio
from benchmarks.train_loop import write_images
from timm_mldecoder.distributed.world import World, join_world
from timm_mldecoder.flags import train_options
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import backward, step_optimizer
from timm_mldecoder.train.nonfinite import Buffers, TrainedBatch
from timm_mldecoder.train.run import Run

MODELS = ('vit_small_patch16_224', 'resnet50')
CLASSES = 10
WORK = {
    'frozen, linear': dict(freeze_backbone=True),
    'frozen, ML-Decoder': dict(freeze_backbone=True, use_ml_decoder_head=1),
    'fine-tuned, linear': {},
    'fine-tuned, ML-Decoder': dict(use_ml_decoder_head=1),
}
HEADER = ('model, work', 'ms per step', 'of forward', 'peak MiB')


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=5)
    flags.add_argument('--models', nargs='+', default=MODELS)
    flags.add_argument('--batch-size', type=int, default=8)
    flags.add_argument('--img-size', type=int, default=224)
    args = flags.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, join_world(args.device) as world:
        write_images(Path(folder, 'data'), CLASSES * args.batch_size, CLASSES, args.img_size)  # to build a run
        return markdown(HEADER, [row for name in args.models for row in _rows(name, args, folder, world)])


def _rows(name: str, args: Namespace, folder: str, world: World) -> list[list]:
    precision = dict(amp=True, amp_dtype='bfloat16') if args.device == 'cuda' else {}
    build = partial(
        train_options, data_dir=f'{folder}/data', output=folder, val_split='', model=name, num_classes=CLASSES,
        img_size=args.img_size, batch_size=args.batch_size, workers=0, device=args.device, opt='adamw', lr=1e-3,
        **precision,
    )  # fmt: skip
    runs = {work: build_run(build(experiment=f'{name} {work}', **settings), world) for work, settings in WORK.items()}
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=world.device)
    target = torch.randint(CLASSES, (args.batch_size,), device=world.device)
    steps = {'forward': inference(runs['frozen, linear'].eval_model, images)}
    steps |= {work: _step(run, images, target) for work, run in runs.items()}
    times = paired_times(steps, args.rounds, args.device)
    rows = []
    for work, step in steps.items():
        share = ratio(times[work], times['forward'])
        rows.append([f'{name}, {work}', 1000 * median(times[work]), share, peak_memory(step, args.device)])
    for run in runs.values():
        run.close()
    return rows


def _step(run: Run, images: Tensor, target: Tensor) -> Step:
    model = run.state.task.get_trainable_module()
    buffers = Buffers(model)

    def step() -> None:
        run.freezer.train_mode(model, epoch=0)  # the forward pass alone changed the mode of the model that it shares
        loss = backward(run, images, target, accumulated=1)
        step_optimizer(run, [TrainedBatch(loss, len(images), [])], buffers)

    return step


if __name__ == '__main__':
    print(main())
