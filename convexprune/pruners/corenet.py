"""Single weights by how much of an output they make up on a sample of inputs, output by output.

Source: C. Baykal, L. Liebenwein, I. Gilitschenski, D. Feldman and D. Rus, Data-dependent coresets for compressing
neural networks with applications to generalization bounds, ICLR 2019. The paper could not be read: the formulas are
recalled, and agree with the authors' later code as far as that goes. K and λ* stand for constants of an assumption on
the distribution of the inputs that nobody knows; here, as there in the experiments, they are log(ηη*) and half of it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from convexprune.pruners.draws import Scheme, whole_draws
from convexprune.pruners.generalisation import CodedLayer, GeneralisationBound, generalisation_terms
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.sampling import Sampling
from convexprune.pruners.sensitivities import cancellation, edge_sensitivities, enough_samples
from convexprune.pruners.views import Items, Sensitivities, View
from convexprune.report.report import Assumption
from convexprune.runs.run import Run
from convexprune.targets import Guarantee


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


class _Measured(NamedTuple):
    """What the sample says of a layer's group: its inputs, which are as large as the data, need not be held for it."""

    view: View
    s: Tensor
    ratio: float
    cancelled: int
    rows: int
    nonnegative: bool

    @classmethod
    def of(cls, view: View) -> "_Measured":
        """Of a view, whose inputs are needed no more."""
        view.check("weights")
        [product], [X] = view.products, view.inputs
        found = edge_sensitivities(product.weights, X), *cancellation(product.weights, X)
        without = replace(view, products=(replace(product, inputs=None),))
        return cls(without, *found, len(X), bool(X.min() >= 0))


@register_pruner("corenet")
@dataclass(frozen=True)
class CoreNet(Sampling):
    """Coreset of each output's positive and negative weights (Baykal et al. 2019): s_k = max_S w_k a_k/Σ w a.

    Made for fully connected ReLU networks; biases are kept as they are. Sensitivities need the whole network
    at once, from the input on: a layer that is scored alone is taken for all of it. Groups of a convolution are one
    layer. A budget is shared in proportion to the sums of sensitivities, as the draws are within a layer.

    Args:
        delta: The probability of failure for which Δ̂ is reported and, without a guarantee, the size of the sample
            checked.
        sampling: See ``Scheme``.
        margin: γ of the generalisation bound, if the data have labels.

    Raises:
        InvalidTolerance: delta is no probability between 0 and 1.
    """

    delta: float = 0.05
    items: ClassVar[Items] = "weights"
    needs_data: ClassVar[bool] = True
    whole_network: ClassVar[bool] = True
    generalises: ClassVar[bool] = True
    sampling: Scheme = "fixed"
    margin: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        Guarantee(1.0, self.delta).checked()  # looks at delta

    def sensitivities(self, view: View) -> Sensitivities:
        """Sensitivities of a layer's weights, as if it were the whole network."""
        return self.of_layers([view])[0]

    def of_layers(self, views: Iterable[View]) -> list[Sensitivities]:
        """Sensitivities of all layers' weights, from the input on, and a sample of inputs."""
        measured = [_Measured.of(view) for view in views]
        places = _places(measured)
        return [self._sensitivities(found, places[found.view.name]) for found in measured]

    def _sensitivities(self, found: _Measured, place: Place) -> Sensitivities:
        sums, guarantee = found.s.sum(1), found.view.guarantee
        outputs = "each of the network's outputs" if place.layers > 1 else "each of the layer's outputs"
        return Sensitivities(
            found.s,
            None if guarantee is None else place.draws(sums, guarantee),
            f"{outputs} within (1 ± eps) of its value, for an input that is drawn as the sample was, with probability "
            "1 − delta",
            self._assumptions(found, place),
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

    def _assumptions(self, found: _Measured, place: Place) -> tuple[Assumption, ...]:
        pairs, delta = found.rows * len(found.s) // 2, (found.view.guarantee or self).delta
        activation, positions = found.view.activation, found.view.products[0].positions
        return (
            Assumption("the layer's inputs are ≥ 0", found.nonnegative),
            Assumption("a ReLU follows, or nothing", None if activation is None else activation in ("relu", "output")),
            Assumption("the layer is fully connected", positions == 1),
            Assumption("no layer has a bias: the theory has none", not place.biased),
            Assumption(f"Σ w a ≠ 0 ({found.cancelled} exceptions in {pairs} outputs)", found.cancelled == 0),
            enough_samples(found.rows // positions, place.samples(delta), delta),
            Assumption("the shares of an output have tails as thin as K and λ* = K/2 say", None),
        )

    def generalisation(self, run: Run, before: Tensor, after: Tensor, labels: Tensor) -> GeneralisationBound:
        """What the theory, and the size of the pruned network, say of errors on new data.

        All layers that were scored count; whatever else the network stores counts beside the last one.
        """
        weights = {name: run.layers[name].weights for name in run.terms}
        kept = weights | {name: sum(answer.nonzeros for answer in answers) for name, answers in run.written.items()}
        stored = [*run.model.parameters(), *(buffer for buffer in run.model.buffers() if buffer.is_floating_point())]
        others = sum(tensor.numel() for tensor in stored) - sum(weights.values())
        coded = [
            CodedLayer(weights[name], kept[name], extra, terms["S"], terms["Delta"])
            for (name, terms), extra in zip(run.terms.items(), [0] * (len(weights) - 1) + [others], strict=True)
        ]
        widest = 8 * max(tensor.element_size() for tensor in stored)
        return generalisation_terms(before, after, labels, coded, self.margin, bits_per_value=widest)


def _places(measured: Sequence[_Measured]) -> dict[str, Place]:
    """By name; the groups of a convolution share one."""
    layers = {one.view.name: [each for each in measured if each.view.name == one.view.name] for one in measured}
    outputs = [sum(len(found.s) // 2 for found in groups) for groups in layers.values()]
    ratios = [max(found.ratio for found in groups) for groups in layers.values()]
    network, biased = (sum(outputs), max(outputs), len(outputs)), any(found.view.biased for found in measured)
    return {name: Place(*network, tuple(ratios[number:]), biased) for number, name in enumerate(layers)}
