"""Modules as matrices, samples first, and back, and why some are none; the only place where weights change.

All that take a layer raise UnsupportedModule where it is not a matrix product that can be written down.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from convexprune.errors import UnsupportedModule
from convexprune.layers.emptied import Emptied
from convexprune.layers.kinds import Kind, known_kinds
from convexprune.layers.memory import Holders, overlaps_itself
from convexprune.solvers.errors import NonFinite, ShapeMismatch

_NAMES = "Linear, Conv1d, Conv2d, Conv3d, MultiheadAttention and the Transformers library's Conv1D"


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind whose class the module's extends, whether or not the module can be pruned."""
    return next((kind for kind in known_kinds() if isinstance(layer, kind.base)), None)


def supported(layer: nn.Module) -> Kind:
    """The module's kind; UnsupportedModule is raised where it cannot be pruned."""
    reason, kind = unsupported(layer), kind_of(layer)
    if reason is not None or kind is None:
        raise UnsupportedModule(reason)
    return kind


def unsupported(layer: nn.Module, *, empty: bool = False) -> str | None:
    """Why the module cannot be pruned, and what to do about it; None if it can, with ``empty`` also without entries.

    Linear, Conv1d, Conv2d, Conv3d, MultiheadAttention (its projections of queries, keys and values) and the
    Transformers library's Conv1D can, and their subclasses that compute the same; their weights must be plain dense
    parameters.
    """
    name, own = type(layer).__name__, dict(layer.named_parameters(recurse=False))
    if isinstance(layer, torch.jit.ScriptModule):
        return f"{name} is compiled by torch.jit: prune the Python module, then script it"
    if any(nn.parameter.is_lazy(parameter) for parameter in own.values()):
        return f"{name} has no weights yet: run the model once on a batch"
    if "quantized" in type(layer).__module__:
        return f"{name} is quantised: prune the floating-point model, then quantise it"
    kind = kind_of(layer)
    if kind is None:
        held = ", ".join(key for key, parameter in own.items() if parameter.dim() >= 2)
        if not held:
            return f"{name} holds no weight matrix of its own: choose {_NAMES.replace(' and ', ' or ')} modules"
        return f"{name} keeps weights in {held}, and only {_NAMES} can be pruned: leave this module out"
    if has_own_forward(layer):
        return (
            f"{name} has a forward of its own, so its output may not be X U: replace it by a plain {kind.base.__name__}"
        )
    each = (_unsupported_parameter(layer, key, own.get(key), empty) for key in kind.parameters)
    return next((f"{name}'s {reason}" for reason in chain(each, _shared(own)) if reason), None)


def altered(module: nn.Module) -> str | None:
    """Why a module may compute something else than its kind says; None if it does not."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks, which may change what it takes or returns"
    return "has a forward of its own" if has_own_forward(module) else None


def has_own_forward(module: nn.Module) -> bool:
    """Whether it overrides that of its kind.

    A _conv_forward of its own changes a convolution without touching forward (weight standardisation does this).
    """
    kind, names = kind_of(module), ("forward", "_conv_forward")
    base = type(module) if kind is None or isinstance(module, Emptied) else kind.base
    same = all(getattr(type(module), name, None) is getattr(base, name, None) for name in names)
    return not same or "forward" in vars(module)


def _shared(own: Mapping[str, nn.Parameter]) -> Iterator[str]:
    holders = Holders((parameter, name) for name, parameter in own.items())
    for name, parameter in own.items():
        others = [other for other in holders.of(parameter) if other != name]
        if others:
            yield f"{name} shares memory with its {others[0]}, and each is pruned for itself: give it a copy"


def _unsupported_parameter(layer: nn.Module, name: str, value: nn.Parameter | None, empty: bool) -> str | None:
    if value is None:
        if getattr(layer, name) is None:
            return None
        if name in layer._parameters:  # named_parameters lists a tensor under its first name
            return f"{name} is another of its parameters too, and each is pruned for itself: give it a copy"
        return (
            f"{name} is computed from other tensors: make it permanent first, with "
            "convexprune.masks.make_permanent_(model), "
            f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{name}"), torch.nn.utils.prune.remove(layer, '
            f'"{name}") or torch.nn.utils.remove_weight_norm(layer)'
        )
    if not value.numel() and not empty:
        return f"{name} has no entries (its shape is {list(value.shape)}): leave this module out"
    if value.is_meta:
        return f"{name} is on the meta device, without values: load the weights first"
    if value.is_complex():
        return f"{name} is complex, and only real weights can be pruned: leave this module out"
    if not value.is_floating_point() or value.element_size() < 2:
        return f"{name} is quantised to {value.dtype}: prune the floating-point model, then quantise it"
    if type(value) is not nn.Parameter or value.layout != torch.strided:
        return f"{name} is not a plain dense tensor ({type(value).__name__}, {value.layout}): make it a dense Parameter"
    if value.is_inference():
        return f"{name} was made in torch.inference_mode and cannot be written to: build the model outside, or clone it"
    if overlaps_itself(value):
        return f"{name} has several entries in one place of memory, as expand() makes them: give it a contiguous copy"
    return None


def weight_matrices(layer: nn.Module) -> tuple[Tensor, ...]:
    """Weights U [N, M] of each group: detached copies, in the module's dtype; NonFinite where one is not finite."""
    matrices = tuple(_matrix(weight, bias) for weight, bias in supported(layer).groups(layer))
    if not all(U.isfinite().all() for U in matrices):
        raise NonFinite(f"the weights of this {type(layer).__name__} hold NaN or infinity: load or train it again")
    return matrices


def gradient_matrices(layer: nn.Module) -> tuple[Tensor, ...]:
    """Gradients by U [N, M] of each group, from the parameters' ``grad``; zeros where there is none."""
    held = {name: p if p is None else p.grad for name, p in layer._parameters.items()}
    zeros = {name: torch.zeros_like(p) for name, p in layer._parameters.items() if p is not None and p.grad is None}
    gradients = SimpleNamespace(**vars(layer) | held | zeros)
    return tuple(_matrix(weight, bias) for weight, bias in supported(layer).groups(gradients))


def input_matrices(layer: nn.Module, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Inputs X [P, N] of each group, from the module's input tensor; may share memory with it.

    Rows run over the leading dimensions of a Linear's ``inputs`` [..., features], and over the samples and positions of
    the output of a convolution, whose ``inputs`` are [samples, channels, height, width] or [channels, height, width],
    with as many axes behind the channels as it has. ``inputs`` of a MultiheadAttention are (query, key, value), each
    [..., features]. ShapeMismatch is raised where the module could not have taken these inputs.
    """
    kind = supported(layer)
    groups = zip(kind.inputs(layer, inputs), kind.groups(layer), strict=True)
    return tuple(_rows(received, weight.shape[1:], bias is not None) for received, (weight, bias) in groups)


def input_positions(layer: nn.Module, inputs: Tensor | Sequence[Tensor]) -> tuple[torch.Size, ...]:
    """The lengths of the axes that the rows of each group's X run over, the last the fastest: P is their product.

    ShapeMismatch is raised as by ``input_matrices``.
    """
    kind = supported(layer)
    groups = zip(kind.inputs(layer, inputs), kind.groups(layer), strict=True)
    return tuple(received.shape[: received.dim() - weight.dim() + 1] for received, (weight, _) in groups)


def output_matrices(layer: nn.Module, outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The module's own output Y [P, M] of each group, rows as in ``input_matrices``; may share memory with ``outputs``.

    ``outputs`` of a MultiheadAttention are its three projections, each [..., features], which it does not return.
    ShapeMismatch is raised where the module could not have returned these outputs.
    """
    computed = supported(layer).outputs(layer, outputs)
    return tuple(Y.reshape(Y.shape[:-1].numel(), Y.shape[-1]) for Y in computed)


def write_back_(layer: nn.Module, weights: Tensor | Sequence[Tensor]) -> None:
    """Put weights U [N, M], one matrix for each group, into the module; the inverse of ``weight_matrices``.

    Values are rounded to the module's dtype. The Parameter objects, their ``requires_grad`` and ``grad`` stay.

    Raises:
        ShapeMismatch: the number or the shapes of the matrices differ from ``weight_matrices(layer)``.
        NonFinite: NaN, infinity, or a value beyond the range of the module's dtype. Nothing was changed.
    """
    groups = supported(layer).groups(layer)
    expected = [(weight.shape[1:].numel() + (bias is not None), len(weight)) for weight, bias in groups]
    matrices = [weights] if isinstance(weights, Tensor) else list(weights)
    found = [tuple(matrix.shape) for matrix in matrices]
    if found != expected:
        shapes = expected[0] if len(set(expected)) == 1 else expected
        takes = f"{len(expected)} weight matrices of shape {shapes}"
        raise ShapeMismatch(f"{type(layer).__name__} takes {takes}; got {found}")
    # Copies: the matrices may be views of the very weights that are written.
    new = [U.detach().to(weight, copy=True) for U, (weight, _) in zip(matrices, groups, strict=True)]
    if not all(U.isfinite().all() for U in new):
        raise NonFinite(f"NaN or infinity as {groups[0][0].dtype}: the {type(layer).__name__} keeps its weights")
    for U, (weight, bias) in zip(new, groups, strict=True):
        weight.copy_(U[: weight.shape[1:].numel()].mT.reshape(weight.shape))
        if bias is not None:
            bias.copy_(U[-1])


def _matrix(weight: Tensor, bias: Tensor | None) -> Tensor:
    U = weight.flatten(1).mT
    return U.clone(memory_format=torch.contiguous_format) if bias is None else torch.cat([U, bias[None]])


def _rows(inputs: Tensor, fan_in: torch.Size, biased: bool) -> Tensor:
    """[*positions, *fan-in] as [P, N], with a last column of ones for the bias."""
    positions = inputs.shape[: inputs.dim() - len(fan_in)]
    if not biased:
        return inputs.reshape(positions.numel(), fan_in.numel())
    X = inputs.new_ones(*positions, fan_in.numel() + 1)
    X[..., :-1].view(inputs.shape).copy_(inputs)
    return X.reshape(positions.numel(), fan_in.numel() + 1)
