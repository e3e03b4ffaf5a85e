"""Where in a running model a layer's inputs are seen."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.errors import UnsupportedModule
from convexprune.network.watch import tensors_in
from convexprune.solvers.errors import InvalidInput, NonFinite

Received = Tensor | tuple[Tensor, ...]
"""What ``input_matrices`` takes: a module's raw input, or a MultiheadAttention's (query, key, value)."""


@dataclass(frozen=True, eq=False)
class Tap:
    """Where a layer's inputs are seen.

    Attributes:
        module: The module to put a forward hook on.
        received: The layer's raw inputs, from the positional and keyword arguments and the output of one call of
            ``module``. It may run the module once more, as it is now, without its hooks: call it in the hook.
        plain: Whether the module's output is the layer's output X U.
        first: Whether it is the first of what the module returns.
    """

    module: nn.Module
    received: Callable[[Sequence[Any], Mapping[str, Any], Any], Received]
    plain: bool = True
    first: bool = False

    def outputs(self, returned: Any) -> Tensor | None:
        """The layer's outputs among what the module returned; None where it does not return them."""
        found: Tensor | None = returned if self.plain else returned[0] if self.first else None
        return found

    def with_outputs(self, returned: Any, outputs: Tensor) -> Any:
        """What the module returned with others in their place."""
        return (outputs, *returned[1:]) if self.first else outputs


def tap(model: nn.Module, name: str) -> Tap:
    """Where the inputs of the layer of this qualified name are seen.

    A MultiheadAttention never calls its ``out_proj``: what that receives is seen at the MultiheadAttention itself.

    Raises:
        InvalidInput: The model has no such module.
        UnsupportedModule: It is compiled by ``torch.jit``.
    """
    layer = _named(model, name)
    parent, _, child = name.rpartition(".")
    if child == "out_proj" and _is_attention(owner := model.get_submodule(parent)):
        return Tap(owner, partial(_attended, owner), plain=False, first=True)
    return Tap(layer, _projected, plain=False) if _is_attention(layer) else Tap(layer, _first)


def norm_tap(norm: nn.Module) -> Tap:
    """Where a norm's outputs are seen."""
    return Tap(norm, _first)


@contextmanager
def tapped(taps: Mapping[str, Sequence[Tap]], see: Callable[[str, Received], None]) -> Iterator[None]:
    """Calls ``see(name, inputs)`` after each call of a tapped module; always unhooked."""

    def hook(name: str, tap: Tap, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        see(name, tap.received(args, kwargs, output))

    with ExitStack() as stack:
        # In front of others, which may change the output; the last one registered is the first to run.
        for name, several in reversed(list(taps.items())):
            for tap in several:
                stack.enter_context(
                    tap.module.register_forward_hook(partial(hook, name, tap), prepend=True, with_kwargs=True)
                )
        yield


def check_received(name: str, received: Received) -> None:
    """What the layer of this name receives is finite.

    Raises:
        NonFinite: It is not.
        UnsupportedModule: It is called inside a transform such as ``torch.vmap``, where entries cannot be looked at.
    """
    try:
        finite = all(bool(tensor.isfinite().all()) for tensor in tensors_in(received))
    except RuntimeError as error:
        if not any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors_in(received)):
            raise
        raise UnsupportedModule(
            f"layer {name!r} is called inside torch.vmap or another transform of torch.func, where no inputs can be "
            f"seen: call it on whole batches, or leave it out with layers='!{name}'"
        ) from error
    if not finite:
        raise NonFinite(f"NaN or infinity reaches layer {name!r}: check the layers before it and the data's scale")


def _named(model: nn.Module, name: str) -> nn.Module:
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModule(
            f"{type(model).__name__} is compiled by torch.jit: prune the Python module, then script it"
        )
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise InvalidInput(f"the model has no module {name!r}: take names from model.named_modules()") from error


def _is_attention(module: nn.Module) -> bool:
    """Whether it is a MultiheadAttention that computes as torch's own does; others may well call their modules."""
    own = type(module).forward is not nn.MultiheadAttention.forward or "forward" in vars(module)
    return isinstance(module, nn.MultiheadAttention) and not own


def _first(args: Sequence[Any], kwargs: Mapping[str, Any], _output: Any) -> Tensor:
    received: Tensor = args[0] if args else next(iter(kwargs.values()))
    return received


def _projected(args: Sequence[Any], kwargs: Mapping[str, Any], _output: Any) -> tuple[Tensor, ...]:
    names = ("query", "key", "value")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return tuple(given[name] for name in names)


class _Unhooked(nn.Module):
    """A module's forward without the hooks on the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def without_hooks(
    module: nn.Module, parameters: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """What the module returns with these values of its parameters, and without the hooks on it."""
    values = {f"module.{name}": value for name, value in parameters.items()}
    # Without ties: a parameter elsewhere may be one of these too, and stays what it is.
    return torch.func.functional_call(_Unhooked(module), values, tuple(args), dict(kwargs), tie_weights=False)


def attention_of(
    owner: nn.MultiheadAttention, projections: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """What a MultiheadAttention returns first where its queries, keys and values are these, each [..., embed_dim]."""
    same = torch.eye(owner.embed_dim, dtype=projections[0].dtype, device=projections[0].device)
    names = [name for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight") if getattr(owner, name) is not None]
    values = dict.fromkeys(names, same) if names else {"in_proj_weight": same.repeat(3, 1)}
    if owner.in_proj_bias is not None:
        values["in_proj_bias"] = owner.in_proj_bias.new_zeros(3 * owner.embed_dim)
    given = dict(zip(("query", "key", "value"), projections, strict=True))
    rest = {name: value for name, value in kwargs.items() if name not in given}
    returned: tuple[Tensor, ...] = without_hooks(owner, values, (*given.values(), *args[3:]), rest)
    return returned[0]


def _attended(owner: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], _output: Any) -> Tensor:
    """What ``out_proj`` receives: the output of a MultiheadAttention whose out_proj changes nothing."""
    layer = owner.get_submodule("out_proj")
    weight, bias = layer.get_parameter("weight"), layer.bias
    same = {"out_proj.weight": torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)}
    if isinstance(bias, Tensor):
        same["out_proj.bias"] = bias.new_zeros(weight.shape[1])
    with torch.no_grad():
        received: Tensor = without_hooks(owner, same, args, kwargs)[0]
    return received
