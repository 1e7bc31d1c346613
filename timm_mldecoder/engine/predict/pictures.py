"""Pictures of images with the attention of their labels, drawn on what the model saw."""

from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from timm_mldecoder.engine.predict.run import Predictor
from timm_mldecoder.engine.predict.sources import SourceDataset
from timm_mldecoder.models.attention_maps import attention_maps

MAPS = 4  # attention maps per picture
# colours of attention from none to most: matplotlib's inferno, which reports and the page do without
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


def draw_pictures(predictor: Predictor, dataset: SourceDataset, folder: Path) -> None:
    """Draw every readable image, with the attention map of its labels beside it.

    Raises:
        ValueError: If matplotlib is missing, or the model has no attention maps.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--pictures needs matplotlib: pip install 'timm-mldecoder[demo]'") from error
    config, device = predictor.data_config, next(predictor.model.parameters()).device
    for index in range(len(dataset)):
        try:
            image, _ = dataset[index]
        except OSError:
            continue  # listed in errors.csv
        images = image[None].to(device)
        labels = predictor.labels(predictor(images)[0][0])[:MAPS]
        figure = Figure(figsize=(3 * (1 + len(labels)), 3.3), layout='constrained')
        axes = figure.subplots(1, 1 + len(labels), squeeze=False)[0]
        seen = denormalise(image, config['mean'], config['std'])
        axes[0].imshow(seen, cmap='gray')
        axes[0].set_title(escape(dataset.filename(index)))
        classes = torch.tensor([label.index for label in labels], device=device)
        maps = attention_maps(predictor.model, images.expand(len(labels), -1, -1, -1), classes).cpu() if labels else []
        for axis, label, attention in zip(axes[1:], labels, maps, strict=True):
            axis.imshow(seen.mean(dim=-1) if seen.dim() == 3 else seen, cmap='gray')
            # one scale for all maps: 0 to the largest share that a token may have beside an even spread
            axis.imshow(attention, cmap='inferno', alpha=0.6, vmin=0, vmax=max(attention.max(), 4 / attention.numel()),
                        extent=(-0.5, seen.shape[1] - 0.5, seen.shape[0] - 0.5, -0.5))  # fmt: skip
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


def denormalise(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return a transformed image [C, H, W] as pixels in [0, 1], [H, W] if grey, else [H, W, 3]."""
    scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in (std, mean))
    pixels = (image * scale + shift).clamp(0, 1)
    return pixels[0] if len(pixels) == 1 else pixels[:3].permute(1, 2, 0)


def escape(text: str, length: int = 40) -> str:
    """Return text that matplotlib does not take for mathematics, on one line of limited length."""
    text = ' '.join(text.split())
    text = text if len(text) <= length else f'…{text[-length:]}'
    return text.replace('$', r'\$')


def thumbnail(pixels: Tensor, side: int) -> Image.Image:
    """Return pixels in [0, 1], [H, W] or [H, W, 3], as an RGB image whose longer side is `side` pixels."""
    image = Image.fromarray((255 * pixels).round().byte().cpu().numpy()).convert('RGB')
    scale = side / max(image.size)
    return image.resize([max(1, round(scale * length)) for length in image.size], Image.Resampling.BICUBIC)


def attention_overlay(pixels: Tensor, attention: Tensor, side: int) -> Image.Image:
    """Return an image in grey with an attention map over it.

    Args:
        pixels: Pixels in [0, 1], [H, W] or [H, W, 3].
        attention: Attention [h, w] that sums to 1.
        side: Longer side of the result, in pixels.
    """
    image = thumbnail(pixels, side)
    # one scale for all maps: 0 to the largest share that a token may have beside an even spread
    strength = (attention / max(attention.max().item(), 4 / attention.numel())).float().cpu().numpy()
    strength = np.asarray(Image.fromarray(strength).resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)
    heat = np.stack([np.interp(strength, np.linspace(0, 1, len(HEAT)), channel) for channel in zip(*HEAT, strict=True)])
    heat = Image.fromarray(heat.transpose(1, 2, 0).astype(np.uint8))
    return Image.blend(image.convert('L').convert('RGB'), heat, 0.6)
