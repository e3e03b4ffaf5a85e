"""Fits and penalties of a user's own: those of the documentation, and wrong ones, which are caught or refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from documented import get, lines_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import AGREEMENT, EXACT, REFERENCE
from torch import Tensor
from zoo import gaussian

from convexprune.solvers import (
    L1,
    Ball,
    LayerProgram,
    NetTrimSet,
    ReluBall,
    Solution,
    Status,
    TopK,
    certify,
    solve,
    solve_path,
    testing,
)
from convexprune.solvers.certificate import make_feasible, support_bounds
from convexprune.solvers.errors import InvalidInput, SolverRefused
from convexprune.solvers.methods import feasible_eps, refit
from convexprune.solvers.programs import NM, GroupL2, NetTrimLoss, ReluLoss, SquaredLoss
from convexprune.solvers.testing import NotConforming

HuberLoss, HuberBall, Box = (get("fits.md", name) for name in ("HuberLoss", "HuberBall", "Box"))
ElasticNet, BoundedL1, NonnegativeL1 = (
    get("penalties.md", name) for name in ("ElasticNet", "BoundedL1", "NonnegativeL1")
)


class Quantile(HuberLoss):  # type: ignore[misc, valid-type]
    """w·Σ max(q·r, (q − 1)·r) of r = Z − Y, q = ``delta``: its multipliers are at a limit of the domain."""

    def rescaled(self, c: float) -> Any:
        return replace(self, Y=c * self.Y, weight=self.weight / c)

    def sums(self, Z: Tensor) -> Tensor:
        R = (Z - self.Y).double()
        return torch.maximum(self.delta * R, (self.delta - 1) * R).sum(0, keepdim=True)

    def prox_residual(self, Z: Tensor, sums: Tensor, rho: float) -> Tensor:
        return self.project_dual(rho * (Z - self.Y)) / rho

    def residual(self, Z: Tensor) -> Tensor:
        return self.project_dual(torch.where(self.Y < Z, torch.inf, -torch.inf).to(Z))

    def project_dual(self, L: Tensor) -> Tensor:
        return L.clamp(self.weight * (self.delta - 1), self.weight * self.delta)

    def dual_value(self, terms: Tensor, t: Tensor) -> float:
        return float((terms[0] * t).sum())

    def best_scaling(self, terms: Tensor, cap: Tensor) -> Tensor:
        return torch.where(terms[0] > 0, cap.clamp(max=1), 0.0)

    def to_cvxpy(self, Z: Any) -> Any:
        import cvxpy as cp

        R = Z - self.Y.double().numpy()
        return self.weight * cp.sum(cp.maximum(self.delta * R, (self.delta - 1) * R)), []


P, N, M = 14, 4, 2
ONES = torch.ones(1, 1, dtype=torch.float64)
FREE = L1.free_bias(N)
FIRST = torch.ones(N, 1, dtype=torch.float64)
FIRST[-1] = 0  # on all inputs but the bias
BOUND = torch.where(FIRST > 0, 0.4, torch.inf)

PENALTIES: dict[str, Any] = {
    "L1": L1(),
    "L1, free bias": FREE,
    "L1, all free": L1(0 * ONES),
    "rows": GroupL2("rows"),
    "columns, one free": GroupL2("columns", [0.0, 1.0]),  # type: ignore[arg-type]
    "labels": GroupL2(torch.arange(N * M).view(N, M) // 3),
    "elastic net": ElasticNet(ONES),
    "elastic net, free bias": ElasticNet(FIRST, FREE),
    "elastic net, some ridges": ElasticNet(torch.tensor([[1.0], [0.0], [2.0], [0.1]]), FREE),
    "bounds": BoundedL1(-0.3 * ONES, 0.5 * ONES),
    "bounds, free bias": BoundedL1(-BOUND, 2 * BOUND, FREE),
    "bounds, one side": BoundedL1(-math.inf * ONES, 0.5 * ONES),
    "nonnegative": NonnegativeL1(),
    "nonnegative, free bias": NonnegativeL1(FREE),
}
OURS = [name for name in PENALTIES if isinstance(PENALTIES[name], L1 | GroupL2)]
THEIRS = [name for name in PENALTIES if name not in OURS]
FITS: dict[str, Callable[[Tensor], Any]] = {
    "squared loss": lambda Z: SquaredLoss(_wrong(Z), 2.0),
    "ball": lambda Z: Ball(Z, 0.2 * float(Z.norm())),
    "a ball a neuron": lambda Z: Ball(Z, torch.tensor([0.2, 0.3]) * Z.norm()),
    "relu loss": lambda Z: ReluLoss(_wrong(Z).clamp(min=0), 2.0),
    "relu ball": lambda Z: ReluBall(Z.clamp(min=0), 0.2 * float(Z.norm())),
    "net-trim loss": lambda Z: NetTrimLoss(Z.clamp(min=0), 2.0, Z),
    "net-trim": lambda Z: NetTrimSet(Z.clamp(min=0), 0.2 * float(Z.norm()), Z),
    "huber loss": lambda Z: HuberLoss(_wrong(Z), 0.3, 2.0),
    "huber ball": lambda Z: HuberBall(Z, 0.1, eps=0.2 * float(Z.norm())),
    "box": lambda Z: Box(Z, 0.3),
    "quantile loss": lambda Z: Quantile(_wrong(Z), 0.8, 2.0),
}


def _wrong(Z: Tensor) -> Tensor:
    """Targets with noise, a few of them far off."""
    Y = Z + 0.2 * gaussian(3, *Z.shape)
    Y[:2] += 20
    return Y


@cache
def program_of(fit: str, penalty: str) -> LayerProgram:
    """A program that weights in the penalty's domain satisfy."""
    X = gaussian(1, P, N)
    X[:, -1] = 1
    W = PENALTIES[penalty].to(X).prox(gaussian(2, N, M), 0.0)
    return LayerProgram(X, FITS[fit](X @ W), PENALTIES[penalty])


@cache
def optimum(fit: str, penalty: str) -> float:
    """That of the cvxpy form in the caller's own units, by an interior point."""
    problem, _ = program_of(fit, penalty).to_cvxpy()
    return float(problem.solve(solver="CLARABEL"))


@cache
def reached(fit: str, penalty: str) -> Solution:
    return solve(program_of(fit, penalty))


def _below(bound: float, program: LayerProgram, best: float) -> bool:
    return 0 <= bound <= best + REFERENCE * max(best, program.fit.size)


@pytest.mark.parametrize("name", ["HuberLoss", "HuberBall", "ElasticNet", "BoundedL1", "NonnegativeL1"])
def test_the_examples_are_short(name: str) -> None:
    page = "fits.md" if name.startswith("Huber") else "penalties.md"
    assert lines_of(page, name) < 60


# Solved, and certified


@pytest.mark.parametrize("solver", ["admm", "quadratic", "cvxpy"])
@pytest.mark.parametrize("penalty", THEIRS)
@pytest.mark.parametrize("fit", ["squared loss", "ball"])
def test_documented_penalties_are_certified_by_three_methods(fit: str, penalty: str, solver: str) -> None:
    program, best = program_of(fit, penalty), optimum(fit, penalty)
    found = solve(program, solver)
    assert found.status is Status.SOLVED
    assert abs(found.certificate.value - best) <= 2 * AGREEMENT * found.certificate.scale
    inside = program.penalty.to(found.weights).prox(found.weights, 0.0)
    torch.testing.assert_close(inside, found.weights, rtol=EXACT, atol=0)


@pytest.mark.parametrize("solver", ["admm", "cvxpy"])
@pytest.mark.parametrize("penalty", ["L1, free bias", "elastic net, free bias"])
@pytest.mark.parametrize("fit", ["huber loss", "huber ball"])
def test_documented_fits_are_certified_by_two_methods(fit: str, penalty: str, solver: str) -> None:
    found, best = solve(program_of(fit, penalty), solver), optimum(fit, penalty)
    assert found.status is Status.SOLVED
    assert abs(found.certificate.value - best) <= 2 * AGREEMENT * found.certificate.scale


@pytest.mark.parametrize("penalty", THEIRS)
def test_units_do_not_change_the_program(penalty: str) -> None:
    """x_j → d_j x_j, Y → cY: c·g is not g(c·), so what scales must multiply."""
    program = program_of("squared loss", penalty)
    d, c = torch.logspace(-3, 2, N, dtype=torch.float64)[:, None], 1e3
    scaled = LayerProgram(program.inputs * d.T, program.fit.rescaled(c), program.penalty.rescaled(c / d))  # type: ignore[arg-type]
    best = optimum("squared loss", penalty)
    for solver in ("quadratic", "cvxpy"):
        found = solve(scaled, solver)
        assert found.status is Status.SOLVED
        assert found.certificate.value == pytest.approx(best, rel=2 * AGREEMENT)


# No bound above the optimum, whoever speaks


FEW = ["L1, free bias", "columns, one free", "elastic net, some ridges", "bounds, free bias"]
PAIRS = [(fit, penalty) for fit in FITS for penalty in (PENALTIES if fit == "squared loss" else FEW)]


@pytest.mark.parametrize(("fit", "penalty"), PAIRS)
@settings(max_examples=3)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1e-6, 1e-2, 0.3, 1.0, 1e3, 1e8]))
def test_no_multipliers_bound_above_the_optimum(fit: str, penalty: str, seed: int, size: float) -> None:
    program, best = program_of(fit, penalty), optimum(fit, penalty)
    U, L = reached(fit, penalty).weights.double(), reached(fit, penalty).multipliers
    assert L is not None
    X, noise = program.inputs, size * gaussian(seed, P, M)
    orthogonal = noise - X @ torch.linalg.pinv(X) @ noise
    scaled = L * (noise[:1].clamp(-9, 9)).exp()
    for proposal in (noise, noise.sign(), scaled, L + L.std() * noise, L + orthogonal, None):
        assert _below(certify(program, U + size * gaussian(seed + 1, N, M), proposal).bound, program, best)


@pytest.mark.parametrize("delta", [0.1, 1.0])
def test_a_huber_loss_with_a_free_bias_is_bounded_and_certified(delta: float) -> None:
    """A shift that makes XᵀΛ = 0 takes multipliers out of the box |λ| ≤ wδ, where no bound holds."""
    X = 1e-3 * gaussian(1, 100, 2)
    X[:, -1] = 1
    Y = 0.1 * gaussian(2, 100, 1)
    Y[:10] += 1000
    program = LayerProgram(X, HuberLoss(Y, delta), L1.free_bias(2))
    L = torch.ones(100, 1, dtype=torch.float64)
    L[:10] = -1
    found = solve(program, tol=REFERENCE)
    assert found.status is Status.SOLVED
    far = torch.tensor([[0.0], [90.0]], dtype=torch.float64)
    best = found.certificate.value
    assert certify(program, far, delta * L).bound <= best
    assert certify(program, found.weights, (1 + 1e-3 * gaussian(3, 100, 1)) * found.multipliers).gap < 1e-2  # type: ignore[operator]


def test_multipliers_at_a_limit_of_the_domain_are_certified_with_a_free_bias() -> None:
    """A first shift moves few of them, for the rest is projected; those that can move then make up for all."""
    X = gaussian(1, 200, 4)
    X[:, -1] = 1
    Y = X @ gaussian(2, 4, 3) + gaussian(4, 200, 3).exp()
    program = LayerProgram(X, Quantile(Y, 0.9), L1.free_bias(4))
    found = solve(program, "cvxpy", tol=REFERENCE)
    assert found.multipliers is not None
    moved = found.multipliers + 1e-3 * gaussian(3, 200, 3)
    assert certify(program, found.weights, moved).gap < 1e-2
    assert certify(program, found.weights, moved).bound <= (1 + REFERENCE) * found.certificate.value


def test_weights_outside_of_the_domain_are_a_violation() -> None:
    """Whatever input they belong to, a dead one too."""
    program = program_of("squared loss", "nonnegative")
    dead = program.inputs.clone()
    dead[:, 0] = 0
    for X in (program.inputs, dead):
        U = torch.ones(N, M, dtype=torch.float64)
        U[0, 0] = -1
        judged = certify(LayerProgram(X, program.fit, program.penalty), U)
        assert judged.violation > 1e-2
        assert math.isfinite(judged.value)
    assert certify(program, torch.ones(N, M)).violation == 0


def test_bounds_that_exclude_the_targets_are_proven_infeasible() -> None:
    program = program_of("ball", "bounds")
    Y = 100 * program.fit.Y
    found = solve(LayerProgram(program.inputs, Ball(Y, 1.0), program.penalty), max_iter=500)
    assert found.status is Status.INFEASIBLE


# Who refuses what


class Doubled(SquaredLoss):
    """Twice the loss, under the name of a kind of ours."""

    def value(self, sums: Tensor) -> float:
        return 2 * super().value(sums)

    def times(self, k: float) -> Any:
        return super().times(k)


class OneSign(L1):
    """The nonnegative ℓ1 norm, as a subclass of L1."""

    def prox(self, V: Tensor, step: float) -> Tensor:
        return super().prox(V, step).clamp(min=0)

    def dual_norm(self, A: Tensor) -> Tensor:
        return super().dual_norm(A.clamp(min=0))


@pytest.mark.parametrize("solver", ["clarabel", "scs", "osqp", "published", "continuation"])
def test_methods_that_know_penalties_by_name_refuse_others(solver: str) -> None:
    fit = Ball(gaussian(2, P, M), 1.0) if solver == "published" else SquaredLoss(gaussian(2, P, M))
    for penalty in (OneSign(), *(PENALTIES[name] for name in THEIRS)):
        with pytest.raises(SolverRefused, match=type(penalty).__name__ + "|unweighted L1"):
            solve(LayerProgram(gaussian(1, P, N), fit, penalty), solver)


@pytest.mark.parametrize("solver", ["clarabel", "scs", "osqp", "published", "quadratic"])
def test_methods_that_know_fits_by_name_refuse_others(solver: str) -> None:
    for name in ("huber loss", "huber ball", "box"):
        program = program_of(name, "L1")
        with pytest.raises(SolverRefused, match=type(program.fit).__name__):
            solve(program, solver)


def test_what_rests_on_our_kinds_refuses_others() -> None:
    box, loss = program_of("box", "L1"), program_of("huber loss", "L1")
    with pytest.raises(InvalidInput, match=r"expected Ball, ReluBall or NetTrimSet.*found Box"):
        solve_path(box, [1.0])
    with pytest.raises(InvalidInput, match=r"expected Ball, ReluBall or NetTrimSet.*found Box"):
        feasible_eps(box)
    for program in (box, loss):
        with pytest.raises(SolverRefused, match="fits of this library"):
            refit(program, torch.ones(N, M, dtype=torch.bool))
    with pytest.raises(SolverRefused, match="domain of NonnegativeL1"):
        refit(LayerProgram(gaussian(1, P, N), SquaredLoss(gaussian(2, P, M)), NonnegativeL1()), torch.ones(N, M) > 0)
    for penalty in THEIRS:
        with pytest.raises(InvalidInput, match="bound no single weights"):
            support_bounds(program_of("squared loss", penalty), torch.zeros(N, M))
    budget = LayerProgram(gaussian(1, P, N), HuberLoss(gaussian(2, P, M)), TopK(2))
    with pytest.raises(SolverRefused, match="found HuberLoss"):
        solve(budget, "continuation")


def test_mixtures_stay_within_the_domain() -> None:
    program = program_of("ball", "bounds")
    W = program.penalty.to(ONES).prox(gaussian(2, N, M), 0.0)
    mixed = make_feasible(program, W + 0.02, W)
    assert mixed.certificate.violation <= EXACT
    with pytest.raises(InvalidInput, match="domain of BoundedL1"):
        make_feasible(program, W, W + 1)


def test_zeros_are_exact_for_the_squared_loss_alone() -> None:
    """A subclass with another curvature gets the bounds of any fit, not those of the loss that it is named after."""

    class Tiny(SquaredLoss):
        def residual(self, Z: Tensor) -> Tensor:
            return 1.0 * super().residual(Z)

    program = program_of("squared loss", "L1")
    found = solve(program, tol=REFERENCE)
    changed = LayerProgram(program.inputs, Tiny(program.fit.Y, 2.0), L1())
    exact, bounds = (support_bounds(p, found.weights, found.multipliers) for p in (program, changed))
    assert bool((bounds >= exact).all())
    assert not bool((bounds == 0).any())


# Claims that are false


class Forgetful(ElasticNet):  # type: ignore[misc, valid-type]
    """Claims to be homogeneous."""

    homogeneous = True


class SmallDual(NonnegativeL1):  # type: ignore[misc, valid-type]
    def dual_norm(self, A: Tensor) -> Tensor:
        return 0.5 * super().dual_norm(A)


class SmallConjugate(ElasticNet):  # type: ignore[misc, valid-type]
    def conjugate(self, A: Tensor) -> Tensor:
        return 0.5 * super().conjugate(A)


class Bare(L1):
    """Not homogeneous, and without a conjugate and ``times``."""

    homogeneous = False
    conjugate = times = property()  # type: ignore[assignment]


class Unrestrained(HuberLoss):  # type: ignore[misc, valid-type]
    def project_dual(self, L: Tensor) -> Tensor:
        return L

    def best_scaling(self, terms: Tensor, cap: Tensor) -> Tensor:
        return torch.minimum(self.weight * terms[0].clamp(min=0) / terms[1].clamp(min=1e-300), cap)


class Unlimited(HuberLoss):  # type: ignore[misc, valid-type]
    """Scales beyond 1 leave the box that ``project_dual`` leads into."""

    def best_scaling(self, terms: Tensor, cap: Tensor) -> Tensor:
        return torch.minimum(self.weight * terms[0].clamp(min=0) / terms[1].clamp(min=1e-300), cap)


class SmallSupport(Box):  # type: ignore[misc, valid-type]
    def dual_value(self, terms: Tensor, t: Tensor) -> float:
        return float((t * (terms[0] - 0.9 * self.eps * terms[1])).sum())


@pytest.mark.parametrize(
    "penalty", [Forgetful(ONES), SmallDual(), SmallConjugate(ONES), Bare()], ids=lambda g: type(g).__name__
)
def test_a_program_refuses_penalties_whose_bounds_would_be_false(penalty: Any) -> None:
    with pytest.raises(InvalidInput, match=f"penalty {type(penalty).__name__}"):
        LayerProgram(gaussian(1, P, N), SquaredLoss(gaussian(2, P, M)), penalty)


@pytest.mark.parametrize("kind", [Unrestrained, Unlimited, lambda Y: SmallSupport(Y, 0.3)], ids=["a", "b", "c"])
def test_a_program_refuses_fits_whose_bounds_would_be_false(kind: Callable[[Tensor], Any]) -> None:
    with pytest.raises(InvalidInput, match=r"⟨Λ, Z⟩ = .* exceeds"):
        LayerProgram(gaussian(1, P, N), kind(gaussian(2, P, M)))


# The checks, on what is right


@pytest.mark.parametrize("name", [*PENALTIES, "top-k", "2:4"])
def test_right_penalties_pass(name: str) -> None:
    budgets = {"top-k": TopK(3), "2:4": NM(2, 4)}
    report = testing.check_penalty(budgets.get(name) or PENALTIES[name], N, M, points=2)
    assert report.passed


@pytest.mark.parametrize("name", FITS)
def test_right_fits_pass(name: str) -> None:
    Z = gaussian(5, 24, 3)
    fit = Ball(Z, torch.tensor([0.2, 0.3, 2.0])) if "neuron" in name else FITS[name](Z)
    assert testing.check_fit(fit, points=3).passed


# The checks, on what is spoilt


def spoilt(kind: Any, **members: Any) -> Any:
    """A subclass with other members; ``super`` of a method is its last argument."""

    def method(name: str, change: Callable[..., Any]) -> Any:
        return lambda self, *args: change(self, *args, lambda *a: getattr(super(made, self), name)(*a))

    made = type(f"Spoilt{kind.__name__}", (kind,), {name: method(name, change) for name, change in members.items()})
    return made


SPOILT_FITS: dict[str, tuple[Any, str]] = {
    "prox too short": (
        spoilt(HuberLoss, prox_residual=lambda s, Z, sums, rho, f: 0.9 * f(Z, sums, rho)),
        "prox|duality",
    ),
    "prox of another weight": (spoilt(HuberLoss, prox=lambda s, Z, rho, f: f(Z, 2 * rho)), "prox"),
    "prox writes on its argument": (spoilt(HuberLoss, prox=lambda s, Z, rho, f: Z.copy_(f(Z, rho))), "changed"),
    "value doubled": (spoilt(HuberLoss, value=lambda s, sums, f: 2 * f(sums)), "prox|duality"),
    "no project_dual": (spoilt(HuberLoss, project_dual=lambda s, L, f: L), "project_dual|duality"),
    "project_dual by half": (spoilt(HuberLoss, project_dual=lambda s, L, f: 0.5 * f(L)), "project_dual"),
    "conjugate too small": (spoilt(HuberLoss, dual_value=lambda s, terms, t, f: f(terms, t) + 0.1), "duality"),
    "conjugate too large": (spoilt(HuberLoss, dual_value=lambda s, terms, t, f: f(terms, t) - 0.1), "duality"),
    "scales beyond the caps": (spoilt(HuberLoss, best_scaling=lambda s, terms, cap, f: 2 * cap), "scaling|duality"),
    "scales of nine tenths": (
        spoilt(HuberLoss, best_scaling=lambda s, terms, cap, f: 0.9 * f(terms, cap)),
        "best_scaling",
    ),
    "scales of 0": (spoilt(HuberLoss, best_scaling=lambda s, terms, cap, f: 0 * cap), "best_scaling"),
    "dual terms of a mean": (spoilt(HuberLoss, dual_terms=lambda s, L, f: f(L) / len(L)), "dual_terms|duality"),
    "sums of a mean": (spoilt(HuberLoss, sums=lambda s, Z, f: f(Z) / len(Z)), "sums"),
    "sums in float32": (spoilt(HuberLoss, sums=lambda s, Z, f: f(Z).float()), "float64"),
    "rescaled without its delta": (
        spoilt(HuberLoss, rescaled=lambda s, c, f: type(s)(c * s.Y, s.delta, s.weight / c**2)),
        "rescaled",
    ),
    "times does nothing": (spoilt(HuberLoss, times=lambda s, k, f: s), "times"),
    "sample of the same weight": (spoilt(HuberLoss, sample=lambda s, rows, f: s.map(lambda a: a[rows])), "sample"),
    "residual of the wrong sign": (spoilt(HuberLoss, residual=lambda s, Z, f: -f(Z)), "residual"),
    "cvxpy of another program": (
        spoilt(HuberLoss, to_cvxpy=lambda s, Z, f: (2 * f(Z)[0], [])),
        "to_cvxpy",
    ),
    "residual in float32": (spoilt(HuberLoss, residual=lambda s, Z, f: f(Z).float()), "residual of"),
    "a distance that is not": (spoilt(Box, distance=lambda s, sums, f: 0.5 * f(sums)), "distance"),
    "a mask of numbers": (spoilt(HuberLoss, unrestricted=lambda s, f: f().double()), "unrestricted"),
}


@pytest.mark.parametrize("name", SPOILT_FITS)
def test_spoilt_fits_are_caught(name: str) -> None:
    kind, reason = SPOILT_FITS[name]
    fit = kind(gaussian(5, 24, 3), 0.3)
    with pytest.raises(NotConforming, match=reason):
        testing.check_fit(fit, points=3)


def doubled_ridge(s: Any, d: Tensor, f: Callable[..., Any]) -> Any:
    return type(s)(s.ridge.to(d) / d, s.l1.rescaled(d))


SPOILT_PENALTIES: dict[str, tuple[Any, str]] = {
    "claims to be homogeneous": (Forgetful, "homogeneous"),
    "prox too short": (spoilt(ElasticNet, prox=lambda s, V, t, f: f(V, 0.9 * t)), "prox"),
    "prox forgets the ridge": (spoilt(ElasticNet, prox=lambda s, V, t, f: s.l1.prox(V, t)), "prox|conjugate"),
    "value doubled": (spoilt(ElasticNet, value=lambda s, U, f: 2 * f(U)), "prox"),
    "not convex": (spoilt(ElasticNet, value=lambda s, U, f: U.abs().sqrt().sum()), "convex"),
    "not 0 at 0": (spoilt(ElasticNet, value=lambda s, U, f: f(U) + 1), r"value\(0\)"),
    "conjugate too small": (SmallConjugate, r"g\*\(A\)"),
    "conjugate too large": (spoilt(ElasticNet, conjugate=lambda s, A, f: 1.1 * f(A)), r"g\*\(A\)"),
    "conjugate of everything": (spoilt(ElasticNet, conjugate=lambda s, A, f: f(A).sum()), "conjugate|raised"),
    "rescaled by d, not d²": (spoilt(ElasticNet, rescaled=doubled_ridge), "rescaled"),
    "times the ridge alone": (spoilt(ElasticNet, times=lambda s, k, f: type(s)(k * s.ridge, s.l1)), "times"),
    "free by its cost": (spoilt(ElasticNet, cost=lambda s, shape, f: torch.zeros(shape)), "free"),
    "cvxpy of another program": (spoilt(ElasticNet, to_cvxpy=lambda s, U, f: 2 * f(U)), "to_cvxpy"),
    "dual norm too small": (SmallDual, "dual_norm"),
    "dual norm too large": (spoilt(NonnegativeL1, dual_norm=lambda s, A, f: 2 * f(A)), "dual_norm"),
    "dual norm of the other sign": (spoilt(NonnegativeL1, dual_norm=lambda s, A, f: f(-A)), "dual_norm|⟨A, U⟩"),
    "prox out of the domain": (spoilt(NonnegativeL1, prox=lambda s, V, t, f: s.l1.prox(V, t)), "prox|dual_norm|cvxpy"),
    "slack too large": (spoilt(L1, slack=lambda s, A, f: 2 * f(A) + 0.1), "slack"),
    "prices halved": (spoilt(L1, cost=lambda s, shape, f: 0.5 * f(shape)), "cost"),
    "a prox that keeps too much": (spoilt(TopK, prox=lambda s, V, t, f: V), "budget"),
}


@pytest.mark.parametrize("name", SPOILT_PENALTIES)
def test_spoilt_penalties_are_caught(name: str) -> None:
    kind, reason = SPOILT_PENALTIES[name]
    bases = {NonnegativeL1: (), L1: (), TopK: (3,)}
    arguments = next((args for base, args in bases.items() if issubclass(kind, base)), (ONES,))
    with pytest.raises(NotConforming, match=reason):
        testing.check_penalty(kind(*arguments), N, M, points=3)


def test_a_report_has_a_line_a_check() -> None:
    report = testing.check_fit(HuberLoss(gaussian(5, 24, 3), 0.3), points=2)
    assert {result.name for result in report.results} >= {"prox", "duality", "project_dual", "units", "cvxpy"}
    assert len(str(report).splitlines()) == len(report.results) + 1
