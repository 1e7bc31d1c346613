"""Image preparation and scores inside an ONNX file: from pixels of any size to what predict writes.

The operators are those of timm's evaluation transform on PIL images: PIL resizes the columns, rounds to 8 bits, and
resizes the rows.
"""

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MODES: dict[str, dict[str, Any]] = {'bilinear': dict(mode='linear'), 'bicubic': dict(mode='cubic', cubic_coeff_a=-0.5)}
INPUT, OUTPUT = 'pixels', 'scores'


class _Nodes:
    """Nodes and constants of an ONNX graph, each result under a name of its own."""

    def __init__(self) -> None:
        self.onnx = importlib.import_module('onnx')
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def op(self, kind: str, *inputs: str, output: str = '', **attributes: Any) -> str:
        """Add a node and return the name of its result."""
        output = output or f'images_{len(self.nodes)}_{kind}'
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def value(self, value: Any, dtype: Any = np.int64) -> str:
        """Add a constant and return its name."""
        name = f'images_constant_{len(self.constants)}'
        self.constants.append(self.onnx.numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def size(self, x: str, axis: int) -> str:
        """Size [1] of a dimension."""
        return self.op('Gather', self.op('Shape', x), self.value([axis]))

    def clip(self, x: str) -> str:
        """Round to 8 bits."""
        return self.op('Clip', self.op('Round', x), self.value(0, np.float32), self.value(255, np.float32))

    def resize(self, x: str, height: str, width: str, interpolation: str) -> str:
        settings = dict(MODES[interpolation], antialias=1, coordinate_transformation_mode='half_pixel')
        outer = self.op('Slice', self.op('Shape', x), self.value([0]), self.value([2]))
        for rows, columns in ((self.size(x, 2), width), (height, width)):
            sizes = self.op('Concat', outer, rows, columns, axis=0)
            x = self.clip(self.op('Resize', x, '', '', sizes, exclude_outside=1, **settings))
        return x

    def center(self, x: str, sizes: tuple[int, int], fill: list[float]) -> str:
        """Crop to the center, after padding with a value per channel where the image is smaller."""
        level = self.value(np.reshape(fill, (1, -1, 1, 1)), np.float32)
        two, zero = self.value([2]), self.value([0])
        before, after = [], []
        for axis, size in zip((2, 3), sizes, strict=True):
            missing = self.op('Max', self.op('Sub', self.value([size]), self.size(x, axis)), zero)
            before.append(self.op('Div', missing, two))
            after.append(self.op('Sub', missing, before[-1]))
        pads = self.op('Concat', self.value([0, 0]), *before, self.value([0, 0]), *after, axis=0)
        x = self.op('Add', self.op('Pad', self.op('Sub', x, level), pads), level)
        for axis, size in zip((2, 3), sizes, strict=True):
            surplus = self.op('Sub', self.size(x, axis), self.value([size]))
            half = self.op('Div', surplus, two)
            odd = self.op('Mul', self.op('Mod', surplus, two), self.op('Mod', half, two))  # halves are rounded to even
            start = self.op('Add', half, odd)
            x = self.op('Slice', x, start, self.op('Add', start, self.value([size])), self.value([axis]))
        return x

    def scaled(self, x: str, target: tuple[int, int], config: Mapping[str, Any]) -> tuple[str, str]:
        """Height and width to resize to, each [1]."""
        sizes = self.size(x, 2), self.size(x, 3)
        if config['crop_mode'] == 'squash':
            return self.value([target[0]]), self.value([target[1]])
        if config['crop_mode'] == 'center' and target[0] == target[1]:  # the shorter side, the other one rounded down
            shorter = self.op('Min', *sizes)
            scaled = (self.op('Mul', size, self.value([target[0]])) for size in sizes)
            height, width = (self.op('Div', size, shorter) for size in scaled)
            return height, width
        kind = self.onnx.TensorProto
        exact = [self.op('Cast', size, to=kind.DOUBLE) for size in sizes]
        ratios = [self.op('Div', size, self.value([t], np.float64)) for size, t in zip(exact, target, strict=True)]
        ratio = self.op('Max' if config['crop_mode'] == 'border' else 'Min', *ratios)
        height, width = (
            self.op('Cast', self.op('Round', self.op('Div', size, ratio)), to=kind.INT64) for size in exact
        )
        return height, width


def check_images(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a data configuration whose images a graph cannot prepare."""
    if config['input_size'][0] != 3:
        raise ValueError(f'--with-preprocessing takes RGB images, the model {config["input_size"][0]} channels')
    if config['interpolation'] not in MODES:
        raise ValueError(f'--with-preprocessing knows {", ".join(MODES)}, not {config["interpolation"]}')
    if not 0 < config['crop_pct'] <= 1:
        raise ValueError(f'--with-preprocessing needs a crop_pct in (0, 1], got {config["crop_pct"]}')


def prepare_images(path: Path, metadata: Mapping[str, Any]) -> None:
    """Change an ONNX file in place: from uint8 pixels [B, H, W, 3] to scores [B, C] and logits [B, C]."""
    graph, config = _Nodes(), metadata['preprocessing']
    onnx, helper = graph.onnx, graph.onnx.helper
    size = tuple(config['input_size'][1:])
    target = tuple(math.floor(side / config['crop_pct']) for side in size)
    x = graph.op('Cast', graph.op('Transpose', INPUT, perm=[0, 3, 1, 2]), to=onnx.TensorProto.FLOAT)
    x = graph.resize(x, *graph.scaled(x, target, config), config['interpolation'])
    fill = [round(255 * value) if config['crop_mode'] == 'border' else 0 for value in config['mean']]
    x = graph.center(x, size, fill)
    mean, std = (graph.value(np.reshape(config[name], (1, -1, 1, 1)), np.float32) for name in ('mean', 'std'))
    x = graph.op('Div', x, graph.value(255, np.float32))
    graph.op('Div', graph.op('Sub', x, mean), std, output='images')
    proto = onnx.load(path, load_external_data=False)
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0]
    pixels = helper.make_tensor_value_info(INPUT, onnx.TensorProto.UINT8, ['batch', 'height', 'width', 3])
    pixels.type.tensor_type.shape.dim[0].CopyFrom(batch)
    scores = onnx.ValueInfoProto()
    scores.CopyFrom(proto.graph.output[0])
    scores.name = OUTPUT
    kind = {'multilabel': ('Sigmoid', {}), 'classification': ('Softmax', dict(axis=1))}[metadata['task']]
    nodes = [*graph.nodes, *proto.graph.node, helper.make_node(kind[0], ['logits'], [OUTPUT], **kind[1])]
    del proto.graph.node[:], proto.graph.input[:]
    proto.graph.node.extend(nodes)
    proto.graph.input.append(pixels)
    proto.graph.initializer.extend(graph.constants)
    proto.graph.output.insert(0, scores)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)
