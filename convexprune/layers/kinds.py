"""The kinds of modules whose weights can be pruned: how each is a matrix product, group by group.

Linear, and the Transformers library's Conv1D, a Linear whose weight is kept transposed; convolutions along one, two and
three axes, with a row of X for each receptive field; and the projections of queries, keys and values in a
MultiheadAttention, three products with inputs of their own.
"""

import sys
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from convexprune.solvers.errors import ShapeMismatch

Module: TypeAlias = Any
"""A module of one kind."""

Raw: TypeAlias = Any
"""What a module receives or computes: a tensor, or a MultiheadAttention's three."""

Group = tuple[Tensor, Tensor | None]
"""The weight [M, *fan-in] and the bias [M] of one group."""


class Kind:
    """A kind of module whose output is a matrix product, group by group: in this class one group, features last.

    Attributes:
        base: The class; subclasses that compute the same are of the kind.
        parameters: Names of the module's tensors that make up U.
        settings: Names of the attributes that say how ``inputs`` are made.
        axis: Of what the module returns, the one along which its outputs lie, counted from the end.
    """

    parameters: tuple[str, ...] = ("weight", "bias")
    settings: ClassVar[tuple[str, ...]] = ()
    axis = -1

    def __init__(self, base: type[nn.Module]) -> None:
        self.base = base

    def groups(self, module: Module) -> list[Group]:
        """Detached views of the module's tensors, for what is written there to be in the module."""
        return [(module.weight.detach(), None if module.bias is None else module.bias.detach())]

    def inputs(self, module: Module, received: Raw) -> list[Tensor]:
        """Inputs [*positions, *fan-in] of each group, from what the module received; views where possible."""
        widths = [weight.shape[1] for weight, _ in self.groups(module)]
        return [_with_size(tensor, width) for tensor, width in zip(self._each(received), widths, strict=True)]

    def outputs(self, module: Module, computed: Raw) -> list[Tensor]:
        """Outputs [*positions, M] of each group, from what the module computed; views where possible."""
        widths = [len(weight) for weight, _ in self.groups(module)]
        return [_with_size(tensor, width) for tensor, width in zip(self._each(computed), widths, strict=True)]

    def _each(self, tensors: Raw) -> Sequence[Tensor]:
        """Those of each group."""
        return [tensors]


class _Transposed(Kind):
    def groups(self, module: Module) -> list[Group]:
        return [(weight.mT, bias) for weight, bias in super().groups(module)]


class _Convolution(Kind):
    settings: ClassVar[tuple[str, ...]] = ("stride", "padding", "dilation", "groups", "padding_mode")

    def __init__(self, base: type[nn.Module], *axes: str) -> None:
        super().__init__(base)
        self.axes, self.axis = axes, -1 - len(axes)

    def groups(self, module: Module) -> list[Group]:
        [(weight, bias)] = super().groups(module)
        biases = [None] * module.groups if bias is None else bias.chunk(module.groups)
        return list(zip(weight.chunk(module.groups), biases, strict=True))

    def inputs(self, module: Module, received: Tensor) -> list[Tensor]:
        """Windows over the padded input, which share its memory."""
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        windows = functional.pad(self._samples(received, module.in_channels), _padding(module), mode=mode)
        sizes = zip(module.kernel_size, module.dilation, module.stride, strict=True)
        for axis, (kernel, dilation, stride) in enumerate(sizes, start=2):
            reach = dilation * (kernel - 1) + 1
            if windows.shape[axis] < reach:
                found = f"the {type(module).__name__} reaches over {reach} positions of an axis"
                raise ShapeMismatch(f"{found}; got {windows.shape[axis]} with padding, inputs {tuple(received.shape)}")
            windows = windows.unfold(axis, reach, stride)[..., ::dilation]
        channels = 1 + len(self.axes)  # behind the positions, before the kernel's axes
        return list(windows.movedim(1, channels).chunk(module.groups, channels))

    def outputs(self, module: Module, computed: Tensor) -> list[Tensor]:
        return list(self._samples(computed, module.out_channels).movedim(1, -1).chunk(module.groups, -1))

    def _samples(self, tensor: Tensor, channels: int) -> Tensor:
        """[samples, channels, *positions], also of an unbatched tensor."""
        axes = len(self.axes)
        found = _with_size(tensor, channels, self.axis, f"samples, channels, {', '.join(self.axes)}", most=axes + 2)
        return found if found.dim() == axes + 2 else found[None]


class _Attention(Kind):
    parameters = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")

    def groups(self, module: Module) -> list[Group]:
        joint, bias = module.in_proj_weight, module.in_proj_bias
        own = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        weights, biases = (
            own if joint is None else joint.chunk(3),
            [None] * 3 if bias is None else bias.detach().chunk(3),
        )
        return [(weight.detach(), shift) for weight, shift in zip(weights, biases, strict=True)]

    def _each(self, tensors: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        if isinstance(tensors, Tensor) or len(tensors) != 3:
            found = f"shape {tuple(tensors.shape)}" if isinstance(tensors, Tensor) else f"{len(tensors)} tensors"
            raise ShapeMismatch(f"MultiheadAttention has three projections: expected (query, key, value); got {found}")
        return tensors


def _with_size(
    tensor: Tensor, size: int, axis: int = -1, layout: str = "..., features", most: int | None = None
) -> Tensor:
    """The tensor, detached; ShapeMismatch unless it has this size at the axis, and at most so many axes."""
    if tensor.dim() < -axis or tensor.shape[axis] != size or (most is not None and tensor.dim() > most):
        raise ShapeMismatch(f"expected [{layout}] with {size} at axis {axis}; got shape {tuple(tensor.shape)}")
    return tensor.detach()


def _padding(module: Module) -> list[int]:
    """Entries added before and behind, from the last axis to the first."""
    if isinstance(module.padding, str):  # "same", or "valid" for none
        reaches = [gap * (size - 1) for gap, size in zip(module.dilation, module.kernel_size, strict=True)]
        totals = [reach if module.padding == "same" else 0 for reach in reversed(reaches)]
        return [entries for total in totals for entries in (total // 2, total - total // 2)]
    return [entries for entries in reversed(module.padding) for _ in range(2)]


LINEAR = Kind(nn.Linear)
CONVOLUTIONS = [
    _Convolution(nn.Conv1d, "length"),
    _Convolution(nn.Conv2d, "height", "width"),
    _Convolution(nn.Conv3d, "depth", "height", "width"),
]
ATTENTION = _Attention(nn.MultiheadAttention)

LAYERS = tuple(kind.base for kind in (LINEAR, *CONVOLUTIONS))
"""Those that have neurons: in the order of the axes behind their outputs' channels."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""What keeps neurons apart and has weights for each."""


def known_kinds() -> list[Kind]:
    """All kinds, Conv1D's if the Transformers library is in use: it is not imported in order to look."""
    base = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return [LINEAR, *CONVOLUTIONS, ATTENTION, *([] if base is None else [_Transposed(base)])]
