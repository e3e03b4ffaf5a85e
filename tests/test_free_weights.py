"""Weights without a price: whole neurons of them are least squares, and the residual's multipliers prove it."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import AGREEMENT, REFERENCE, ROUNDING
from torch import Tensor
from zoo import gaussian

from convexprune.solvers import L1, Ball, LayerProgram, ReluBall, Status, certify, solve
from convexprune.solvers.certificate import repair
from convexprune.solvers.methods import feasible_eps
from convexprune.solvers.programs import GroupL2, NetTrimLoss, ReluLoss, SquaredLoss

P, N, M = 30, 5, 3
SEEDS = st.integers(0, 10_000)
SOLVERS = ["admm", "quadratic", "clarabel"]


def prices(*free: int) -> Tensor:
    """1 everywhere but in these columns."""
    w = torch.ones(N, M)
    w[:, list(free)] = 0
    return w


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    X = gaussian(1, P, N)
    X[:, -1] = 1
    return X.to(dtype), (X @ gaussian(2, N, M) + gaussian(3, P, M)).to(dtype)


def least_squares(X: Tensor, Y: Tensor) -> Tensor:
    """The squared distance of each column of Y from the span of X."""
    X, Y = X.double(), Y.double()
    return (Y - X @ torch.linalg.pinv(X) @ Y).square().sum(0)


ALL_FREE: dict[str, Any] = {
    "L1": L1(torch.zeros(1, 1)),
    "rows": GroupL2("rows", [0.0] * N),  # type: ignore[arg-type]
    "columns": GroupL2("columns", [0.0] * M),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("penalty", ALL_FREE)
def test_least_squares_are_certified_at_once(penalty: str, solver: str, dtype: torch.dtype) -> None:
    X, Y = data(dtype)
    found = solve(LayerProgram(X, SquaredLoss(Y, 2.0), ALL_FREE[penalty]), solver)
    best = float(least_squares(X, Y).sum())
    assert found.status is Status.SOLVED
    assert found.iterations <= 20
    assert found.certificate.value == pytest.approx(best, rel=AGREEMENT)
    assert found.certificate.bound == pytest.approx(best, rel=AGREEMENT)
    assert found.certificate.bound <= best * (1 + ROUNDING)


def test_a_single_free_input_is_certified_at_once() -> None:
    X, Y = torch.rand(10, 1, dtype=torch.float64), gaussian(0, 10, 3)
    for solver in SOLVERS:
        found = solve(LayerProgram(X, SquaredLoss(Y), L1.free_bias(1)), solver)
        assert found.status is Status.SOLVED
        assert found.iterations <= 20


FITS: dict[str, Callable[[Tensor], Any]] = {
    "squared loss": lambda Y: SquaredLoss(Y, 3.0),
    "relu loss": lambda Y: ReluLoss(Y.clamp(min=0), 3.0),
    "net-trim loss": lambda Y: NetTrimLoss(Y.clamp(min=0), 3.0),
    "ball": lambda Y: Ball(Y, 0.8 * float(Y.norm())),
    "a ball a neuron": lambda Y: Ball(Y, 0.8 * Y.norm(dim=0)),
    "relu ball": lambda Y: ReluBall(Y.clamp(min=0), 0.6 * float(Y.norm())),
}
PENALTIES: dict[str, Any] = {
    "one column": L1(prices(1)),
    "two columns": L1(prices(0, 2)),
    "all columns": L1(prices(0, 1, 2)),
    "a group of weight 0": GroupL2("columns", [0.0, 1.0, 2.0]),  # type: ignore[arg-type]
    "rows of weight 0": GroupL2("rows", [1.0, 0.0, 0.0, 1.0, 0.0]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("fit", FITS)
def test_free_columns_are_certified_with_any_fit(fit: str, penalty: str, dead: bool) -> None:
    X, Y = data()
    if dead:
        X[:, 1] = 0
    program = LayerProgram(X, FITS[fit](Y), PENALTIES[penalty])
    ours, reference = solve(program), solve(program, "clarabel", tol=REFERENCE)
    assert [ours.status, reference.status] == [Status.SOLVED] * 2
    assert abs(ours.certificate.value - reference.certificate.value) <= 2 * AGREEMENT * ours.certificate.scale


@pytest.mark.parametrize("columns", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("fit", FITS)
def test_free_columns_that_reach_their_targets_cost_nothing(fit: str, columns: tuple[int, ...]) -> None:
    """As many samples as inputs, independent: no residual, no multipliers, and an optimum of 0 for what is free."""
    X, Y = gaussian(4, N, N), gaussian(5, N, M)
    found = solve(LayerProgram(X, FITS[fit](Y), L1(prices(*columns))))
    assert found.status is Status.SOLVED
    if len(columns) == M:
        assert found.certificate.value <= 1e-11 * float(Y.square().sum())


@pytest.mark.parametrize("name", ["one column", "two columns", "a group of weight 0"])
def test_a_free_column_out_of_reach_is_proven_infeasible(name: str) -> None:
    X, Y = data()
    rest = float(least_squares(X, Y).sum().sqrt())
    assert solve(LayerProgram(X, Ball(Y, 0.9 * rest), PENALTIES[name])).status is Status.INFEASIBLE


@cache
def optimum(fit: str, penalty: str) -> tuple[LayerProgram, float]:
    """A program, and a little more than its optimum."""
    X, Y = data()
    program = LayerProgram(X, FITS[fit](Y), PENALTIES[penalty])
    tight = solve(program, "clarabel", tol=REFERENCE).certificate
    return program, tight.value + REFERENCE * tight.scale


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("fit", FITS)
@settings(max_examples=10)
@given(seed=SEEDS, orthogonal=st.booleans(), power=st.integers(-50, 50))
def test_no_multipliers_bound_above_the_optimum_of_free_columns(
    fit: str, penalty: str, seed: int, orthogonal: bool, power: int
) -> None:
    (program, best), L = optimum(fit, penalty), gaussian(seed, P, M)
    if orthogonal:
        L = L - program.inputs @ torch.linalg.pinv(program.inputs) @ L
    assert 0 <= certify(program, torch.zeros(N, M), L * 10.0**power).bound <= best


def test_many_free_inputs_are_repaired_a_few_neurons_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix serves all neurons of a linear fit; behind a ReLU each has its own, and few are held at once."""
    monkeypatch.setattr(repair, "_GRAM_ENTRIES", 2 * 70**2)
    X, W = gaussian(6, 300, 70), gaussian(7, 70, 5)
    Y = X @ W + gaussian(8, 300, 5)
    for fit in (SquaredLoss(Y), ReluLoss(Y.clamp(min=0))):
        program = LayerProgram(X, fit, L1(torch.zeros(1, 1)))
        tight = solve(program, "clarabel", tol=REFERENCE).certificate
        assert tight.bound == pytest.approx(tight.value, rel=REFERENCE)
        rough = certify(program, torch.zeros(70, 5), fit.residual(X @ W) + 1e-3 * gaussian(9, 300, 5))
        assert 0 < rough.bound <= tight.value * (1 + REFERENCE)


def test_the_smallest_eps_of_free_neurons() -> None:
    """Nothing has a price, so the smallest eps is the distance of the targets from the span of the inputs."""
    X, Y = data()
    rest = float(least_squares(X, Y).sum().sqrt())
    found = feasible_eps(LayerProgram(X, Ball(Y, 1.0), L1(torch.zeros(1, 1))), tol=1e-4)
    assert found.low <= rest * (1 + ROUNDING)
    assert found.high >= rest * (1 - ROUNDING)
    assert found.width <= 1e-4 * float(Y.norm())
