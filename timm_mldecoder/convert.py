"""Turn a downloaded ML-Decoder checkpoint into a folder that timm loads.

    python -m timm_mldecoder.convert tresnet_l_COCO__448_90_0.pth coco_l
    python -c "import timm; timm.create_model('local-dir:coco_l', pretrained=True)"

The published TResNets are recognised. For another backbone say which timm model it is (``--model``) and at which size
it was trained (``--input-size``). docs/checkpoints.md tells the rest.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models import resolve_model_input_args, save_for_hf
from torch import Tensor

from timm_mldecoder.checkpoints.published import convert_state_dict, find_head, head_options, read_checkpoint, unwrap
from timm_mldecoder.data.word_embeddings import read_word_embeddings


class Architecture(NamedTuple):
    """A timm model: its name, and the arguments that make it what the checkpoint was made with."""

    model: str
    arguments: Mapping[str, Any] = {}


class TResNetShape(NamedTuple):
    """What tells one TResNet from another."""

    blocks: tuple[int, ...]  # of each stage
    width: int  # channels of the stem
    bottlenecks: bool  # from the first stage on, not from the third


M = TResNetShape((3, 4, 11, 3), 64, False)
L = TResNetShape((3, 4, 23, 3), 64, True)
XL = TResNetShape((3, 8, 34, 5), 64, True)
# The L and XL of the TResNet paper (arXiv 2003.13630). timm calls these two tresnet_l and tresnet_xl, the reference
# repository of ML-Decoder the two above, and timm has a name for that L only.
PAPER_L = TResNetShape((4, 5, 18, 3), 76, False)
PAPER_XL = TResNetShape((4, 5, 24, 3), 83, False)

TRESNETS = {
    M: Architecture('tresnet_m'),
    L: Architecture('tresnet_v2_l'),
    XL: Architecture('tresnet_v2_l', {'layers': list(XL.blocks)}),
    PAPER_L: Architecture('tresnet_l'),
    PAPER_XL: Architecture('tresnet_xl'),
}

# Backbone and number of classes -> input size of the published checkpoint (model zoo of the reference repository).
INPUT_SIZES = {
    (M, 80): 224,  # COCO, 84.2 mAP
    (L, 80): 448,  # COCO, 90.1 mAP
    (XL, 80): 640,  # COCO, 91.4 mAP
    (PAPER_XL, 80): 640,
    (M, 9605): 224,  # Open Images, 86.8 mAP
    (L, 196): 384,  # Stanford Cars, 96.41 %
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        convert(**vars(args))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def convert(
    file: Path, folder: Path, model: str | None, input_size: int | None, word_embeddings: Path | None, **preprocessing
) -> None:
    """Read ``file``, say what it is, and write ``folder``.

    Args:
        file: a checkpoint in one of the layouts of `timm_mldecoder.checkpoints.published`.
        folder: a new or empty folder, for ``config.json`` and ``model.safetensors``.
        model: timm's name of the backbone, where the file does not show it.
        input_size: height and width of the images in pixels, where the checkpoint is not a published one.
        word_embeddings: label embeddings for a head of word queries, which is published without any; see
            `timm_mldecoder.data.word_embeddings`.
        **preprocessing: how images are prepared, under the names of timm's data config.

    Raises:
        ValueError: the file is not what `convert_state_dict` reads, something is to be said that only the user knows,
            or the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'{folder} is not an empty folder: choose another one')
    checkpoint = read_checkpoint(file)
    tensors = unwrap(checkpoint)
    options = head_options(tensors)
    names = None
    if 'word_embeddings' in options:
        options['word_embeddings'], names = _word_embeddings(word_embeddings)
        options['class_names'] = names
    elif word_embeddings:
        raise ValueError(f'{file} has no word queries: leave --word-embeddings out')
    num_classes = options.pop('num_classes', len(options.get('word_embeddings', ())))
    shape = tresnet_shape(tensors)
    architecture = Architecture(model) if model else _architecture(shape, checkpoint.get('arch'))
    input_size = input_size or INPUT_SIZES.get((shape, num_classes))
    if input_size is None:
        raise ValueError(f'{file} does not show the size of its images: say --input-size')
    if not timm.is_model(architecture.model):
        raise ValueError(f'{architecture.model} is no model of timm: see timm.list_models()')
    names = names or class_names(checkpoint.get('idx_to_class'), num_classes)

    target = resolve_model_input_args(
        architecture.model,
        {'img_size': input_size},
        num_classes=num_classes,
        ml_decoder=options,
        **architecture.arguments,
    )
    network = timm.create_model(**target)
    network.load_state_dict(convert_state_dict(tensors, network))
    data_config = {'input_size': (3, input_size, input_size), **preprocessing}
    save_for_hf(network, folder, model_config={'label_names': names}, data_config=data_config, safe_serialization=True)

    print(f'layout        {find_head(tensors).layout}')
    print(f'architecture  {architecture.model}', *(f'{key}={value}' for key, value in architecture.arguments.items()))
    print(f'classes       {num_classes}, {_say_names(names, checkpoint)}')
    print(f'groups        {network.get_classifier().config.num_queries}')
    print('images        ' + ', '.join(f'{key} {value}' for key, value in data_config.items()))
    print(f"written       {folder}: timm.create_model('local-dir:{folder}', pretrained=True)")


def _word_embeddings(path: Path | None) -> tuple[Tensor, list[str] | None]:
    if path is None:
        raise ValueError('the file has word queries: give its classes, --word-embeddings FILE')
    return read_word_embeddings(path)


def tresnet_shape(tensors: Mapping[str, Tensor]) -> TResNetShape | None:
    """The shape of the TResNet that the tensors belong to, None if they are not of a TResNet with in-place ABN."""
    stem = tensors.get('body.conv1.0.weight')
    if stem is None:
        return None
    places = {tuple(map(int, place)) for place in re.findall(r'body\.layer(\d)\.(\d+)\.', '\n'.join(tensors))}
    stages = [stage for stage, _ in places]
    blocks = tuple(stages.count(stage) for stage in sorted(set(stages)))
    return TResNetShape(blocks, stem.shape[0], 'body.layer1.0.conv3.0.weight' in tensors)


def class_names(idx_to_class: Mapping | None, num_classes: int) -> list[str] | None:
    """The names of the outputs in their order, None if the file does not name each.

    Keys that are not 0 to C - 1 (the identifiers of a dataset) are taken in the file's order, as the reference's own
    demonstration does.
    """
    if not idx_to_class or len(idx_to_class) != num_classes:
        return None
    by_key = {str(key): str(name) for key, name in idx_to_class.items()}
    outputs = [str(output) for output in range(num_classes)]
    return [by_key[output] for output in outputs] if set(by_key) == set(outputs) else list(by_key.values())


def _architecture(shape: TResNetShape | None, named: str | None) -> Architecture:
    """The backbone that the tensors show, or that a training run of timm noted in its checkpoint."""
    if shape in TRESNETS:
        return TRESNETS[shape]
    if shape is not None:
        raise ValueError(f'no published TResNet is like the one in the file ({shape}): say --model')
    if named is None:
        raise ValueError('the file does not show its backbone: say --model')
    return Architecture(named)


def _say_names(names: Sequence[str] | None, checkpoint: Mapping[str, Any]) -> str:
    if names:
        return ', '.join([*names[:3], '...'] if len(names) > 3 else names)
    found = len(checkpoint.get('idx_to_class') or ())
    return f'names left out (the file has {found})' if found else 'without names'


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser('python -m timm_mldecoder.convert', description=__doc__, formatter_class=formatter)
    parser.add_argument('file', type=Path, help='checkpoint: .pth, .pth.tar, .ckpt or .safetensors')
    parser.add_argument('folder', type=Path, help='folder to write, new or empty')
    parser.add_argument('--model', help="timm's name of the backbone, where the file does not show it")
    parser.add_argument('--input-size', type=int, help='pixels a side, where the checkpoint is not a published one')
    parser.add_argument('--word-embeddings', type=Path, help='label embeddings, for a head of word queries')
    images = parser.add_argument_group('how images are prepared, by default as the published checkpoints expect them')
    images.add_argument('--crop-mode', default='squash', choices=['squash', 'center', 'border'], help='[%(default)s]')
    images.add_argument('--crop-pct', default=1.0, type=float, help='[%(default)s]')
    images.add_argument('--interpolation', default='bilinear', help='[%(default)s]')
    images.add_argument('--mean', default=(0.0, 0.0, 0.0), type=float, nargs=3, help='[%(default)s]')
    images.add_argument('--std', default=(1.0, 1.0, 1.0), type=float, nargs=3, help='[%(default)s]')
    return parser


if __name__ == '__main__':
    main()
