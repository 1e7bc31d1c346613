"""All options of train.py and of validate.py, their flags, and the groups that parts of a run take together."""

import copy
import os
from argparse import Namespace
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from timm_mldecoder.flags.augmentation import AugmentationOptions, RegularizationOptions
from timm_mldecoder.flags.data import (
    ClassesOptions,
    DatasetOptions,
    ImageOptions,
    LoadingOptions,
    NaflexOptions,
    SizeOptions,
)
from timm_mldecoder.flags.flag import Flag
from timm_mldecoder.flags.group import Group
from timm_mldecoder.flags.model import BatchNormOptions, DeviceOptions, EmaOptions, HeadOptions, ModelOptions
from timm_mldecoder.flags.optimization import DistillationOptions, LossOptions, OptimizerOptions, ScheduleOptions
from timm_mldecoder.flags.run import ResultOptions, RunOptions, TrackerOptions

# fmt: off
#: The groups in the order of `--help`.
GROUPS: tuple[type[Group], ...] = (
    DatasetOptions, ModelOptions, HeadOptions, ClassesOptions, ImageOptions, LoadingOptions, LossOptions,
    DistillationOptions, OptimizerOptions, ScheduleOptions, AugmentationOptions, RegularizationOptions, SizeOptions,
    NaflexOptions, BatchNormOptions, EmaOptions, DeviceOptions, RunOptions, TrackerOptions, ResultOptions,
)


# What one part of a run takes of several groups. Python needs the bases of all of these in one order.
class SplitOptions(DatasetOptions, ModelOptions, LoadingOptions, ClassesOptions, ImageOptions, RunOptions):
    """For the images and targets of a split."""


class EvalLoaderOptions(DatasetOptions, ModelOptions, LoadingOptions, NaflexOptions, DeviceOptions):
    """For batches to evaluate."""


class TrainLoaderOptions(EvalLoaderOptions, ScheduleOptions, AugmentationOptions, RegularizationOptions, SizeOptions,
                         BatchNormOptions, RunOptions):
    """For batches to train on."""


class CreateOptions(ModelOptions, HeadOptions, ClassesOptions, ImageOptions):
    """For a model."""


class CreateTrainOptions(CreateOptions, RegularizationOptions, BatchNormOptions):
    """For a model to train."""


class TaskOptions(DatasetOptions, ModelOptions, DeviceOptions, HeadOptions, ClassesOptions, ImageOptions, LossOptions,
                  DistillationOptions, AugmentationOptions, RegularizationOptions, SizeOptions):
    """For the loss of a training run, and its teacher."""


class UpdateOptions(LoadingOptions, OptimizerOptions, ScheduleOptions):
    """For the optimizer and its learning rate."""


class TrialOptions(UpdateOptions, LoadingOptions, ClassesOptions, OptimizerOptions, ScheduleOptions, RunOptions):
    """For the heads of a probe."""


class LayoutOptions(DeviceOptions, EmaOptions):
    """For the model on several ranks."""


class ResumeOptions(DatasetOptions, ModelOptions, LoadingOptions, OptimizerOptions, ScheduleOptions, RunOptions):
    """For the checkpoint that a run continues from."""


class LoopOptions(LoadingOptions, NaflexOptions, DeviceOptions, ImageOptions, OptimizerOptions, ScheduleOptions,
                  AugmentationOptions, SizeOptions, EmaOptions, RunOptions):
    """For the training loop."""


class ReportOptions(EvalLoaderOptions, ImageOptions, ResultOptions):
    """For the files of results."""


@dataclass(frozen=True)
class Options(SplitOptions, TrainLoaderOptions, CreateTrainOptions, TaskOptions, TrialOptions, LayoutOptions,
              ResumeOptions, LoopOptions, ReportOptions, TrackerOptions):
    """The effective options of a script, for the functions that build its parts; a part gets its groups of them.

    An option that the other script alone has a flag for keeps its default.
    """
    # fmt: on

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of the options that the script has a flag for, which the caller may change."""
        return {name: copy.deepcopy(self[name]) for name in flags(self.script)}

    def with_data_path(self) -> 'Options':
        """The options with the full path of the dataset, as checkpoints and `args.yaml` keep it."""
        return self.replace(data_dir=os.path.abspath(self.data_dir)) if self.data_dir else self

    def to_namespace(self) -> Namespace:
        """The options as checkpoints store them and as timm's helpers take them."""
        return Namespace(**self.to_dict())


@cache
def groups(script: str) -> dict[str, list[Flag]]:
    """The flags of a script, `train` or `validate`, by the titles of their groups."""
    found = {}
    for group in GROUPS:
        rows = [(entry, entry.metadata['flag']) for entry in fields(group) if 'flag' in entry.metadata]
        title = str(group.__doc__).partition('\n')[0].rstrip('.')
        found[title] = [row.of(entry, script) for entry, row in rows if script in row.scripts]
    return found


@cache
def flags(script: str) -> dict[str, Flag]:
    """The flags of a script by the name of their option."""
    return {row.dest: row for rows in groups(script).values() for row in rows}
