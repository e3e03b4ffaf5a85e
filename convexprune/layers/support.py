"""Which modules are matrix products that can be written down, and why others are not."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from convexprune.errors import UnsupportedModule
from convexprune.layers.kinds import Kind, known_kinds
from convexprune.network.memory import Holders, overlaps_itself

_NAMES = "Linear, Conv1d, Conv2d, Conv3d, MultiheadAttention and the Transformers library's Conv1D"


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind whose class the module's extends, whether or not the module can be pruned."""
    return next((kind for kind in known_kinds() if isinstance(layer, kind.base)), None)


def supported(layer: nn.Module) -> Kind:
    """The module's kind.

    Raises:
        UnsupportedModule: The module is not a matrix product that can be written down.
    """
    reason, kind = unsupported(layer), kind_of(layer)
    if reason is not None or kind is None:
        raise UnsupportedModule(reason)
    return kind


def unsupported(layer: nn.Module) -> str | None:
    """Why the module cannot be pruned, and what to do about it; None if it can.

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
    if _has_own_forward(layer):
        return (
            f"{name} has a forward of its own, so its output may not be X U: replace it by a plain {kind.base.__name__}"
        )
    reasons = [_unsupported_parameter(layer, key, own.get(key)) for key in kind.parameters]
    reasons += _shared(own) if not any(reasons) else []
    return next((f"{name}'s {reason}" for reason in reasons if reason), None)


def altered(module: nn.Module) -> str | None:
    """Why a module may compute something else than its kind says; None if it does not."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks, which may change what it takes or returns"
    return "has a forward of its own" if _has_own_forward(module) else None


def _has_own_forward(module: nn.Module) -> bool:
    """Whether it overrides that of its kind.

    A _conv_forward of its own changes a convolution without touching forward (weight standardisation does this).
    """
    kind, names = kind_of(module), ("forward", "_conv_forward")
    base = type(module) if kind is None else kind.base
    same = all(getattr(type(module), name, None) is getattr(base, name, None) for name in names)
    return not same or "forward" in vars(module)


def _shared(own: Mapping[str, nn.Parameter]) -> Iterator[str]:
    holders = Holders((parameter, name) for name, parameter in own.items())
    for name, parameter in own.items():
        others = [other for other in holders.of(parameter) if other != name]
        if others:
            yield f"{name} shares memory with its {others[0]}, and each is pruned for itself: give it a copy"


def _unsupported_parameter(layer: nn.Module, name: str, value: nn.Parameter | None) -> str | None:
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
    if not value.numel():
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
