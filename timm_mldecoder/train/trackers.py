"""Experiment trackers: optional packages, imported when a flag requests them."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from timm_mldecoder.flags.run import TrackerOptions

Tracker = Callable[[dict[str, float]], None]


def create_trackers(options: TrackerOptions, folder: Path, config: dict[str, Any]) -> list[Tracker]:
    """Return the functions to call with the metrics of each epoch; `config` are the values that a tracker shows.

    Raises:
        ValueError: If the package of a tracker is missing, or it cannot start.
    """
    return [_start(name, start, options, folder, config) for name, start in _TRACKERS.items() if getattr(options, name)]


def _start(name: str, start: Callable, options: TrackerOptions, folder: Path, config: dict[str, Any]) -> Tracker:
    flag, package = f'--{name.replace("_", "-")}', name.removeprefix('log_')
    try:
        return start(import_module(package), options, folder, config)
    except ImportError as error:
        raise ValueError(f"{flag} needs the package {package}: pip install 'timm-mldecoder[trackers]'") from error
    except Exception as error:  # no key, no network: each tracker has its own errors
        raise ValueError(f'{flag}: {package} could not start: {error}') from error


def _wandb(wandb: Any, options: TrackerOptions, folder: Path, config: dict[str, Any]) -> Tracker:
    run = wandb.init(
        project=options.wandb_project,
        name=folder.name,
        config=config,
        tags=options.wandb_tags,
        resume='must' if options.wandb_resume_id else None,
        id=options.wandb_resume_id or None,
    )
    return run.log


def _trackio(trackio: Any, options: TrackerOptions, folder: Path, config: dict[str, Any]) -> Tracker:
    trackio.init(project=options.wandb_project or 'train', name=folder.name, config=config)
    return trackio.log


def _tensorboard(tensorboard: Any, options: TrackerOptions, folder: Path, config: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(row: dict[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name.replace('_', '/', 1), value, row['epoch'])
        writer.flush()

    return log


_TRACKERS = {'log_wandb': _wandb, 'log_trackio': _trackio, 'log_tensorboard': _tensorboard}
