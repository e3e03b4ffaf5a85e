"""Neurons and filters by how much of any next output they make up on a sample of inputs.

Source: L. Liebenwein, C. Baykal, H. Lang, D. Feldman and D. Rus, Provable filter pruning for efficient neural networks,
ICLR 2020, as the authors' code (torchprune) has it. A filter is scored as an input channel of the layers that take it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.pruners.draws import Scheme, expected_distinct, normalised, rounded, whole_draws
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.sampling import Sampling
from convexprune.pruners.sensitivities import Share, coefficients, enough_samples, neuron_sensitivities, samples_needed
from convexprune.pruners.views import Items, Sensitivities, View
from convexprune.report.report import Assumption
from convexprune.targets import Guarantee


@register_pruner("pfp")
@dataclass(frozen=True)
class PFP(Sampling):
    """Coreset of neurons (Liebenwein et al. 2020): s_j is the largest share w_ij a_j/Σ_k w_ik a_k that neuron j has.

    The largest over inputs of the sample, positions, next outputs i and signs of weights; of inputs of both signs each
    is taken apart. A budget gives every layer the draws of one common ε, as many distinct neurons as these can be
    expected to find.

    Args:
        share: A neuron that goes on to an output by several weights (a kernel's positions, or a flattened map's) has
            the share of their sum, which a bound on the error needs, or of the largest of them ("largest", as in the
            authors' code).
        sampling: See ``Scheme``. "fixed" does without leftovers what the authors' partly random variant is for:
            neurons that are all but sure to be drawn are kept for certain, and the others sampled without bias. "top"
            is what they ran in their experiments.
        delta: The probability of failure that a budget is split for, and, without a guarantee, the size of the sample
            checked for.

    Raises:
        InvalidInput: An unknown kind of share.
        InvalidTolerance: delta is no probability between 0 and 1.
    """

    share: Share = "sum"
    delta: float = 1e-16
    items: ClassVar[Items] = "neurons"
    needs_data: ClassVar[bool] = True
    sampling: Scheme = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        Guarantee(1.0, self.delta).checked()  # looks at delta

    def sensitivities(self, view: View) -> Sensitivities:
        """Sensitivities of a layer's neurons, from a sample of inputs; shares are S̃ = 6·S·log(8(P + 1)κ/δ)."""
        view.check(self.items)
        n, products, inputs, guarantee = len(view.incoming), view.products, view.inputs, view.guarantee
        found = [neuron_sensitivities(p.weights, X, n, self.share) for p, X in zip(products, inputs, strict=True)]
        s, kernel = torch.stack(found).amax(0), max(len(product.weights) // n for product in products)
        own = s.sum()[None], max(product.positions for product in products), kernel
        samples = min(len(X) // product.positions for X, product in zip(inputs, products, strict=True))
        delta = (guarantee or self).delta
        return Sensitivities(
            s[None],
            None if guarantee is None else _draws(coefficients(*own, delta), guarantee.eps),
            "the positive and the negative part of any one next output within (1 ± eps), for an input that is drawn as "
            "the sample was, with probability 1 − delta",
            (
                enough_samples(samples, samples_needed(view.outputs, delta), delta),
                Assumption("a neuron's share is that of all its weights", kernel == 1 or self.share == "sum"),
            ),
            shares=coefficients(*own, self.delta),
            terms={"S": float(s.sum())},
        )

    def sizes_at(self, layers: Sequence[Sensitivities]) -> Callable[[float], list[Tensor]]:
        """The neurons that draws in proportion to S̃ find."""
        q = [normalised(found.values.detach().to("cpu", torch.float64)) for found in layers]
        return lambda scale: [
            rounded(expected_distinct(each, scale * found.parts)) for each, found in zip(q, layers, strict=True)
        ]


def _draws(tilde: Tensor, eps: float) -> Tensor:
    """m [1] = ⌈3(6 + 2ε)·S̃/ε²⌉."""
    return whole_draws(3 * (6 + 2 * eps) * tilde / eps**2)
