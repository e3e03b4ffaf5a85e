"""The interior point method: its cones, its embedding, its answers, and what passes on to it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import linprog
from tolerances import EXACT, REFERENCE
from torch import Tensor

from convexprune.solvers import Ball, LayerProgram, NetTrimSet, ReluBall, Status, solve
from convexprune.solvers.methods import IterativeSolver, Start
from convexprune.solvers.methods.homogeneous import Array, Cones, Embedding, NesterovTodd
from convexprune.solvers.methods.iterate import PenaltyParameter
from convexprune.solvers.programs import SquaredLoss
from convexprune.solvers.testing import zoo
from convexprune.solvers.testing.layers import layer

CONES = Cones(2, 3, np.array([3, 1, 4]))


def inside(seed: int) -> Array:
    a = np.random.default_rng(seed).normal(size=CONES.rows)
    a[:2], a[CONES.line] = 0, np.abs(a[CONES.line]) + 0.1
    a[CONES.heads] = np.sqrt(CONES.inner(a, a)) + 0.3
    return a


def test_the_scaling_makes_one_point_of_two() -> None:
    s, z, a = inside(0), inside(1), inside(2)
    W = NesterovTodd(CONES, s, z)
    assert W.apply(z) == pytest.approx(W.apply(s, -1.0), rel=EXACT)
    assert W.apply(W.apply(a), -1.0) == pytest.approx(a, rel=EXACT)
    assert W.square(z) == pytest.approx(s, rel=EXACT)
    assert CONES.product(s, CONES.quotient(s, z)) == pytest.approx(z, rel=EXACT)


def test_the_sparse_form_is_the_square_of_the_scaling() -> None:
    W, a = NesterovTodd(CONES, inside(0), inside(1)), inside(2)
    D, u, v = W.sparse()
    product = D * a
    for first, size in zip(CONES.heads, CONES.sizes, strict=True):
        at = slice(first, first + size)
        product[at] += u[at] * (u[at] @ a[at]) - v[at] * (v[at] @ a[at])
    assert product == pytest.approx(W.square(a), rel=EXACT)


def test_the_reach_is_the_distance_to_the_boundary() -> None:
    a, d = inside(0), -inside(1)
    edge = a + CONES.reach(a, d) * d
    assert min(edge[CONES.line].min(), CONES.margin(edge)[0].min()) == pytest.approx(0, abs=EXACT)
    assert CONES.reach(a, inside(2)) == math.inf


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_reach_towards_the_apex(size: int) -> None:
    """There both margins fall to 0 at once, and rounding may hide that they do."""
    rng, cones = np.random.default_rng(size), Cones(0, 0, np.array([size]))
    for _ in range(200):
        body = rng.normal(size=size - 1)
        a = np.append(np.linalg.norm(body) + rng.uniform(0.1, 1), body)
        assert cones.reach(a, -2 * a) == pytest.approx(0.5, rel=REFERENCE)


def linear(q: Array, A: Array, b: Array) -> Embedding:
    """min qᵀx subject to Ax ≤ b."""
    n, m = len(q), len(b)
    return Embedding(sparse.csc_matrix((n, n)), q, sparse.csc_matrix(A), b, Cones(0, m, np.zeros(0, dtype=int)))


def solved(program: Embedding) -> Embedding:
    while not program.stuck and program.mu > 1e-14:
        program.step()
    return program


def test_a_linear_program_agrees_with_the_simplex_method() -> None:
    rng = np.random.default_rng(0)
    A, b, q = rng.normal(size=(30, 6)), rng.uniform(1, 2, 30), rng.normal(size=6)
    A, b = np.vstack([A, np.eye(6), -np.eye(6)]), np.append(b, np.full(12, 3.0))
    other = linprog(q, A, b, bounds=(None, None))
    assert q @ solved(linear(q, A, b)).point()[0] == pytest.approx(other.fun, rel=REFERENCE)


def test_a_program_without_solution_leaves_a_proof() -> None:
    """x ≤ −1 and −x ≤ −1."""
    A, b = np.array([[1.0], [-1.0]]), np.array([-1.0, -1.0])
    program = solved(linear(np.ones(1), A, b))
    z = program.ray()[1]
    assert program.kappa > 1e6 * program.tau
    assert np.all(z >= 0)
    assert abs(A.T @ z) < REFERENCE
    assert b @ z < 0


@pytest.mark.parametrize("weight", [1.0, 100.0])
@pytest.mark.parametrize("solver", ["interior", None])
def test_ceilings_that_no_weights_keep_are_proven_so_for_a_loss(solver: str | None, weight: float) -> None:
    """Its ray has no part in the outputs that the loss looks at."""
    rng = torch.Generator().manual_seed(4)
    X, Y = (torch.randn(20, n, generator=rng, dtype=torch.float64) for n in (5, 3))
    program = LayerProgram(X, NetTrimSet(Y.clamp(min=0), 1.0, ceiling=-1.0).as_loss(weight))
    solution = solve(program, solver)
    assert solution.status is Status.INFEASIBLE
    if solver == "interior":
        assert solution.iterations < 20


@pytest.mark.parametrize(
    "name", ["relu-ball plain 60x30x40", "net-trim weighted", "squared-loss columns", "ball blocks"]
)
def test_many_digits_and_exact_zeros(name: str) -> None:
    program = zoo.program(name)
    solution = solve(program, "interior", tol=1e-7, feas_tol=1e-8)
    assert solution.status is Status.SOLVED
    assert solution.iterations < 30
    first_order = solve(program, tol=1e-5)
    assert solution.nonzeros <= 1.05 * first_order.nonzeros
    assert solution.certificate.value == pytest.approx(first_order.certificate.value, rel=1e-4)


def tight(dtype: torch.dtype) -> LayerProgram:
    X, W = layer(24, 60, 8, 5)
    Y = (X @ W).clamp(min=0).to(dtype)
    return LayerProgram(X.to(dtype), ReluBall(Y, 0.0))


@pytest.mark.parametrize("share", [1e-5, 1e-9, 1e-11])
def test_losses_with_next_to_no_penalty(share: float) -> None:
    """More inputs than samples: multipliers are no small difference times a large weight."""
    rng = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(20, n, generator=rng, dtype=torch.float64) for n in (40, 3))
    program = LayerProgram(X, SquaredLoss(Y, 1 / (share * float((X.T @ Y).abs().max()))))
    solution = solve(program, "interior", tol=1e-6)
    assert solution.status is Status.SOLVED
    exact = solve(LayerProgram(X, Ball(Y, 0.0)), "interior", tol=1e-6).certificate.value
    assert solution.certificate.value == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_went_on_is_said(dtype: torch.dtype) -> None:
    solution = solve(tight(dtype), "admm")
    assert solution.status is Status.SOLVED
    assert "iterations: interior point method went on" in solution.provenance["message"]
    stages = [point.stage for point in solution.trace]
    assert stages[0] == ""
    assert stages[-1] == "interior point method"
    assert [point.iteration for point in solution.trace] == sorted(point.iteration for point in solution.trace)
    assert solution.trace[-1].iteration == solution.iterations
    json.dumps(solution.to_dict())


def test_limits_hold_for_all_methods_together() -> None:
    solution = solve(tight(torch.float64), tol=1e-12, feas_tol=1e-13, max_iter=250)
    assert solution.iterations <= 250
    assert solution.trace[-1].iteration <= 250


@pytest.mark.parametrize("seed", [13, 19, 38])
def test_the_gram_solver_goes_on_too(seed: int) -> None:
    """Balls of 1e-9 of the targets, on which it used up its iterations before."""
    rng = torch.Generator().manual_seed(seed)
    P, N, M = (int(torch.randint(1, 25, (1,), generator=rng)) for _ in range(3))
    X = torch.randn(P, N, generator=rng, dtype=torch.float64).clamp(min=0)
    Y = X @ torch.randn(N, M, generator=rng, dtype=torch.float64)
    solution = solve(LayerProgram(X, Ball(Y, 1e-9 * float(Y.norm()))), "quadratic")
    assert solution.status is Status.SOLVED
    assert "interior point method went on" in solution.provenance["message"]


def test_large_programs_go_on_in_float64() -> None:
    """Too large for the interior point method, and outputs that float32 cannot tell from the targets to within eps."""
    X, W = layer(1, 400, 30, 40)
    program = LayerProgram(X.float(), Ball((X @ W).float(), 1e-6 * float((X @ W).norm())))
    solution = solve(program, max_iter=3000)
    assert solution.status is Status.SOLVED
    assert solution.trace[-1].stage == "admm in float64"
    assert solution.provenance["effective"]["iterate dtype"] == "torch.float64"


@dataclass(frozen=True)
class Walks(IterativeSolver[list[Tensor]]):
    """Shows the weights given, one an iteration; what is no tensor is raised."""

    shown: tuple[Any, ...] = ()

    def refuses(self, program: LayerProgram) -> str | None:
        return None

    def init(self, program: LayerProgram, start: Start | None) -> list[Tensor]:
        return [torch.zeros(program.shape, dtype=torch.float64), *self.shown]

    def step(self, state: list[Tensor]) -> None:
        del state[0]
        if isinstance(state[0], Exception):
            raise state[0]

    def ready(self, state: list[Tensor], limits: Any) -> bool:
        return True

    def residuals(self, state: list[Tensor]) -> Mapping[str, float]:
        return {}

    def finish(self, state: list[Tensor]) -> tuple[Tensor, None]:
        return state[0], None


def weights(factor: float) -> tuple[LayerProgram, Tensor]:
    X, W = layer(3, 30, 6, 4)
    return LayerProgram(X, Ball(X @ W, 0.1 * float((X @ W).norm()))), factor * W


def test_the_best_iterate_comes_back_not_the_last() -> None:
    program, W = weights(1.0)
    solution = solve(program, Walks((2 * W, W, 5 * W)), max_iter=3)
    assert torch.equal(solution.weights, W)
    assert solution.status is Status.ITERATION_LIMIT
    assert solution.iterations == 3


@pytest.mark.parametrize(
    "error", [torch.linalg.LinAlgError("singular"), OverflowError("too large"), ZeroDivisionError()]
)
def test_arithmetic_that_breaks_down_is_a_status(error: Exception) -> None:
    program, W = weights(1.0)
    solution = solve(program, Walks((W, error)))
    assert solution.status is Status.UNCERTIFIED
    assert "broke down" in solution.provenance["message"]
    assert torch.equal(solution.weights, W)


@pytest.mark.parametrize("precision", [2.0**-23, 2.0**-52])
@pytest.mark.parametrize(("primal", "moved"), [(1.0, 1e-9), (1e-9, 1.0)])
def test_penalties_stay_in_the_range_of_their_precision(precision: float, primal: float, moved: float) -> None:
    """However long residuals ask for more: a sum keeps half of the digits of its scaled dual, or of its variable."""
    parameter, dual = PenaltyParameter(1.0, precision), 1.0
    for _ in range(100):
        parameter.measure(1.0, primal, moved, dual)
        dual /= parameter.rebalance(0.1)
    half = math.sqrt(precision)
    assert half * (1 - EXACT) <= dual <= (1 + EXACT) / half
    assert dual < 2 * half or dual > 0.5 / half


def test_units_that_float32_cannot_square() -> None:
    X, W = layer(4, 30, 6, 4)
    Y = (X @ W).float()
    small, large = (solve(LayerProgram(X.float() * c, Ball(Y * c, 0.1 * c * float(Y.norm())))) for c in (1.0, 1e20))
    assert large.status is Status.SOLVED
    assert large.certificate.value == pytest.approx(small.certificate.value, rel=1e-3)
