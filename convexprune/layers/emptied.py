"""Convolutions and batch norms without channels, which torch's own refuse, or compute wrongly.

A residual block that has lost all its neurons is its shortcut: what it adds is zero, or its last bias. As a Linear, a
layer without outputs returns a tensor of size 0, and one without inputs its bias, at every position.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from convexprune.solvers.errors import ShapeMismatch


class Emptied:
    """What the classes below have in common: the module computes as the class that it extends, without channels."""


class _Convolution(Emptied):
    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        # From the last axis to the first, before and behind.
        added = [sum(self._reversed_padding_repeated_twice[2 * axis :][:2]) for axis in range(len(self.stride))]
        return _empty_products(input, weight, bias, self.in_channels, self.stride, added[::-1], self.dilation)


class _Norm(Emptied):
    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002
        return _unchanged(input, self.weight, self.bias)


class EmptiedConv1d(_Convolution, nn.Conv1d):
    """A Conv1d without input or output channels."""


class EmptiedConv2d(_Convolution, nn.Conv2d):
    """A Conv2d without input or output channels."""


class EmptiedConv3d(_Convolution, nn.Conv3d):
    """A Conv3d without input or output channels."""


class EmptiedBatchNorm1d(_Norm, nn.BatchNorm1d):
    """A BatchNorm1d without channels."""


class EmptiedBatchNorm2d(_Norm, nn.BatchNorm2d):
    """A BatchNorm2d without channels."""


class EmptiedBatchNorm3d(_Norm, nn.BatchNorm3d):
    """A BatchNorm3d without channels."""


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: EmptiedConv1d,
    nn.Conv2d: EmptiedConv2d,
    nn.Conv3d: EmptiedConv3d,
    nn.BatchNorm1d: EmptiedBatchNorm1d,
    nn.BatchNorm2d: EmptiedBatchNorm2d,
    nn.BatchNorm3d: EmptiedBatchNorm3d,
}


def without_channels_(module: nn.Module) -> None:
    """Give a convolution or a batch norm that has no channels left the class that can do without.

    A class of the user's own is not kept. Other modules stay: torch has Linear and PReLU without neurons.
    """
    base = next((kind for kind in _CLASSES if isinstance(module, kind)), None)
    if base is None or isinstance(module, Emptied):
        return
    channels = getattr(module, "num_features", None)  # of a norm, which need not hold tensors
    if not (module.get_parameter("weight").numel() if channels is None else channels):
        module.__class__ = _CLASSES[base]


def _empty_products(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None,
    channels: int,
    stride: Sequence[int],
    added: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    axes = weight.dim() - 2
    if input.dim() not in (axes + 1, axes + 2) or input.shape[-axes - 1] != channels:
        raise ShapeMismatch(f"expected {channels} channels at axis {-axes - 1}; got shape {list(input.shape)}")
    sizes = zip(input.shape[-axes:], weight.shape[2:], stride, added, dilation, strict=True)
    lengths = [(length + more - gap * (size - 1) - 1) // step + 1 for length, size, step, more, gap in sizes]
    zero = input[:0].sum() + weight.sum()  # of no entries: the graph of autograd is as behind a convolution
    zeros = zero.expand(*input.shape[: -axes - 1], len(weight), *lengths)
    return zeros.clone() if bias is None else zeros + bias[(..., *[None] * axes)]


def _unchanged(input: Tensor, *own: Tensor | None) -> Tensor:  # noqa: A002
    if input.shape[1]:
        raise ShapeMismatch(f"expected 0 channels at axis 1; got shape {list(input.shape)}")
    for tensor in own:
        input = input if tensor is None else input + tensor.sum()  # noqa: A001
    return input


fx.wrap("_empty_products")  # what depends on shapes is not traced
fx.wrap("_unchanged")
