"""Single weights by how much of an output they make up on a sample of inputs, output by output.

Source: C. Baykal, L. Liebenwein, I. Gilitschenski, D. Feldman and D. Rus, Data-dependent coresets for compressing
neural networks with applications to generalization bounds, ICLR 2019. The paper could not be read: the formulas are
recalled, and agree with the authors' later code as far as that goes. K and λ* stand for constants of an assumption on
the distribution of the inputs that nobody knows; here, as there in the experiments, they are log(ηη*) and half of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.coresets.base import (
    Edges,
    Guarantee,
    Items,
    Method,
    Neurons,
    Scores,
    expect_edges,
)
from convexprune.coresets.sampling import Sampling, whole_draws
from convexprune.coresets.sensitivities import (
    cancellation,
    edge_sensitivities,
    enough_samples,
    inputs_of,
    nonnegative,
)
from convexprune.report.report import Assumption


@dataclass(frozen=True)
class Place:
    """What the theory wants to know of a layer's network.

    Attributes:
        neurons: η, the outputs of all layers together.
        widest: η*, the most outputs of a layer.
        layers: L − 1, how many layers of weights there are.
        ratios: Of this layer and of those behind it, max_i mean_S Σ|wa|/|Σwa|.
        biased: Whether any layer has a bias.
    """

    neurons: int
    widest: int
    layers: int
    ratios: tuple[float, ...]
    biased: bool = False

    @property
    def spread(self) -> float:
        """K = log(ηη*), but at least 1."""
        return max(1.0, math.log(self.neurons * self.widest))

    def samples(self, delta: float) -> int:
        """|S| = ⌈log(8ηη*/δ)·K⌉."""
        return math.ceil(self._log(delta) * self.spread)

    def kappa(self, delta: float) -> float:
        """κ = √(2λ*)·(1 + √(2λ*)·log(8ηη*/δ)) with λ* = K/2: what a mean over S may miss."""
        return math.sqrt(self.spread) * (1 + math.sqrt(self.spread) * self._log(delta))

    def onwards(self, delta: float) -> float:
        """Δ̂^{ℓ→} = Π Δ̂^k over this layer and those behind it, Δ̂^k = the k-th ratio + κ."""
        return math.prod(ratio + self.kappa(delta) for ratio in self.ratios)

    def draws(self, sums: Tensor, guarantee: Guarantee) -> Tensor:
        """m [G] = ⌈8·S·K·log(8η/δ)/ε_ℓ²⌉ for sums S [G], with ε_ℓ = ε/(2(L − 1)Δ̂^{ℓ→}); 0 where S is 0."""
        finer = 2 * self.layers * self.onwards(guarantee.delta) / guarantee.eps
        factor = 8 * self.spread * math.log(8 * self.neurons / guarantee.delta) * finer * finer
        return whole_draws(torch.where(sums > 0, factor * sums, 0.0))

    def _log(self, delta: float) -> float:
        return math.log(8 * self.neurons * self.widest / delta)


@dataclass(frozen=True, eq=False)
class _Measured:
    """A layer on the sample: sensitivities [2M, N], the ratio, how often it was undefined."""

    s: Tensor
    ratio: float
    cancelled: int


@dataclass(frozen=True)
class CoreNet(Method):
    """Coreset of each output's positive and negative weights (Baykal et al. 2019): s_k = max_S w_k a_k/Σ w a.

    Made for fully connected ReLU networks; biases are kept as they are. Scores need the whole network at once, from the
    input on: a layer that is scored alone is taken for all of it. Groups of a convolution are one layer. A budget is
    shared in proportion to the sums of sensitivities, as the draws are within a layer.

    Args:
        delta: The probability of failure for which Δ̂ is reported and, without a guarantee, the size of the sample
            checked.
        sampling: See ``SAMPLINGS``.

    Raises:
        InvalidTolerance: delta is no probability between 0 and 1.
    """

    delta: float = 0.05
    items: ClassVar[Items] = "edges"
    needs_inputs: ClassVar[bool] = True
    whole_network: ClassVar[bool] = True
    sampling: Sampling = "fixed"

    def __post_init__(self) -> None:
        Guarantee(1.0, self.delta)  # checks delta

    def scores(self, layer: Neurons | Edges) -> Scores:
        """Sensitivities of a layer's weights, as if it were the whole network.

        Raises:
            InvalidInput: Neurons, or no inputs.
        """
        return self.score([layer])[0]

    def score(self, layers: Sequence[Neurons | Edges]) -> list[Scores]:
        """Sensitivities of all layers' weights, from the input on.

        Raises:
            InvalidInput: Neurons, or no inputs.
        """
        edges = [expect_edges(layer, "corenet") for layer in layers]
        measured = [_measure(layer) for layer in edges]
        places = _places(edges, measured)
        return [self._scores(e, m, places[e.name]) for e, m in zip(edges, measured, strict=True)]

    def _scores(self, layer: Edges, found: _Measured, place: Place) -> Scores:
        sums = found.s.sum(1)
        outputs = "each of the network's outputs" if place.layers > 1 else "each of the layer's outputs"
        return Scores(
            found.s,
            partial(place.draws, sums),
            f"{outputs} within (1 ± eps) of its value, for an input that is drawn as the sample was, with probability "
            "1 − delta",
            partial(self._assumptions, layer, found, place),
            shares=sums,
            terms={
                "S": float(sums.sum()),
                "K": place.spread,
                "kappa": place.kappa(self.delta),
                "cancellation": found.ratio,
                "Delta": place.ratios[0] + place.kappa(self.delta),
                "Delta_onwards": place.onwards(self.delta),
            },
        )

    def _assumptions(
        self, layer: Edges, found: _Measured, place: Place, guarantee: Guarantee | None
    ) -> tuple[Assumption, ...]:
        X, positions = inputs_of(layer.product, layer.name), layer.product.positions
        pairs, delta = len(X) * len(found.s) // 2, (guarantee or self).delta
        return (
            nonnegative(X),
            Assumption("a ReLU follows, or nothing", _relu_or_output(layer.activation)),
            Assumption("the layer is fully connected", positions == 1),
            Assumption("no layer has a bias: the theory has none", not place.biased),
            Assumption(f"Σ w a ≠ 0 ({found.cancelled} exceptions in {pairs} outputs)", found.cancelled == 0),
            enough_samples(len(X) // positions, place.samples(delta), delta),
            Assumption("the shares of an output have tails as thin as K and λ* = K/2 say", None),
        )


def _relu_or_output(activation: str | None) -> bool | None:
    return None if activation is None else activation in ("relu", "output")


def _measure(layer: Edges) -> _Measured:
    U, X = layer.product.weights, inputs_of(layer.product, layer.name)
    return _Measured(edge_sensitivities(U, X), *cancellation(U, X))


def _places(layers: Sequence[Edges], measured: Sequence[_Measured]) -> dict[str, Place]:
    """By name; the groups of a convolution share one."""
    outputs: dict[str, int] = {}
    ratios: dict[str, float] = {}
    for layer, found in zip(layers, measured, strict=True):
        outputs[layer.name] = outputs.get(layer.name, 0) + layer.product.weights.shape[1]
        ratios[layer.name] = max(ratios.get(layer.name, 1.0), found.ratio)
    from_here, biased = list(ratios.values()), any(layer.biased for layer in layers)
    return {
        name: Place(sum(outputs.values()), max(outputs.values()), len(outputs), tuple(from_here[number:]), biased)
        for number, name in enumerate(outputs)
    }
