"""Score one model on one split, as validate.py does."""

import logging
from pathlib import Path
from typing import Any

import torch
from timm.layers import apply_test_time_pool
from timm.task import evaluation_sample_limit
from timm.utils import random_seed
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_mldecoder.checkpoint.read import RUN
from timm_mldecoder.checkpoint.state import held_out_before
from timm_mldecoder.data import class_to_index
from timm_mldecoder.data.class_files import read_categories
from timm_mldecoder.distributed.world import World
from timm_mldecoder.evaluation.evaluate import create_autocast, create_evaluator, evaluate, test_time_views, widen
from timm_mldecoder.evaluation.predicted import PredictedClasses
from timm_mldecoder.flags import Options, warn_no_effect
from timm_mldecoder.flags.options import CreateOptions, EvalLoaderOptions
from timm_mldecoder.loading.compare_classes import check_class_names, check_classes, use_classes_of
from timm_mldecoder.loading.create_loaders import DataConfig, create_eval_loader, model_dtype, resolve_config
from timm_mldecoder.loading.datasets import create_split
from timm_mldecoder.loading.loader import EvalLoader
from timm_mldecoder.loading.naflex import PatchFormat, patch_format
from timm_mldecoder.loading.ranks import check_ranks
from timm_mldecoder.metrics.multilabel import read_threshold_metric
from timm_mldecoder.modeling.classes import class_names_of, set_classes, thresholds_for
from timm_mldecoder.modeling.create import count_parameters, fuse_model, has_text_queries, script
from timm_mldecoder.modeling.load import LoadedModel, load_model
from timm_mldecoder.runtime.log import EvalLog
from timm_mldecoder.validate.outputs import MultiLabelOutputs, create_extra_metrics
from timm_mldecoder.validate.report import Report

_logger = logging.getLogger(__name__)

Result = dict[str, Any]


def score_model(options: Options, world: World) -> Result:
    """Score one model on a split; return its metrics in percent, unrounded, and how, under timm's names."""
    random_seed(options.seed, 0)
    loaded = load_model(options)
    model, content, options = loaded.model, loaded.content, loaded.options or options
    if options.write_thresholds and options.checkpoint and RUN not in content:
        raise ValueError(f'--write-thresholds needs a checkpoint of train.py; {options.checkpoint} is not one')
    read_threshold_metric(options.threshold_metric)
    warn_no_effect(options, 'validate')
    dataset = _open_split(options, loaded, world)
    names = class_names_of(dataset)
    num_classes = (not has_text_queries(options) and options.num_classes) or model.num_classes
    config = resolve_config(options, model, loaded.data_config, not options.use_train_size, options.naflex_loader)
    model, config = _test_pool(options, model, config)
    valid_labels = _read_valid_labels(options.valid_labels, dataset, num_classes, world.device)
    if valid_labels is None:
        check_classes(dataset, num_classes, given='num_classes' in options.given)
    if options.fuse_bn:
        fuse_model(model, config['input_size'])
    plain, patches = model, patch_format(options, model)
    model = _prepare(options, model, world)

    loader = _create_loader(options, dataset, config, patches, world)
    limit = evaluation_sample_limit(loader)
    tuned, operating_point = _thresholds(options, content, names)
    evaluator: Any = create_evaluator(options, dataset, tuned, device=world.device, max_samples=limit)
    extra = create_extra_metrics(options, dataset, limit, world)
    predicted = PredictedClasses(evaluator, names if valid_labels is None else None, limit, world)
    labels = names or [str(index) for index in range(num_classes)]
    multilabel = options.task == 'multilabel'
    outputs = [MultiLabelOutputs(options, evaluator, labels, world)] if multilabel else []
    categories = read_categories(Path(file), labels) if (file := options.threshold_categories) else None
    report = Report(options, dataset, names, evaluator, loader, limit, world) if options.report else None
    try:
        metrics = evaluate(
            model,
            loader,
            evaluator,
            world,
            autocast=create_autocast(options, world.device),
            log=EvalLog('Test', evaluator, len(loader), options.log_freq, world.primary),
            views=test_time_views(options.tta, config['input_size'][1:]),
            classes=valid_labels,
            measures=[measure.update for measure in (predicted, *extra, *([report] if report else []))],
        )
    finally:
        loader.close()
    for measure in extra:
        metrics.update(measure.compute())
    if options.write_thresholds:  # all that is written and shown is then at these
        _tune_thresholds(options, evaluator, labels, categories, world)
        metrics.update(evaluator.compute(world.distributed))
        operating_point = 'thresholds tuned on this split'
    named = {'operating_point': operating_point} if multilabel else {}
    for output in outputs:
        output.write(content)
    if report:
        report.write(plain, config, metrics | named)
    _log_result(metrics, operating_point if named else '', predicted, world)
    return _describe(options, metrics | named, model, config)


def _open_split(options: Options, loaded: LoadedModel, world: World) -> Any:
    """Open the split as the training run did, and give it the classes of the model, or the model those of the split."""
    dataset = create_split(
        options,
        options.split,
        num_samples=options.num_samples,
        load_bytes=options.tf_preprocessing,
        missing=options.missing_images,
        known=held_out_before(options, loaded.content),
    )
    own_names = options.class_map or options.valid_labels or has_text_queries(options)
    trained = [] if own_names else loaded.content.get('class_names') or []
    use_classes_of(dataset, trained)
    check_ranks(world, {options.split: dataset})
    set_classes(loaded.model, class_names_of(dataset), options.word_embeddings)
    check_class_names(dataset, trained)
    return dataset


def _create_loader(
    options: Options, dataset: Any, config: DataConfig, patches: PatchFormat | None, world: World
) -> EvalLoader:
    return create_eval_loader(
        options,
        dataset,
        widen(config, options.tta),
        world,
        batch_size=options.batch_size,
        bad_image=options.bad_image,
        remedy='--bad-image skip',
        crop_border_pixels=options.crop_border_pixels,
        patches=patches,
        tf_preprocessing=options.tf_preprocessing,
    )


def _thresholds(options: Options, content: dict[str, Any], names: list[str] | None) -> tuple[Tensor | None, str]:
    """Return the stored threshold of each class, None for that of the options; and how to report which."""
    tuned = thresholds_for(content, names) if 'multilabel_threshold' not in options.given else None
    if tuned is None:
        return None, f'threshold {options.multilabel_threshold:g}'
    _logger.info('Labels are predicted by the thresholds in the checkpoint; --multilabel-threshold overrides them')
    return tuned, 'stored thresholds'


def _log_result(metrics: dict[str, Any], operating_point: str, predicted: PredictedClasses, world: World) -> None:
    for line in predicted.lines():
        if world.primary:
            _logger.warning(line)
    if world.primary:
        shown = ' '.join(f'{EvalLog.NAMES.get(name, name)} {value:.3f}' for name, value in metrics.items())
        _logger.info(f' * {shown}' + (f' (at {operating_point})' if operating_point else ''))


def _tune_thresholds(
    options: Options, evaluator: Any, labels: list[str], categories: Tensor | None, world: World
) -> None:
    """Give the evaluator the best thresholds; warn of classes that reach the precision that is requested at none."""
    metric = options.threshold_metric
    evaluator.use_thresholds(evaluator.tune_thresholds(world.distributed, metric, categories))
    least = read_threshold_metric(metric)
    if least is None or categories is not None:  # whose classes are counted together
        return
    right, predicted, positive = evaluator.class_counts(distributed=world.distributed).double()
    short = (positive > 0) & (right / predicted.clamp(min=1) < least)
    if short.any() and world.primary:
        names = [name for name, missed in zip(labels, short.tolist(), strict=True) if missed]
        _logger.warning(f'no threshold reaches {metric} for {", ".join(names[:10])}: their highest precision was taken')


def _test_pool(options: CreateOptions, model: nn.Module, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    if options.reparam:
        model = reparameterize_model(model)
    if not options.test_pool:
        return model, config
    if options.use_ml_decoder_head or options.cosine_classifier:
        raise ValueError('--test-pool needs a linear classifier, not an ML-Decoder head or a cosine classifier')
    model, pooled = apply_test_time_pool(model, config)
    return model, {**config, 'crop_pct': 1.0} if pooled else config


def _prepare(options: EvalLoaderOptions, model: Any, world: World) -> Any:
    """Put the model on its device, and compile it if requested."""
    model = model.to(device=world.device, dtype=model_dtype(options))
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if options.torchscript:
        model = script(model)
    elif options.torchcompile:
        model = torch.compile(model, backend=options.torchcompile, mode=options.torchcompile_mode)
    elif options.aot_autograd:
        model = torch.compile(model, backend='aot_eager')
    if options.num_gpu > 1:
        model = nn.DataParallel(model, device_ids=list(range(options.num_gpu)))
    return model


def _read_valid_labels(path: str, dataset: Dataset, num_classes: int, device: torch.device) -> Tensor | None:
    if not path:
        return None
    try:
        labels = [int(line) for line in Path(path).read_text().split()]
    except (OSError, ValueError) as error:
        raise ValueError(f'--valid-labels {path}: {error}; expected one class index per line') from error
    odd = [label for label in labels if not 0 <= label < num_classes]
    if odd:
        raise ValueError(f'--valid-labels {path}: {odd[0]} is not one of the {num_classes} classes of the model')
    present = class_to_index(dataset) or ()
    if not labels or len(labels) < len(present):
        raise ValueError(f'--valid-labels {path} has {len(labels)} classes, the data {len(present) or "more"}')
    return torch.tensor(labels, device=device)


def _describe(options: EvalLoaderOptions, metrics: dict[str, Any], model: nn.Module, config: dict[str, Any]) -> Result:
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
        'param_count': round(count_parameters(model) / 1e6, 2),
        'img_size': config['input_size'][-1],
        'crop_pct': config['crop_pct'],
        'interpolation': config['interpolation'],
        **({'seq_len': options.naflex_max_seq_len} if options.naflex_loader else {}),
    }
