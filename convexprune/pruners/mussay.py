"""Neurons by how large they can get times how much the next layer makes of them, without data.

Source: B. Mussay, M. Osadchy, V. Braverman, S. Zhou and D. Feldman, Data-independent neural pruning via coresets, ICLR
2020; B. Mussay, D. Feldman, S. Zhou, V. Braverman and M. Osadchy, Data-independent structured pruning of neural
networks via coresets, 2020. The sensitivities are those of the authors' code; of the papers only the abstracts could
be read, so that the draws that a guarantee needs are derived here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from convexprune.pruners.draws import Scheme, hoeffding
from convexprune.pruners.pruner import register_pruner
from convexprune.pruners.sampling import Sampling
from convexprune.pruners.views import Items, Sensitivities, View
from convexprune.report.report import Assumption
from convexprune.solvers.arrays import checked_positive
from convexprune.solvers.errors import InvalidInput

MONOTONE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
    "hardsigmoid": functional.hardsigmoid,
}  # φ ≥ 0 and non-decreasing: on [−ρ, ρ] the largest value is φ(ρ)
_BELOW = {
    *("relu", "relu6", "leaky_relu", "gelu", "silu", "tanh", "elu", "hardswish", "hardtanh", "mish", "softsign"),
    *("hardshrink", "softshrink", "tanhshrink"),
}  # |φ(z)| ≤ |z|, with their default parameters


@register_pruner("mussay")
@dataclass(frozen=True)
class Mussay(Sampling):
    """Data-independent coreset of neurons: s_i = max_j |W_ji|·φ(β‖p_i‖), p_i = (w_i, b_i) (Mussay et al. 2020).

    Where a neuron goes on to an output by several weights (a kernel's), |W_ji| is the sum of theirs.

    For every input x with √(‖x‖² + 1) ≤ β each output keeps within ε·t of its value, t = Σs, with probability 1 − δ.

    Args:
        beta: β; None: 1 where it cancels (ReLU), else the largest over the calibration data.
        sampling: See ``Scheme``.
    """

    beta: float | None = None
    items: ClassVar[Items] = "neurons"
    sampling: Scheme = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is not None:
            checked_positive("beta", self.beta)

    def sensitivities(self, view: View) -> Sensitivities:
        """Sensitivities of a layer's neurons; β, or more of the activation, may have to be known."""
        view.check(self.items)
        beta, outputs = reach_of(view, self.beta), view.outputs
        s = view.loads.to(torch.float64).amax(1) * sizes_of(view, beta)
        total = float(s.sum())
        error = "eps·t" if is_bounded(view, self.beta) else "eps·t·√(‖x‖² + 1)"
        monotone = Assumption("the activation is ≥ 0 and non-decreasing", view.activation in MONOTONE)
        return Sensitivities(
            s[None],
            None if view.guarantee is None else hoeffding(view.guarantee, outputs),
            f"each of {outputs} outputs within {error}, t = {total:.4g}, for every one input x, "
            "with probability 1 − delta",
            (monotone, *within_reach(view, self.beta)),
            terms={"t": total, "beta": beta},
        )


def reach_of(view: View, beta: float | None) -> float:
    """β as given, 1 where it cancels, or as measured.

    Raises:
        InvalidInput: Nothing is known of the activation, or β is needed, and there are no data.
    """
    if not below_identity(view.activation) and view.activation not in MONOTONE:
        known = ", ".join(sorted({*MONOTONE, *_BELOW}))
        raise InvalidInput(
            f"layer {view.name!r}: activation {view.activation!r}: nothing is known of how large it gets; known are "
            f"{known}, with their default parameters and behind all norms. Leave the layer out"
        )
    if beta is not None:
        return float(beta)
    if below_identity(view.activation):
        return 1.0
    if view.reach is None:
        raise InvalidInput(f"layer {view.name!r}: {view.activation} needs a bound on its inputs: give beta, or data")
    return view.reach


def within_reach(view: View, beta: float | None) -> tuple[Assumption, ...]:
    """That inputs are no larger than β, where that matters: checked if β was given and there are data."""
    if not is_bounded(view, beta):
        return ()
    beta = reach_of(view, beta)
    inside = None if view.reach is None else view.reach <= beta
    return (Assumption(f"√(‖x‖² + 1) ≤ β = {beta:.4g} for the inputs x of the layer", inside),)


def is_bounded(view: View, beta: float | None) -> bool:
    """Whether errors are within a bound for inputs up to β; otherwise they grow with the input, and β cancels."""
    return beta is not None or not below_identity(view.activation)


def sizes_of(view: View, beta: float) -> Tensor:
    """How large each neuron [n] can get: |φ(p_iᵀ(x, 1))| ≤ φ(β‖p_i‖)."""
    return largest(view.activation, beta * torch.linalg.vector_norm(view.incoming, dim=1, dtype=torch.float64))


def below_identity(activation: str | None) -> bool:
    """Whether |φ(z)| ≤ |z|."""
    return activation is None or activation in _BELOW


def largest(activation: str | None, radius: Tensor) -> Tensor:
    """A bound on |φ(z)| over |z| ≤ ρ, for each ρ ≥ 0, of an activation of which something is known."""
    return radius if activation is None or activation in _BELOW else MONOTONE[activation](radius)
