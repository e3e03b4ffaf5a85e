"""The certificate: valid whoever speaks, exact at an optimum, blind to order, units, blocks and precision."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerances import EXACT, FEASIBLE, KKT, OPTIMUM, REFERENCE, ROUNDING, SINGLE, TIGHT
from torch import Tensor
from zoo import CLOSING, FITS, SMALL, build, gaussian, layer, multipliers, tight

from convexprune.solvers import L1, Ball, LayerProgram, NetTrimSet, ReluBall, Solution, Status, TopK, certify, solve
from convexprune.solvers.certificate import Certificate, certificate, repair
from convexprune.solvers.errors import EmptyInput, InvalidInput, NonFinite, ShapeMismatch
from convexprune.solvers.methods import Proposal, Start
from convexprune.solvers.methods.interface import Limits, Watch
from convexprune.solvers.methods.solve import Judge
from convexprune.solvers.programs import NM, GroupL2, NetTrimLoss, ReluLoss, SquaredLoss

BOUNDED = [*SMALL, "net-trim raised ceiling", "relu-ball wide", "ball badly_scaled", "relu-ball badly_scaled"]
BOUNDED += ["net-trim dead_inputs", "relu-ball exact", "net-trim exact", "relu-ball all inactive, U = 0"]
POWERS = st.integers(-8, 8).map(lambda power: 10.0**power)
SEEDS = st.integers(0, 10_000)


@cache
def reference(name: str) -> tuple[float, Tensor]:
    """An upper bound on the optimum, what a (nearly) feasible point costs, and nearly optimal multipliers."""
    hard = name.endswith(("badly_scaled", "exact"))  # a set is taken larger by a part of the violation tolerated
    solution = solve(build(name), "clarabel", feas_tol=ROUNDING) if hard else tight(name)
    return solution.certificate.value + OPTIMUM * solution.certificate.scale, multipliers(solution)


PROPOSALS: dict[str, Callable[[LayerProgram, Tensor, Tensor], Tensor]] = {
    "noise": lambda program, L, noise: noise,
    "positive": lambda program, L, noise: noise.abs(),
    "negative": lambda program, L, noise: -noise.abs(),
    "sparse": lambda program, L, noise: noise * (noise.abs() > 2),
    "one neuron": lambda program, L, noise: noise * (torch.arange(noise.shape[1]) == 0),
    "targets": lambda program, L, noise: -program.fit.Y,
    "nearly optimal": lambda program, L, noise: L + 1e-3 * L.norm() / noise.norm() * noise,
    "optimal, skewed": lambda program, L, noise: L * (0.1 * noise[:1]).exp(),
    "orthogonal to X": lambda program, L, noise: noise - program.inputs @ torch.linalg.pinv(program.inputs) @ noise,
    "optimal and orthogonal": lambda program, L, noise: (
        L + 1e3 * (noise - program.inputs @ torch.linalg.pinv(program.inputs) @ noise)
    ),
    "zero": lambda program, L, noise: 0 * noise,
}


@pytest.mark.parametrize("name", BOUNDED)
@given(kind=st.sampled_from(sorted(PROPOSALS)), seed=SEEDS, power=st.integers(-200, 200))
def test_no_multipliers_bound_above_the_optimum(name: str, kind: str, seed: int, power: int) -> None:
    """Weak duality after repair, whoever produced the multipliers and at any scale."""
    program, (optimum, L) = build(name), reference(name)
    L = PROPOSALS[kind](program, L, gaussian(seed, *program.fit.shape)) * 10.0**power
    assert 0 <= certify(program, torch.zeros(program.shape), L).bound <= optimum


@pytest.mark.parametrize("name", SMALL)
@given(
    seed=SEEDS,
    scale=st.sampled_from([1e-90, 1e-20, 1e-3, 0.3, 7.0, 1e5, 1e90]),
    noise=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_the_scale_of_the_multipliers_is_irrelevant(name: str, seed: int, scale: float, noise: float) -> None:
    program, solution = build(name), tight(name)
    L = multipliers(solution)
    L = L + noise * L.std() * gaussian(seed, *L.shape)
    once, twice = (certify(program, solution.weights, factor * L) for factor in (1.0, scale))
    assert_alike(once, twice)


@pytest.mark.parametrize("name", CLOSING)
def test_strong_duality_at_tight_solutions(name: str) -> None:
    """Slater's condition holds or the program is linear: value and bound meet."""
    found = tight(name).certificate
    assert found.gap <= TIGHT
    assert found.violation <= TIGHT
    assert found.bound == pytest.approx(found.value, rel=2 * TIGHT)


@pytest.mark.parametrize("name", CLOSING)
def test_the_sparse_side_of_optimality(name: str) -> None:
    """0 ∈ ∂g(U) + XᵀΛ: |XᵀΛ| ≤ w everywhere, XᵀΛ = −w sign(u) on the support; slack leaves zeros to the last bit."""
    program, solution = build(name), tight(name)
    U, A, w = solution.weights, program.inputs.T @ multipliers(solution), program.penalty.cost(program.shape)
    assert bool((A.abs() <= w + KKT).all())
    torch.testing.assert_close(A[U != 0], (-w * U.sign())[U != 0].to(A), rtol=0, atol=KKT)
    assert not U[A.abs() < (1 - KKT) * w].any()
    assert solution.nonzeros == int((U != 0).sum()) < U.numel()


@pytest.mark.parametrize("name", CLOSING)
def test_the_fitting_side_of_optimality(name: str) -> None:
    """Λ ∈ ∂f(XU): on the ball it is a multiple of the residual, which reaches eps; off Ω it is ≥ 0 and needs Z = V."""
    program, solution = build(name), tight(name)
    fit, Z, L = program.fit, program.inputs @ solution.weights, multipliers(solution)
    h, on_ball = fit.residual(Z), L
    if isinstance(fit, NetTrimSet):
        on_ball, off = torch.where(fit.Y > 0, L, 0.0), torch.where(fit.Y > 0, 0.0, L)
        assert float((off * (fit.V - Z)).abs().max()) <= KKT * float(L.abs().max() * Z.abs().max())
    torch.testing.assert_close(on_ball / on_ball.norm(), h / h.norm(), rtol=0, atol=KKT)
    torch.testing.assert_close(L, fit.project_dual(L))
    assert float(h.norm()) == pytest.approx(program.fit.scale, rel=KKT)


# The best scale of each column


def objective(fit: Ball, terms: Tensor, t: Tensor) -> float:
    return float((terms[0] * t).sum() - fit.eps * (terms[1] * t**2).sum().sqrt())


def scaling_problem(seed: int, size: int, eps: float) -> tuple[Ball, Tensor, Tensor]:
    """Random a, b², cap; some of each are 0, as happens where a neuron has no multipliers or no ball entries."""
    a, b, cap, draw = gaussian(seed, 4, size)
    a, b, cap = (torch.where(draw > x, y, 0.0) for x, y in ((-1.5, a), (-1.0, b), (-0.5, cap.exp())))
    return Ball(torch.ones(1, size), eps), torch.stack([a, b**2]), cap


@given(seed=SEEDS, size=st.integers(1, 8), eps=st.sampled_from([0.0, 0.01, 0.3, 1.0, 3.0]), unit=POWERS)
def test_best_scaling_meets_the_optimality_conditions(seed: int, size: int, eps: float, unit: float) -> None:
    """The concave Σ a t − eps‖t∘b‖ over the box: no coordinate, and no common factor, can improve it."""
    fit, terms, cap = scaling_problem(seed, size, eps)
    terms = terms * torch.tensor([[unit], [unit**2]])
    t = fit.best_scaling(terms, cap)
    best = objective(fit, terms, t)
    assert bool(((t >= 0) & (t <= cap)).all())
    slack = ROUNDING * float((terms[0].abs() * cap).sum())
    trials = [cap * torch.rand(size, generator=torch.Generator().manual_seed(k)).double() for k in range(20)]
    trials += [torch.where(torch.arange(size) == m, x * cap, t) for m in range(size) for x in (0.0, 0.5, 1.0)]
    trials += [(t * x).minimum(cap) for x in (0.9, 0.999, 1.001, 1.1)]
    assert best >= max(objective(fit, terms, trial) for trial in [*trials, cap, 0 * cap]) - slack
    assert best == pytest.approx(fit.dual_value(terms, t), abs=slack)


@pytest.mark.parametrize("seed", range(12))
def test_best_scaling_equals_a_conic_solvers(seed: int) -> None:
    fit, terms, cap = scaling_problem(seed, 6, 0.4)
    t = cp.Variable(6)
    gain = terms[0].numpy() @ t - fit.eps * cp.norm(cp.multiply(terms[1].sqrt().numpy(), t))
    value = cp.Problem(cp.Maximize(gain), [t >= 0, t <= cap.numpy()]).solve(solver="CLARABEL")
    assert objective(fit, terms, fit.best_scaling(terms, cap)) == pytest.approx(value, abs=REFERENCE)


# What the certificate must not depend on


def assert_alike(first: Certificate, second: Certificate, unit: float = 1.0, tolerance: float = ROUNDING) -> None:
    """The same figures, value and bound in units that differ by a factor."""
    slack = tolerance * second.scale
    assert first.value * unit == pytest.approx(second.value, abs=slack)
    assert first.bound * unit == pytest.approx(second.bound, abs=slack)
    assert first.gap == pytest.approx(second.gap, abs=tolerance)
    assert first.violation == pytest.approx(second.violation, rel=tolerance, abs=tolerance)


def rough(name: str) -> tuple[LayerProgram, Tensor, Tensor]:
    """A program with weights and multipliers some way from its solution, so that no figure is 0."""
    program, solution = build(name), tight(name)
    U, L = solution.weights, multipliers(solution)
    L = L + 0.02 * L.std() * gaussian(1, *L.shape)
    return program, U + 0.05 * U.std() * gaussian(2, *U.shape), L


def rebuilt(program: LayerProgram, X: Tensor, change: Callable[[Tensor], Tensor], w: Tensor) -> LayerProgram:
    return LayerProgram(X, program.fit.map(change), L1(w))


@pytest.mark.parametrize("name", SMALL)
def test_the_judge_writes_on_nothing(name: str) -> None:
    program = build(name)
    U, L = gaussian(0, *program.shape), gaussian(1, *program.fit.shape)
    arrays = [program.inputs, program.fit.Y, U, L]
    before = [array.clone() for array in arrays]
    certify(program, U, L)
    certify(program, U)
    assert all(map(torch.equal, arrays, before))


@pytest.mark.parametrize("name", [*SMALL, "net-trim raised ceiling"])
def test_the_order_of_samples_neurons_and_inputs_is_irrelevant(name: str) -> None:
    program, U, L = rough(name)
    (P, N, M), w = (*program.inputs.shape, U.shape[1]), program.penalty.cost(program.shape)
    p, n, m = (torch.randperm(size, generator=torch.Generator().manual_seed(size)) for size in (P, N, M))
    shuffled = rebuilt(program, program.inputs[p][:, n], lambda array: array[p][:, m], w[n][:, m])
    assert_alike(certify(program, U, L), certify(shuffled, U[n][:, m], L[p][:, m]))


@pytest.mark.parametrize("name", [*SMALL, "net-trim raised ceiling"])
@given(c=POWERS)
def test_the_unit_of_the_inputs_is_irrelevant(name: str, c: float) -> None:
    program, U, L = rough(name)
    changed = replace(program, X=c * program.inputs)
    assert_alike(certify(program, U, L), certify(changed, U / c, L), 1 / c)


@pytest.mark.parametrize("name", [*SMALL, "net-trim raised ceiling"])
@given(c=POWERS)
def test_the_unit_of_the_outputs_is_irrelevant(name: str, c: float) -> None:
    program, U, L = rough(name)
    changed = replace(program, fit=program.fit.rescaled(c))
    assert_alike(certify(program, U, L), certify(changed, c * U, L), c)


@pytest.mark.parametrize("name", SMALL)
@given(seed=SEEDS, spread=st.sampled_from([0.1, 1.0, 3.0]))
def test_the_unit_of_each_input_is_irrelevant(name: str, seed: int, spread: float) -> None:
    """x_j → d_j x_j, u_j → u_j/d_j, w_j → w_j d_j describe the same layer."""
    program, U, L = rough(name)
    d = (spread * gaussian(seed, program.shape[0], 1)).exp()
    changed = LayerProgram(program.inputs * d.T, program.fit, L1(program.penalty.cost(program.shape) * d))
    assert_alike(certify(program, U, L), certify(changed, U / d, L))


@pytest.mark.parametrize("entries", [1, 100, 1000])
@pytest.mark.parametrize("with_multipliers", [True, False])
@pytest.mark.parametrize("name", [*SMALL, "net-trim raised ceiling"])
def test_blocks_of_samples_add_up(
    name: str, with_multipliers: bool, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, U, L = rough(name)
    whole = certify(program, U, L if with_multipliers else None)
    monkeypatch.setattr(repair, "BLOCK_ENTRIES", entries)
    assert_alike(whole, certify(program, U, L if with_multipliers else None))


@pytest.mark.parametrize("name", [name for name in SMALL if "plain" in name])
def test_a_dense_evaluation_with_one_common_scale_agrees(name: str) -> None:
    """Value and distance by their definitions; the bound beats that of one common scale for all columns."""
    program, U, L = rough(name)
    found, fit, Z = certify(program, U, L), program.fit, program.inputs @ U
    assert found.value == pytest.approx(float(U.abs().sum()), rel=EXACT)
    assert found.violation == pytest.approx(float((Z - fit.prox(Z, 1.0)).norm()) / fit.scale, rel=ROUNDING)
    L = fit.project_dual(L)
    L = L / (program.inputs.T @ L).abs().max()
    ball = L * (fit.Y > 0) if isinstance(fit, NetTrimSet) else L
    common = -float((L * fit.anchor).sum()) - fit.scale * float(ball.norm())
    assert 0 < common <= found.bound * (1 + EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [*SMALL, "net-trim raised ceiling"])
def test_the_callers_data_are_judged_in_float64(name: str, dtype: torch.dtype) -> None:
    """Data, weights and multipliers of any precision are taken as the numbers that they hold."""
    program, U, L = rough(name)
    low = program.to(dtype)
    U, L = U.to(dtype), L.to(dtype)
    assert low.inputs.dtype == low.fit.Y.dtype == dtype
    assert_alike(certify(low, U, L), certify(low.to(torch.float64), U.double(), L.double()))
    assert certify(low, U, L).value == pytest.approx(certify(program, U).value, rel=20 * SINGLE)


# Weights alone


@pytest.mark.parametrize("name", [name for name in CLOSING if not name.startswith("net-trim")])
def test_weights_alone_certify_themselves_at_an_optimum(name: str) -> None:
    """There Λ is a multiple of the residual, column by column with one factor; its error is first order in U."""
    alone = certify(build(name), tight(name).weights)
    assert alone.gap <= 2 * KKT
    assert alone.value == tight(name).certificate.value


@pytest.mark.parametrize("name", SMALL)
@given(seed=SEEDS, size=st.sampled_from([0.0, 1e-3, 1.0, 1e6]))
def test_weights_alone_never_bound_above_the_optimum(name: str, seed: int, size: float) -> None:
    program = build(name)
    found = certify(program, tight(name).weights + size * gaussian(seed, *program.shape))
    assert 0 <= found.bound <= reference(name)[0]


# Losses, balls a neuron, groups

SHAPE = (60, 8, 5)
UNEVEN = torch.tensor([0.03, 0.04, 0.05, 0.06, 0.07], dtype=torch.float64)
ALL_FITS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "ball": lambda Z, Y: Ball(Z, 0.1 * Z.norm()),
    "a ball a neuron": lambda Z, Y: Ball(Z, 0.1 * Z.norm(dim=0)),
    "a relu ball a neuron": lambda Z, Y: ReluBall(Y, UNEVEN * Y.norm()),
    "a net-trim set a neuron": lambda Z, Y: NetTrimSet(Y, UNEVEN * Y.norm()),
    "squared loss": lambda Z, Y: SquaredLoss(Z, 2.0),
    "relu loss": lambda Z, Y: ReluLoss(Y, 2.0),
    "net-trim loss": lambda Z, Y: NetTrimLoss(Y, 2.0),
}
ALL_PENALTIES: dict[str, Any] = {
    "L1": L1(),
    "free bias": L1.free_bias(SHAPE[1]),
    "rows": GroupL2("rows"),
    "rows, free bias": GroupL2("rows", [1.0] * (SHAPE[1] - 1) + [0.0]),  # type: ignore[arg-type]
    "columns": GroupL2("columns", torch.arange(1, SHAPE[2] + 1)),
    "labels": GroupL2(torch.arange(SHAPE[1] * SHAPE[2]).view(SHAPE[1:]) // 3),
}
PAIRS = [(fit, penalty) for fit in ALL_FITS for penalty in ALL_PENALTIES]


@cache
def posed(fit: str, penalty: str) -> LayerProgram:
    X, W = layer(5, *SHAPE)
    noise = 0.05 * gaussian(6, SHAPE[0], SHAPE[2])
    Z = X @ W + (noise if "loss" in fit else 0)
    return LayerProgram(X, ALL_FITS[fit](Z, Z.clamp(min=0)), ALL_PENALTIES[penalty])


@cache
def closed(fit: str, penalty: str) -> Solution:
    """The program's solution, to a gap of 1e-5."""
    return solve(posed(fit, penalty), tol=FEASIBLE, feas_tol=OPTIMUM, max_iter=20_000)


@pytest.mark.parametrize(("fit", "penalty"), PAIRS)
@settings(max_examples=12)
@given(seed=SEEDS)
def test_value_violation_and_scale_by_their_definitions(fit: str, penalty: str, seed: int) -> None:
    """value = g(U) + f(XU); the distance is that to the prox, for a loss only where it is infinite."""
    program = posed(fit, penalty)
    U = gaussian(seed, *program.shape)
    found, Z, g = certify(program, U), program.inputs @ U, float(program.penalty.value(U))
    f, h = program.fit, program.fit.residual(Z)
    loss = "loss" in fit
    assert found.value == pytest.approx(g + (0.5 * 2.0 * float(h.square().sum()) if loss else 0), rel=ROUNDING)
    domain = f.prox(Z, 1e-30 if loss else 1.0)  # a loss that weighs next to nothing leaves the projection on its domain
    outside = torch.where(f.unrestricted(), 0.0, Z - domain) if fit == "net-trim loss" else (Z - domain) * (not loss)
    assert found.violation == pytest.approx(float(outside.norm()) / f.scale, rel=ROUNDING, abs=ROUNDING)
    assert found.scale >= found.value


@pytest.mark.parametrize(("fit", "penalty"), PAIRS)
def test_strong_duality_of_every_fit_and_penalty(fit: str, penalty: str) -> None:
    solution = closed(fit, penalty)
    found = solution.certificate
    assert solution.status is Status.SOLVED
    assert found.bound == pytest.approx(found.value, abs=2 * FEASIBLE * found.scale)
    assert found.bound > 0.1 * found.scale


@pytest.mark.parametrize(("fit", "penalty"), PAIRS)
@settings(max_examples=12)
@given(kind=st.sampled_from(sorted(PROPOSALS)), seed=SEEDS, power=st.integers(-200, 200))
def test_no_multipliers_bound_above_the_optimum_of_any_fit_and_penalty(
    fit: str, penalty: str, kind: str, seed: int, power: int
) -> None:
    """Weak duality after repair; the dual point behind the bound is feasible for the penalty."""
    program, solution = posed(fit, penalty), closed(fit, penalty)
    best = solution.certificate
    L = PROPOSALS[kind](program, multipliers(solution), gaussian(seed, *program.fit.shape)) * 10.0**power
    judged = certificate.judge(program, torch.zeros(program.shape, dtype=torch.float64), L)
    assert 0 <= judged.certificate.bound <= best.value + 2 * OPTIMUM * best.scale
    if judged.certificate.bound:
        assert float(program.penalty.to(judged.A).dual_norm(-judged.A).max()) <= 1 + ROUNDING


SPANNING = ("rows", "rows, free bias", "labels")  # groups with entries in several columns


@pytest.mark.parametrize(("fit", "penalty"), [pair for pair in PAIRS if "net-trim" not in pair[0]])
def test_weights_alone_certify_themselves_at_any_optimum(fit: str, penalty: str) -> None:
    """Λ is weight·h for a loss, a multiple of h for one ball, and with a ball a neuron one for each column.

    Those of different columns are found one by one, unless groups span the columns: the bound is then only a bound.
    """
    sharp = solve(posed(fit, penalty), tol=TIGHT, feas_tol=OPTIMUM, max_iter=20_000)
    alone, best = certify(posed(fit, penalty), sharp.weights), sharp.certificate
    if "neuron" in fit and penalty in SPANNING:
        assert 0 < alone.bound <= best.value + 2 * OPTIMUM * best.scale
    else:
        assert alone.gap <= KKT  # first order in an error of √1e-8


@pytest.mark.parametrize(("fit", "penalty"), [pair for pair in PAIRS if "free" not in pair[1]])
def test_one_common_scale_bounds_no_better(fit: str, penalty: str) -> None:
    """D(Λ/s) with the largest dual norm s is one choice of scales; the best ones are at least as good."""
    program, solution = posed(fit, penalty), closed(fit, penalty)
    L = multipliers(solution)
    L = program.fit.project_dual(L + 0.05 * L.std() * gaussian(1, *L.shape))
    L = L / program.penalty.dual_norm(-program.inputs.T @ L).max().clamp(min=1)
    terms = program.fit.dual_terms(L)
    common = program.fit.dual_value(terms, torch.ones(SHAPE[2], dtype=torch.float64))
    assert 0 < common <= certify(program, solution.weights, L).bound * (1 + ROUNDING)


@pytest.mark.parametrize("penalty", ["L1", "rows", "columns", "labels"])
@pytest.mark.parametrize("fit", ALL_FITS)
@settings(max_examples=12)
@given(seed=SEEDS)
def test_the_unit_of_each_input_is_irrelevant_to_any_fit(fit: str, penalty: str, seed: int) -> None:
    """x_j → d_j x_j, u_j → u_j/d_j, the penalty rescaled by 1/d, describe the same layer."""
    program, solution = posed(fit, penalty), closed(fit, penalty)
    d = gaussian(seed, SHAPE[1], 1).exp()
    U = solution.weights + 0.05 * gaussian(seed + 1, *program.shape)
    L = multipliers(solution) + 0.02 * gaussian(seed + 2, *program.fit.shape)
    changed = LayerProgram(program.inputs * d.T, program.fit, program.penalty.rescaled(1 / d))
    assert_alike(certify(program, U, L), certify(changed, U / d, L))


@pytest.mark.parametrize("entries", [1, 200])
@pytest.mark.parametrize("fit", ALL_FITS)
def test_blocks_of_samples_add_up_for_any_fit(fit: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program, solution = posed(fit, "L1"), closed(fit, "L1")
    whole = certify(program, 1.1 * solution.weights, multipliers(solution))
    monkeypatch.setattr(repair, "BLOCK_ENTRIES", entries)
    assert_alike(whole, certify(program, 1.1 * solution.weights, multipliers(solution)))


# Budgets


@dataclass(frozen=True)
class Proposes:
    """A solver that has one answer."""

    weights: Any

    def refuses(self, program: LayerProgram) -> str | None:
        return None

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        return Proposal(self.weights, None, "own rule", 1, 0.0)


@pytest.mark.parametrize("fit", ALL_FITS)
@pytest.mark.parametrize("budget", [TopK(12), TopK(3, "neuron"), NM(2, 4), TopK(2, rows=7)], ids=str)
def test_a_budget_is_certified_to_be_kept_and_nothing_more(fit: str, budget: Any) -> None:
    """No bound, no gap; the value is the loss alone, and infinite where the budget is broken."""
    program = LayerProgram(posed(fit, "L1").inputs, posed(fit, "L1").fit, budget)
    W = layer(5, *SHAPE)[1]
    kept = budget.prox(W, 1.0)
    for U in (kept, W):
        found = certify(program, U, torch.ones(program.fit.shape))
        convex = certify(posed(fit, "L1"), U)
        loss = convex.value - float(U.abs().sum())
        assert (found.bound, found.gap, found.infeasible) == (-math.inf, math.inf, False)
        assert found.violation == pytest.approx(convex.violation, rel=ROUNDING)
        assert found.value == pytest.approx(loss if U is kept else math.inf, rel=ROUNDING, abs=ROUNDING)
        assert not found.within(1e300, 1e300)
    program = LayerProgram(program.inputs, program.fit.as_loss(1.0), budget)  # type: ignore[attr-defined]
    if "net-trim" not in fit:
        assert solve(program, Proposes(kept)).status is Status.NO_BOUND
    assert solve(program, Proposes(W)).status is Status.UNCERTIFIED


# Multipliers of some samples

SUBSETS = ["ball", "a ball a neuron", "a relu ball a neuron", "a net-trim set a neuron", "relu loss", "squared loss"]


@pytest.mark.parametrize("penalty", ["L1", "free bias", "rows"])
@pytest.mark.parametrize("fit", SUBSETS)
@settings(max_examples=12)
@given(seed=SEEDS, count=st.integers(1, 60))
def test_a_subset_bounds_the_whole(fit: str, penalty: str, seed: int, count: int) -> None:
    """Λ = 0 elsewhere is dual feasible: the bound is that of padding by hand, and never above the full optimum."""
    program, best = posed(fit, penalty), closed(fit, penalty).certificate
    rows = torch.randperm(SHAPE[0], generator=torch.Generator().manual_seed(seed))[:count]
    L = gaussian(seed, count, SHAPE[2]) if seed % 2 else -program.fit.residual(0 * program.fit.Y)[rows]
    padded = torch.zeros(program.fit.shape, dtype=torch.float64)
    padded[rows] = L
    found = certify(program, torch.zeros(program.shape), L, samples=rows)
    assert found == certify(program, torch.zeros(program.shape), padded)
    assert 0 <= found.bound <= best.value + 2 * OPTIMUM * best.scale


@pytest.mark.parametrize("fit", SUBSETS)
def test_a_solved_subset_bounds_the_whole_as_well_as_itself(fit: str) -> None:
    """The same Λ has the same XᵀΛ and f*(Λ) in both programs, for the ball and the weight are the same."""
    program, rows = posed(fit, "L1"), torch.arange(0, SHAPE[0], 2)
    part = LayerProgram(program.inputs[rows], program.fit.map(lambda array: array[rows]), program.penalty)
    found = solve(part, tol=REFERENCE, feas_tol=OPTIMUM)
    judged = certify(program, found.weights, multipliers(found), samples=rows.numpy())
    assert judged.bound == pytest.approx(found.certificate.bound, rel=ROUNDING)
    assert 0.1 * judged.bound < judged.bound <= closed(fit, "L1").certificate.value * (1 + REFERENCE)


@pytest.mark.parametrize(
    ("samples", "rows", "error", "message"),
    [
        ([0, 1, 1], 3, InvalidInput, "samples: expected distinct indices below 20"),
        ([0, 20], 2, InvalidInput, "samples: expected distinct indices below 20"),
        ([-1, 0], 2, InvalidInput, "samples: expected distinct indices"),
        ([], 1, InvalidInput, "samples: expected distinct indices"),
        ([[0, 1]], 2, InvalidInput, "samples: expected distinct indices"),
        ([0.0, 1.0], 2, InvalidInput, "samples: expected distinct indices"),
        ([True, False], 2, InvalidInput, "samples: expected distinct indices"),
        ([0, 1, 2], 2, ShapeMismatch, r"multipliers: expected shape \[3, 5\] .*one row a sample given"),
        ([0, 1], 20, ShapeMismatch, r"multipliers: expected shape \[2, 5\]"),
    ],
)
def test_samples_that_do_not_fit(samples: Any, rows: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        certify(build("relu-ball plain 20x8x5"), torch.zeros(8, 5), torch.ones(rows, 5), samples=samples)


# Feasible and infeasible points


@pytest.mark.parametrize("fit", FITS)
def test_the_trained_weights_are_feasible(fit: str) -> None:
    X, W = gaussian(0, 30, 6), gaussian(1, 6, 4)
    Y = X @ W if fit == "ball" else (X @ W).clamp(min=0)
    found = certify(LayerProgram(X, FITS[fit](Y, 0.0)), W)
    assert found.violation <= EXACT
    assert found.value == pytest.approx(float(W.abs().sum()))


def test_violation_is_the_distance_over_eps() -> None:
    X, Y = torch.eye(2, dtype=torch.float64), torch.tensor([[3.0], [0.0]], dtype=torch.float64)
    U = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    assert certify(LayerProgram(X, Ball(Y, 1.0)), U).violation == pytest.approx(3.0)
    assert certify(LayerProgram(X, ReluBall(Y, 0.5)), U).violation == pytest.approx(7.0)
    assert certify(LayerProgram(X, NetTrimSet(Y, 0.5, 1.0)), U).violation == pytest.approx(6.0)
    assert certify(LayerProgram(X, NetTrimSet(Y, 0.0, 1.0)), U).violation == pytest.approx(1.0)  # 3/‖Y‖
    assert certify(LayerProgram(X, ReluBall(Y, 0.5)), -U * torch.tensor([[-1], [1]])).violation == 0


def test_gap_and_scale_are_what_they_say() -> None:
    found = certify(*rough("relu-ball plain 20x8x5"))
    assert found.scale == found.value
    assert found.gap == pytest.approx((found.value - found.bound) / found.scale)
    assert found.within(found.gap, found.violation)
    assert not found.within(found.gap * 0.99, found.violation)
    assert not found.within(found.gap, found.violation * 0.99)
    assert set(found.to_dict()) == {"value", "bound", "gap", "violation", "scale", "infeasible"}


def test_an_impossible_program_is_proven_so() -> None:
    """Two equal inputs with targets 1 and −1, neither within eps: Λ = ∓1 has XᵀΛ = 0 and a positive value."""
    X = torch.ones(2, 1, dtype=torch.float64)
    program = LayerProgram(X, Ball(X * torch.tensor([[1], [-1]]), 0.5))
    assert certify(program, torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]])).infeasible
    assert not certify(program, torch.zeros(1, 1), torch.tensor([[-1.0], [-1.0]])).infeasible


def test_large_weights_that_fit_are_no_impossible_program() -> None:
    """Inputs that differ by little ask for weights of a size that no single input's price tells."""
    X = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-22]])
    Y = torch.tensor([[1.0], [-1.0]])
    program = LayerProgram(X, Ball(Y, 1e-6))
    Q = torch.linalg.inv(X.double()).T @ torch.tensor([[1.0], [-1.0]]).double()  # of the dual: XᵀΛ = (−1, 1)
    found = certify(program, torch.zeros(2, 1), -Q)
    assert found.bound > 1e6
    assert not found.infeasible
    solution = solve(program)
    assert solution.status is Status.SOLVED


def test_no_program_is_called_infeasible_whose_start_satisfies_it() -> None:
    def told(U: Tensor, _: Tensor | None) -> Certificate:
        return Certificate(1.0, 1e9, 0.0, float(U.abs().max()), 1.0, infeasible=bool(U.any()))

    limits, fits, other = Limits(1e-4, 1e-5, None, None), torch.zeros(1, 1), torch.ones(1, 1)
    proposal = Proposal(other, None, "iteration limit", 1, 0.0)
    judges = [Judge(told, limits, None, start=start) for start in (None, other, fits)]
    statuses = [judge.verdict(proposal, other, {}).status for judge in judges]
    assert statuses == [Status.INFEASIBLE, Status.INFEASIBLE, Status.ITERATION_LIMIT]


@given(seed=SEEDS)
def test_multipliers_that_move_a_free_weight_prove_nothing(seed: int) -> None:
    """A free bias puts every output below the ceiling at no cost; off Ω nothing can be shifted to make XᵀΛ = 0."""
    X, L = gaussian(seed, 12, 3), gaussian(seed + 1, 12, 2).abs()
    X[:, -1] = 1
    program = LayerProgram(X, NetTrimSet(torch.zeros(12, 2, dtype=torch.float64), 1.0, -1.0), L1.free_bias(3))
    assert certify(program, torch.zeros(3, 2), L).bound == 0


def test_rounding_is_not_taken_for_a_bound() -> None:
    """Targets orthogonal to X, eps the least number ≥ ‖Y‖ in exact arithmetic: U = 0 is feasible and optimal."""
    bounds = []
    for seed in range(60):
        X, Y = gaussian(seed, 50, 5), gaussian(seed + 1, 50, 3)
        for _ in range(2):
            Y = Y - X @ (torch.linalg.pinv(X) @ Y)
        square = sum(Fraction(y) ** 2 for y in Y.flatten().tolist())
        eps = math.sqrt(square)
        while Fraction(eps) ** 2 < square:
            eps = math.nextafter(eps, math.inf)
        bounds.append(
            certify(LayerProgram(X, Ball(Y, eps)), torch.zeros(5, 3)).bound * float(X.norm(dim=0).max()) / eps
        )
    assert max(bounds) <= OPTIMUM


# Arguments that do not fit

U_SHAPE, L_SHAPE = (8, 5), (20, 5)


@pytest.mark.parametrize(
    ("weights", "L", "error", "message"),
    [
        (torch.zeros(5, 8), None, ShapeMismatch, r"weights U: expected shape \[8, 5\].*found \[5, 8\]"),
        (torch.zeros(40), None, ShapeMismatch, r"weights U: expected a matrix, found shape \[40\]"),
        (torch.full(U_SHAPE, math.nan), None, NonFinite, "weights U: 40 of 40 entries"),
        (torch.zeros(U_SHAPE), torch.zeros(8, 5), ShapeMismatch, r"multipliers: expected shape \[20, 5\]"),
        (torch.zeros(U_SHAPE), torch.full(L_SHAPE, math.inf), NonFinite, "multipliers: 100 of 100"),
        (torch.zeros(0, 5), None, EmptyInput, "weights U"),
        ("weights", None, InvalidInput, "weights U: expected a tensor or a numeric array, found str"),
        (torch.zeros(U_SHAPE), torch.zeros(L_SHAPE, dtype=torch.complex64), InvalidInput, "multipliers.*complex64"),
    ],
)
def test_arguments_that_do_not_fit(weights: Any, L: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        certify(build("relu-ball plain 20x8x5"), weights, L)
    assert caught.type is error


def test_arrays_are_as_good_as_tensors() -> None:
    program, U, L = rough("relu-ball plain 20x8x5")
    assert certify(program, U.numpy(), np.asfortranarray(L.numpy())) == certify(program, U, L)
    wanting = U.clone().requires_grad_()
    assert certify(program, wanting, L) == certify(program, U, L)


@given(seed=SEEDS)
def test_any_program_of_one_neuron_and_one_input_is_certified_exactly(seed: int) -> None:
    """min |u| with ‖xu − y‖ ≤ eps: u solves a quadratic equation, the multipliers are the residual."""
    x, y = gaussian(seed, 6, 1).abs() + 0.1, gaussian(seed + 1, 6, 1).abs() + 0.1
    best = float((x * y).sum() / (x * x).sum())
    eps = 0.5 * (float((x * best - y).norm()) + float(y.norm()))
    discriminant = float((x * y).sum() ** 2 - (x * x).sum() * ((y * y).sum() - eps**2))
    assume(discriminant > 0)
    u = (float((x * y).sum()) - discriminant**0.5) / float((x * x).sum())
    found = certify(LayerProgram(x, Ball(y, eps)), torch.tensor([[u]], dtype=torch.float64))
    assert found.gap <= ROUNDING
    assert found.violation <= ROUNDING


@pytest.mark.parametrize("fit", sorted(FITS))
@pytest.mark.parametrize("eps", [0.0, 0.1])
@given(seed=SEEDS, orthogonal=st.booleans())
def test_a_column_that_is_free_as_a_whole_supports_no_bound(fit: str, eps: float, seed: int, orthogonal: bool) -> None:
    """No weight limits what rounding leaves of XᵀΛ there, so no scale of such a λ may pass for a proof."""
    X, W, L = gaussian(1, 30, 4), gaussian(2, 4, 3), gaussian(seed, 30, 3)
    w = torch.ones(4, 3, dtype=torch.float64)
    w[:, 0] = 0
    Y = X @ W if fit == "ball" else (X @ W).clamp(min=0)
    program = LayerProgram(X, FITS[fit](Y, eps * float(Y.norm())), L1(w))
    if orthogonal:
        L = L - X @ torch.linalg.pinv(X) @ L
    assert certify(program, W, L).bound <= float((w * W.abs()).sum()) * (1 + ROUNDING)
