"""Pictures of images with the attention of their labels, drawn on what the model saw."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from timm_mldecoder.modeling.load import LoadedModel
from timm_mldecoder.models.attention_maps import attention_maps, attention_overlay, denormalise
from timm_mldecoder.predict.sources import SourceDataset

MAPS = 4  # attention maps per picture
SIDE = 240  # of each, in pixels


@torch.inference_mode()
def draw_pictures(loaded: LoadedModel, dataset: SourceDataset, indices: Iterable[int], folder: Path) -> None:
    """Draw images, with the attention map of their labels beside them; unreadable ones are left out.

    Raises:
        ValueError: If matplotlib is missing, or the model has no attention maps.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--pictures needs matplotlib: pip install 'timm-mldecoder[demo]'") from error
    config, device = loaded.data_config, next(loaded.model.parameters()).device
    for index in indices:
        try:
            image, _ = dataset[index]
        except OSError:
            continue  # listed beside the output
        images = image[None].to(device)
        labels = loaded.labels(loaded.scores(loaded.model(images)))[0][:MAPS]
        figure = Figure(figsize=(3 * (1 + len(labels)), 3.3), layout='constrained')
        axes = figure.subplots(1, 1 + len(labels), squeeze=False)[0]
        seen = denormalise(image, config['mean'], config['std'])
        axes[0].imshow(seen.numpy(), cmap='gray')
        axes[0].set_title(escape(dataset.filename(index)))
        classes = torch.tensor([label.index for label in labels], device=device)
        repeated = images.expand(len(labels), -1, -1, -1)
        maps: Any = attention_maps(loaded.model, repeated, classes).float().cpu() if labels else []
        for axis, label, attention in zip(axes[1:], labels, maps, strict=True):
            axis.imshow(attention_overlay(seen, attention, SIDE))
            axis.set_title(f'{escape(label.name)} {label.score:.2f}')
        for axis in axes:
            axis.set_axis_off()
        path = picture_path(folder, dataset.filename(index))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=80)


def picture_path(folder: Path, name: str) -> Path:
    """Return the file of a picture, which is under `folder` whatever the name of the image is."""
    parts = [part for part in PurePosixPath(name).parts if part not in ('/', '..', '.')]
    return folder.joinpath(*parts).with_name(f'{parts[-1]}.png')


def escape(text: str, length: int = 40) -> str:
    """Return text that matplotlib does not take for mathematics, on one line of limited length."""
    text = ' '.join(text.split())
    text = text if len(text) <= length else f'…{text[-length:]}'
    return text.replace('$', r'\$')
