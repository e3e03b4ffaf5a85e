"""Convolutions along one, two and three axes: a row of X for each receptive field."""

from torch import Tensor, nn
from torch.nn import functional

from convexprune.layers.kinds import Group, Kind, check_axis
from convexprune.solvers.errors import ShapeMismatch

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}


def _groups(module: _Convolution) -> list[Group]:
    weights = module.weight.detach().chunk(module.groups)
    if module.bias is None:
        return [(weight, None) for weight in weights]
    return list(zip(weights, module.bias.detach().chunk(module.groups), strict=True))


def _inputs(module: _Convolution, inputs: Tensor) -> list[Tensor]:
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


def _outputs(module: _Convolution, outputs: Tensor) -> list[Tensor]:
    return list(_samples(module, outputs, module.out_channels).movedim(1, -1).chunk(module.groups, -1))


def _samples(module: _Convolution, tensor: Tensor, channels: int) -> Tensor:
    """[samples, channels, *positions], also of an unbatched tensor."""
    axes = len(module.kernel_size)
    check_axis(tensor, -1 - axes, channels, f"[samples, channels, {_AXES[axes]}]", most=axes + 2)
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
    Kind(base, ("weight", "bias"), _groups, _inputs, _outputs, _SETTINGS, axis=-1 - axes)
    for axes, base in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1)
]
