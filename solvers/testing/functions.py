"""What fits and penalties have in common as closed convex functions φ, tried at random points."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor

from convexprune.solvers.programs.duality import Convex
from convexprune.solvers.testing.contract import ALIKE, ConformanceReport, best_of, expect, result_of, same

STEPS = (0.03, 1.0, 30.0)
"""Of a prox, from hardly any to nearly all of φ."""
_CONIC = 1e-4  # relative error granted to a conic solver


@dataclass(frozen=True, eq=False)
class Draw:
    """Random points for a function φ."""

    function: Convex
    points: int
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers in float64, in the function's own shape unless another is given."""
        return torch.randn(*(shape or self.function.shape), generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1 in float64."""
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def sizes(self) -> list[float]:
        """Factors from far too small to far too large."""
        return [10.0 ** float(power) for power in torch.linspace(-2, 2, self.points)]

    def at(self, size: float) -> Tensor:
        """A point at this distance from the centre, in units of the function."""
        return self.function.centre + size * self.function.unit * self.normal()

    def anywhere(self) -> list[Tensor]:
        """Points near the centre and far from it."""
        return [self.at(size) for size in self.sizes()]

    def inside(self) -> list[Tensor]:
        """Points of the domain, of all sizes, and some where φ is low."""
        points = [self.function.inside(V) for V in self.anywhere()]
        return points + [self.function.prox(V, 1.0) for V in points]


def report_of(draw: Draw, checks: Iterable[Callable[[Draw], object]]) -> ConformanceReport:
    """The report of checks, which raise NotConforming; each goes by the name of its function.

    Raises:
        NotConforming: Some failed; the message names them.
    """
    results = (result_of(check.__name__.strip("_"), check, draw) for check in checks)
    report = ConformanceReport(type(draw.function.subject).__name__, tuple(results))
    report.raise_if_failed()
    return report


def _objective(function: Convex, U: Tensor, V: Tensor, step: float) -> float:
    return step * function.value(U) + 0.5 * float((U - V).square().sum())


def convex(draw: Draw) -> None:
    """Between two points of the domain φ is no larger than the mean."""
    f, points = draw.function, draw.inside()
    for A, B in zip(points, reversed(points), strict=True):
        between, a, b = (A + B) / 2, f.value(A), f.value(B)
        far, room = f.far(between), ALIKE * (f.unit + float((A - B).norm()))
        expect(far <= room, f"domain: convex, yet {far:.3g} away from it between two of its points")
        best_of("value: convex between two points", f.value(between), [(a + b) / 2], max(a, b))


def prox(draw: Draw, steps: tuple[float, ...] = STEPS) -> None:
    """The minimiser of its own definition, in the domain, against random competitors."""
    f = draw.function
    for V in draw.anywhere():
        unit = float((V - f.centre).square().sum())
        for step in steps:
            kept, U = V.clone(), f.prox(V, step)
            expect(torch.equal(kept, V), "prox: changed its argument")
            far, moved = f.far(U), float((U - V).norm())
            expect(far <= ALIKE * (moved + f.unit), f"prox: {far:.3g} away from the domain")
            others = [U + s * moved * draw.normal() / V.numel() ** 0.5 for s in (1e-3, 0.1, 1.0)]
            others += [V, f.centre, 0.99 * U + 0.01 * f.centre]
            found = [_objective(f, f.inside(T), V, step) for T in others]
            best_of("prox: its objective", _objective(f, U, V, step), found, unit)


def duality(draw: Draw) -> None:
    """Fenchel–Young: ⟨A, U⟩ ≤ φ(U) + φ*(A), with equality where A = (V − prox)/step is a subgradient at the prox."""
    f, points = draw.function, list(product(draw.anywhere(), STEPS))
    excess = f.exceeded(points, ALIKE)
    expect(not excess, excess)
    left, right = f.inequality
    for V, step in points:
        U = f.prox(V, step)
        # Rounding may put a subgradient just outside of where φ* is finite.
        A, conjugate = next(f.duals((1 - 1e-9) * (V - U) / step))
        size = float((A * U).abs().sum()) + abs(f.value(U))
        same(f"{right} by {f.members}, against {left}", f.value(U) + conjugate, float((A * U).sum()), size)


def in_units(draw: Draw, scaled: Convex, scale: Tensor | float, name: str, factor: float = 1.0) -> None:
    """Raise NotConforming unless ``scaled`` of scale·U is factor·φ(U): its values, proxes and conjugates follow."""
    f = draw.function
    expect(type(scaled.subject) is type(f.subject), f"{name}: found {type(scaled.subject).__name__}")
    for V in draw.anywhere():
        U = f.prox(V, 1.0)
        S = V - U
        moved = float((S * U).abs().sum())  # rounding of U moves φ by a small part of it, also where φ is 0
        same(f"{name}: value", scaled.value(scale * U), factor * f.value(U), moved)
        for A in (S, draw.normal()):
            (dual, expected), (found, conjugate) = (next(g.duals(B)) for g, B in ((f, A), (scaled, factor * A / scale)))
            same(f"{name}: multipliers, by project_dual or dual_norm", found, factor * dual / scale)
            same(f"{name}: conjugate", conjugate, factor * expected, moved)


def precision(draw: Draw, low: Callable[[Tensor, float], Tensor]) -> None:
    """The prox in float32 takes and gives float32, and is the same."""
    V = draw.normal().float()
    found = low(V, 0.3)
    expect(found.dtype == torch.float32, f"prox of float32 numbers: found {found.dtype}")
    same("prox in float32", found.double(), draw.function.prox(V.double(), 0.3), rtol=1e-4)


def cvxpy(draw: Draw) -> str | None:
    """The prox problem has the same value in cvxpy's form."""
    if find_spec("cvxpy") is None or find_spec("clarabel") is None:
        return "not checked: cvxpy or clarabel is not installed"
    import cvxpy as cp

    f, step = draw.function, 0.4
    for V in (draw.at(0.3), draw.at(3.0)):
        X, size = cp.Variable(f.shape), float((V - f.centre).square().sum())
        term, constraints = f.to_cvxpy(X)
        problem = cp.Problem(cp.Minimize((step * term + cp.sum_squares(X - V.numpy()) / 2) / size), constraints)
        expect(problem.is_dcp(), "to_cvxpy: the expression is not convex by cvxpy's rules")
        found, expected = float(problem.solve(solver="CLARABEL")), _objective(f, f.prox(V, step), V, step) / size
        same("to_cvxpy: the prox problem", found, expected, 1e-3, _CONIC)
    return None
