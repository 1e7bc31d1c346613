"""validate.py beside a plain evaluation loop: the same model, images, transform and metrics, a pass each in turn.

    python -m benchmarks.validate_loop [--device cuda]

Both create the model and the loader, and start its workers. On CUDA both run in bfloat16 and channels-last.
"""

import contextlib
import tempfile
from pathlib import Path
from statistics import median

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import accuracy

from benchmarks.measure import Step, markdown, paired_times, parser, ratio
from benchmarks.train_loop import CLASSES, write_images
from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.flags import Options, validate_options
from timm_mldecoder.validate.score import score_model

HEADER = ('loop', 'img/s', 'of the plain loop')


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=5)
    flags.add_argument('--model', default='resnet18')
    flags.add_argument('--img-size', type=int, default=64)
    flags.add_argument('--batch-size', type=int, default=32)
    flags.add_argument('--images', type=int, default=1920)
    flags.add_argument('--workers', type=int, default=1)
    args = flags.parse_args(argv)
    fast = dict(amp=True, amp_dtype='bfloat16', channels_last=True) if args.device == 'cuda' else {}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args.images, CLASSES, args.img_size, 'validation')
        checkpoint = f'{folder}/model.pth'
        torch.save(timm.create_model(args.model, num_classes=CLASSES, ml_decoder=True).state_dict(), checkpoint)
        options = validate_options(
            data_dir=folder, model=args.model, num_classes=CLASSES, img_size=args.img_size, batch_size=args.batch_size,
            workers=args.workers, device=args.device, use_ml_decoder_head=1, checkpoint=checkpoint, **fast,
        )  # fmt: skip
        with join_world(options.device) as world:
            loops = {'plain': _plain(options), 'validate.py': lambda: score_model(options, world)}
            times = paired_times(loops, args.rounds, args.device, workers=args.workers)
    plain, ours = times.values()
    speeds = [args.images / median(each) for each in (plain, ours)]
    rows = [['plain', speeds[0], '1.000'], ['`validate.py`', speeds[1], f'{ratio(plain, ours):.3f}']]
    return markdown(HEADER, rows)


def _plain(options: Options) -> Step:
    """The loop that one would write by hand."""
    device = torch.device(options.device)

    @torch.inference_mode()
    def evaluation() -> None:
        settings = dict(num_classes=CLASSES, ml_decoder=True, checkpoint_path=options.checkpoint)
        model = timm.create_model(options.model, **settings).to(device).eval()
        if options.channels_last:
            model = model.to(memory_format=torch.channels_last)
        config = resolve_data_config(options.to_dict(), model=model, use_test_size=True)
        loader = create_loader(
            create_dataset('', options.data_dir, split='validation'), batch_size=options.batch_size, device=device,
            num_workers=options.workers, **{name: config[name] for name in LOADED},
        )  # fmt: skip
        correct = torch.zeros(2, device=device)
        total_loss = torch.zeros((), device=device)
        for images, target in loader:
            if options.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast('cuda', torch.bfloat16) if options.amp else contextlib.nullcontext():
                logits = model(images)
            total_loss += torch.nn.functional.cross_entropy(logits.float(), target) * len(images)
            correct += torch.stack(accuracy(logits, target, topk=(1, 5))) * len(images)
        correct.tolist(), total_loss.item()

    return evaluation


LOADED = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')  # of timm's data configuration

if __name__ == '__main__':
    print(main())
