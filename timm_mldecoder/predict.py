"""Labels, scores and features of images, with a trained model.

    python -m timm_mldecoder.predict IMAGES --checkpoint output/train/RUN/model_best.pth.tar --out labels.csv
    torchrun --nproc_per_node=8 -m timm_mldecoder.predict IMAGES --model local-dir:FOLDER --amp --out labels.parquet
    python -m timm_mldecoder.predict IMAGES --model local-dir:FOLDER --classes classes.txt \\
        --word-embeddings words.safetensors --out labels.jsonl --pictures PICTURES

IMAGES is an image, a folder, a tar file or a folder of them (WebDataset shards), or a CSV or Parquet list with a column
`path`. The output is written in finished parts: the same command continues after a kill. Images that cannot be read are
listed in errors.csv beside the output. A checkpoint of train.py is used as it was trained; one from elsewhere becomes a
folder for `local-dir:` with `python -m timm_mldecoder.convert`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor

import timm_mldecoder  # noqa: F401 - timm then builds models with an ML-Decoder head
from timm_mldecoder.checkpoints.folders import folder_settings
from timm_mldecoder.data import create_dataset
from timm_mldecoder.engine.eval.evaluate import autocast_context
from timm_mldecoder.engine.input.images import Placement
from timm_mldecoder.engine.model import Trained, load_trained, set_classes, thresholds_for
from timm_mldecoder.engine.predict.parts import Parts, fingerprint
from timm_mldecoder.engine.predict.pictures import draw_pictures
from timm_mldecoder.engine.predict.run import Predictor, predict
from timm_mldecoder.engine.predict.sources import SourceDataset, dataset_source, open_source
from timm_mldecoder.engine.runtime.distributed import World, join_world
from timm_mldecoder.engine.runtime.errors import run_command
from timm_mldecoder.head import MLDecoder


def main(argv: Sequence[str] | None = None) -> None:
    """Predict with the options of a command line.

    Raises:
        ValueError: For a user's mistake.
        RunFailed: If an image cannot be read and --bad-image is abort.
    """
    arguments = _parse(argv)
    device = arguments.device
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    with join_world(device) as world:
        _predict(arguments, world)


def _predict(arguments: argparse.Namespace, world: World) -> None:
    predictor = load_predictor(arguments, world.device)
    outputs = [path for path in (arguments.pictures, arguments.out.with_name(f'{arguments.out.name}.parts')) if path]
    if arguments.dataset:
        source = dataset_source(
            create_dataset(arguments.dataset, str(arguments.images), arguments.split), arguments.images
        )
    else:
        source = open_source(arguments.images, exclude=outputs)
    transform = create_transform(**{**predictor.data_config, 'is_training': False})
    dataset = SourceDataset(source, transform, predictor.image_mode)
    arrays = {'scores': arguments.scores, 'features': arguments.features}
    setup = dict(
        model=arguments.model or str(arguments.checkpoint),
        weights=fingerprint(*(float(tensor.double().sum()) for tensor in predictor.model.state_dict().values())),
        source=fingerprint(bytes(source.names.tobytes()) if hasattr(source.names, 'tobytes') else tuple(source.names)),
        classes=predictor.class_names,
        thresholds=None if predictor.thresholds is None else predictor.thresholds.tolist(),
        top_k=arguments.top_k,
        features=predictor.features,
        amp=arguments.amp,
    )
    parts = Parts(
        arguments.out, len(dataset), arguments.part_size, setup, {name: path for name, path in arrays.items() if path}
    )
    if arguments.torchcompile:
        predictor = predictor._replace(model=torch.compile(predictor.model))
    if arguments.pictures and world.primary:
        try:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f'--pictures {arguments.pictures}: {error.strerror}') from error
    errors = predict(
        predictor,
        dataset,
        parts,
        world,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        autocast=autocast_context(world.device, arguments.amp_dtype if arguments.amp else None),
        placement=Placement(world.device, channels_last=arguments.channels_last),
        bad_image=arguments.bad_image,
    )
    if world.primary:
        if arguments.pictures:
            draw_pictures(predictor, dataset, arguments.pictures)
        found = f'{parts.labels} labels of {len(dataset) - errors} images in {arguments.out}'
        print(found + (f', {errors} unreadable ones in {arguments.out.with_name("errors.csv")}' if errors else ''))


def load_predictor(arguments: argparse.Namespace, device: torch.device) -> Predictor:
    """Load the model that the arguments name, with the classes that they name.

    Raises:
        ValueError: For a user's mistake.
    """
    trained = _load(arguments, str(device))
    model, content = trained.model, trained.content
    if arguments.pictures and not isinstance(model.get_classifier(), MLDecoder):
        raise ValueError('--pictures draws the attention of an ML-Decoder head, which this model does not have')
    names = trained.class_names
    if arguments.classes or arguments.word_embeddings:
        head = model.get_classifier()
        if not isinstance(head, MLDecoder) or head.vocabulary is None:
            raise ValueError('--classes and --word-embeddings need text queries; the classes of this model are fixed')
        set_classes(model, _read_classes(arguments.classes), str(arguments.word_embeddings or ''))
        names = head.class_names
    names = [str(name) for name in names or range(model.num_classes)]
    if arguments.features and arguments.feature_kind == 'queries' and not isinstance(model.get_classifier(), MLDecoder):
        raise ValueError('--feature-kind queries needs an ML-Decoder head: pass pooled')
    if arguments.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Predictor(
        model.eval().to(device),
        {**resolve_data_config({}, model=model), **trained.data_config},
        names,
        _thresholds(arguments, content, names),
        trained.image_mode,
        arguments.top_k,
        arguments.feature_kind if arguments.features else '',
    )


def _load(arguments: argparse.Namespace, device: str) -> Trained:
    if arguments.checkpoint:
        return load_trained(arguments.checkpoint, device=device, use_ema=arguments.use_ema)
    if arguments.use_ema is not None:
        raise ValueError('--use-ema and --no-use-ema choose weights of a --checkpoint')
    try:
        model = timm.create_model(arguments.model, pretrained=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f'--model {arguments.model}: {error}') from error
    return Trained(model, None, {}, {})


def _thresholds(arguments: argparse.Namespace, content: dict[str, Any], names: list[str]) -> Tensor | None:
    """Return the threshold of each class, None for a single-label model."""
    stored = folder_settings(arguments.model) if arguments.model else content
    task = arguments.task or (
        stored.get('task', 'classification') if arguments.model else vars(content['args'])['task']
    )
    if task != 'multilabel':
        if arguments.threshold is not None:
            raise ValueError('--threshold is for multi-label models: pass --task multilabel if this is one')
        return None
    if arguments.threshold is not None or not stored.get('thresholds'):
        return torch.full((len(names),), 0.5 if arguments.threshold is None else arguments.threshold)
    tuned = thresholds_for(stored, names)
    if tuned is None:
        missing = next(name for name in names if name not in stored['thresholds'])
        raise ValueError(f'the tuned thresholds do not include class {missing!r}: pass --threshold')
    return tuned


def _read_classes(classes: str | None) -> list[str] | None:
    """Return the names in a file, one per line, or in a comma-separated list."""
    if not classes:
        return None
    is_file = os.path.isfile(classes)  # Path.is_file raises for a list that is too long for a name
    lines = Path(classes).read_text(encoding='utf-8-sig').splitlines() if is_file else classes.split(',')
    return [line.strip() for line in lines if line.strip()]


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f'{text} is below 1')
    return value


def _probability(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f'{text} is not a probability in [0, 1]')
    return value


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser('python -m timm_mldecoder.predict', description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add('images', type=Path, help='image, folder, tar file, or CSV or Parquet list')
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument('--model', help='pretrained timm model, such as local-dir:FOLDER')
    model.add_argument('--checkpoint', type=Path, help='checkpoint of train.py')
    add('--dataset', default='', help='dataset in the folder IMAGES, as in train.py: coco2014, csv, ...')
    add('--split', default='validation', help='split of the --dataset (default: %(default)s)')
    add(
        '--use-ema',
        action=argparse.BooleanOptionalAction,
        help='EMA weights (default: as it was ranked)',
    )
    add('--task', choices=['classification', 'multilabel'], help='task of a --model that does not know its own')
    add('--classes', help='classes of a model with text queries: a file with one per line, or a comma-separated list')
    add('--word-embeddings', type=Path, help='label embeddings of the classes')
    add('--out', type=Path, required=True, help='file to write: .csv, .jsonl or .parquet')
    add('--top-k', type=_positive, help='largest number of labels per image')
    add('--threshold', type=_probability, help='probability of a label (default: the tuned ones, else 0.5)')
    add('--scores', type=Path, help='.npz for the scores of all classes, float16')
    add('--features', type=Path, help='.npz for features, float16')
    add('--feature-kind', choices=['pooled', 'queries'], default='pooled', help='mean of the tokens, or query outputs')
    add('--pictures', type=Path, help='folder for a picture per image, with attention maps')
    add('--bad-image', choices=['skip', 'abort'], default='skip', help='unreadable images (default: %(default)s)')
    add('--part-size', type=_positive, default=4096, help='images per part (default: %(default)s)')
    add('-b', '--batch-size', type=_positive, default=64, help='batch size per rank (default: %(default)s)')
    add('-j', '--workers', type=int, default=4, help='data loader workers per rank (default: %(default)s)')
    add('--device', default='auto', help='device; auto takes the GPU if there is one (default: %(default)s)')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', choices=['bfloat16', 'float16'], default='bfloat16', help='(default: %(default)s)')
    add('--channels-last', action='store_true', help='channels-last memory layout')
    add('--torchcompile', action='store_true', help='compile the model')
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.workers <= 256:
        parser.error(f'--workers {arguments.workers} is not in [0, 256]')
    return arguments


if __name__ == '__main__':
    sys.exit(run_command(main))
