"""All options of train.py and of validate.py, and their flags."""

import copy
import os
from argparse import Namespace
from dataclasses import dataclass, field, fields
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
from timm_mldecoder.flags.model import BatchNormOptions, DeviceOptions, EmaOptions, HeadOptions, ModelOptions
from timm_mldecoder.flags.optimization import DistillationOptions, LossOptions, OptimizerOptions, ScheduleOptions
from timm_mldecoder.flags.run import ResultOptions, RunOptions, TrackerOptions


@dataclass(frozen=True)
class Options(
    DatasetOptions,
    ModelOptions,
    HeadOptions,
    ClassesOptions,
    ImageOptions,
    LoadingOptions,
    LossOptions,
    DistillationOptions,
    OptimizerOptions,
    ScheduleOptions,
    AugmentationOptions,
    RegularizationOptions,
    SizeOptions,
    NaflexOptions,
    BatchNormOptions,
    EmaOptions,
    DeviceOptions,
    RunOptions,
    TrackerOptions,
    ResultOptions,
):
    """The effective options of a script, for the functions that build its parts; a part gets its group of them.

    An option that the other script alone has a flag for keeps its default.
    """

    script: str = field(default='train', kw_only=True)  # or `validate`

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
    for group in Options.__bases__:
        rows = [(entry, entry.metadata['flag']) for entry in fields(group) if 'flag' in entry.metadata]  # type: ignore[arg-type]
        title = str(group.__doc__).partition('\n')[0].rstrip('.')
        found[title] = [row.of(entry, script) for entry, row in rows if script in row.scripts]
    return found


@cache
def flags(script: str) -> dict[str, Flag]:
    """The flags of a script by the name of their option."""
    return {row.dest: row for rows in groups(script).values() for row in rows}
