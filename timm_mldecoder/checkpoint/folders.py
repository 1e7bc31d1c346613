"""Folders that timm loads with `local-dir:`, and the hub with `hf-hub:`: weights, configuration, model card.

What timm's `config.json` has no place for, such as the task and the tuned thresholds, is kept in it under one key more.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from timm.models._hub import load_cfg_from_json
from torch import nn

from timm_mldecoder.runtime.files import write_atomically

SETTINGS = 'timm_mldecoder'
#: The name that transformers has for a task.
PROBLEM_TYPES = {'classification': 'single_label_classification', 'multilabel': 'multi_label_classification'}
CARD = """\
---
tags:
{tags}
pipeline_tag: image-classification
library_name: timm
---
# {name}

{described}

{classes}{facts}## How to load it

```bash
pip install .    # in a clone of timm-mldecoder
```

```python
import timm, torch
from PIL import Image

model = timm.create_model('local-dir:FOLDER', pretrained=True).eval()  # or hf-hub:OWNER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open('image.jpg').convert('RGB'))[None]
scores = model(image).{scores}
```
"""


def save_folder(
    model: nn.Module,
    folder: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    task: str = 'classification',
    thresholds: Mapping[str, float] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Save a model as a folder, with a model card, and return the folder; nothing is left of one that fails midway.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` and transformers' `TimmWrapperForImageClassification` load
    it; `huggingface_hub.upload_folder` publishes it.

    Args:
        model: timm model, with any classifier of this package or its own.
        folder: New or empty folder.
        class_names: Name of each output.
        data_config: timm's data configuration of evaluation images.
        task: 'classification' or 'multilabel'.
        thresholds: Tuned probability per class name, for the multi-label task.
        facts: Further lines of the model card, such as metrics and the training command, by title.

    Raises:
        ValueError: If the folder is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'{folder} is not an empty folder: choose another one')
    settings = {'task': task, **({'thresholds': dict(thresholds)} if thresholds else {})}
    config = {'label_names': list(class_names) if class_names else None, SETTINGS: settings}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{folder.name}.', dir=folder.parent) as temporary:
        written = Path(temporary) / 'folder'  # a temporary folder itself is for its owner only
        data = dict(data_config or {})
        save_for_hf(model, str(written), model_config=config, data_config=data, safe_serialization=True)
        # timm writes num_classes twice, which transformers refuses; the number of the weights is in pretrained_cfg
        path = written / 'config.json'
        content = json.loads(path.read_text())
        content.get('model_args', {}).pop('num_classes', None)
        # transformers applies a softmax to what is not named multi-label
        content['problem_type'] = PROBLEM_TYPES[task]
        path.write_text(json.dumps(content, indent=2))
        card = model_card(content, folder.name, class_names, facts or {})
        (written / 'README.md').write_text(card, encoding='utf-8', errors='backslashreplace')
        for file in written.iterdir():  # safetensors writes for the owner only
            file.chmod(path.stat().st_mode)
        written.replace(folder)  # an empty folder may be there
    return folder


def folder_settings(model: str) -> dict[str, Any]:
    """Return the task and thresholds of a model name, empty if it is not a folder of this package.

    Args:
        model: Name as `timm.create_model` takes it; `local-dir:` and `hf-hub:` names may have settings.
    """
    return folder_config(model).get(SETTINGS, {})


def store_thresholds(model: str, thresholds: Mapping[str, float]) -> Path:
    """Store tuned thresholds in the folder of a `local-dir:` name, beside those of other classes; return its file."""
    path = Path(model.partition(':')[2]) / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    settings = config.setdefault(SETTINGS, {'task': 'multilabel'})
    settings['thresholds'] = {**settings.get('thresholds', {}), **thresholds}
    write_atomically(path, lambda file: file.write(json.dumps(config, indent=2).encode()))
    return path


def folder_channels(model: str) -> int | None:
    """Return the number of image channels of the folder that a model name stands for, None if it is not one."""
    size = folder_config(model).get('pretrained_cfg', {}).get('input_size')
    return size[0] if size else None


@contextmanager
def stored_folder(model: str, config: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a model name that works without the folder it names, which may have moved since.

    Args:
        model: Name as `timm.create_model` takes it.
        config: What `folder_config` returned for it when its checkpoint was written; empty or None yields the name.
    """
    if not config:
        yield model
        return
    with tempfile.TemporaryDirectory(prefix='timm_mldecoder.') as folder:
        (Path(folder) / 'config.json').write_text(json.dumps(config))
        yield f'local-dir:{folder}'


def folder_config(model: str) -> dict[str, Any]:
    """Return the `config.json` of the folder that a model name stands for, empty for other names."""
    scheme, _, place = model.partition(':')
    if scheme == 'local-dir' and (Path(place) / 'config.json').is_file():
        return load_cfg_from_json(Path(place) / 'config.json')
    if scheme in ('hf-hub', 'hf_hub'):
        from timm.models._hub import download_from_hf

        return load_cfg_from_json(download_from_hf(place, 'config.json'))
    return {}


def model_card(
    config: Mapping[str, Any], name: str, class_names: Sequence[str] | None, facts: Mapping[str, Any]
) -> str:
    """Return the README of a model folder: metadata for the hub, what the model is, and how to load it."""
    task = config[SETTINGS]['task']
    head = 'ml_decoder' in config.get('model_args', {})
    size = ' x '.join(map(str, config['pretrained_cfg'].get('input_size', ())))
    tags = ['image-classification', 'timm', 'transformers', *(['ml-decoder'] if head else [])]
    class_names = class_names or []
    names = ', '.join(escape(' '.join(str(name).split())) for name in class_names[:20])  # text, whatever they are
    names += ', ...' if len(class_names) > 20 else ''
    described = (
        f'{config["architecture"]} with {"an ML-Decoder head (arXiv 2111.12933)" if head else "its own classifier"}, '
        f'{config["num_classes"]} classes, {"multi-label" if task == "multilabel" else "single-label"}, input {size}.'
    )
    return CARD.format(
        tags='\n'.join(f'- {tag}' for tag in tags),
        name=name,
        described=described,
        classes=f'Classes: {names}\n\n' if names else '',
        facts=''.join(f'## {title}\n\n{text}\n\n' for title, text in facts.items()),
        scores='sigmoid()' if task == 'multilabel' else 'softmax(dim=1)',
    )
