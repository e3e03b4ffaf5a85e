"""Measures m(h): how the distances h of the outputs from their targets count.

Each is a closed convex function of the lengths ‖h_m‖ of the columns of h: the indicator of one ball over the layer, of
a ball for each neuron, or half a sum of squares. With s [M] the squares ‖h_m‖² in float64 and b2_m = ‖λ_m‖²:

- ``unit``: the length of all radii together, 0 for a loss; ``distance(s)``: from h to the set, 0 for a loss;
- ``value(s)``: m(h) without its indicator part;
- ``prox_fraction(s, rho)``: [M] or scalar, the part of each column of h that the prox with penalty rho takes away;
- ``dual_value(a, b2, t)``: Σ a_m t_m − m*(t∘Λ); ``best_scaling(a, b2, cap)``: t [M] in [0, cap] that maximises it;
- ``to_cvxpy(columns)``: (objective, constraints) for the entries of h of each neuron, None where it has none.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerBall:
    """The indicator of ‖h‖_F ≤ eps."""

    eps: float

    @property
    def unit(self) -> float:
        """The radius."""
        return self.eps

    def value(self, s: Tensor) -> float:  # noqa: ARG002 - an indicator
        """0."""
        return 0.0

    def distance(self, s: Tensor) -> float:
        """(‖h‖ − eps)₊."""
        return max(0.0, float(s.sum().sqrt()) - self.eps)

    def prox_fraction(self, s: Tensor, rho: float) -> Tensor:  # noqa: ARG002 - an indicator has no scale
        """(1 − eps/‖h‖)₊."""
        return _beyond(s.sum(), self.eps)

    def best_scaling(self, a: Tensor, b2: Tensor, cap: Tensor) -> Tensor:
        """The maximiser of Σ a_m t_m − eps·√Σ b_m² t_m² over 0 ≤ t ≤ cap, exact up to rounding.

        It satisfies t_m = min(S a_m/(eps b_m²), cap_m) with S = ‖t∘b‖. Columns reach their cap in the order of
        S_m = eps b_m² cap_m/a_m, so S follows from the number k of columns at their cap; the best k is taken.
        """
        if self.eps == 0:
            return torch.where(a > 0, cap, 0.0)
        a = a.clamp(min=0)
        reach = torch.where(a > 0, self.eps * b2 * cap / a, torch.inf)
        order = reach.argsort()
        a, b2, top, reach = a[order], b2[order], cap[order], reach[order]
        # Columns that reach S at once (no ball term) are at their cap whatever S is.
        slope = torch.where(b2 > 0, a.square() / b2.clamp(min=1e-300), 0.0) / self.eps**2
        capped = torch.cumsum(top.square() * b2, 0)
        rest = 1 - (slope.sum() - torch.cumsum(slope, 0))
        S = torch.where(rest > 0, (capped / rest.clamp(min=1e-300)).sqrt(), torch.inf)
        following = torch.cat([reach[1:], reach.new_tensor([torch.inf])])
        consistent = (S >= reach * (1 - 1e-9)) & (S <= following * (1 + 1e-9)) & (a > 0)
        if not bool(consistent.any()):
            return torch.zeros_like(cap)
        best = S[consistent].min()
        t = torch.where(reach <= best, top, best * a / (self.eps * b2).clamp(min=1e-300))
        t = torch.where(a > 0, torch.minimum(t, top), 0.0)
        return torch.zeros_like(cap).scatter(0, order, t)

    def dual_value(self, a: Tensor, b2: Tensor, t: Tensor) -> float:
        """Σ a_m t_m − eps·√Σ b_m² t_m²."""
        return float((a * t).sum() - self.eps * (b2 * t.square()).sum().sqrt())

    def to_cvxpy(self, columns: list[Any]) -> tuple[Any, list[Any]]:
        """One second-order cone."""
        import cvxpy as cp

        h = [column for column in columns if column is not None]
        return 0.0, [cp.norm(cp.hstack(h), 2) <= self.eps] if h else []


@dataclass(frozen=True, eq=False)
class NeuronBalls:
    """The indicator of ‖h_m‖ ≤ eps_m for each neuron m; eps [M] in float64."""

    eps: Tensor

    @property
    def unit(self) -> float:
        """‖eps‖."""
        return float(torch.linalg.vector_norm(self.eps))

    def value(self, s: Tensor) -> float:  # noqa: ARG002 - an indicator
        """0."""
        return 0.0

    def distance(self, s: Tensor) -> float:
        """√Σ (‖h_m‖ − eps_m)₊²: the balls are independent."""
        return float(torch.linalg.vector_norm((s.sqrt() - self.eps).clamp(min=0)))

    def prox_fraction(self, s: Tensor, rho: float) -> Tensor:  # noqa: ARG002 - an indicator has no scale
        """(1 − eps_m/‖h_m‖)₊."""
        return _beyond(s, self.eps)

    def best_scaling(self, a: Tensor, b2: Tensor, cap: Tensor) -> Tensor:
        """Each column at its cap where that helps: its term is linear in t_m."""
        return torch.where(a > self.eps * b2.sqrt(), cap, 0.0)

    def dual_value(self, a: Tensor, b2: Tensor, t: Tensor) -> float:
        """Σ t_m (a_m − eps_m b_m)."""
        return float((t * (a - self.eps * b2.sqrt())).sum())

    def to_cvxpy(self, columns: list[Any]) -> tuple[Any, list[Any]]:
        """A second-order cone a neuron."""
        import cvxpy as cp

        return 0.0, [cp.norm(h, 2) <= float(eps) for h, eps in zip(columns, self.eps, strict=True) if h is not None]


@dataclass(frozen=True, eq=False)
class HalfSquare:
    """½·weight·‖h‖_F²."""

    weight: float

    @property
    def unit(self) -> float:
        """0: a loss has no radius."""
        return 0.0

    def value(self, s: Tensor) -> float:
        """½·weight·Σ ‖h_m‖²."""
        return 0.5 * self.weight * float(s.sum())

    def distance(self, s: Tensor) -> float:  # noqa: ARG002 - nothing is out of reach of a loss
        """0."""
        return 0.0

    def prox_fraction(self, s: Tensor, rho: float) -> Tensor:
        """weight/(weight + rho)."""
        return s.new_tensor(self.weight / (self.weight + rho))

    def best_scaling(self, a: Tensor, b2: Tensor, cap: Tensor) -> Tensor:
        """The top of a parabola a column: min(weight·a_m/b_m², cap_m)."""
        return torch.minimum(self.weight * a.clamp(min=0) / b2.clamp(min=1e-300), cap)

    def dual_value(self, a: Tensor, b2: Tensor, t: Tensor) -> float:
        """Σ a_m t_m − b_m² t_m²/(2 weight)."""
        return float((a * t - b2 * t.square() / (2 * self.weight)).sum())

    def to_cvxpy(self, columns: list[Any]) -> tuple[Any, list[Any]]:
        """A sum of squares."""
        import cvxpy as cp

        h = [column for column in columns if column is not None]
        return 0.5 * self.weight * cp.sum_squares(cp.hstack(h)) if h else 0.0, []


def _beyond(s: Tensor, eps: Tensor | float) -> Tensor:
    return (1 - eps / s.to(torch.float64).sqrt().clamp(min=1e-300)).clamp(min=0)


Measure: TypeAlias = LayerBall | NeuronBalls | HalfSquare
