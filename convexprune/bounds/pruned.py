"""The pruned layers of a network, and where their weights are used."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn

from convexprune.bounds.tensor_error import TensorError
from convexprune.layers.kinds import ATTENTION, NORMS
from convexprune.layers.support import kind_of
from convexprune.network.memory import Holders, place_of, tensors_in
from convexprune.solvers.errors import InvalidInput


@dataclass(frozen=True)
class PrunedLayer:
    """A pruned layer, and what lies between it and the place where its radius holds.

    Attributes:
        name: Of a module that can be pruned; others that share its weights are meant too. For one that is only used
            inside another, and for a MultiheadAttention, no bound is known.
        relu: Whether the radius holds behind the ReLU that follows (fits "relu-ball" and "net-trim").
        norm: Name of the BatchNorm that comes first and is part of the program; its shift may have changed as well.
    """

    name: str
    relu: bool = False
    norm: str | None = None


def is_product(module: nn.Module | None) -> bool:
    """Whether its output is one matrix product of its input, so that their norms say all."""
    kind = None if module is None else kind_of(module)
    return kind is not None and kind is not ATTENTION


class Pruned:
    """The pruned layers by module, and the tensors that changed with them."""

    def __init__(self, model: nn.Module, layers: list[PrunedLayer], cascade: bool) -> None:
        self.cascade, self.names = cascade, [layer.name for layer in layers]
        self.errors: list[tuple[nn.Module, TensorError]] = []
        changed: list[tuple[Tensor, str]] = []
        for layer in layers:
            module = _module(model, layer.name, "a module that can be pruned", lambda m: kind_of(m) is not None)
            norms = [] if layer.norm is None else [_module(model, layer.norm, "a BatchNorm", _is_norm)]
            if is_product(module):
                awaited = (*norms, *(["relu"] if layer.relu else []))
                self.errors.append((module, TensorError(own=layer.name, awaited=awaited)))
            changed += [(tensor, layer.name) for part in (module, *norms) for tensor in part.parameters()]
        self.holders = Holders(changed)
        tensors = (tensor for module in model.modules() for tensor in tensors_in(vars(module)))
        others = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
        self.aliased = self._owners(others)  # what a forward computes of these is not in its graph

    def held_by(self, holder: nn.Module | Tensor | None) -> list[str]:
        """The pruned layers with weights in it, or parts of these."""
        own = (holder.parameters(), holder.buffers()) if isinstance(holder, nn.Module) else (tensors_in(holder),)
        return self._owners(chain(*own))

    def _owners(self, tensors: Iterable[Tensor]) -> list[str]:
        return list(dict.fromkeys(name for tensor in tensors for name in self.holders.of(tensor)))

    def error(self, module: nn.Module | None) -> TensorError | None:
        """The error that a pruned layer itself makes; None for other modules."""
        return next((error for layer, error in self.errors if module is layer or _same(module, layer)), None)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, NORMS)


def _module(model: nn.Module, name: str, expected: str, wanted: Callable[[nn.Module], bool]) -> nn.Module:
    module: nn.Module | None = None
    with suppress(AttributeError):
        module = model.get_submodule(name)
    if module is None or not wanted(module):
        found = "no such module" if module is None else type(module).__name__
        raise InvalidInput(f"{name}: expected the name of {expected} in the model, found {found}")
    return module


def _same(one: nn.Module | None, other: nn.Module) -> bool:
    """Whether two layers of a kind share all their parameters."""
    if one is None or type(one) is not type(other):
        return False
    own = [dict(module.named_parameters(recurse=False)) for module in (one, other)]
    places = [{name: place_of(tensor) for name, tensor in tensors.items()} for tensors in own]
    return places[0] == places[1] and "weight" in own[0] and own[0]["weight"].numel() > 0
