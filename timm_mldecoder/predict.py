"""Labels of images: a file or a folder of them in, CSV or JSON out, and pictures with what each label looks at.

    python -m timm_mldecoder.predict IMAGES --checkpoint output/train/RUN/model_best.pth.tar
    python -m timm_mldecoder.predict IMAGES --model local-dir:FOLDER --pictures PICTURES --out labels.json
    python -m timm_mldecoder.predict IMAGES --model local-dir:FOLDER --classes "zebra,traffic light" \\
        --word-embeddings words.safetensors

A checkpoint of train.py is used as it was trained. A file from elsewhere becomes a folder for `local-dir:` by
`python -m timm_mldecoder.convert`. A model with word queries takes any classes (`--classes`) that a file of label
embeddings has, or picks among its own.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.utils import setup_default_logging
from torch import Tensor, nn

import timm_mldecoder  # noqa: F401 - timm then builds models with an ML-Decoder head
from timm_mldecoder.data.word_embeddings import read_word_embeddings
from timm_mldecoder.engine.eval.score import create_model, take_checkpoint
from timm_mldecoder.engine.flags import parse_validate
from timm_mldecoder.engine.runtime.distributed import World
from timm_mldecoder.models.attention_maps import attention_maps

SUFFIXES = tuple(Image.registered_extensions())
MAPS = 4  # most attention maps in a picture


class Predictor(NamedTuple):
    """A model and what goes with it.

    Attributes:
        model: In eval mode.
        config: timm's data configuration.
        names: Names of the outputs in their order.
        thresholds: Probabilities from which a label is given, a scalar or [C]; None for one label an image.
    """

    model: nn.Module
    config: dict[str, Any]
    names: list[str]
    thresholds: Tensor | None


class Label(NamedTuple):
    """A label of an image, and its probability."""

    index: int
    name: str
    score: float


def main(argv: Sequence[str] | None = None) -> None:
    """Predict as the command line says."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.use_ema and not options.checkpoint:
        parser.error('--use-ema takes the averaged weights of a --checkpoint')
    setup_default_logging()
    try:
        files = find_images(options.images)
        predictor = load(options)
        found = dict(predict(predictor, files, options))
        write(options.out, found, options.images)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def find_images(path: Path) -> list[Path]:
    """The image, or every image in the folder and the folders in it, sorted."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob('*') if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f'{path}: no image there')
    return files


def load(options: argparse.Namespace) -> Predictor:
    """The model that the options name, asked for the classes that they name.

    Raises:
        ValueError: For whatever the user got wrong.
    """
    thresholds, content, config = None, {}, {}
    if options.checkpoint:
        asked, explicit = parse_validate(
            [
                '.',
                '--checkpoint',
                str(options.checkpoint),
                '--device',
                options.device,
                *(['--use-ema'] if options.use_ema else []),
            ]
        )
        content, config = take_checkpoint(asked, explicit)
        model = create_model(asked, content, World(torch.device(options.device)))
        multilabel, thresholds = asked.task == 'multilabel', content.get('thresholds')
    else:
        model = timm.create_model(options.model, pretrained=True)
        multilabel = not options.single_label
    config = {**resolve_data_config({}, model=model), **config}
    names = content.get('class_names') or model.pretrained_cfg.get('label_names')
    vocabulary = getattr(model.get_classifier(), 'vocabulary', None)
    if options.classes or options.word_embeddings:
        thresholds = None  # they are those of the old classes
        names = _change_classes(model, options)
    elif vocabulary is not None:
        names = vocabulary.class_names
    names = names or range(model.num_classes)
    if options.threshold is None and thresholds is not None and len(thresholds) != len(names):
        raise ValueError(
            f'{options.checkpoint} holds thresholds of {len(thresholds)} classes, and {len(names)} are '
            f'asked for: pass --threshold'
        )
    if multilabel and (options.threshold is not None or thresholds is None):
        thresholds = torch.tensor(0.5 if options.threshold is None else options.threshold)
    return Predictor(
        model.eval().to(options.device), config, [str(name) for name in names], thresholds if multilabel else None
    )


def _change_classes(model: nn.Module, options: argparse.Namespace) -> list[str]:
    """Ask a model with word queries for the classes of the options; their names."""
    head = model.get_classifier()
    if getattr(head, 'vocabulary', None) is None:
        raise ValueError('the classes of this model are fixed: --classes and --word-embeddings are for word queries')
    wanted = [name.strip() for name in options.classes.split(',') if name.strip()] if options.classes else None
    if options.word_embeddings:
        embeddings, names = read_word_embeddings(options.word_embeddings, wanted)
    else:
        own = {name: index for index, name in enumerate(head.class_names or ())}
        missing = [name for name in wanted if name not in own]
        if missing:
            raise ValueError(f'the model has no embedding of {", ".join(missing)}: give --word-embeddings')
        embeddings, names = head.vocabulary.embeddings[[own[name] for name in wanted]], wanted
    head.set_word_embeddings(embeddings, names)
    return names


def predict(
    predictor: Predictor, files: Sequence[Path], options: argparse.Namespace
) -> Iterator[tuple[Path, list[Label]]]:
    """Each image and its labels, the likeliest first; draws pictures where the options ask for them."""
    transform = create_transform(**{**predictor.config, 'is_training': False})
    mode = 'L' if predictor.config['input_size'][0] == 1 else 'RGB'
    for start in range(0, len(files), options.batch_size):
        batch = files[start : start + options.batch_size]
        images = [Image.open(file).convert(mode) for file in batch]
        inputs = torch.stack([transform(image) for image in images]).to(options.device)
        with torch.inference_mode():
            logits = predictor.model(inputs).float()
        for file, image, row, values in zip(batch, images, logits, inputs, strict=True):
            labels = choose(predictor, row, options.top_k)
            if options.pictures:
                picture = options.pictures / file.relative_to(_root(options.images)).with_suffix('.png')
                draw(predictor.model, image, values, labels[:MAPS], picture)
            yield file, labels


def choose(predictor: Predictor, logits: Tensor, top_k: int | None) -> list[Label]:
    """The labels of one image: the `top_k` likeliest, or all above their threshold, or the one."""
    single = predictor.thresholds is None
    scores = (logits.softmax(0) if single else logits.sigmoid()).cpu()
    order = scores.argsort(descending=True)
    order = order[: top_k or 1] if top_k or single else order[(scores >= predictor.thresholds)[order]]
    return [Label(index, predictor.names[index], scores[index].item()) for index in order.tolist()]


def draw(model: nn.Module, image: Image.Image, values: Tensor, labels: Sequence[Label], path: Path) -> None:
    """The image, and beside it what the head looks at for each label."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--pictures needs matplotlib: pip install 'timm-mldecoder[demo]'") from error
    image = image.resize(values.shape[:0:-1])
    figure = Figure(figsize=(3 * (1 + len(labels)), 3.3), layout='constrained')
    axes = figure.subplots(1, 1 + len(labels), squeeze=False)[0]
    axes[0].imshow(np.asarray(image), cmap='gray')
    axes[0].set_title(path.stem)
    if labels:
        classes = torch.tensor([label.index for label in labels], device=values.device)
        maps = attention_maps(model, values.expand(len(labels), -1, -1, -1), classes).cpu()
        for place, label, attention in zip(axes[1:], labels, maps, strict=True):
            place.imshow(np.asarray(image.convert('L')), cmap='gray')
            place.imshow(attention, cmap='inferno', alpha=0.6, extent=(0, image.width, image.height, 0))
            place.set_title(f'{label.name} {label.score:.2f}')
    for place in axes:
        place.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def write(out: Path | None, found: dict[Path, list[Label]], images: Path) -> None:
    """Write a row a label (CSV), or an object with a list an image (JSON); CSV to the screen without a file."""
    named = {str(file.relative_to(_root(images))): labels for file, labels in found.items()}
    if out is not None and out.suffix == '.json':
        content = {
            name: [{'label': label.name, 'score': label.score} for label in labels] for name, labels in named.items()
        }
        out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        return
    rows = [(name, label.name, f'{label.score:.6f}') for name, labels in named.items() for label in labels]
    with out.open('w', newline='', encoding='utf-8') if out else _screen() as file:
        csv.writer(file).writerows([('image', 'label', 'score'), *rows])


def _screen():
    return open(sys.stdout.fileno(), 'w', newline='', encoding='utf-8', closefd=False)


def _root(images: Path) -> Path:
    return images if images.is_dir() else images.parent


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser('python -m timm_mldecoder.predict', description=__doc__, formatter_class=formatter)
    parser.add_argument('images', type=Path, help='an image, or a folder of them')
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument('--model', help='a pretrained timm model, as in local-dir:FOLDER')
    model.add_argument('--checkpoint', type=Path, help='a checkpoint of train.py')
    parser.add_argument('--use-ema', action='store_true', help='the averaged weights of the checkpoint')
    parser.add_argument('--classes', help='classes to ask a model with word queries for, separated by commas')
    parser.add_argument('--word-embeddings', type=Path, help='label embeddings of the classes')
    parser.add_argument('--out', type=Path, help='.csv or .json; CSV on the screen if left out')
    parser.add_argument('--pictures', type=Path, help='folder for a picture an image, with attention maps')
    parser.add_argument('--top-k', type=int, help='so many labels an image, whatever their scores')
    parser.add_argument('--threshold', type=float, help='probability of a label [those of the checkpoint, or 0.5]')
    parser.add_argument('--single-label', action='store_true', help='one label an image (a checkpoint knows)')
    parser.add_argument('--device', default='cpu', help='[%(default)s]')
    parser.add_argument('-b', '--batch-size', type=int, default=32, help='[%(default)s]')
    return parser


if __name__ == '__main__':
    main()
