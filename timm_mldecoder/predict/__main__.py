"""Labels, scores and features of images, with a trained model.

    python -m timm_mldecoder.predict IMAGES --checkpoint output/train/RUN/model_best.pth.tar --out labels.csv
    torchrun --nproc_per_node=8 -m timm_mldecoder.predict IMAGES --model local-dir:FOLDER --amp --out labels.parquet
    python -m timm_mldecoder.predict IMAGES --model local-dir:FOLDER --classes classes.txt \\
        --word-embeddings words.safetensors --out labels.jsonl --pictures PICTURES

IMAGES is an image, a folder, a tar file or a folder of them (WebDataset shards), or a CSV or Parquet list. The output
is written in finished parts: the same command continues after a kill. Images that cannot be read are listed in
OUT.errors.csv. A checkpoint of train.py is used as it was trained; one from elsewhere becomes a folder for
`local-dir:` with `python -m timm_mldecoder.convert`.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import timm_mldecoder  # noqa: F401 - timm then builds models with an ML-Decoder head
from timm_mldecoder.checkpoint.read import RUN
from timm_mldecoder.checkpoint.state import held_out_before
from timm_mldecoder.data import FORMATS, create_dataset
from timm_mldecoder.data.class_files import read_implications
from timm_mldecoder.distributed.world import World, join_world
from timm_mldecoder.evaluation.evaluate import autocast_context
from timm_mldecoder.flags import validate_options
from timm_mldecoder.flags.flag import number
from timm_mldecoder.flags.parse import inherit
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.loading.datasets import create_split
from timm_mldecoder.loading.loader import Placement
from timm_mldecoder.loading.ranks import check_rank_names
from timm_mldecoder.modeling.classes import set_classes
from timm_mldecoder.modeling.create import fuse_model
from timm_mldecoder.modeling.load import LoadedModel, load
from timm_mldecoder.predict.parts import Parts, fingerprint
from timm_mldecoder.predict.pictures import draw_pictures
from timm_mldecoder.predict.predict import predict
from timm_mldecoder.predict.sources import SourceDataset, dataset_source, open_source
from timm_mldecoder.runtime.errors import CommandParser, RunFailed, run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Predict with the options of a command line.

    Raises:
        RunFailed: If an image cannot be read and --bad-image is abort.
    """
    arguments = _parse(argv)
    device = arguments.device
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    with join_world(device) as world:
        _predict(arguments, world)


def _predict(arguments: argparse.Namespace, world: World) -> None:
    loaded = _load(arguments, world.device)
    outputs = [path for path in (arguments.pictures, arguments.out.with_name(f'{arguments.out.name}.parts')) if path]
    if arguments.dataset:
        source = dataset_source(_open_dataset(arguments, loaded.content), arguments.images)
    else:
        source = open_source(arguments.images, outputs, arguments.path_column or '')
    check_rank_names(world, source.names, loaded.class_names)
    dataset = SourceDataset(source, loaded.transform, loaded.image_mode, loaded.reading)
    features = arguments.feature_kind if arguments.features else ''
    amp_dtype = arguments.amp_dtype if arguments.amp else None
    weights = loaded.model.state_dict().values()
    setup = dict(
        weights=fingerprint(tensor.cpu().reshape(-1).view(torch.uint8).numpy() for tensor in weights),
        source=fingerprint([source.names]),
        preprocessing=[loaded.data_config, loaded.image_mode, str(loaded.reading)],
        classes=loaded.class_names,
        thresholds=None if loaded.thresholds is None else loaded.thresholds.tolist(),
        top_k=arguments.top_k,
        **({} if loaded.implications is None else {'implications': loaded.implications.tolist()}),
        features=features,
        amp=amp_dtype,
        scores_dtype=arguments.scores_dtype,
    )
    arrays = {name: path for name in ('scores', 'features') if (path := getattr(arguments, name))}
    parts = Parts(arguments.out, len(dataset), arguments.part_size, setup, arrays)
    if arguments.pictures:
        try:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f'--pictures {arguments.pictures}: {error.strerror}') from error
    autocast = autocast_context(world.device, amp_dtype)
    predict(
        loaded,
        dataset,
        parts,
        world,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        autocast=autocast,
        placement=Placement(world.device, channels_last=arguments.channels_last),
        bad_image=arguments.bad_image,
        features=features,
        compiled=arguments.torchcompile,
    )
    if arguments.pictures:  # before the parts are joined: a kill meanwhile leaves a prediction to resume
        with autocast():
            draw_pictures(loaded, dataset, range(world.rank, len(dataset), world.size), arguments.pictures)
        world.barrier()
    if world.primary:
        errors = parts.finish()
        found = f'{parts.labels} labels of {len(dataset) - errors} images in {arguments.out}'
        print(found + (f', {errors} unreadable ones in {parts.errors}' if errors else ''))
        if errors == len(dataset):
            for path in (arguments.out, *arrays.values()):
                path.unlink(missing_ok=True)  # for the corrected command
            raise RunFailed(
                f'none of the {errors} images could be read, such as {dataset.filename(0)}: {parts.errors} says why. '
                'Paths of a list are relative to its folder, with /; --path-column names their column'
            )


def _open_dataset(arguments: argparse.Namespace, content: Mapping[str, Any]) -> Any:
    """Open the split of a dataset; that of the training run with its columns, and divided as it was."""
    names = ('path_column', 'label_column', 'label_separator', 'split_column')
    columns = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    missing = arguments.missing_images
    if RUN not in content:
        images = str(arguments.images)
        return create_dataset(arguments.dataset, images, arguments.split, missing=missing or 'error', **columns)
    options = validate_options(
        data=str(arguments.images),
        dataset=arguments.dataset,
        checkpoint=str(arguments.checkpoint),
        device='cpu',  # nothing is computed here
        **columns,
        **({'missing_images': missing} if missing else {}),
    )
    # the labels are not used
    options = inherit(options, vars(content['args'])).replace(class_map='', class_split='')
    if arguments.dataset in FORMATS:
        options = options.replace(task='multilabel')
    known = held_out_before(options, content)
    return create_split(options, arguments.split, missing=options.missing_images, known=known)


def _load(arguments: argparse.Namespace, device: torch.device) -> LoadedModel:
    """Load the model that the arguments name, with the classes that they name."""
    labels = {name: getattr(arguments, name) for name in ('use_ema', 'task', 'threshold', 'top_k')}
    loaded = load(arguments.model or arguments.checkpoint, str(device), **labels)
    model = loaded.model
    head = model.get_classifier()
    if arguments.pictures and not isinstance(head, MLDecoder):
        raise ValueError('--pictures draws the attention of an ML-Decoder head, which this model does not have')
    if arguments.classes or arguments.word_embeddings:
        if not isinstance(head, MLDecoder) or head.vocabulary is None:
            raise ValueError('--classes and --word-embeddings need text queries; the classes of this model are fixed')
        set_classes(model, _read_classes(arguments.classes), str(arguments.word_embeddings or ''))
        if not head.class_names:  # the names of the training run are of other classes
            head.set_word_embeddings(head.vocabulary.embeddings, [str(number) for number in range(model.num_classes)])
    if arguments.fuse_bn:
        fuse_model(model, loaded.data_config['input_size'])
    if arguments.channels_last:
        model.to(memory_format=torch.channels_last)
    if arguments.implications:
        loaded = replace(loaded, implications=read_implications(arguments.implications, loaded.class_names))
    return loaded


def _read_classes(classes: str | None) -> list[str] | None:
    """Return the names in a file, one per line, or in a comma-separated list."""
    if not classes:
        return None
    is_file = os.path.isfile(classes)  # Path.is_file raises for a list that is too long for a name
    lines = Path(classes).read_text(encoding='utf-8-sig').splitlines() if is_file else classes.split(',')
    return [line.strip() for line in lines if line.strip()]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser('python -m timm_mldecoder.predict', __doc__)
    add, positive = parser.add_argument, number(int, '[1, inf)')
    add('images', type=Path, help='image, folder, tar file, or CSV or Parquet list')
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument('--model', help='pretrained timm model, or folder of convert')
    model.add_argument('--checkpoint', type=Path, help='checkpoint of train.py, or folder of a run')
    add('--dataset', default='', help='dataset in the folder IMAGES, as in train.py: coco2014, csv, ...')
    add('--split', default='validation', help='split of the --dataset (default: %(default)s)')
    add('--path-column', help='column of the paths in a CSV or Parquet list (default: path, else the first)')
    add('--label-column', help='column of the labels of --dataset csv (default: as in training)')
    add('--label-separator', help='what is between the labels of --dataset csv (default: as in training)')
    add('--split-column', help='column of --dataset csv that names the split (default: as in training)')
    add('--missing-images', choices=('error', 'skip'), help='images that a --dataset lists and that are not on disk: '
        'end, or leave them out (default: as in training)')  # fmt: skip
    add('--use-ema', action=argparse.BooleanOptionalAction, help='EMA weights (default: as it was ranked)')
    add('--task', choices=['classification', 'multilabel'], help='task of a --model that does not know its own')
    add('--classes', help='classes of a model with text queries: a file with one per line, or a comma-separated list')
    add('--word-embeddings', type=Path, help='label embeddings of the classes')
    add('--out', type=Path, required=True, help='file to write: .csv, .jsonl or .parquet')
    add('--top-k', type=positive, help='largest number of labels per image')
    add('--threshold', type=number(float, '[0, 1]'), help='probability of a label (default: the tuned ones, else 0.5)')
    add('--implications', type=Path, metavar='FILE', help='lines "tag -> tag": labels are closed under them')
    add('--scores', type=Path, help='.npz for the scores of all classes')
    add(
        '--scores-dtype',
        choices=['float32', 'float16'],
        default='float32',
        help='float16: half the size, and ties that change average precision (default: %(default)s)',
    )
    add('--features', type=Path, help='.npz for features, float16')
    add('--feature-kind', choices=['pooled', 'queries'], default='pooled', help='mean of the tokens, or query outputs')
    add('--pictures', type=Path, help='folder for a picture per image, with attention maps')
    add('--bad-image', choices=['skip', 'abort'], default='skip', help='unreadable images (default: %(default)s)')
    add('--part-size', type=positive, default=4096, help='images per part (default: %(default)s)')
    add('-b', '--batch-size', type=positive, default=64, help='batch size per rank (default: %(default)s)')
    workers = number(int, '[0, 256]')
    add('-j', '--workers', type=workers, default=4, help='data loader workers per rank (default: %(default)s)')
    add('--device', default='auto', help='device; auto takes the GPU if there is one (default: %(default)s)')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', choices=['bfloat16', 'float16'], default='bfloat16', help='(default: %(default)s)')
    add('--channels-last', action='store_true', help='channels-last memory layout')
    add('--fuse-bn', action='store_true', help='fold BatchNorm into the convolutions before it')
    add('--torchcompile', action='store_true', help='compile the model')
    return parser.parse_args(argv)


if __name__ == '__main__':
    sys.exit(run_command(main))
