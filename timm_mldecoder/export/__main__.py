"""Export a trained model to a file that runs without training code, and verify the file.

    python -m timm_mldecoder.export output/train/RUN/model_best.pth.tar model.onnx --format onnx --images IMAGES
    python -m timm_mldecoder.export FOLDER model.pt2 --format torch-export --half
    python -m timm_mldecoder.export FOLDER model.pt2 --format aot --device cuda
    python -m timm_mldecoder.export FOLDER int8.onnx --format onnx --quantize int8 --calibration TRAIN --images VAL
    python -m timm_mldecoder.export output/train/RUN/model_best.pth.tar folder --format safetensors

The file takes images [B, channels, height, width] in float32, prepared as its metadata says, and returns logits [B, C]
in float32. The metadata holds architecture, task, class names, thresholds, preprocessing and precision: see
`read_metadata`. Text queries and label graphs are folded into constants. Before the file is put in its place, its
logits are compared with those of PyTorch on real images; a difference above the bound fails with exit code 1 and leaves
nothing behind.
"""

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import timm_mldecoder  # noqa: F401 - timm then builds models with an ML-Decoder head
from timm_mldecoder.checkpoint.folders import PROBLEM_TYPES
from timm_mldecoder.checkpoint.read import RUN
from timm_mldecoder.data.class_files import read_class_names, read_thresholds
from timm_mldecoder.export.card import run_facts
from timm_mldecoder.export.compare import VERIFIED, compare, load_images, quantize, verify, verify_scores
from timm_mldecoder.export.formats import FORMATS, Job, preprocessing, read_metadata
from timm_mldecoder.export.onnx_images import check_images, prepare_images
from timm_mldecoder.flags.flag import number
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.modeling.load import load
from timm_mldecoder.runtime.errors import CommandParser, RunFailed, one_line, run_command

__all__ = ['load_source', 'main', 'read_metadata']

SIZES = (1, 7)  # batch sizes to verify
CALIBRATION = 128  # number of images to calibrate with
BOUNDS = {'float32': 1e-4, 'float16': 2e-2}  # of a difference, in units of the largest logit or of 1


class Source(NamedTuple):
    """A model to export."""

    model: Any  # the model in eval mode on the CPU, float32
    metadata: dict[str, Any]  # what `read_metadata` returns, but for the precision
    facts: Mapping[str, Any]  # lines of the model card, see `save_folder`


def main(argv: Sequence[str] | None = None) -> None:
    """Export with the options of a command line.

    Raises:
        RunFailed: If the model cannot be exported in the format, or the file differs from PyTorch.
    """
    arguments = _parse(argv)
    _check(arguments)
    out, quantized = arguments.out, arguments.quantize
    source = with_labels(
        load_source(arguments.source, arguments.use_ema), arguments.class_names, arguments.task, arguments.thresholds
    )
    if arguments.features == 'queries' and not isinstance(source.model.get_classifier(), MLDecoder):
        raise ValueError('--features queries needs an ML-Decoder head: pass pooled')
    precision = 'float16' if arguments.half else 'float32'
    metadata = {**source.metadata, 'precision': quantized or precision}
    if arguments.with_preprocessing:
        check_images(metadata['preprocessing'])
    images = load_images(arguments.images, metadata, arguments.max_images if quantized else VERIFIED)
    # everything happens in a folder beside the output, which disappears with all that is in it if a step fails
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as folder:
        path = Path(folder) / out.name
        write, load = FORMATS[arguments.format][:2]
        job = Job(
            source.model,
            {**metadata, 'precision': precision},
            source.facts,
            arguments.device,
            arguments.batch_size,
            arguments.opset,
            arguments.features or '',
        )
        with _one_line_failures(arguments.format):
            write(path, job)
            run = load(path, arguments.device)
            sizes = (arguments.batch_size,) if arguments.batch_size else SIZES
            tolerance = BOUNDS[precision] if arguments.tolerance is None else arguments.tolerance
            lines = [f'difference    {verify(run, source.model, images.tensors, sizes, tolerance)}']
            if arguments.with_preprocessing:
                prepare_images(path, metadata)
                lines += [f'difference    {verify_scores(path, source.model, images, metadata)}']
        if quantized:
            calibration = None
            if arguments.calibration:
                calibration = load_images(arguments.calibration, metadata, CALIBRATION).tensors
            with _one_line_failures(f'{arguments.format} --quantize'):
                quantize(path, metadata, calibration)
                models = {precision: run, quantized: load(path, arguments.device)}
                lines += compare(models, images, metadata, arguments.batch_size, arguments.min_agreement)
        if read_metadata(path) != metadata:
            raise RunFailed(f'the metadata of {out} do not read back as they were written')
        _check_absent(out)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == path):  # the second file of weights first
            os.replace(file, out.parent / file.name)
    names = metadata['class_names']
    print(f'architecture  {metadata["architecture"]}, {metadata["precision"]}')
    print(f'classes       {source.model.num_classes}, {", ".join(names[:5]) if names else "without names"}')
    print('\n'.join(lines))
    print(f'written       {out}')


def load_source(source: str, use_ema: bool | None = None) -> Source:
    """Load a model to export.

    Args:
        source: As `load` takes it: checkpoint of train.py, folder, or name of a pretrained timm model.
        use_ema: Whether to take the EMA weights of a checkpoint; None takes those that it was ranked by.

    Raises:
        ValueError: If there is no such model, or it does not load.
    """
    loaded = load(source, use_ema=use_ema)
    names = loaded.known_names
    tuned = bool(loaded.content.get('thresholds') and names) and loaded.thresholds is not None
    return Source(
        loaded.model.float(),
        {
            'architecture': loaded.model.pretrained_cfg['architecture'],
            'task': loaded.task,
            'class_names': names,
            'thresholds': {n: loaded.content['thresholds'][n] for n in names} if names and tuned else None,
            'preprocessing': preprocessing(loaded.data_config),
        },
        run_facts(loaded.content, use_ema) if RUN in loaded.content else {},
    )


def with_labels(source: Source, class_names: Path | None, task: str | None, thresholds: Path | None) -> Source:
    """Return a source with other class names, task or thresholds; stored thresholds are those of the renamed classes.

    Raises:
        ValueError: If a file does not fit the model, or thresholds have no names or another task.
    """
    metadata, old = dict(source.metadata), source.metadata['class_names']
    metadata['task'] = task or metadata['task']
    if class_names:
        names = metadata['class_names'] = read_class_names(class_names, source.model.num_classes)
        if stored := metadata['thresholds']:
            metadata['thresholds'] = {new: stored[name] for new, name in zip(names, old, strict=True)}
    if thresholds:
        metadata['thresholds'] = read_thresholds(thresholds, metadata['class_names'], metadata['task'])
    return source._replace(metadata=metadata)


@contextmanager
def _one_line_failures(what: str) -> Iterator[None]:
    """Turn what the exporters raise, which is anything but about the user's command, into a RunFailed of one line."""
    try:
        yield
    except (ValueError, RunFailed, OSError):
        raise
    except Exception as error:
        raise RunFailed(f'--format {what}: {type(error).__name__}: {one_line(error, 500)}') from error


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for arguments that contradict each other or cannot be met."""
    spec = FORMATS[arguments.format]
    for name in {flag for other in FORMATS.values() for flag in other.flags} - set(spec.flags):
        if getattr(arguments, name) != DEFAULTS[name]:
            formats = ', '.join(key for key, other in FORMATS.items() if name in other.flags)
            raise ValueError(f'--{name.replace("_", "-")} is for --format {formats}, not {arguments.format}')
    if not arguments.quantize:
        for name in ('calibration', 'max_images', 'min_agreement'):
            if getattr(arguments, name) != DEFAULTS[name]:
                raise ValueError(f'--{name.replace("_", "-")} needs --quantize')
    elif arguments.half:
        raise ValueError('--half and --quantize exclude each other')
    elif arguments.with_preprocessing:
        raise ValueError('--with-preprocessing and --quantize exclude each other')
    if arguments.with_preprocessing and arguments.batch_size not in (None, 1):
        raise ValueError('--with-preprocessing is verified image by image: leave --batch-size out')
    if arguments.features and arguments.quantize:
        raise ValueError('--features and --quantize exclude each other')
    if arguments.out.suffix != spec.suffix and spec.suffix:
        raise ValueError(f'{arguments.out}: the name of a file of --format {arguments.format} ends with {spec.suffix}')
    missing = ', '.join(name for name in spec.packages if importlib.util.find_spec(name) is None)
    if missing:
        raise ValueError(f"--format {arguments.format} needs {missing}: pip install 'timm-mldecoder[export]'")
    if arguments.device.partition(':')[0] not in ('cpu', 'cuda') or (
        arguments.device != 'cpu' and not torch.cuda.is_available()
    ):
        raise ValueError(f'--device {arguments.device} is not available: pass cpu')
    if not arguments.out.parent.is_dir():
        raise ValueError(f'{arguments.out}: no such folder {arguments.out.parent}')
    try:
        str(arguments.out).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'{arguments.out}: the name is not valid UTF-8') from error
    _check_absent(arguments.out)


def _check_absent(out: Path) -> None:
    for path in (out, out.with_name(f'{out.name}.data')):  # the second file of weights of a large ONNX model
        if path.exists() or path.is_symlink():
            raise ValueError(f'{path} exists: remove it, or choose another name')


DEFAULTS = dict(
    batch_size=None,
    opset=None,
    with_preprocessing=False,
    features=None,
    quantize=None,
    calibration=None,
    max_images=256,
    min_agreement=0.9,
    device='cpu',
)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser('python -m timm_mldecoder.export', __doc__)
    parser.set_defaults(**DEFAULTS)
    add = parser.add_argument
    add('source', help='checkpoint of train.py, model folder, or pretrained timm model such as hf-hub:OWNER/NAME')
    add('out', type=Path, help='file to write (.onnx, .pt2), or folder for safetensors; must not exist')
    add('--format', choices=list(FORMATS), required=True, help='aot is compiled code of AOTInductor')
    add('--half', action='store_true', help='half precision: float16 weights and activations')
    add('--use-ema', action=argparse.BooleanOptionalAction, help='EMA weights (default: those it was ranked by)')
    add('--class-names', type=Path, metavar='FILE', help='names of the outputs: one per line, or a JSON list or object')
    add('--task', choices=list(PROBLEM_TYPES), help='task of the metadata (default: that of the source)')
    add('--thresholds', type=Path, metavar='FILE', help='probability per class: CSV rows name,threshold, or JSON')
    add('--images', type=Path, help='images to verify with: a file, folder, tar file or list (default: digits)')
    add('--tolerance', type=number(float, '[0, 1e3]'), help='bound of the difference, in units of the largest logit or '
        f'1 (default: {BOUNDS["float32"]:g}, with --half {BOUNDS["float16"]:g})')  # fmt: skip
    add('--batch-size', type=number(int, '[1, 65536]'), help='the only batch size of the file (default: any)')
    add('--device', help='device of the file, cpu or cuda (aot, torch-export; default: cpu)')
    add('--with-preprocessing', action='store_true', help='ONNX: the file takes uint8 pixels [B, H, W, 3] of any size '
        'and returns scores and logits')  # fmt: skip
    add('--features', choices=['pooled', 'queries'], help='ONNX: a second output, the mean token [B, F] or the query '
        'outputs [B, K, D] of an ML-Decoder head')  # fmt: skip
    add('--opset', type=number(int, '[18, 99]'), help="ONNX operator set (default: torch's)")
    quantization = parser.add_argument_group('quantization of ONNX files for a CPU')
    add = quantization.add_argument
    add('--quantize', choices=['int8'], help='also compares labels, accuracy and speed with float32')
    add('--calibration', type=Path, help='images that fix the ranges of activations, at best training images '
        '(default: linear layers only, with ranges that each batch computes)')  # fmt: skip
    add('--max-images', type=number(int, '[1, inf)'), help='images of --images to compare on (default: 256)')
    add('--min-agreement', type=number(float, '[0, 1]'), help='share of labels that must agree (default: 0.9)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # removes what is half-written
    sys.exit(run_command(main))
