"""Where in a running model a layer's inputs are seen."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.errors import UnsupportedModule
from convexprune.solvers.errors import InvalidInput, NonFinite
from convexprune.watch import tensors_in

__all__ = ["Received", "Tap", "check_received", "tap", "tapped"]

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
    """

    module: nn.Module
    received: Callable[[Sequence[Any], Mapping[str, Any], Any], Received]
    plain: bool = True


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
        return Tap(owner, partial(_attended, owner), plain=False)
    return Tap(layer, _projected, plain=False) if _is_attention(layer) else Tap(layer, _first)


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
    """
    if not all(bool(tensor.isfinite().all()) for tensor in tensors_in(received)):
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


def _attended(owner: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], _output: Any) -> Tensor:
    """What ``out_proj`` receives: the output of a MultiheadAttention whose out_proj changes nothing."""
    layer = owner.get_submodule("out_proj")
    weight, bias = layer.get_parameter("weight"), layer.bias
    same = {"module.out_proj.weight": torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)}
    if isinstance(bias, Tensor):
        same["module.out_proj.bias"] = bias.new_zeros(weight.shape[1])
    with torch.no_grad():
        # Without ties: another parameter may be out_proj's weight too, and stays what it is.
        output = torch.func.functional_call(_Unhooked(owner), same, tuple(args), dict(kwargs), tie_weights=False)
    received: Tensor = output[0]
    return received
