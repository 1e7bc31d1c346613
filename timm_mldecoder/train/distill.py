"""Knowledge distillation: the teacher, and timm's task of student and teacher."""

import logging
from typing import Any

import torch
from timm.task import (
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_mldecoder.checkpoint.read import RUN, read_checkpoint
from timm_mldecoder.flags import unchecked_options
from timm_mldecoder.flags.data import SizeOptions
from timm_mldecoder.flags.optimization import DistillationOptions
from timm_mldecoder.flags.options import TaskOptions
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.loading.compare_classes import check_class_names
from timm_mldecoder.loading.create_loaders import DataConfig
from timm_mldecoder.modeling.create import count_parameters
from timm_mldecoder.modeling.load import LoadedModel, load_model, per_channel
from timm_mldecoder.runtime.errors import one_line

_logger = logging.getLogger(__name__)

#: timm's task of each `--kd-distill-type`, and the options that it has besides those of all.
TASKS: dict[str, tuple[Any, dict[str, str]]] = {
    'logit': (LogitDistillationTask, dict(loss_type='kd_loss_type', temperature='kd_temperature')),
    'feature': (FeatureDistillationTask, {}),
    'token': (TokenDistillationTask, dict(distill_type='kd_token_distill_type', temperature='kd_temperature')),
}


class Teacher(DistillationTeacher):
    """timm's teacher without gradients, for images that are normalized for the student.

    timm's own takes both normalizations from the models, whatever `--mean` and `--std` are, and waits for the device in
    each step to compare them.
    """

    def __init__(self, model: nn.Module, own: DataConfig, images: DataConfig) -> None:
        super().__init__(model)
        self.requires_grad_(False)
        channels = images['input_size'][0]
        mean, std, image_mean, image_std = (
            torch.tensor(per_channel(config[name], channels), dtype=torch.float64).view(1, -1, 1, 1)
            for config in (own, images)
            for name in ('mean', 'std')
        )
        like = next(model.parameters())
        self.same = torch.equal(mean, image_mean) and torch.equal(std, image_std)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer('scale', (image_std / std).to(like), persistent=False)
        self.register_buffer('shift', ((image_mean - mean) / std).to(like), persistent=False)

    def normalize_input(
        self, input: Tensor, student_mean: Tensor | None = None, student_std: Tensor | None = None
    ) -> Tensor:
        """Return images [B, C, H, W] normalized for the teacher."""
        return input if self.same else input * self.scale + self.shift


class HeadTokenTask(FeatureDistillationTask):
    """Token distillation of a student with an ML-Decoder head, which has no second classifier.

    A linear classifier on the mean image token is added for training. It has the place of the projection in feature
    distillation: it is loaded with the student, and kept out of its weights.

    Args:
        distill_type: 'soft' or 'hard', see `TokenDistillationTask`.
        temperature: Temperature of 'soft'.
        student_feature_dim: Width F of the mean image token.
        **settings: Arguments of `FeatureDistillationTask`.
    """

    def __init__(self, *, distill_type: str, temperature: float, student_feature_dim: int, **settings: Any) -> None:
        classes = settings['student_model'].num_classes
        super().__init__(student_feature_dim=student_feature_dim, teacher_feature_dim=classes, **settings)
        module = self.trainable_module
        if module.projection is None:  # as many classes as features
            module.projection = nn.Linear(classes, classes, device=self.device, dtype=self.dtype)
        self.distill_type = distill_type
        self.temperature = temperature

    forward = TokenDistillationTask.forward


def create_distillation_task(
    options: TaskOptions, student: Any, dataset: Dataset, images: DataConfig, **settings: Any
) -> TrainingTask:
    """Create timm's task of a student, which is on its device, and its teacher.

    Raises:
        ValueError: If the teacher does not load, or student, teacher and images do not fit each other.
    """
    teacher = _create_teacher(options, student, dataset, images)
    task, names = TASKS[options.kd_distill_type]
    settings |= {argument: getattr(options, name) for argument, name in names.items()}
    image = _image_sizes(options, images, next(student.parameters()))[0]
    if task is TokenDistillationTask and isinstance(student.get_classifier(), MLDecoder):
        task = HeadTokenTask
        settings['student_feature_dim'] = _feature_width(options, 'student', student, image)
    if task is FeatureDistillationTask:
        for who, model in (('student', student), ('teacher', teacher.model)):
            settings[f'{who}_feature_dim'] = _feature_width(options, who, model, image)
    try:
        return task(
            student_model=student,
            teacher_model=teacher,
            distill_loss_weight=options.distill_loss_weight,
            task_loss_weight=options.task_loss_weight,
            **settings,
        )
    except ValueError as error:  # a model without the second classifier of token distillation
        raise ValueError(f'--kd-distill-type {options.kd_distill_type}: {error}') from error


def _create_teacher(options: TaskOptions, student: Any, dataset: Dataset, images: DataConfig) -> Teacher:
    """Load the teacher, in the precision of the run, and check that it fits."""
    source = options.kd_checkpoint or options.kd_model_name or ''
    like = next(student.parameters())
    try:
        loaded = _load(options, student)
        model = loaded.model.eval().to(device=like.device, dtype=like.dtype)
        if options.channels_last:
            model.to(memory_format=torch.channels_last)
        for batch in _image_sizes(options, images, like):
            _check_logits(options, model, student.num_classes, batch)
        # models of a hub may name their classes otherwise than folders do
        named = options.kd_checkpoint or source.startswith('local-dir:')
        if named and options.kd_distill_type != 'feature':
            check_class_names(dataset, loaded.known_names)
    except ValueError as error:
        reason = str(error).removeprefix(f'--model {source}: ').removeprefix(f'--checkpoint {source}: ')
        flag = '--kd-checkpoint' if options.kd_checkpoint else '--kd-model-name'
        raise ValueError(f'{flag} {source}: {reason}') from error
    own = {name: loaded.data_config.get(name, model.pretrained_cfg[name]) for name in ('mean', 'std')}
    _logger.info(f'Teacher {source} created, param count:{count_parameters(model)}')
    return Teacher(model, own, images)


def _load(options: TaskOptions, student: nn.Module) -> LoadedModel:
    """Load the teacher that the options name; a ValueError if it was loaded for another task."""
    settings: dict[str, Any] = dict(device=options.device, in_chans=options.channels)
    if options.kd_model_name:
        settings['model'] = options.kd_model_name
    if options.kd_checkpoint:
        settings['checkpoint'] = options.kd_checkpoint
        if RUN not in read_checkpoint(options.kd_checkpoint):
            if not options.kd_model_name:
                raise ValueError('the file holds weights only: add --kd-model-name, their model')
            settings['num_classes'] = student.num_classes
    loaded = load_model(unchecked_options('validate', **settings))
    if loaded.task != options.task:
        raise ValueError(f'the teacher was trained for --task {loaded.task}, this run is for {options.task}')
    return loaded


def _image_sizes(options: SizeOptions, images: DataConfig, like: Tensor) -> list[Tensor]:
    """Return a black image [1, C, H, W] of each size that the student is loaded with."""
    channels, *size = images['input_size']
    sizes = [(side, side) for side in options.train_img_sizes or ()] or [size]
    return [torch.zeros(1, channels, *size, device=like.device, dtype=like.dtype) for size in sizes]


@torch.no_grad()
def _check_logits(options: DistillationOptions, teacher: nn.Module, num_classes: int, images: Tensor) -> None:
    """Raise ValueError if a teacher does not take the images, or does not have the classes of the student."""
    try:
        logits = teacher(images)
    except (RuntimeError, AssertionError) as error:
        size = ' x '.join(map(str, images.shape[1:]))
        raise ValueError(f'the teacher does not take images of {size}: {one_line(error, 200)}') from error
    if logits.shape[1:] != (num_classes,) and options.kd_distill_type != 'feature':
        raise ValueError(f'the teacher has {logits.shape[1]} classes, the student {num_classes}')


@torch.no_grad()
def _feature_width(options: DistillationOptions, who: str, model: Any, images: Tensor) -> int:
    """Return the width of the pooled features of student or teacher; a ValueError if the options give another one."""
    training = model.training
    features = model.eval().forward_head(model.forward_features(images), pre_logits=True)
    model.train(training)
    if features.dim() != 2:
        raise ValueError(f'--kd-distill-type feature: the {who} has no pooled features, but {list(features.shape)}')
    width = features.shape[1]
    given = options.kd_student_feature_dim if who == 'student' else options.kd_teacher_feature_dim
    if given not in (None, width):
        raise ValueError(f'--kd-{who}-feature-dim {given}: the {who} has {width} features')
    return width
