"""Experiment trackers: optional packages, imported where they are asked for."""

from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

Row = dict[str, float]


def create_trackers(options: Namespace, folder: Path) -> list[Callable[[Row], None]]:
    """What to call with the metrics of each epoch.

    Raises:
        ValueError: If the package of a tracker is missing.
    """
    return [start(options, folder) for name, start in _TRACKERS.items() if getattr(options, name)]


def _wandb(options: Namespace, folder: Path) -> Callable[[Row], None]:
    wandb = _import('wandb', '--log-wandb')
    run = wandb.init(
        project=options.wandb_project,
        name=folder.name,
        config=vars(options),
        tags=options.wandb_tags,
        resume='must' if options.wandb_resume_id else None,
        id=options.wandb_resume_id or None,
    )
    return run.log


def _trackio(options: Namespace, folder: Path) -> Callable[[Row], None]:
    trackio = _import('trackio', '--log-trackio')
    trackio.init(project=options.wandb_project or 'train', name=folder.name, config=vars(options))
    return trackio.log


def _tensorboard(options: Namespace, folder: Path) -> Callable[[Row], None]:
    _import('tensorboard', '--log-tensorboard')
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(row: Row) -> None:
        for name, value in row.items():
            writer.add_scalar(name.replace('_', '/', 1), value, row['epoch'])
        writer.flush()

    return log


def _import(package: str, flag: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(f"{flag} needs the package {package}: pip install 'timm-mldecoder[trackers]'") from error


_TRACKERS = {'log_wandb': _wandb, 'log_trackio': _trackio, 'log_tensorboard': _tensorboard}
