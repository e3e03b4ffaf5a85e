"""Small networks that several tests share; most are residual, of layers that lose neurons together."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Net(nn.Module):
    """Named modules, and a forward of any kind over them: a function of the network and its input."""

    def __init__(self, way: Callable[[Any, Any], Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.way = way

    def forward(self, x):
        return self.way(self, x)


def mlp(*sizes: int, bias: bool = True, seed: int | None = 0) -> nn.Sequential:
    """Linear layers of these sizes with a ReLU between them; None as seed: drawn from the state as it is."""
    if seed is not None:
        torch.manual_seed(seed)
    layers = [module for n, m in pairwise(sizes) for module in (nn.Linear(n, m, bias=bias), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Basic(nn.Module):
    """A residual block as torchvision writes it."""

    def __init__(self, before: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu, self.shortcut = nn.ReLU(inplace=True), None
        if stride != 1 or before != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(before, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


class PreActivation(nn.Module):
    """Norms and activations stand on the stream's branches, and the sum is bare."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 3, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(3), nn.Conv2d(3, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).sigmoid())).sigmoid())


class Inverted(nn.Module):
    """MobileNet's block: a depthwise convolution, which may make several channels of each, and a gate."""

    def __init__(self, channels: int, multiplier: int = 1) -> None:
        super().__init__()
        wide = 5 * multiplier
        self.expand, self.bn1 = nn.Conv2d(channels, 5, 1), nn.BatchNorm2d(5)
        self.depthwise, self.bn2 = nn.Conv2d(5, wide, 3, padding=1, groups=5), nn.BatchNorm2d(wide)
        self.squeeze, self.excite = nn.Conv2d(wide, 2, 1), nn.Conv2d(2, channels, 1)
        self.project, self.bn3 = nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x):
        inner = self.bn2(self.depthwise(functional.relu6(self.bn1(self.expand(x))))).tanh()
        gate = self.excite(self.squeeze(inner.mean((2, 3), keepdim=True)).tanh()).sigmoid()
        return x + self.bn3(self.project(inner)) * gate


class Perceptron(nn.Module):
    """Residual, with square layers that take what they are added to, a gated branch, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.square, self.norm = nn.Linear(6, 5), nn.Linear(5, 5), nn.BatchNorm1d(5)
        self.gate, self.up, self.down = nn.Linear(5, 4), nn.Linear(5, 4, bias=False), nn.Linear(4, 5)
        self.drop, self.one, self.two = nn.Dropout(), nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, x):
        x = self.stem(x).tanh()
        x = x - self.drop(self.square(self.norm(x)).relu())
        x = x + self.down(functional.silu(self.gate(x)) * self.up(x))
        return torch.cat([self.one(x), self.two(functional.gelu(x))], 1)


class Scaled(nn.Module):
    """Branches times numbers, given and learned, and sums with numbers, some of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (nn.Linear(4, n) for n in (4, 4, 4, 2))
        self.alpha = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x):
        x = 1 - self.stem(x).mul_(0.5).tanh()
        x = torch.add(x, self.a(x.relu()), alpha=0.3)
        return self.head((x + self.alpha * self.b(x).sigmoid()) / 2 + 1)


class Axes(nn.Module):
    """Residual over one axis or three, with slopes for each channel."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        conv, norm, pool = {
            1: (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d(2)),
            3: (nn.Conv3d, nn.BatchNorm3d, nn.AvgPool3d(2)),
        }[axes]
        self.stem, self.norm, self.slopes = conv(2, 5, 3, padding=1), norm(5), nn.PReLU(5)
        self.conv, self.depthwise = conv(5, 5, 3, padding=1), conv(5, 5, 3, padding=1, groups=5, bias=False)
        self.pool, self.head = pool, nn.Linear(5 * 2**axes, 3)

    def forward(self, x):
        x = self.slopes(self.norm(self.stem(x)))
        return self.head(self.pool(self.depthwise(self.conv(x)) + x).flatten(1))


def resnet() -> nn.Module:
    """Three stages: with identity shortcuts only, and with 1×1 convolutions."""
    blocks = [Basic(4, 4), Basic(4, 4), Basic(4, 6, 2), Basic(6, 6), Basic(6, 5)]
    stem = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(5, 3))


def preactivation() -> nn.Module:
    """With norms on the stream."""
    blocks = [nn.Conv2d(2, 4, 3, padding=1), PreActivation(4), PreActivation(4), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 3))


def mobilenet() -> nn.Module:
    """With gates, and a stem whose filters a depthwise convolution doubles."""
    stem = [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 6, 3, groups=3), nn.PReLU(6), nn.Conv2d(6, 4, 1)]
    return nn.Sequential(*stem, Inverted(4), Inverted(4, 2), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(108, 2))


JOINT = {
    "resnet": (resnet, (2, 8, 8)),
    "preactivation": (preactivation, (2, 8, 8)),
    "mobilenet": (mobilenet, (2, 8, 8)),
    "perceptron": (Perceptron, (6,)),
    "scaled": (Scaled, (4,)),
    "one axis": (lambda: Axes(1), (2, 4)),
    "three axes": (lambda: Axes(3), (2, 4, 4, 4)),
}
"""By name: what builds the network, and the shape of a sample."""
