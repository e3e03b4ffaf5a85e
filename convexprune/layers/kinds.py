"""The kinds of modules whose weights can be pruned: how each is a matrix product, group by group.

Linear, and the Transformers library's Conv1D, a Linear whose weight is kept transposed; convolutions along one, two and
three axes, with a row of X for each receptive field; and the projections of queries, keys and values in a
MultiheadAttention, three products with inputs of their own.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from convexprune.solvers.errors import ShapeMismatch

Module: TypeAlias = Any
"""A module of one kind."""

Raw: TypeAlias = Any
"""What a module receives or computes: a tensor, or a MultiheadAttention's three."""

Group = tuple[Tensor, Tensor | None]
"""The weight [M, *fan-in] and the bias [M] of one group."""


@dataclass(frozen=True)
class Kind:
    """A kind of module whose output is a matrix product, group by group. The functions take such a module first.

    Attributes:
        base: The class; subclasses that compute the same are of the kind.
        parameters: Names of the module's tensors that make up U.
        groups: Detached views of these tensors, for what is written there to be in the module.
        inputs: Inputs [*positions, *fan-in] of each group, from what the module received; views where possible.
        outputs: Outputs [*positions, M] of each group, from what the module computed; views where possible.
        settings: Names of the attributes that say how ``inputs`` are made.
        axis: Of what the module returns, the one along which its outputs lie, counted from the end.
    """

    base: type[nn.Module]
    parameters: tuple[str, ...]
    groups: Callable[[Module], Sequence[Group]]
    inputs: Callable[[Module, Raw], Sequence[Tensor]]
    outputs: Callable[[Module, Raw], Sequence[Tensor]]
    settings: tuple[str, ...] = ()
    axis: int = -1


def _check_axis(tensor: Tensor, axis: int, size: int, layout: str, most: int | None = None) -> None:
    """The tensor has this size at the axis, counted from the end, and at most so many axes.

    Raises:
        ShapeMismatch: It has not.
    """
    if tensor.dim() < -axis or tensor.shape[axis] != size or (most is not None and tensor.dim() > most):
        raise ShapeMismatch(f"expected {layout} with {size} at axis {axis}; got shape {tuple(tensor.shape)}")


def _features(tensor: Tensor, size: int) -> Tensor:
    """[..., features], detached; ShapeMismatch where the last axis is of another size."""
    _check_axis(tensor, -1, size, "[..., features]")
    return tensor.detach()


def _linear(base: type[nn.Module], inputs_axis: int) -> Kind:
    def groups(module: Module) -> list[Group]:
        weight = module.weight.detach()
        return [(weight.mT if inputs_axis == 0 else weight, None if module.bias is None else module.bias.detach())]

    def inputs(module: Module, received: Tensor) -> list[Tensor]:
        return [_features(received, module.weight.shape[inputs_axis])]

    def outputs(module: Module, computed: Tensor) -> list[Tensor]:
        return [_features(computed, module.weight.shape[1 - inputs_axis])]

    return Kind(base, ("weight", "bias"), groups, inputs, outputs)


LINEAR = _linear(nn.Linear, inputs_axis=1)


_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}


def _filters(module: _Convolution) -> list[Group]:
    weights = module.weight.detach().chunk(module.groups)
    if module.bias is None:
        return [(weight, None) for weight in weights]
    return list(zip(weights, module.bias.detach().chunk(module.groups), strict=True))


def _windows(module: _Convolution, inputs: Tensor) -> list[Tensor]:
    """Windows over the padded input, which share its memory."""
    windows = _padded(module, _samples(module, inputs, module.in_channels))
    sizes = zip(module.kernel_size, module.dilation, module.stride, strict=True)
    for axis, (kernel, dilation, stride) in enumerate(sizes, start=2):
        reach = dilation * (kernel - 1) + 1
        if windows.shape[axis] < reach:
            found = f"the {type(module).__name__} reaches over {reach} positions of an axis"
            raise ShapeMismatch(f"{found}; got {windows.shape[axis]} with padding, inputs {tuple(inputs.shape)}")
        windows = windows.unfold(axis, reach, stride)[..., ::dilation]
    channels = 1 + len(module.kernel_size)  # behind the positions, before the kernel's axes
    return list(windows.movedim(1, channels).chunk(module.groups, channels))


def _maps(module: _Convolution, outputs: Tensor) -> list[Tensor]:
    return list(_samples(module, outputs, module.out_channels).movedim(1, -1).chunk(module.groups, -1))


def _samples(module: _Convolution, tensor: Tensor, channels: int) -> Tensor:
    """[samples, channels, *positions], also of an unbatched tensor."""
    axes = len(module.kernel_size)
    _check_axis(tensor, -1 - axes, channels, f"[samples, channels, {_AXES[axes]}]", most=axes + 2)
    return tensor.detach() if tensor.dim() == axes + 2 else tensor.detach()[None]


def _padded(module: _Convolution, inputs: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(inputs, _padding(module), mode=mode)


def _padding(module: _Convolution) -> list[int]:
    """Entries added before and behind, from the last axis to the first."""
    if module.padding == "valid":
        return [0] * (2 * len(module.kernel_size))
    if isinstance(module.padding, str):
        totals = [gap * (size - 1) for gap, size in zip(module.dilation, module.kernel_size, strict=True)]
        return [entries for total in reversed(totals) for entries in (total // 2, total - total // 2)]
    return [entries for entries in reversed(module.padding) for _ in range(2)]


_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode")

CONVOLUTIONS = [
    Kind(base, ("weight", "bias"), _filters, _windows, _maps, _SETTINGS, axis=-1 - axes)
    for axes, base in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1)
]


def _projections(module: nn.MultiheadAttention) -> list[Group]:
    joint, bias = module.in_proj_weight, module.in_proj_bias
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if joint is None else joint.chunk(3)
    biases = [None] * 3 if bias is None else bias.detach().chunk(3)
    return [(weight.detach(), shift) for weight, shift in zip(weights, biases, strict=True)]


def _attention_inputs(module: nn.MultiheadAttention, received: Sequence[Tensor]) -> list[Tensor]:
    return _three(received, (module.embed_dim, module.kdim, module.vdim))


def _attention_outputs(module: nn.MultiheadAttention, projected: Sequence[Tensor]) -> list[Tensor]:
    return _three(projected, (module.embed_dim,) * 3)


def _three(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    if isinstance(tensors, Tensor) or len(tensors) != 3:
        found = f"shape {tuple(tensors.shape)}" if isinstance(tensors, Tensor) else f"{len(tensors)} tensors"
        raise ShapeMismatch(f"MultiheadAttention has three projections: expected (query, key, value); got {found}")
    return [_features(tensor, size) for tensor, size in zip(tensors, sizes, strict=True)]


ATTENTION = Kind(
    nn.MultiheadAttention,
    ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"),
    _projections,
    _attention_inputs,
    _attention_outputs,
)

LAYERS = tuple(kind.base for kind in (LINEAR, *CONVOLUTIONS))
"""Those that have neurons: in the order of the axes behind their outputs' channels."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""What keeps neurons apart and has weights for each."""


def known_kinds() -> list[Kind]:
    """All kinds, Conv1D's if the Transformers library is in use: it is not imported in order to look."""
    base = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    own = [] if base is None else [_linear(base, inputs_axis=0)]
    return [LINEAR, *CONVOLUTIONS, ATTENTION, *own]
