"""Plain models whose state dicts have the published layouts, written from the paper and the layouts' tensor names.

They share no code with the package: the tests hold converted checkpoints against what these compute.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ReferenceHead(nn.Module):
    """ML-Decoder (arXiv 2111.12933, section 2.3) in evaluation mode, one group after the other.

    The state dict has the reference repository's names.
    """

    def __init__(self, features: int, classes: int, queries: int, dim: int = 768, hidden: int = 2048):
        super().__init__()
        layer = nn.Module()
        layer.multihead_attn = nn.MultiheadAttention(dim, 8, batch_first=True)
        layer.linear1, layer.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        layer.norm1, layer.norm2, layer.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList([layer])
        self.decoder.embed_standart = nn.Linear(features, dim)
        self.decoder.query_embed = nn.Embedding(queries, dim)
        group = (classes + queries - 1) // queries
        self.decoder.duplicate_pooling = nn.Parameter(torch.randn(queries, dim, group) * 0.05)
        self.decoder.duplicate_pooling_bias = nn.Parameter(torch.randn(classes))
        for norm in (layer.norm1, layer.norm2, layer.norm3):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        nn.init.normal_(layer.multihead_attn.in_proj_bias)
        nn.init.normal_(self.decoder.embed_standart.weight, std=3 * features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        decoder, layer = self.decoder, self.decoder.layers[0]
        memory = F.relu(decoder.embed_standart(x.flatten(2).transpose(1, 2)))
        query = decoder.query_embed.weight.expand(len(x), -1, -1)
        query = layer.norm1(query + query)
        query = layer.norm2(query + layer.multihead_attn(query, memory, memory)[0])
        query = layer.norm3(query + layer.linear2(F.relu(layer.linear1(query))))
        logits = [query[:, k] @ decoder.duplicate_pooling[k] for k in range(query.shape[1])]
        bias = decoder.duplicate_pooling_bias
        return torch.cat(logits, dim=1)[:, : len(bias)] + bias


class InPlaceABN(nn.Module):
    """Batch norm whose scale is |weight| + eps, and leaky ReLU; it counts no batches."""

    def __init__(self, channels: int, slope: float):
        super().__init__()
        self.slope = slope
        # small where a residual branch ends, as in trained networks: else features grow with every block
        size = 0.3 if slope == 1 else 1.0
        self.weight = nn.Parameter((torch.rand(channels) + 0.5) * size * torch.randn(channels).sign())
        self.bias = nn.Parameter(torch.randn(channels) * 0.1)
        self.register_buffer('running_mean', torch.randn(channels) * 0.1)
        self.register_buffer('running_var', torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs() + 1e-5
        return F.leaky_relu(F.batch_norm(x, self.running_mean, self.running_var, scale, self.bias), self.slope)


class Blur(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        ramp = x.new_tensor([1, 2, 1]) / 4
        kernel = torch.outer(ramp, ramp).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode='reflect'), kernel, stride=2, groups=x.shape[1])


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def conv_abn(features: int, channels: int, kernel: int, slope: float, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(features, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    layers = nn.Sequential(conv, InPlaceABN(channels, slope))
    return nn.Sequential(layers, Blur()) if stride == 2 else layers


class Block(nn.Module):
    def __init__(self, features: int, planes: int, stride: int, bottleneck: bool, squeeze: bool):
        super().__init__()
        channels = planes * 4 if bottleneck else planes
        if bottleneck:
            self.conv1 = conv_abn(features, planes, 1, 1e-3)
            self.conv2 = conv_abn(planes, planes, 3, 1e-3, stride)
            self.conv3 = conv_abn(planes, channels, 1, 1.0)
        else:
            self.conv1 = conv_abn(features, planes, 3, 1e-3, stride)
            self.conv2 = conv_abn(planes, planes, 3, 1.0)
        self.se = SqueezeExcite(planes, max(channels // (8 if bottleneck else 4), 64)) if squeeze else nn.Identity()
        self.downsample = nn.Identity()
        if stride == 2 or features != channels:
            pool = [nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)] if stride == 2 else []
            self.downsample = nn.Sequential(*pool, conv_abn(features, channels, 1, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        out = self.se(self.conv2(self.conv1(x)))
        if hasattr(self, 'conv3'):
            out = self.conv3(out)
        return F.relu(out + self.downsample(x))


class SpaceToDepth(nn.Module):
    """4 x 4 pixels to channels; the place in the square varies slowest."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 4).unflatten(1, (-1, 16)).transpose(1, 2).flatten(1, 2)


class ReferenceTResNet(nn.Module):
    """TResNet (arXiv 2003.13630) with in-place ABN and an ML-Decoder head, named as in the reference repository."""

    def __init__(self, blocks: tuple[int, ...], width: int, bottlenecks: bool, classes: int, queries: int):
        super().__init__()
        features = width
        self.body = nn.Sequential()
        self.body.add_module('SpaceToDepth', SpaceToDepth())
        self.body.add_module('conv1', conv_abn(48, width, 3, 1e-2))
        for stage, count in enumerate(blocks):
            layers = []
            for index in range(count):
                planes, bottleneck = width * 2**stage, bottlenecks or stage >= 2
                stride = 2 if stage and not index else 1
                layers.append(Block(features, planes, stride, bottleneck, squeeze=stage < 3))
                features = planes * 4 if bottleneck else planes
            self.body.add_module(f'layer{stage + 1}', nn.Sequential(*layers))
        self.head = ReferenceHead(features, classes, queries)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))
