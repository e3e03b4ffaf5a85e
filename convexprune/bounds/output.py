"""A bound on the error of a network's outputs that is linear in the radii of its pruned layers."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from convexprune.bounds.observed import observed
from convexprune.bounds.propagation import Propagation
from convexprune.bounds.pruned import Pruned, PrunedLayer
from convexprune.errors import UnsupportedModule
from convexprune.network.choosing import check_module
from convexprune.network.forwards import Forward, evaluating, left_as_found
from convexprune.solvers.arrays import checked_radius
from convexprune.solvers.errors import InvalidInput


@dataclass(frozen=True)
class OutputBound:
    """‖f̂(x) − f(x)‖_F ≤ Σ c_l r_l, over all outputs and samples.

    Attributes:
        coefficients: c_l by layer; infinity where nothing is known of what follows the layer.
        norms: The operator norms that were needed, by module.
        reason: Why the first of the infinite coefficients is so.
    """

    coefficients: Mapping[str, float]
    norms: Mapping[str, float]
    reason: str | None

    def at(self, radii: Mapping[str, float]) -> float:
        """Σ c_l r_l for a radius r_l ≥ 0 of every layer; one of radius 0 is taken as unchanged, and adds nothing.

        Raises:
            InvalidInput: Radii of other layers than the coefficients'.
            InvalidTolerance: A radius that is no number ≥ 0.
        """
        if set(radii) != set(self.coefficients):
            raise InvalidInput(f"radii: expected those of {list(self.coefficients)}, found {list(radii)}")
        checked = {name: checked_radius(f"radius of {name}", radius) for name, radius in radii.items()}
        return math.fsum(c * checked[name] for name, c in self.coefficients.items() if c and checked[name])


def output_bound(
    model: nn.Module,
    layers: Iterable[PrunedLayer],
    batch: Any,
    *,
    mode: str = "parallel",
    forward: Forward | None = None,
    norms: Mapping[str, float] | None = None,
) -> OutputBound:
    """How much each layer's radius counts in the error of the network's outputs, with the weights as they are now.

    With inputs X of the original network, X̂ of the pruned one, and s the norm and ReLU that belong to the layer:

    - "parallel": ‖s(XU) − s(XW)‖_F ≤ r, so behind s the error is at most r + Lip(s)‖U‖₂·‖X̂ − X‖_F;
    - "cascade": ‖s(X̂U) − s(XW)‖_F ≤ r, so behind s the error is at most r, whatever came before.

    In parallel mode a coefficient depends on the weights behind the layer only. The radii are those of all calls and
    samples together. The bound is for exact arithmetic, for samples that do not see each other, and for inputs as
    large as those of the batch. Operator norms are exact for dense matrices up to 4096 in their smaller dimension, and
    Frobenius norms beyond; for convolutions see docs/networks.md.

    Args:
        model: Any network that torch.fx can trace, in evaluation; it is left as found.
        layers: The layers with radii; others are taken as unchanged.
        batch: As ``model`` takes it: a mapping of keyword arguments, a tuple or list of positional ones, else one. One
            sample is enough.
        mode: What the radii mean.
        forward: Called as ``forward(model, batch)``; it must return what the model returns.
        norms: Operator norms of modules unchanged since, from an earlier bound: they are not computed again.

    Raises:
        InvalidInput: No such layer, norm or mode, a layer named twice, or the model cannot be called on the batch.
    """
    listed = list(layers)
    names = [layer.name for layer in listed]
    if mode not in ("parallel", "cascade"):
        raise InvalidInput(f"mode: expected 'parallel' or 'cascade', found {mode!r}")
    if len(set(names)) < len(names):
        raise InvalidInput(f"layers: expected each name once, found {names}")
    pruned = Pruned(check_module(model), listed, mode == "cascade")
    with evaluating(model), left_as_found(model):
        call = observed(model, batch, forward)
        try:
            propagation = Propagation(model, pruned, norms or {})
        except UnsupportedModule as error:
            return OutputBound(dict.fromkeys(names, math.inf), {}, str(error))
        found = propagation.error_of_outputs(call)
    coefficients = {name: found.coefficients.get(name, 0.0) for name in names}
    reason = found.reason if math.inf in coefficients.values() else None
    return OutputBound(coefficients, propagation.norms, reason)
