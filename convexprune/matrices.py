"""Modules as matrices, samples first, and back; the only place where weights change.

A layer's own output is ``X U``: X [P, N] has one row for each position at which the layer is applied (its last column
is ones if the layer has a bias), U [N, M] the weights (its last row is the bias). Each group of a convolution is a pair
of matrices of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from convexprune.errors import UnsupportedModule
from convexprune.solvers.errors import NonFinite, ShapeMismatch

__all__ = ["input_matrices", "output_matrices", "unsupported", "weight_matrices", "write_back_"]


def weight_matrices(layer: nn.Module) -> tuple[Tensor, ...]:
    """Weights U [N, M] of each group: detached copies, in the module's dtype.

    Raises:
        UnsupportedModule: the module is not a matrix product that can be written down.
        NonFinite: the weights hold NaN or infinity.
    """
    module = _supported(layer)
    groups, fan_in, outputs = _sizes(module)
    U = module.weight.detach().reshape(groups, outputs, fan_in).mT
    if module.bias is not None:
        U = torch.cat([U, module.bias.detach().reshape(groups, 1, outputs)], dim=1)
    if not U.isfinite().all():
        raise NonFinite(f"the weights of this {type(layer).__name__} hold NaN or infinity: load or train it again")
    return tuple(group.clone(memory_format=torch.contiguous_format) for group in U)


def input_matrices(layer: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
    """Inputs X [P, N] of each group, from the module's input tensor; may share memory with it.

    Rows run over the leading dimensions of a Linear's ``inputs`` [..., features], and over (sample, height, width) of
    the output of a Conv2d, whose ``inputs`` are [samples, channels, height, width] or [channels, height, width].

    Raises:
        UnsupportedModule: the module is not a matrix product that can be written down.
        ShapeMismatch: the module could not have taken these inputs.
    """
    module = _supported(layer)
    if isinstance(module, nn.Linear):
        rows = _features(inputs, module.in_features)
    else:
        _check_axis(inputs, -3, module.in_channels, "[samples, channels, height, width]")
        rows = _positions(_patches(module, inputs.detach()), module.groups)
    if module.bias is None:
        return rows.flatten(1, 2).unbind()
    X = rows.new_ones(*rows.shape[:-1], rows.shape[-1] + 1)
    X[..., :-1] = rows
    return X.flatten(1, 2).unbind()


def output_matrices(layer: nn.Module, outputs: Tensor) -> tuple[Tensor, ...]:
    """The module's own output Y [P, M] of each group, rows as in ``input_matrices``; may share memory with ``outputs``.

    Raises:
        UnsupportedModule: the module is not a matrix product that can be written down.
        ShapeMismatch: the module could not have returned these outputs.
    """
    module = _supported(layer)
    if isinstance(module, nn.Linear):
        return _features(outputs, module.out_features).flatten(1, 2).unbind()
    _check_axis(outputs, -3, module.out_channels, "[samples, channels, height, width]")
    return _positions(outputs.detach().flatten(-2), module.groups).flatten(1, 2).unbind()


def write_back_(layer: nn.Module, weights: Tensor | Sequence[Tensor]) -> None:
    """Put weights U [N, M], one matrix for each group, into the module; the inverse of ``weight_matrices``.

    Values are rounded to the module's dtype. The Parameter objects, their ``requires_grad`` and ``grad`` stay.

    Raises:
        UnsupportedModule: the module is not a matrix product that can be written down.
        ShapeMismatch: the number or the shapes of the matrices differ from ``weight_matrices(layer)``.
        NonFinite: NaN, infinity, or a value beyond the range of the module's dtype. Nothing was changed.
    """
    module = _supported(layer)
    groups, fan_in, outputs = _sizes(module)
    shape = (fan_in + (module.bias is not None), outputs)
    matrices = [weights] if isinstance(weights, Tensor) else list(weights)
    found = [tuple(matrix.shape) for matrix in matrices]
    if found != [shape] * groups:
        raise ShapeMismatch(f"{type(layer).__name__} takes {groups} weight matrices of shape {shape}; got {found}")
    U = torch.stack([matrix.detach().to(module.weight) for matrix in matrices])
    if not U.isfinite().all():
        raise NonFinite(f"NaN or infinity as {module.weight.dtype}: the {type(layer).__name__} keeps its weights")
    with torch.no_grad():
        module.weight.copy_(U[:, :fan_in].mT.reshape(module.weight.shape))
        if module.bias is not None:
            module.bias.copy_(U[:, fan_in].flatten())


def unsupported(layer: nn.Module) -> str | None:
    """Why the module cannot be pruned, and what to do about it; None if it can.

    Linear and Conv2d can, and their subclasses that compute the same; their weights must be plain dense parameters.
    """
    kind, own = type(layer).__name__, dict(layer.named_parameters(recurse=False))
    if any(nn.parameter.is_lazy(parameter) for parameter in own.values()):
        return f"{kind} has no weights yet: run the model once on a batch"
    if "quantized" in type(layer).__module__:
        return f"{kind} is quantised: prune the floating-point model, then quantise it"
    base = next((base for base in (nn.Linear, nn.Conv2d) if isinstance(layer, base)), None)
    if base is None:
        held = ", ".join(name for name, parameter in own.items() if parameter.dim() >= 2)
        if not held:
            return f"{kind} holds no weight matrix of its own: choose Linear or Conv2d modules"
        return f"{kind} keeps weights in {held}, and only Linear and Conv2d can be pruned: leave this module out"
    # A _conv_forward of its own changes a convolution without touching forward (weight standardisation does this).
    same = all(getattr(type(layer), name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))
    if not same or "forward" in vars(layer):
        return f"{kind} has a forward of its own, so its output may not be X U: replace it by a plain {base.__name__}"
    reasons = (_unsupported_parameter(layer, name, own.get(name)) for name in ("weight", "bias"))
    return next((f"{kind}'s {reason}" for reason in reasons if reason), None)


def _unsupported_parameter(layer: nn.Module, name: str, value: nn.Parameter | None) -> str | None:
    if value is None:
        if getattr(layer, name) is None:
            return None
        return (
            f"{name} is computed from other tensors: make it permanent first, with "
            f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{name}"), torch.nn.utils.prune.remove(layer, '
            f'"{name}") or torch.nn.utils.remove_weight_norm(layer)'
        )
    if value.is_meta:
        return f"{name} is on the meta device, without values: load the weights first"
    if value.is_complex():
        return f"{name} is complex, and only real weights can be pruned: leave this module out"
    if not value.is_floating_point() or value.element_size() < 2:
        return f"{name} is quantised to {value.dtype}: prune the floating-point model, then quantise it"
    if type(value) is not nn.Parameter or value.layout != torch.strided:
        return f"{name} is not a plain dense tensor ({type(value).__name__}, {value.layout}): make it a dense Parameter"
    return None


def _supported(layer: nn.Module) -> nn.Linear | nn.Conv2d:
    reason = unsupported(layer)
    if reason is not None or not isinstance(layer, nn.Linear | nn.Conv2d):
        raise UnsupportedModule(reason)
    return layer


def _sizes(module: nn.Linear | nn.Conv2d) -> tuple[int, int, int]:
    """Groups, and for each group its inputs without the bias and its outputs."""
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    return groups, module.weight.shape[1:].numel(), module.weight.shape[0] // groups


def _check_axis(tensor: Tensor, axis: int, size: int, layout: str) -> None:
    if tensor.dim() < -axis or tensor.shape[axis] != size or (axis == -3 and tensor.dim() > 4):
        raise ShapeMismatch(f"expected {layout} with {size} at axis {axis}; got shape {tuple(tensor.shape)}")


def _patches(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """The receptive fields as [samples, fan-in of all groups, positions], or without samples for unbatched inputs."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    images = functional.pad(inputs if inputs.dim() == 4 else inputs[None], _padding(module), mode=mode)
    return functional.unfold(images, module.kernel_size, dilation=module.dilation, stride=module.stride)


def _padding(module: nn.Conv2d) -> list[int]:
    """Pixels added left, right, above and below."""
    if module.padding == "valid":
        return [0, 0, 0, 0]
    if isinstance(module.padding, str):
        totals = [gap * (size - 1) for gap, size in zip(module.dilation, module.kernel_size, strict=True)]
        return [pixels for total in reversed(totals) for pixels in (total // 2, total - total // 2)]
    height, width = module.padding
    return [width, width, height, height]


def _features(tensor: Tensor, size: int) -> Tensor:
    """[..., features] as [1, 1, positions, features]."""
    _check_axis(tensor, -1, size, "[..., features]")
    return tensor.detach().reshape(1, 1, tensor.shape[:-1].numel(), size)


def _positions(channels: Tensor, groups: int) -> Tensor:
    """[samples, channels, positions], or without samples, as [groups, samples, positions, channels of a group]."""
    samples = channels if channels.dim() == 3 else channels[None]
    count, size, positions = samples.shape
    return samples.reshape(count, groups, size // groups, positions).permute(1, 0, 3, 2)
