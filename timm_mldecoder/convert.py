"""Turn a checkpoint into a folder that timm, transformers and the Hugging Face hub load.

    python -m timm_mldecoder.convert output/train/RUN/model_best.pth.tar folder      a checkpoint of train.py
    python -m timm_mldecoder.convert tresnet_l_COCO__448_90_0.pth coco_l             a published one
    python -m timm_mldecoder.convert output/train/RUN/last.pth.tar single.pth.tar    a sharded one, as one file
    python -c "import timm; timm.create_model('local-dir:coco_l', pretrained=True)"

A checkpoint of train.py brings everything along: head, classes, preprocessing, task and thresholds. Of the published
ones the TResNets are recognized; for another backbone say which timm model it is (`--model`) and at which size it was
trained (`--input-size`). docs/checkpoints.md has the details.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import resolve_model_input_args
from torch import Tensor

from timm_mldecoder.checkpoint.files import BEST, LAST, SUFFIX
from timm_mldecoder.checkpoint.folders import PROBLEM_TYPES, save_folder
from timm_mldecoder.checkpoint.published import convert_state_dict, find_head, head_options, lacks_head_norm
from timm_mldecoder.checkpoint.read import RUN, has_ema, ranked_by_ema, read_checkpoint, weights_of
from timm_mldecoder.checkpoint.repairs import CHOICES
from timm_mldecoder.data.class_files import read_class_names, read_thresholds
from timm_mldecoder.data.word_embeddings import read_word_embeddings
from timm_mldecoder.export.card import run_facts
from timm_mldecoder.flags.flag import Pairs
from timm_mldecoder.modeling.load import load
from timm_mldecoder.runtime.errors import CommandParser, run_command
from timm_mldecoder.runtime.files import write_atomically


class Architecture(NamedTuple):
    """A timm model: its name, and the arguments that the checkpoint was trained with."""

    model: str
    arguments: Mapping[str, Any] = {}


class TResNetShape(NamedTuple):
    """What distinguishes one TResNet from another."""

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


# What timm records of its own weights, which these are not.
NOT_OF_TIMM = dict(tag='', url='', hf_hub_id=None, source='', origin_url='', license='', paper_ids=None, paper_name='')

# How the published checkpoints expect images, under the names of timm's data configuration.
PUBLISHED = dict(crop_mode='squash', crop_pct=1.0, interpolation='bilinear', mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def main(argv: Sequence[str] | None = None) -> None:
    """Convert the checkpoint that the command line names."""
    arguments = vars(_parse(argv))
    folder = arguments['file']
    arguments['file'] = next((folder / name for name in (BEST, LAST) if (folder / name).is_file()), folder)
    content = read_checkpoint(arguments['file'])
    if arguments['folder'].name.endswith(SUFFIX):
        if arguments['folder'].exists():
            raise ValueError(f'{arguments["folder"]} exists: choose another name')
        write_atomically(arguments['folder'], partial(torch.save, content))
        print(f'written       {arguments["folder"]}')
        return
    convert = convert_run if RUN in content else convert_published
    print('\n'.join(convert(content, **arguments)))


def convert_run(content: Mapping[str, Any], file: Path, folder: Path, use_ema: bool | None, **others: Any) -> list[str]:
    """Write a checkpoint of train.py as a folder that scores what validate.py scores on it; return lines about it.

    The other flags are for published checkpoints, and must not be given.

    Raises:
        ValueError: If a flag is given that the checkpoint already decides.
    """
    given = [f'--{name.replace("_", "-")}' for name, value in others.items() if value is not None]
    if given:
        raise ValueError(f'{", ".join(given)}: {file} is a checkpoint of train.py, which says this itself')
    loaded = load(file, use_ema=use_ema, content=dict(content))
    loaded.model.pretrained_cfg = {**loaded.model.pretrained_cfg, **NOT_OF_TIMM}
    save_folder(
        loaded.model,
        folder,
        class_names=loaded.known_names,
        data_config=loaded.data_config,
        task=loaded.task,
        thresholds=content.get('thresholds'),
        facts=run_facts(content, use_ema),
    )
    return [
        f'architecture  {content["arch"]}',
        f'classes       {loaded.model.num_classes}, {_describe_names(loaded.known_names, content)}',
        *_describe_output(loaded.task, loaded.data_config, folder),
    ]


def convert_published(
    content: Mapping[str, Any],
    file: Path,
    folder: Path,
    model: str | None,
    input_size: int | None,
    word_embeddings: Path | None,
    use_ema: bool | None,
    head: str | None = None,
    self_attention: str | None = None,
    ignore: Sequence[str] | None = None,
    ml_decoder_kwargs: Mapping[str, Any] | None = None,
    class_names: Path | None = None,
    task: str | None = None,
    thresholds: Path | None = None,
    **preprocessing: Any,
) -> list[str]:
    """Write a checkpoint in one of the layouts of `published` as a folder; return lines that describe it.

    A head with text queries is published without label embeddings. `ml_decoder_kwargs` are options of the head that no
    tensor shows. `preprocessing` has the names of timm's data configuration; the flags are those of the command line.

    Raises:
        ValueError: If the file is not what `convert_state_dict` reads, or a required flag is missing.
    """
    tensors = weights_of(content, use_ema)
    given = dict(ml_decoder_kwargs or {})
    shown: dict[str, Any] = dict(head=head, self_attention=self_attention, num_heads=given.get('num_heads'))
    options = head_options(tensors, **shown) | given
    options |= _label_embeddings(options.get('word_embeddings'), file, word_embeddings)
    num_classes = options.pop('num_classes', len(options.get('word_embeddings', ())))
    shape = tresnet_shape(tensors)
    architecture = _architecture(model, shape, content.get('arch'))
    input_size = input_size or (shape and INPUT_SIZES.get((shape, num_classes)))
    if input_size is None:
        raise ValueError(f'cannot infer the image size of {file}: pass --input-size')
    names = read_class_names(class_names, num_classes) if class_names else options.get('class_names')
    names = names or names_of_file(content.get('idx_to_class'), num_classes)
    network = _build(architecture, num_classes, input_size, options)
    if 'head_norm' not in options and lacks_head_norm(tensors, network, head=head, ignore=ignore or ()):
        network = _build(architecture, num_classes, input_size, options | {'head_norm': False})
    network.load_state_dict(convert_state_dict(tensors, network, ignore=ignore or (), **shown))
    data_config = {'input_size': (3, input_size, input_size), **PUBLISHED}
    data_config |= {name: value for name, value in preprocessing.items() if value is not None}
    # the published single-label checkpoint is that of Stanford-Cars
    task = task or ('classification' if (shape, num_classes) == (L, 196) else 'multilabel')
    tuned = read_thresholds(thresholds, names, task) if thresholds else None
    network.pretrained_cfg = {**network.pretrained_cfg, **NOT_OF_TIMM}
    facts = {'Source': f'Converted from {file.name}: its weights, not those of timm.'}
    save_folder(network, folder, class_names=names, data_config=data_config, task=task, thresholds=tuned, facts=facts)
    more = (f'{key}={value}' for key, value in architecture.arguments.items())
    return [
        f'layout        {find_head(tensors, head).layout}',
        f'weights       {_describe_weights(content, use_ema)}',
        ' '.join([f'architecture  {architecture.model}', *more]),
        f'classes       {num_classes}, {_describe_names(names, content)}',
        f'groups        {network.get_classifier().config.num_queries}',
        *_describe_output(task, data_config, folder),
    ]


def _label_embeddings(own: Tensor | int | None, file: Path, words: Path | None) -> dict[str, Any]:
    """Return the options of the label embeddings, which a head with text queries has itself or is published without."""
    if isinstance(own, int):
        if words is None:
            raise ValueError('the file has text queries: pass its classes, --word-embeddings FILE')
        return dict(zip(('word_embeddings', 'class_names'), read_word_embeddings(words), strict=True))
    if words is not None:
        found = 'no text queries' if own is None else 'the label embeddings of its classes'
        raise ValueError(f'{file} has {found}: leave --word-embeddings out')
    return {}


def _build(architecture: Architecture, num_classes: int, input_size: int, head: dict[str, Any]) -> Any:
    arguments = dict(num_classes=num_classes, ml_decoder=head, **architecture.arguments)
    return timm.create_model(**resolve_model_input_args(architecture.model, {'img_size': input_size}, **arguments))


def tresnet_shape(tensors: Mapping[str, Tensor]) -> TResNetShape | None:
    """Return the shape of the TResNet of the tensors, None if they are not of a TResNet with in-place ABN."""
    stem = tensors.get('body.conv1.0.weight')
    if stem is None:
        return None
    places = {tuple(map(int, place)) for place in re.findall(r'body\.layer(\d)\.(\d+)\.', '\n'.join(tensors))}
    stages = [stage for stage, _ in places]
    blocks = tuple(stages.count(stage) for stage in sorted(set(stages)))
    return TResNetShape(blocks, stem.shape[0], 'body.layer1.0.conv3.0.weight' in tensors)


def names_of_file(idx_to_class: Mapping | None, num_classes: int) -> list[str] | None:
    """Return the names of the outputs in order, None if the file does not name each.

    Keys other than 0 to C - 1 (identifiers of a dataset) are taken in the file's order, as in the reference's
    demonstration.
    """
    if not idx_to_class or len(idx_to_class) != num_classes:
        return None
    by_key = {str(key): str(name) for key, name in idx_to_class.items()}
    outputs = [str(output) for output in range(num_classes)]
    return [by_key[output] for output in outputs] if set(by_key) == set(outputs) else list(by_key.values())


def _architecture(model: str | None, shape: TResNetShape | None, named: str | None) -> Architecture:
    """Return the backbone of `--model`, or that the tensors show, or that a training run of timm recorded."""
    if not model and shape in TRESNETS:
        return TRESNETS[shape]
    if not model and shape is not None:
        raise ValueError(f'the TResNet in the file ({shape}) is not a published one: pass --model')
    name = model or named
    if name is None:
        raise ValueError('cannot infer the backbone: pass --model')
    if not timm.is_model(name):
        raise ValueError(f'--model {name} is not a model of timm: see timm.list_models()')
    return Architecture(name)


def _describe_weights(content: Mapping[str, Any], use_ema: bool | None) -> str:
    if not has_ema(content):
        return 'the only ones'
    ema = ranked_by_ema(content) if use_ema is None else use_ema
    return f'{"EMA" if ema else "raw"}; --{"no-" if ema else ""}use-ema takes the others'


def _describe_names(names: Sequence[str] | None, checkpoint: Mapping[str, Any]) -> str:
    if names:
        return ', '.join([*names[:3], '...'] if len(names) > 3 else names)
    found = len(checkpoint.get('idx_to_class') or ())
    return f'names left out (the file has {found})' if found else 'without names'


def _describe_output(task: str, data_config: Mapping[str, Any], folder: Path) -> list[str]:
    return [
        f'task          {task}',
        'images        ' + ', '.join(f'{key} {value}' for key, value in data_config.items()),
        f"written       {folder}: timm.create_model('local-dir:{folder}', pretrained=True)",
    ]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser('python -m timm_mldecoder.convert', __doc__)
    add = parser.add_argument
    add('file', type=Path, help='checkpoint: .pth, .pth.tar, .ckpt or .safetensors; or the folder of a run')
    add('folder', type=Path, help='folder to write, new or empty; or NAME.pth.tar, for a copy in one file')
    add('--use-ema', action=argparse.BooleanOptionalAction, help='EMA weights (default: those it was ranked by)')
    add = parser.add_argument_group('checkpoints of other programs').add_argument
    add('--class-names', type=Path, metavar='FILE', help='names of the outputs: one per line, or a JSON list or object')
    add('--task', choices=list(PROBLEM_TYPES), help='(default: multilabel, but for the published Stanford-Cars)')
    add('--thresholds', type=Path, metavar='FILE', help='probability per class: CSV rows name,threshold, or JSON')
    add('--model', help="timm's name of the backbone, where the file does not show it")
    add('--input-size', type=int, help='image size in pixels, where the checkpoint is not a published one')
    add('--word-embeddings', type=Path, help='label embeddings, for a head with text queries')
    add('--head', metavar='NAME', help='the head, in a file with several')
    add('--self-attention', choices=CHOICES, help="what weights of self-attention are for: torch's own decoder layer "
        '(use), nothing (ignore), or self-attention by the weights of the cross-attention (reuse)')  # fmt: skip
    add('--ignore', nargs='+', metavar='NAME', help='beginnings of names of tensors that the logits do not depend on')
    add('--ml-decoder-kwargs', action=Pairs, metavar='KEY=VALUE', help='options of the head that no tensor shows, '
        'such as num_heads=6 prefix_tokens=True position=sin2d memory_activation=leaky_relu')  # fmt: skip
    for name, default in PUBLISHED.items():
        more: dict[str, Any] = dict(nargs=3) if isinstance(default, tuple) else {}
        more |= dict(choices=['squash', 'center', 'border']) if name == 'crop_mode' else {}
        kind = str if isinstance(default, str) else float
        flag = f'--{name.replace("_", "-")}'
        add(flag, type=kind, help=f'of images (default: {default})', **more)
    return parser.parse_args(argv)


if __name__ == '__main__':
    sys.exit(run_command(main))
