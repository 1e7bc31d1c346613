"""Scoring one model on one split."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import apply_test_time_pool, set_fast_norm
from timm.models import clean_state_dict
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from timm.utils import random_seed
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_mldecoder.checkpoints.published import convert_state_dict, read_checkpoint
from timm_mldecoder.engine.checkpoint.state import RUN
from timm_mldecoder.engine.eval.evaluate import evaluate
from timm_mldecoder.engine.eval.extra_metrics import create_measures
from timm_mldecoder.engine.eval.outputs import MultiLabelReport
from timm_mldecoder.engine.flags import tell_without_effect
from timm_mldecoder.engine.input import images as bad_images
from timm_mldecoder.engine.input import loaders, zero_shot
from timm_mldecoder.engine.input.batches import Placement
from timm_mldecoder.engine.input.dataset_checks import check_class_names, check_classes, class_to_index
from timm_mldecoder.engine.runtime.distributed import World
from timm_mldecoder.engine.runtime.report import EvalReport, ProgressBar
from timm_mldecoder.engine.train import build, multilabel
from timm_mldecoder.models.cosine import add_cosine_classifier

_logger = logging.getLogger(__name__)

Result = dict[str, Any]
#: Options that a checkpoint of train.py brings along, where the user does not set them.
_INHERITED = (
    'model',
    'num_classes',
    'in_chans',
    'gp',
    'use_ml_decoder_head',
    'num_of_groups',
    'decoder_embedding',
    'ml_decoder_kwargs',
    'model_kwargs',
    'task',
    'target_format',
    'multilabel_threshold',
    'channels_last',
    'cosine_classifier',
    'word_embeddings',
    'class_split',
    'input_img_mode',
)
_INHERITED_PRECISION = ('amp', 'amp_dtype', 'model_dtype')
_SHOWN = {'top1': 'Acc@1', 'top5': 'Acc@5'}


def score_model(options: Namespace, explicit: dict[str, Any], world: World) -> Result:
    """Score one model on a split.

    Returns:
        The metrics of the split in percent, unrounded, and how it was evaluated, under the names that timm prints.
    """
    random_seed(options.seed, 0)
    weights, config = take_checkpoint(options, explicit) if options.checkpoint else (None, {})
    tell_without_effect(options, explicit)
    model = create_model(options, weights, world)
    config = loaders.data_config(options, model, world, stored=config, use_test_size=not options.use_train_size)
    dataset = loaders.create_split(options, options.split, config)
    zero_shot.set_classes(options, model, dataset)
    explicit_indices = options.class_map or options.valid_labels or zero_shot.has_words(options)
    if weights is not None and RUN in weights and not explicit_indices:
        check_class_names(dataset, weights.get('class_names'))
    model, pooled = _test_pool(options, model, config)
    if pooled:
        config['crop_pct'] = 1.0
    model = _prepare(options, model, world)

    placement = Placement(
        world.device, build.model_dtype(options), options.channels_last, prefetched=not options.no_prefetcher
    )
    valid_labels = _read_valid_labels(options, dataset, world.device)
    if valid_labels is None:
        check_classes(dataset, options.num_classes, asked_for='num_classes' in explicit)
    loader = loaders.create_eval_loader(
        options,
        dataset,
        config,
        placement,
        world,
        options.batch_size,
        crop_mode=config['crop_mode'],
        crop_border_pixels=options.crop_border_pixels,
    )

    limit = evaluation_sample_limit(loader.loader)
    evaluator = _create_evaluator(options, dataset, device=world.device, max_samples=limit)
    extra = create_measures(options, dataset, limit)
    report = MultiLabelReport(options, evaluator, dataset, limit, world)
    tell = EvalReport('Test', evaluator, len(loader), options.log_freq, ProgressBar(world.primary), world.primary)

    def on_batch(index: int, output: Tensor, target: Tensor) -> None:
        for measure in (*extra, report):
            measure.update(output, target)
        tell(index, output, target)

    metrics = evaluate(
        model,
        loader,
        evaluator,
        autocast=build.create_autocast(options, world.device),
        distributed=world.distributed,
        classes=valid_labels,
        on_batch=on_batch,
    )
    for measure in extra:
        metrics.update(measure.compute())
    left_out = bad_images.gather(loader.bad_images)
    if left_out:
        metrics['bad_images'] = len(left_out)
    report.write(weights)
    if world.primary:
        _logger.info(' * ' + ' '.join(f'{_SHOWN.get(name, name)} {value:.3f}' for name, value in metrics.items()))
    return _describe(options, metrics, model, config)


def take_checkpoint(options: Namespace, explicit: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load the checkpoint; take over how train.py built and evaluated the model, but for what the user set.

    Returns:
        What the file holds, and the data configuration it brings along.
    """
    content = read_checkpoint(options.checkpoint)
    if RUN not in content:
        if options.write_thresholds:
            raise ValueError(f'--write-thresholds writes into a checkpoint of train.py; {options.checkpoint} is none')
        return content, {}
    trained = vars(content['args'])
    names = _INHERITED if 'model_dtype' in explicit or 'amp' in explicit else _INHERITED + _INHERITED_PRECISION
    taken = {
        name: trained[name]
        for name in names
        if name not in explicit and name in trained and trained[name] != getattr(options, name)
    }
    vars(options).update(taken)
    last = content[RUN]['rows'][-1] if content[RUN]['rows'] else {}
    if last.get('eval_ema'):
        taken['use_ema'] = options.use_ema = True
    asked = {'input_size' if name == 'img_size' else name for name in explicit}
    config = {name: value for name, value in content[RUN]['data_config'].items() if name not in asked}
    shown = ', '.join(f'{name} {value}' for name, value in {**taken, **config}.items())
    _logger.info(f'Evaluated as trained, but for flags that say otherwise: {shown}')
    if 'thresholds' in content and 'multilabel_threshold' not in explicit:
        options.multilabel_threshold = content['thresholds']
        _logger.info('Labels are predicted by the thresholds in the checkpoint; --multilabel-threshold overrules them.')
    if 'state_dict_ema' in content and not options.use_ema and 'eval_ema' not in last:
        _logger.info('The checkpoint has averaged weights too, which training ranks it by: --use-ema evaluates them.')
    return content, config


def create_model(options: Namespace, content: dict[str, Any] | None, world: World) -> nn.Module:
    if options.fast_norm:
        set_fast_norm()
    words = zero_shot.stored_head(options, _weights(content, options) if content else {})
    with build.refusing(options):
        model = timm.create_model(
            options.model,
            pretrained=content is None,  # a checkpoint replaces whatever those hold
            num_classes=options.num_classes,
            in_chans=build.image_channels(options),
            global_pool=None if options.use_ml_decoder_head else options.gp,
            **build.head_options(options, words),
            **options.model_kwargs,
        )
        if options.cosine_classifier:
            add_cosine_classifier(model, options.cosine_classifier)
    options.num_classes = options.num_classes or model.num_classes
    if content is not None:
        _load_weights(model, content, options)
    if options.reparam:
        model = reparameterize_model(model)
    if world.primary:
        _logger.info(f'Model {options.model} created, param count: {_count(model)}')
    return model


def _load_weights(model: nn.Module, content: dict[str, Any], options: Namespace) -> None:
    weights = _weights(content, options)
    if options.use_ml_decoder_head and RUN not in content:
        weights = convert_state_dict(weights, model)
    try:
        model.load_state_dict(clean_state_dict(weights))
    except RuntimeError as error:  # torch names every key that does not fit
        reason = ' '.join(str(error).split())[:300]
        raise ValueError(f'--checkpoint {options.checkpoint} holds another model: {reason}') from error


def _weights(content: dict[str, Any], options: Namespace) -> dict[str, Any]:
    if options.use_ema and 'state_dict_ema' not in content:
        raise ValueError(f'--use-ema: {options.checkpoint} holds no averaged weights; leave the flag out')
    return content['state_dict_ema'] if options.use_ema else content.get('state_dict', content.get('model', content))


def _test_pool(options: Namespace, model: nn.Module, config: dict[str, Any]) -> tuple[nn.Module, bool]:
    if not options.test_pool:
        return model, False
    if options.use_ml_decoder_head or options.cosine_classifier:
        raise ValueError('--test-pool takes a linear classifier, not an ML-Decoder head or a cosine classifier')
    return apply_test_time_pool(model, config)


def _prepare(options: Namespace, model: nn.Module, world: World) -> nn.Module:
    """Put the model onto its device, and compile it where that is asked for."""
    model = model.to(device=world.device, dtype=build.model_dtype(options))
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if options.torchcompile:
        model = torch.compile(model, backend=options.torchcompile, mode=options.torchcompile_mode)
    elif options.aot_autograd:
        model = torch.compile(model, backend='aot_eager')
    if options.num_gpu > 1:
        model = nn.DataParallel(model, device_ids=list(range(options.num_gpu)))
    return model


def _create_evaluator(options: Namespace, dataset: Dataset, **settings: Any) -> ClassificationEvaluator:
    if options.task == 'classification':
        return ClassificationEvaluator(**settings)
    num_seen = getattr(dataset, 'num_seen', None)
    return multilabel.create_evaluator(num_seen, threshold=options.multilabel_threshold, **settings)


def _read_valid_labels(options: Namespace, dataset: Dataset, device: torch.device) -> Tensor | None:
    path = options.valid_labels
    if not path:
        return None
    try:
        labels = [int(line) for line in Path(path).read_text().split()]
    except (OSError, ValueError) as error:
        raise ValueError(f'--valid-labels {path}: {error}; one class index a line is expected') from error
    odd = [label for label in labels if not 0 <= label < options.num_classes]
    if odd:
        raise ValueError(f'--valid-labels {path}: {odd[0]} is none of the {options.num_classes} classes of the model')
    present = class_to_index(dataset) or ()
    if not labels or len(labels) < len(present):
        raise ValueError(f'--valid-labels {path} has {len(labels)} classes, the data {len(present) or "more"}')
    return torch.tensor(labels, device=device)


def _describe(options: Namespace, metrics: dict[str, float], model: nn.Module, config: dict[str, Any]) -> Result:
    result: Result = {'model': options.model}
    if options.checkpoint:
        result['checkpoint'] = options.checkpoint
    for name, value in metrics.items():
        if name == 'loss':
            continue
        result[name] = value
        if name in ('top1', 'top5'):
            result[f'{name}_err'] = 100 - value
    return {
        **result,
        'param_count': round(_count(model) / 1e6, 2),
        'img_size': config['input_size'][-1],
        'crop_pct': config['crop_pct'],
        'interpolation': config['interpolation'],
    }


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
