"""The pruned layers of a network, and bounds on the errors of single tensors, linear in the layers' radii."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from torch import Tensor, nn

from convexprune.layers.kinds import ATTENTION, NORMS
from convexprune.layers.support import kind_of
from convexprune.network.memory import Holders, place_of, tensors_in
from convexprune.solvers.errors import InvalidInput


@dataclass(frozen=True)
class PrunedLayer:
    """A pruned layer, and what lies between it and the place where its radius holds.

    Attributes:
        name: Of a module that can be pruned, and of those that share its weights. For one that is only used inside
            another, and for a MultiheadAttention, no bound is known.
        relu: Whether the radius holds behind the ReLU that follows (fits "relu-ball" and "net-trim").
        norm: Name of the BatchNorm that comes first and is part of the program; its shift may have changed as well.
    """

    name: str
    relu: bool = False
    norm: str | None = None


@dataclass(frozen=True)
class TensorError:
    """A bound Σ c_l r_l on a tensor's error.

    Between a layer and the place where its radius holds, behind the ``pending`` steps (a norm, then "relu"), ``factor``
    times this radius is to be added there.
    """

    coefficients: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None  # why the first of the infinite coefficients is so
    layer: str = ""
    factor: float = 1.0
    pending: tuple[nn.Module | str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.coefficients or self.pending)

    def times(self, constant: float, reason: str | None = None) -> "TensorError":
        """Behind an operation with this Lipschitz constant."""
        scaled = {name: value * constant for name, value in self.coefficients.items()} if constant else {}
        return replace(self, coefficients=scaled, reason=self.reason or reason, factor=self.factor * constant)

    def behind_step(self, constant: float) -> "TensorError":
        """Behind the first pending step, with this constant: it does not multiply the radius, which holds behind it."""
        return replace(self.times(constant), factor=self.factor, pending=self.pending[1:]).complete()

    def complete(self) -> "TensorError":
        """With the layer's radius, unless steps are pending."""
        if self.pending:
            return self
        return summed([TensorError(self.coefficients, self.reason), TensorError({self.layer: self.factor})])

    def interrupted(self, where: str) -> "TensorError":
        """Where pending steps cannot come any more, so that nothing is known of the layer."""
        if not self.pending:
            return self
        step = "ReLU" if self.pending[0] == "relu" else "norm"
        why = f"the radius of {self.layer!r} holds behind its {step}, and its outputs reach {where} first"
        return summed([TensorError(self.coefficients, self.reason), unbounded([self.layer], why)])


def unbounded(names: Iterable[str], reason: str) -> TensorError:
    """Nothing is known of what these layers do."""
    return TensorError(dict.fromkeys(names, math.inf), reason)


def combined(errors: Iterable[TensorError], norm: Callable[..., float]) -> TensorError:
    """Σ (norm of c_l) r_l: by Minkowski's inequality it bounds the norm of Σ c_l r_l."""
    listed = list(errors)
    names = dict.fromkeys(name for error in listed for name in error.coefficients)
    totals = {name: norm(*(error.coefficients.get(name, 0.0) for error in listed)) for name in names}
    return TensorError(totals, next((error.reason for error in listed if error.reason), None))


def summed(errors: Iterable[TensorError]) -> TensorError:
    """Of a sum of tensors."""
    return combined(errors, lambda *values: math.fsum(values))


def is_product(module: nn.Module | None) -> bool:
    """Whether its output is one matrix product of its input, so that their norms say all."""
    kind = None if module is None else kind_of(module)
    return kind is not None and kind is not ATTENTION


class PrunedWeights:
    """The pruned layers by module, and the tensors that changed with them."""

    def __init__(self, model: nn.Module, layers: list[PrunedLayer]) -> None:
        self.names = [layer.name for layer in layers]
        self.errors: list[tuple[nn.Module, TensorError]] = []
        changed: list[tuple[Tensor, str]] = []
        for layer in layers:
            module = _module(model, layer.name, "a module that can be pruned", lambda m: kind_of(m) is not None)
            named = [] if layer.norm is None else [layer.norm]
            norms = [_module(model, name, "a BatchNorm", lambda m: isinstance(m, NORMS)) for name in named]
            if is_product(module):
                pending: tuple[nn.Module | str, ...] = (*norms, "relu") if layer.relu else tuple(norms)
                self.errors.append((module, TensorError(layer=layer.name, pending=pending)))
            changed += [(tensor, layer.name) for part in (module, *norms) for tensor in part.parameters()]
        self.holders = Holders(changed)
        tensors = (tensor for module in model.modules() for tensor in tensors_in(vars(module)))
        # What a forward computes of these is not in its graph.
        self.aliased = self._owners(tensor for tensor in tensors if not isinstance(tensor, nn.Parameter))

    def held_by(self, holder: object) -> list[str]:
        """The pruned layers with weights in a module or tensor, or parts of these."""
        own = (holder.parameters(), holder.buffers()) if isinstance(holder, nn.Module) else (tensors_in(holder),)
        return self._owners(chain(*own))

    def _owners(self, tensors: Iterable[Tensor]) -> list[str]:
        return list(dict.fromkeys(name for tensor in tensors for name in self.holders.of(tensor)))

    def error(self, module: nn.Module | None) -> TensorError | None:
        """The error that a pruned layer itself makes; None for other modules."""
        return next((error for layer, error in self.errors if module is layer or _same(module, layer)), None)


def _module(model: nn.Module, name: str, expected: str, fits: Callable[[nn.Module], bool]) -> nn.Module:
    module: nn.Module | None = dict(model.named_modules(remove_duplicate=False)).get(name)
    if module is None or not fits(module):
        found = "no such module" if module is None else type(module).__name__
        raise InvalidInput(f"{name}: expected the name of {expected} in the model, found {found}")
    return module


def _same(one: nn.Module | None, other: nn.Module) -> bool:
    """Whether two layers of a kind share all their parameters."""
    if one is None or type(one) is not type(other):
        return False
    own, others = ({n: place_of(p) for n, p in m.named_parameters(recurse=False)} for m in (one, other))
    return own == others and "weight" in own and one.get_parameter("weight").numel() > 0
