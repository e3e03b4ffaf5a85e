"""The model's call on a batch, and the traced forward's inputs and outputs against it."""

import inspect
from typing import Any

from torch import Tensor, fx, nn

from convexprune.network.forwards import Forward, run_model
from convexprune.network.memory import tensors_in
from convexprune.solvers.arrays import norm

Observed = tuple[Any, Any, Any]
"""The positional and keyword arguments of a call, and what it returned."""


def observed(model: nn.Module, batch: Any, forward: Forward | None) -> Observed | None:
    """The arguments and what is returned, of the model's one call; None if the network is more than this call."""
    calls: list[Any] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        # Copies: the forward may work in place.
        calls.append(fx.node.map_aggregate((args, dict(kwargs)), lambda v: v.clone() if isinstance(v, Tensor) else v))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        calls.append(output)

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        outputs = run_model(model, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()
    return (*calls[0], outputs) if len(calls) == 2 and calls[1] is outputs else None


def arguments(module: nn.Module, args: Any, kwargs: Any) -> list[Any]:
    """The inputs in the order of the graph's, with those that are left to their defaults."""
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    several = {name for name, p in signature.parameters.items() if p.kind is p.VAR_POSITIONAL}
    return [v for name, value in bound.arguments.items() for v in (value if name in several else [value])]


def agree(one: Any, other: Any) -> bool:
    """Whether the floating-point tensors are the same, up to rounding."""
    listed = [[t for t in tensors_in(tree) if t.is_floating_point()] for tree in (one, other)]
    shapes = [[t.shape for t in tensors] for tensors in listed]
    return shapes[0] == shapes[1] and all(
        float(norm(a - b)) <= 1e-3 * float(norm(b)) for a, b in zip(*listed, strict=True)
    )
