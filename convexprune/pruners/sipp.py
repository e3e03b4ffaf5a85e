"""Single weights by how much of an output they make up on a sample of inputs; a convex program splits the budget.

Source: C. Baykal, L. Liebenwein, I. Gilitschenski, D. Feldman and D. Rus, Sensitivity-informed provable pruning of
neural networks, SIAM Journal on Mathematics of Data Science, 2022 (SiPPing neural networks, 2019), as the authors' code
(torchprune) has it. There the program is given to an interior-point solver and every number rounded up; here its
optimality conditions are solved, and sizes are rounded within the budget.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from convexprune.pruners.draws import Scheme, among_largest, rounded, whole_draws
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.sampling import Sampling
from convexprune.pruners.sensitivities import coefficients, edge_sensitivities, enough_samples, samples_needed
from convexprune.pruners.views import Items, Sensitivities, View
from convexprune.solvers.errors import InvalidInput
from convexprune.targets import Guarantee

_UNKEPT = 3.0  # the published bound on an output's error is so many times the sensitivities that are not kept
_NEWTON = 12  # steps from at most twice the root: quadratic convergence needs six


@register_pruner("sipp")
@dataclass(frozen=True)
class SiPP(Sampling):
    """Coreset of each output's positive and negative weights (Baykal et al. 2022): s_k = max_S w_k a_k/Σ w a.

    A budget is split so that Σ ε(x)/η^ℓ is least, ε(x) the error that x draws leave an output and sign, η^ℓ the layer's
    outputs. Biases are kept as they are.

    Args:
        variant: "random": weights are sampled. "hybrid": of an output and sign the largest are kept as they are where
            three times the sum of the other sensitivities is no more than ε(x); where the size is a guarantee, all are
            sampled. "deterministic": the largest of the whole network, as they are, by their mean shares over the
            positions of a convolution; proves nothing.
        sampling: See ``Scheme``; "top" for "deterministic", whatever is given.
        delta: The probability of failure that a budget is split for, and, without a guarantee, the size of the sample
            checked for.

    Raises:
        InvalidInput: An unknown variant, or sampling="top" with another one than "deterministic".
        InvalidTolerance: delta is no probability between 0 and 1.
    """

    variant: Literal["random", "hybrid", "deterministic"] = "random"
    delta: float = 1e-16
    items: ClassVar[Items] = "weights"
    needs_data: ClassVar[bool] = True
    sampling: Scheme = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        Guarantee(1.0, self.delta).checked()  # looks at delta
        if self.variant == "deterministic":
            object.__setattr__(self, "sampling", "top")
        elif self.sampling == "top":
            raise InvalidInput(f"sampling: the {self.variant} variant samples; 'top' is variant='deterministic'")

    def sensitivities(self, view: View) -> Sensitivities:
        """Sensitivities of a layer's weights, from a sample of inputs; shares are α = 6·S·log(8(P + 1)κ/δ)."""
        view.check(self.items)
        [product], [X], guarantee = view.products, view.inputs, view.guarantee
        proves = self.variant != "deterministic"
        s = edge_sensitivities(product.weights, X, product.positions, mean_over_patches=not proves)
        alpha = partial(coefficients, s.sum(1), product.positions, product.kernel)
        delta = (guarantee or self).delta
        return Sensitivities(
            s,
            _draws(alpha(delta), guarantee.eps) if proves and guarantee is not None else None,
            "the positive and the negative part of any one output within (1 ± eps), for an input that is drawn as the "
            "sample was, with probability 1 − delta"
            if proves
            else "nothing: the largest are kept",
            (enough_samples(len(X) // product.positions, samples_needed(len(s) // 2, delta), delta),),
            shares=alpha(self.delta),
            top=partial(_better_kept, s, alpha(self.delta)) if self.variant == "hybrid" else None,
            terms={"S": float(s.sum())},
        )

    def sizes_at(self, layers: Sequence[Sensitivities]) -> Callable[[float], list[Tensor]]:
        """Sizes of least total error for their sum, or the largest sensitivities of all layers."""
        if self.variant == "deterministic":
            return among_largest(layers)
        return lambda scale: [  # an error counts 1/η^ℓ, and there are two signs
            rounded(
                least_error_sizes(s.parts, torch.full_like(s.parts, 2 / len(s.parts)), s.candidates.double(), scale)
            )
            for s in layers
        ]


def relative_error(alpha: Tensor, x: Tensor) -> Tensor:
    """ε(x) = ½·(√((α/3x)² + 2α/x) + α/(3x)), which solves x = α(3 + 2ε)/(6ε²); infinite at 0."""
    t = alpha / x
    return ((t * t / 9 + 2 * t).sqrt() + t / 3) / 2


def least_error_sizes(alpha: Tensor, weights: Tensor, most: Tensor, scale: float) -> Tensor:
    """x [G] with the least Σ c·ε(x) + Σx/scale over 0 ≤ x ≤ most: for weights c, and coefficients α of ε.

    With x = α(3 + 2ε)/(6ε²) the derivative in ε is 0 where ε³ = b(1 + ε/3), b = α/(c·scale). Newton's steps fall to its
    only positive root from b^{1/3} + √(b/3), which is no smaller and at most twice as large; x is then cut at ``most``.
    """
    alpha = alpha.clamp(min=1e-100)  # no sensitivities, and then nothing to keep either
    b = (alpha / (weights * scale)).clamp(max=1e200)  # x ≈ 0 long before, and ε³ stays finite
    eps = b ** (1 / 3) + (b / 3).sqrt()
    for _ in range(_NEWTON):
        eps = eps - (eps**3 - b * (1 + eps / 3)) / (3 * eps**2 - b / 3)
    return torch.minimum(alpha * (3 + 2 * eps) / (6 * eps**2), most)


def _better_kept(s: Tensor, alpha: Tensor, sizes: Tensor) -> Tensor:
    """Whether [G] the largest of so many leave no more error than a sample does."""
    s, alpha, x = (value.detach().to("cpu", torch.float64) for value in (s, alpha, sizes))
    ranks = torch.arange(s.shape[1])
    left = s.sort(dim=1, descending=True).values.masked_fill(ranks < x[:, None], 0).sum(1)
    return relative_error(alpha, x) >= _UNKEPT * left


def _draws(alpha: Tensor, eps: float) -> Tensor:
    """x [G] = ⌈α(3 + 2ε)/(6ε²)⌉, with the guarantee's δ in α."""
    return whole_draws(alpha * (3 + 2 * eps) / (6 * eps**2))
