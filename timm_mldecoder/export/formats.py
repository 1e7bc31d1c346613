"""Formats of exported models: how each is written, loaded as a function, and read for its metadata."""

import copy
import importlib
import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import safe_open
from timm.data import resolve_data_config
from torch import Tensor, nn

from timm_mldecoder.checkpoint.folders import SETTINGS, save_folder
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.head.layers import GroupFullyConnected
from timm_mldecoder.head.queries import Queries
from timm_mldecoder.runtime.errors import one_line

METADATA = ('architecture', 'task', 'class_names', 'thresholds', 'preprocessing', 'precision')
KEY = 'timm_mldecoder'  # of the metadata, where a file has one entry for it
LARGEST_PROTOBUF = 2**31 - 2**27  # bytes of weights, above which ONNX keeps them in a second file

#: An exported model: images [B, channels, height, width] to logits [B, C], both float32 on the CPU.
Run = Callable[[Tensor], Tensor]


class Job(NamedTuple):
    """What to write."""

    model: nn.Module  # the model in eval mode on the CPU, float32
    metadata: Mapping[str, Any]  # what `read_metadata` is to return
    facts: Mapping[str, Any] = {}  # lines of the model card, see `save_folder`
    device: str = 'cpu'  # device of the file
    batch_size: int | None = None  # the only batch size of the file; None for any
    opset: int | None = None  # ONNX operator set; None for torch's default
    features: str = ''  # 'pooled' or 'queries' for a second output


class Network(nn.Module):
    """A model with its constants folded, from float32 images to float32 logits, whatever its precision.

    Args:
        model: The model; it is copied.
        dtype: Floating-point type of weights and activations.
        device: Where the copy goes; moved later, ML-Decoder computes its query side for every batch again.
        features: 'pooled' for the mean token [B, F] as a second output, 'queries' for query outputs [B, K, D].
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype = torch.float32, device: str = 'cpu', features: str = ''
    ) -> None:
        super().__init__()
        self.features = features
        self.model: Any = copy.deepcopy(model).eval()
        for module in list(self.model.modules()):
            if type(module).__name__ in FOLDS:
                FOLDS[type(module).__name__](module)
        self.model.to(device, dtype).requires_grad_(False)
        self.dtype = dtype
        for module in self.model.modules():
            if isinstance(module, MLDecoder):
                module.fold()
                if features == 'queries':
                    module.group_fc = _WithInput(module.group_fc)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        images = images.to(self.dtype)
        if self.features == 'pooled':
            maps = self.model.forward_features(images)
            return self.model.forward_head(maps).float(), self.model.forward_head(maps, pre_logits=True).float()
        if self.features == 'queries':
            logits, outputs = self.model(images)
            return logits.float(), outputs.float()
        return self.model(images).float()


class _WithInput(nn.Module):
    """A classifier that also returns what it reads."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor, label_embeddings: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.classifier(x, label_embeddings), x


@torch.no_grad()
def fold_text_queries(head: Any) -> None:
    """Turn a head with text queries into one with the fixed queries of its classes; the label embeddings go."""
    if head.vocabulary is None:
        return
    words, classifier = head.vocabulary(), head.group_fc
    values = head.queries(words)
    queries, folded = Queries(*values.shape), GroupFullyConnected(len(words), *values.shape)
    queries.weight = values
    folded.group_size = classifier.group_size
    folded.weight = nn.Parameter(classifier.group_weights(words, len(values)).contiguous())
    folded.bias = nn.Parameter(classifier.bias.expand(len(words)).clone())
    head.queries, head.group_fc, head.vocabulary = queries, folded, None


#: How modules become constant, by the name of their class, so that nothing is imported that a model does not use.
FOLDS: dict[str, Callable[[Any], None]] = {
    'MLDecoder': fold_text_queries,
    'GraphClassifier': lambda classifier: classifier.fold(),
}


def _program(job: Job) -> Any:
    """Return the `torch.export` program of a model, with a free or a fixed batch size."""
    network = Network(job.model, getattr(torch, job.metadata['precision']), job.device, job.features)
    size = job.metadata['preprocessing']['input_size']
    images = torch.zeros(job.batch_size or 3, *size, device=job.device)  # no size that torch specialises
    batch = None if job.batch_size else {0: torch.export.Dim('batch', min=1, max=2**16)}
    return torch.export.export(network, (images,), dynamic_shapes=(batch,))


def _write_onnx(path: Path, job: Job) -> None:
    for name in ('torch.onnx', 'onnxscript', 'onnx_ir'):  # which log every constant that they leave alone
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.onnx.export(
        _program(job),
        f=path,
        dynamo=True,
        verbose=False,
        input_names=['images'],
        output_names=['logits', 'features'] if job.features else ['logits'],
        opset_version=job.opset,
        external_data=sum(tensor.nbytes for tensor in job.model.state_dict().values()) > LARGEST_PROTOBUF,
    )
    set_onnx_metadata(path, job.metadata)


def set_onnx_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Replace the metadata of an ONNX file."""
    onnx = importlib.import_module('onnx')
    proto = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.save(proto, path)


def _load_onnx(path: Path, device: str) -> Run:
    runtime = importlib.import_module('onnxruntime')
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: it warns of every constant that it cannot fold
    session = runtime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


def _write_torch_export(path: Path, job: Job) -> None:
    extra = {'metadata.json': json.dumps(job.metadata)}
    torch.export.save(_program(job), path, extra_files=extra)


def _load_torch_export(path: Path, device: str) -> Run:
    run = torch.export.load(path).module()
    return lambda images: run(images.to(device)).cpu()


def _write_aot(path: Path, job: Job) -> None:
    torch._inductor.aoti_compile_and_package(
        _program(job),
        package_path=str(path),
        inductor_configs={'aot_inductor.metadata': {KEY: json.dumps(job.metadata)}},
    )


def _load_aot(path: Path, device: str) -> Run:
    run = torch._inductor.aoti_load_package(str(path))
    return lambda images: run(images.to(device)).cpu()


def _write_folder(path: Path, job: Job) -> None:
    half = job.metadata['precision'] == 'float16'
    save_folder(
        copy.deepcopy(job.model).half() if half else job.model,
        path,
        class_names=job.metadata['class_names'],
        data_config=job.metadata['preprocessing'],
        task=job.metadata['task'],
        thresholds=job.metadata['thresholds'],
        facts=job.facts,
    )


def _load_folder(path: Path, device: str) -> Run:
    return timm.create_model(f'local-dir:{path}', pretrained=True).eval()


class Format(NamedTuple):
    """A format: how it is written, how it is loaded as a function from images to logits, and what it takes."""

    write: Callable[[Path, Job], None]
    load: Callable[[Path, str], Run]
    suffix: str = ''
    packages: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


FORMATS = {
    'onnx': Format(
        _write_onnx,
        _load_onnx,
        '.onnx',
        ('onnx', 'onnxscript', 'onnxruntime'),
        (
            'batch_size',
            'opset',
            'with_preprocessing',
            'features',
            'quantize',
            'calibration',
            'max_images',
            'min_agreement',
        ),
    ),
    'torch-export': Format(_write_torch_export, _load_torch_export, '.pt2', flags=('batch_size', 'device')),
    'aot': Format(_write_aot, _load_aot, '.pt2', flags=('batch_size', 'device')),
    'safetensors': Format(_write_folder, _load_folder),
}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the metadata of an exported file or folder.

    Returns:
        `architecture`; `task`, 'classification' or 'multilabel'; `class_names` in the order of the logits, or None;
        `thresholds`, a probability per class name, or None; `preprocessing`, timm's data configuration; `precision`,
        'float32', 'float16' or 'int8'.

    Raises:
        ValueError: If the file is not one of this command.
    """
    path = Path(path)
    read = _read_folder if path.is_dir() else _read_onnx if path.suffix == '.onnx' else _read_archive
    try:
        return read(path)
    except Exception as error:  # damaged files make the readers raise anything
        raise ValueError(f'{path} is not an exported model: {one_line(error, 200)}') from error


def _read_onnx(path: Path) -> dict[str, Any]:
    proto = importlib.import_module('onnx').load(path, load_external_data=False)
    found = {entry.key: entry.value for entry in proto.metadata_props}
    return {key: json.loads(found[key]) for key in METADATA}


def _read_archive(path: Path) -> dict[str, Any]:
    """Read the entry of `torch.export`, or that of AOTInductor, from the zip file that both write."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        own = next((name for name in names if name.endswith('/extra/metadata.json')), None)
        if own:
            return json.loads(archive.read(own))
        compiled = next(name for name in names if name.endswith('wrapper_metadata.json'))
        return json.loads(json.loads(archive.read(compiled))[KEY])


def preprocessing(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the metadata hold of timm's data configuration, as JSON gives it back."""
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    return json.loads(json.dumps({key: data_config[key] for key in keys}))


def _read_folder(path: Path) -> dict[str, Any]:
    config = json.loads((path / 'config.json').read_text())
    with safe_open(path / 'model.safetensors', 'pt') as weights:
        half = any(weights.get_slice(name).get_dtype() == 'F16' for name in weights.keys())  # noqa: SIM118
    return {
        'architecture': config['architecture'],
        'task': config[SETTINGS]['task'],
        'class_names': config.get('label_names'),
        'thresholds': config[SETTINGS].get('thresholds'),
        'preprocessing': preprocessing(resolve_data_config({}, pretrained_cfg=config['pretrained_cfg'])),
        'precision': 'float16' if half else 'float32',
    }
