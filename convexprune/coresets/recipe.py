"""How a coreset is to be taken of a network, the same for all its layers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from convexprune.coresets.base import Edges, Method, Neurons, Product
from convexprune.coresets.baseline import Uniform
from convexprune.coresets.network import product_error
from convexprune.coresets.sizes import Size, checked_size, choose, items_kept
from convexprune.network.capture import Capture
from convexprune.solvers.errors import InvalidInput

Scope = Literal["layer", "network"]
Order = Literal["bottom-up", "top-down"]
See = Callable[[Iterable[str]], Capture | None]
"""The inputs of the named layers, or None if there are no data."""

_BASELINES = 5  # uniform samples whose errors are averaged


@dataclass(frozen=True, eq=False)
class Recipe:
    """Of ``coreset_prune_``; ``tell`` is its ``progress``.

    Raises:
        InvalidInput: An unknown scope or order, a size that is not one ratio for the scope "network", or an order of
            removal, or none, for single weights.
        InvalidTolerance: A ratio outside (0, 1] for the scope "network".
    """

    method: Method
    size: Size | Mapping[str, Size]
    scope: Scope
    order: Order
    remove: bool
    baseline: bool
    rng: np.random.Generator
    tell: Callable[[str, int, int], None]

    def __post_init__(self) -> None:
        for name, value, known in (
            ("scope", self.scope, ("layer", "network")),
            ("order", self.order, ("bottom-up", "top-down")),
        ):
            if value not in known:
                raise InvalidInput(f"{name}: expected {' or '.join(map(repr, known))}, found {value!r}")
        if self.scope == "network" and not isinstance(self.size, float):
            raise InvalidInput(f"size: expected one ratio to share out over the network, found {self.size!r}")
        if self.scope == "network":
            checked_size("the network", self.size)
        if self.method.items == "edges" and (self.order != "bottom-up" or not self.remove):
            raise InvalidInput("order, remove: they are about neurons, and single weights were chosen; leave them out")

    def budget(self, weights: int) -> int:
        """How many of the network's weights are to be left, for the scope "network"."""
        assert isinstance(self.size, float)  # noqa: S101 - checked above
        return items_kept(self.size, weights)

    def uniform_error(self, parts: Sequence[tuple[Neurons | Edges, int, list[Product]]]) -> float:
        """The mean error of uniform samples of so many items of each part; NaN if it was not asked for."""
        if not self.baseline:
            return float("nan")
        uniform, products = Uniform(self.method.items), [product for part in parts for product in part[2]]
        scores = [uniform.scores(layer) for layer, _, _ in parts]
        [rng] = self.rng.spawn(1)  # so that asking for a baseline changes no sample
        errors = []
        for _ in range(_BASELINES):
            factors = [choose(uniform, s, kept, rng).factors for s, (_, kept, _) in zip(scores, parts, strict=True)]
            spreads = [spread(F, part[2]) for F, part in zip(factors, parts, strict=True)]
            errors.append(product_error(products, [F for group in spreads for F in group]))
        return sum(errors) / len(errors)


def spread(factors: Tensor, products: list[Product]) -> list[Tensor]:
    """The factors of each product's weights: a neuron's for all its rows; a weight's own."""
    if len(products) == 1 and factors.numel() == products[0].weights.numel():
        return [factors.reshape(products[0].weights.shape)]
    return [factors[0].repeat_interleave(len(p.weights) // factors.shape[1])[:, None] for p in products]
