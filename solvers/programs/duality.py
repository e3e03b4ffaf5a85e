"""Fits and penalties as what both are, closed convex functions φ, and Fenchel–Young's inequality, which bounds rest on.

⟨A, U⟩ ≤ φ(U) + φ*(A) for all U and A, with equality where A is a subgradient at U.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.programs.penalties import is_homogeneous

_LARGE = 1e3  # a scale of multipliers, and a step of a prox


@dataclass(frozen=True, eq=False)
class Convex:
    """φ on matrices of one shape, in float64.

    Attributes:
        subject: The fit or penalty.
        centre: A point to look around, of that shape.
        value: φ(U), for U in the domain.
        prox: argmin over U of step·φ(U) + ½‖U − V‖², for V and a step > 0.
        inside: A point of the domain, V itself if it is one.
        far: The distance of U from the domain.
        duals: Multipliers made of A by what leads into the domain of φ*, and φ* there.
        to_cvxpy: φ(U) as a cvxpy expression, with constraints.
        inequality: Fenchel–Young's, the left and the right side, in the letters of the subject.
        members: Those of the subject that decide about the right side.
    """

    subject: Any
    centre: Tensor
    value: Callable[[Tensor], float]
    prox: Callable[[Tensor, float], Tensor]
    inside: Callable[[Tensor], Tensor]
    far: Callable[[Tensor], float]
    duals: Callable[[Tensor], Iterator[tuple[Tensor, float]]]
    to_cvxpy: Callable[[Any], tuple[Any, list[Any]]]
    inequality: tuple[str, str]
    members: str

    @property
    def shape(self) -> tuple[int, int]:
        """[P, M] of a fit, [N, M] of a penalty."""
        return (self.centre.shape[0], self.centre.shape[1])

    @property
    def unit(self) -> float:
        """The size of entries."""
        return float(self.centre.square().mean().sqrt()) or 1.0

    def exceeded(self, points: Iterable[tuple[Tensor, float]], tolerance: float) -> str:
        """Where ⟨A, U⟩ > φ(U) + φ*(A), in words; empty if nowhere.

        A are subgradients at the proxes of points with a step each, the same in other places, and far larger
        multipliers, of all entries or few, that favour a bound; U are these proxes, and where ⟨A, U⟩ − φ(U) is large.
        """
        near = [(V, self.prox(V, step), step) for V, step in points]
        against = -self.centre.sign()
        peak = against * (self.centre.abs() == self.centre.abs().amax(0))
        for V, nearest, step in near:
            S = (V - nearest) / step
            large = 30 * float(S.abs().max())
            moved = torch.roll(S, 1, 0)
            for A in (S, moved, large * moved.sign(), large * against, large * peak):
                for L, conjugate in self.duals(A):
                    # Farther off, rounding of the points would count.
                    far = self.centre + _LARGE * L * min(1.0, _LARGE * self.unit / (float(L.abs().max()) or 1.0))
                    for U in (*(found for _, found, _ in near), self.prox(far, _LARGE), self.inside(far)):
                        product, value = float((L * U).sum()), self.value(U)
                        size = float((L * U).abs().sum()) + abs(value) + abs(conjugate)
                        if not product <= value + conjugate + tolerance * size:
                            left, right = self.inequality
                            found = f"{left} = {product:.9g} exceeds {right} = {value + conjugate:.9g}"
                            return f"{found}: its {self.members} makes the latter too small, or its prox is none"
        return ""


def of_fit(fit: Any) -> Convex:
    """f of outputs Z [P, M]; of multipliers the nearest where f* is finite, and a scale of each of their columns."""

    def far(Z: Tensor) -> float:
        return float(fit.distance(fit.sums(Z)))

    def duals(A: Tensor) -> Iterator[tuple[Tensor, float]]:
        L = fit.project_dual(A)
        terms = fit.dual_terms(L)
        for t in (torch.ones_like(terms[0]), fit.best_scaling(terms, torch.full_like(terms[0], _LARGE))):
            yield L * t, -float(fit.dual_value(terms, t))

    return Convex(
        subject=fit,
        centre=fit.anchor.to(torch.float64).expand(fit.shape),
        value=lambda Z: float(fit.value(fit.sums(Z))),
        prox=lambda Z, step: fit.prox(Z, 1 / step),
        inside=lambda Z: fit.prox(Z, 1.0) if far(Z) else Z,
        far=far,
        duals=duals,
        to_cvxpy=fit.to_cvxpy,
        inequality=("⟨Λ, Z⟩", "f(Z) + f*(Λ)"),
        members="project_dual, dual_terms, dual_value or best_scaling",
    )


def of_penalty(penalty: Any, shape: tuple[int, int]) -> Convex:
    """g of weights [N, M]; of multipliers free entries are left out, and homogeneous ones scaled to dual norm 1."""
    centre = torch.zeros(shape, dtype=torch.float64)
    g = penalty.to(centre)

    def duals(A: Tensor) -> Iterator[tuple[Tensor, float]]:
        A = torch.where(g.cost(shape).to(A) == 0, 0.0, A)
        if is_homogeneous(g):
            norm = g.dual_norm(A)
            yield A * torch.where(norm > 0, 1 / norm, 0.0), 0.0
        else:
            yield A, float(g.conjugate(A).sum())

    return Convex(
        subject=g,
        centre=centre,
        value=lambda U: float(g.value(U)),
        prox=g.prox,
        inside=lambda U: g.prox(U, 0.0),
        far=lambda U: float((U - g.prox(U, 0.0)).norm()),
        duals=duals,
        to_cvxpy=lambda U: (g.to_cvxpy(U), []),
        inequality=("⟨A, U⟩", "g(U) + g*(A)"),
        members="dual_norm or conjugate",
    )
