"""What multipliers prove beyond the gap: small weights, mixtures that keep the promise, the smallest eps."""

import math
from dataclasses import replace
from functools import cache

import cvxpy as cp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FEASIBLE, OPTIMUM, REFERENCE, ROUNDING, TIGHT
from torch import Tensor
from zoo import FITS, build, gaussian, infeasible_ceiling, layer, multipliers, tight
from zoo import program as pose

from convexprune.solvers import L1, Ball, LayerProgram, NetTrimSet, ReluBall, Solution, TopK, certify, solve
from convexprune.solvers.certificate.guarantees import make_feasible, proven_zeros, support_bounds
from convexprune.solvers.errors import Infeasible, InvalidInput, InvalidTolerance, ShapeMismatch
from convexprune.solvers.methods.epsilon import EpsInterval, feasible_eps, proves_infeasible
from convexprune.solvers.programs import GroupL2, NetTrimLoss, SquaredLoss

SEEDS = st.integers(0, 10_000)
TRAINED = {
    "relu-ball": pose(*layer(50, 90, 14, 8), "relu-ball"),
    "net-trim": pose(*layer(50, 90, 14, 8), "net-trim"),
    "ball": pose(*layer(50, 90, 14, 8), "ball"),
    "relu-loss": pose(*layer(50, 90, 14, 8), "relu-loss"),
    "squared-loss": pose(*layer(50, 90, 14, 8), "squared-loss"),
    "net-trim-loss": pose(*layer(50, 90, 14, 8), "net-trim-loss"),
    "relu-ball free_bias": pose(*layer(51, 90, 14, 8), "relu-ball", penalty=L1.free_bias(14)),
    "net-trim rows": pose(*layer(52, 90, 12, 8), "net-trim", 0.75, GroupL2("rows")),
    "squared-loss rows": pose(*layer(52, 90, 12, 8), "squared-loss", 0.3, GroupL2("rows")),
}
"""Programs whose targets the trained weights reach, which are so inside every set."""
WEIGHTS = {name: layer(seed, 90, N, 8)[1] for name, seed, N in (("", 50, 14), ("free_bias", 51, 14), ("rows", 52, 12))}


def trained(name: str) -> Tensor:
    return WEIGHTS[name.partition(" ")[2]]


@cache
def answer(name: str, tol: float = TIGHT, solver: str = "admm") -> Solution:
    limit = {} if solver == "clarabel" else {"max_iter": 50_000}
    return solve(TRAINED[name], solver, tol=tol, feas_tol=tol, **limit)  # type: ignore[arg-type]


@cache
def bounds(name: str, tol: float) -> Tensor:
    return support_bounds(TRAINED[name], answer(name, tol), feasible=trained(name))


def room(U: Tensor) -> float:
    """What a tight solution may be outside by: it is not optimal itself."""
    return REFERENCE * float(U.abs().max())


# Bounds on single weights


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-6])
def test_optimal_weights_keep_within_bounds_from_any_gap(name: str, tol: float) -> None:
    for solver in ("admm", "clarabel"):
        U = answer(name, solver=solver).weights
        assert bool((U.abs() <= bounds(name, tol) + room(U)).all())


@pytest.mark.parametrize("name", TRAINED)
@given(seed=SEEDS, power=st.floats(-6, 0))
@settings(max_examples=15, deadline=None)
def test_bounds_hold_whoever_speaks(name: str, seed: int, power: float) -> None:
    """Multipliers near the optimum or far away, weights anywhere between an answer and the trained ones."""
    program, tightest = TRAINED[name], answer(name)
    L, noise = multipliers(tightest), gaussian(seed, *program.fit.shape)
    L = L + 10**power * L.norm() / noise.norm() * noise
    share = 10**power
    U = (1 - share) * tightest.weights + share * trained(name)
    found = support_bounds(program, U, L, feasible=trained(name))
    assert bool((tightest.weights.abs() <= found + room(U)).all())


@pytest.mark.parametrize("name", TRAINED)
def test_zeros_proven_at_any_gap_are_small_in_tight_solutions_of_two_solvers(name: str) -> None:
    size = 1e-2 * float(trained(name).abs().max())
    for tol in (1e-3, 1e-5):
        zeros = proven_zeros(TRAINED[name], answer(name, tol), size=size, feasible=trained(name))
        assert torch.equal(zeros, bounds(name, tol) <= size)
        for solver in ("admm", "clarabel"):
            U = answer(name, solver=solver).weights
            assert float(U[zeros].abs().max() if bool(zeros.any()) else 0.0) <= size + room(U)


@pytest.mark.parametrize("name", TRAINED)
def test_a_tight_gap_proves_most_zeros(name: str) -> None:
    """All zeros with strict complementarity; nine of ten is what is asked for."""
    zeros = answer(name).weights == 0
    proven = bounds(name, TIGHT) <= 1e-3 * float(trained(name).abs().max())
    assert int(proven.sum()) >= 0.9 * int(zeros.sum()) > 0


@pytest.mark.parametrize("name", ["net-trim rows", "squared-loss rows"])
def test_rows_are_proven_as_a_whole(name: str) -> None:
    proven = bounds(name, TIGHT) <= 1e-3 * float(trained(name).abs().max())
    assert torch.equal(proven, proven[:, :1].expand_as(proven))
    assert 0 < int(proven[:, 0].sum()) < len(proven)


@pytest.mark.parametrize("name", ["relu-loss", "squared-loss", "squared-loss rows"])
def test_losses_prove_exact_zeros(name: str) -> None:
    """−f* is strongly concave, so all optimal multipliers are near: size 0 can be asked for."""
    zeros = proven_zeros(TRAINED[name], answer(name), size=0.0)
    assert int(zeros.sum()) >= 0.9 * int((answer(name).weights == 0).sum()) > 0
    assert float(answer(name, solver="clarabel").weights[zeros].abs().max()) < room(trained(name))


def test_exact_zeros_of_the_soft_threshold() -> None:
    """XᵀX = I: U is the soft threshold of XᵀY at 1/weight, so what is proven zero is known."""
    program = build("squared-loss orthonormal L1")
    assert isinstance(program.fit, SquaredLoss)
    V = program.inputs.T @ program.fit.Y
    crude = solve(program, tol=1e-2)
    for found in (crude, tight("squared-loss orthonormal L1")):
        zeros = proven_zeros(program, found, size=0.0)
        assert not bool((zeros & (V.abs() > 1 / program.fit.weight)).any())
    assert torch.equal(zeros, V.abs() < 1 / program.fit.weight)


@pytest.mark.parametrize("name", ["relu-loss free_bias", "relu-loss weighted", "squared-loss weighted rows"])
def test_free_weights_have_no_bound(name: str) -> None:
    program = build(name)
    free, found = program.penalty.cost(program.shape) == 0, support_bounds(program, tight(name))
    assert bool(free.any())
    assert bool(found[free].isinf().all())
    assert bool((tight(name).weights.abs() <= found + room(tight(name).weights)).all())
    assert int((found[~free] == 0).sum()) >= 0.9 * int((tight(name).weights == 0).sum()) > 0


def test_a_bound_that_is_attained() -> None:
    """min |u| + |v| with |u + v/2 − 2| ≤ 1: the optimum is 1; of all that cost ≤ 3/2, (1/2, 1) has the largest v."""
    X = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    program = LayerProgram(X, Ball(torch.full((1, 1), 2.0, dtype=torch.float64), 1.0))
    found = support_bounds(program, torch.tensor([[1.5], [0.0]]), torch.tensor([[-1.0]]))
    assert math.isinf(float(found[0]))
    assert math.isclose(float(found[1]), 1.0, rel_tol=ROUNDING)


@pytest.mark.parametrize(("u", "proven"), [(0.0413, True), (0.0415, False)])
def test_the_sphere_reaches_as_far_as_the_gap(u: float, proven: bool) -> None:
    """min |u| + ½(u − 0.9)²: A* = −0.9; u costs u/10 + u²/2 more than 0, r = √(u/5 + u²) < 1 − 0.9 for u < 0.0414."""
    one = torch.ones(1, 1, dtype=torch.float64)
    program = LayerProgram(one, SquaredLoss(0.9 * one))
    assert bool(proven_zeros(program, u * one, -0.9 * one, size=0.0)) is proven


def test_zero_multipliers_leave_the_penalty_alone() -> None:
    """A = 0, bound 0: |u| ≤ g(W)/w for weights W."""
    program, W = TRAINED["relu-ball"], trained("relu-ball")
    found = support_bounds(program, W, torch.zeros(program.fit.shape))
    assert torch.allclose(found, W.abs().sum().expand_as(found), rtol=ROUNDING)


def test_without_multipliers_the_residual_serves() -> None:
    program = TRAINED["ball"]
    U = make_feasible(program, answer("ball"), trained("ball")).weights
    assert bool((support_bounds(program, U) <= 1e-2).any())


def test_weights_outside_are_refused_or_mixed_on_request() -> None:
    program, solution = TRAINED["relu-ball"], answer("relu-ball")
    outside = 0.999 * solution.weights
    assert certify(program, outside).violation > 0
    with pytest.raises(InvalidInput, match=r"weights U: expected weights that satisfy the fit.*feasible=W"):
        support_bounds(program, outside, solution.multipliers)
    mixed = make_feasible(program, outside, trained("relu-ball")).weights
    found = support_bounds(program, outside, solution.multipliers, feasible=trained("relu-ball"))
    assert torch.equal(found, support_bounds(program, mixed, solution.multipliers))


def test_bounds_need_a_convex_penalty_and_a_size() -> None:
    program = TRAINED["squared-loss"]
    budget = LayerProgram(program.inputs, program.fit, TopK(5))
    with pytest.raises(InvalidInput, match="convex"):
        support_bounds(budget, torch.zeros(program.shape))
    with pytest.raises(InvalidTolerance, match="size"):
        proven_zeros(program, answer("squared-loss"), size=-1.0)
    with pytest.raises(ShapeMismatch):
        support_bounds(program, torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bounds_are_those_of_the_callers_data(dtype: torch.dtype) -> None:
    """Data in low precision pose a program of their own; it is judged in float64."""
    X, W = layer(53, 90, 10, 6)
    X = X.to(dtype)
    Y = (X.double() @ W).clamp(min=0).to(dtype)
    program = LayerProgram(X, ReluBall(Y, 0.1 * float(Y.float().norm())))
    found = support_bounds(program, solve(program), feasible=W)
    reference = solve(program.to(torch.float64), tol=TIGHT, feas_tol=TIGHT)
    assert bool((reference.weights.abs() <= found + room(W)).all())


# Mixtures


@pytest.mark.parametrize("name", [name for name in TRAINED if "loss" not in name or "trim" in name])
@pytest.mark.parametrize("shrink", [1.0, 0.999, 0.5, -1.0])
def test_a_mixture_is_inside_and_as_near_as_can_be(name: str, shrink: float) -> None:
    """It costs at most its share of both; a little nearer to U the set is left, for the distance is convex in θ."""
    program, W, U = TRAINED[name], trained(name), shrink * answer(name, 1e-3).weights
    mixed = make_feasible(program, U, W)
    theta = mixed.theta
    assert mixed.certificate.violation <= ROUNDING
    assert torch.allclose(mixed.weights, theta * U + (1 - theta) * W, rtol=ROUNDING, atol=0)
    g = [float(program.penalty.value(V)) for V in (U, W, mixed.weights)]
    assert g[2] <= (theta * g[0] + (1 - theta) * g[1]) * (1 + ROUNDING)
    if theta < 1:
        more = theta + 1e-3 * (1 - theta)
        assert certify(program, more * U + (1 - more) * W).violation > 10 * mixed.certificate.violation
        assert certify(program, U).violation > 0


def test_the_share_for_a_linear_ball_solves_a_quadratic() -> None:
    """‖X(θU + (1 − θ)W) − Y‖ = θ‖XU − Y‖ = eps for XW = Y."""
    program, W = TRAINED["ball"], trained("ball")
    assert isinstance(program.fit, Ball)
    U = 0.9 * answer("ball").weights
    length = float((program.inputs @ U - program.fit.Y).norm())
    assert math.isclose(make_feasible(program, U, W).theta, float(program.fit.eps) / length, rel_tol=ROUNDING)


def test_weights_on_the_boundary_may_be_mixed_through_the_inside() -> None:
    """‖u − 2‖ ≤ 1 in one dimension: from W = 1 to U = 5, of which θ = 1/2 leads to 3, the other end."""
    X = torch.ones(1, 1, dtype=torch.float64)
    mixed = make_feasible(LayerProgram(X, Ball(2 * X, 1.0)), 5 * X, X)
    assert math.isclose(mixed.theta, 0.5, rel_tol=ROUNDING)


def test_weights_inside_stay_as_they_are() -> None:
    program, W = TRAINED["relu-ball"], trained("relu-ball")
    mixed = make_feasible(program, 0.999 * W, W)
    assert mixed.theta == 1
    assert torch.equal(mixed.weights, 0.999 * W)
    loss = make_feasible(TRAINED["relu-loss"], 0 * W, W)
    assert (loss.theta, loss.certificate.violation) == (1, 0)


def test_a_ceiling_that_the_trained_weights_touch_leaves_nothing_to_mix() -> None:
    """V = XW off Ω: wherever XU > V, every θ > 0 is above the ceiling."""
    program = build("net-trim raised ceiling")
    assert isinstance(program.fit, NetTrimSet)
    W = layer(22, 90, 14, 9)[1]
    U = solve(program, tol=1e-2, feas_tol=1e-2).weights
    above = (program.inputs @ U > program.fit.V) & (program.fit.Y <= 0)
    mixed = make_feasible(program, U, W)
    assert bool(above.any())
    assert mixed.theta < ROUNDING
    assert mixed.certificate.violation <= ROUNDING


@pytest.mark.parametrize("fit", FITS)
def test_balls_a_neuron_and_exact_targets(fit: str) -> None:
    _X, W = layer(30, 80, 10, 6)
    W[-1] = W[-1].abs() + 1
    program = build(f"{fit} neurons")
    mixed = make_feasible(program, 0.99 * tight(f"{fit} neurons").weights, W)
    assert 0.5 < mixed.theta < 1
    assert mixed.certificate.violation <= ROUNDING
    exact = make_feasible(build(f"{fit} neurons, one eps 0"), 0.99 * W, W)
    assert exact.theta < ROUNDING
    assert exact.certificate.violation <= ROUNDING


def test_a_gram_is_enough() -> None:
    program = build("gram ball")
    W = torch.linalg.lstsq(program.inputs, program.fit.Y).solution
    mixed = make_feasible(program, 0.9 * tight("gram ball").weights, W)
    assert 0 < mixed.theta < 1
    assert mixed.certificate.violation <= ROUNDING


def test_what_is_mixed_with_must_be_inside() -> None:
    program, U = TRAINED["relu-ball"], answer("relu-ball").weights
    with pytest.raises(InvalidInput, match=r"feasible W: expected weights that satisfy the fit, found a distance of"):
        make_feasible(program, U, 0.5 * U)
    with pytest.raises(ShapeMismatch):
        make_feasible(program, U, U[:2])


# The smallest eps


def smallest(program: LayerProgram, budget: float = math.inf) -> float:
    """min ‖h(XU)‖ over weights below the ceilings, with penalty ≤ budget, by cvxpy."""
    U, Z = cp.Variable(program.shape), cp.Variable(program.fit.shape)
    square, constraints = program.fit.as_loss(2.0).to_cvxpy(Z)  # type: ignore[attr-defined]
    constraints.append(Z == program.inputs.double().numpy() @ U)
    if budget < math.inf:
        constraints.append(program.penalty.to_cvxpy(U) <= budget)
    cp.Problem(cp.Minimize(square), constraints).solve(cp.CLARABEL)
    return math.sqrt(max(0.0, float(square.value)))


def unreachable(fit: str, penalty: L1 | GroupL2 | None = None, ceiling: float = 0.0) -> LayerProgram:
    """Targets that have little to do with the inputs, within a radius that no weights reach."""
    X, Y = gaussian(54, 30, 4), gaussian(55, 30, 3)
    X[:, -1] = 1
    eps = 0.1 * float(Y.norm())
    chosen = NetTrimSet(Y, eps, ceiling) if ceiling else FITS[fit](Y, eps)
    return LayerProgram(X, chosen, penalty or L1())


UNREACHABLE = {
    **{fit: unreachable(fit) for fit in FITS},
    "ceiling": unreachable("net-trim", ceiling=-0.1),
    "rows": unreachable("relu-ball", GroupL2("rows")),
    "free bias": unreachable("ball", L1.free_bias(4)),
}


@cache
def interval(name: str) -> EpsInterval:
    return feasible_eps(UNREACHABLE[name])


@pytest.mark.parametrize("name", UNREACHABLE)
def test_the_interval_holds_the_smallest_eps(name: str) -> None:
    """Of all weights, and of those within the budget, which the weights returned are."""
    program, found = UNREACHABLE[name], interval(name)
    outside = found.violation * program.fit.size  # under a ceiling: what the weights may owe to it
    for budget in (found.budget, math.inf):
        least = smallest(program, budget)
        assert found.low <= least * (1 + REFERENCE)
        assert least <= (found.high + 10 * outside) * (1 + REFERENCE)
    assert 0 <= found.width <= 1e-3 * program.fit.size
    assert found.violation <= REFERENCE
    assert float(program.penalty.value(found.weights)) <= found.budget
    assert (
        certify(program, found.weights).violation <= (found.high - found.eps) / found.eps * (1 + ROUNDING) + REFERENCE
    )


@pytest.mark.parametrize("name", UNREACHABLE)
def test_low_above_eps_is_a_proof_for_the_program_as_posed(name: str) -> None:
    """Its multipliers bound the penalty of whatever satisfies the fit by more than the budget, at eps < low only."""
    program, found = UNREACHABLE[name], interval(name)
    assert isinstance(program.fit, ReluBall | NetTrimSet | Ball)
    assert found.infeasible
    assert found.eps < found.low
    assert proves_infeasible(program, found.multipliers, found.budget)
    almost = LayerProgram(program.inputs, program.fit.with_eps(found.low * (1 - FEASIBLE)), program.penalty)
    assert proves_infeasible(almost, found.multipliers, found.budget)
    enough = LayerProgram(program.inputs, program.fit.with_eps(found.high * (1 + 1e-2)), program.penalty)
    assert not proves_infeasible(enough, found.multipliers, found.budget)
    assert not replace(found, eps=found.high).infeasible


@pytest.mark.parametrize("name", ["relu-ball", "ceiling"])
def test_low_is_proven_for_every_budget(name: str) -> None:
    program, found = UNREACHABLE[name], interval(name)
    assert found.lowest(found.budget) == found.low
    least = [found.lowest(share * found.budget) for share in (0.01, 0.03, 0.1, 1.0, 3.0, 1e9)]
    assert least == sorted(least, reverse=True)
    assert least[-1] == 0
    if name == "relu-ball":  # under a ceiling below 0 small weights are not allowed at all
        for share in (0.01, 0.03, 0.1):
            assert found.lowest(share * found.budget) <= smallest(program, share * found.budget) * (1 + REFERENCE)


def test_the_smallest_eps_under_an_impossible_ceiling() -> None:
    """u·x ≤ −1 on odd samples, the smallest of which is 40/39: u = −39/40 is nearest to 5 on the even ones."""
    program = infeasible_ceiling()
    found = feasible_eps(program, tol=1e-4)
    exact = float((5 + 39 / 40 * program.inputs[::2]).norm())
    assert found.low <= exact <= found.high * (1 + FEASIBLE)
    assert found.width < 1e-4 * program.fit.size
    assert found.infeasible
    assert found.eps == 0.5
    assert proves_infeasible(program, found.multipliers, found.budget)


@pytest.mark.parametrize("fit", FITS)
def test_a_feasible_program_has_a_small_one(fit: str) -> None:
    """The trained weights reach the targets, so the smallest eps is 0."""
    found = feasible_eps(pose(*layer(1, 20, 8, 5), fit))
    assert found.low == 0 <= found.high < found.eps
    assert not found.infeasible


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_intervals_have_the_units_of_the_targets(scale: float) -> None:
    program, found = UNREACHABLE["ball"], interval("ball")
    assert isinstance(program.fit, Ball)
    other = feasible_eps(LayerProgram(program.inputs / scale, Ball(scale * program.fit.Y, scale)))
    assert other.low <= scale * found.high
    assert scale * found.low <= other.high
    assert other.width <= 1e-3 * scale * program.fit.size


def test_a_gram_has_an_interval_too() -> None:
    program = build("gram ball")
    found = feasible_eps(program)
    rest = program.fit.Y - program.inputs @ torch.linalg.lstsq(program.inputs, program.fit.Y).solution
    assert found.low <= float(rest.norm()) <= found.high


def test_another_solver_finds_the_same_interval() -> None:
    found = feasible_eps(UNREACHABLE["relu-ball"], solver="cvxpy")
    assert found.low <= interval("relu-ball").high
    assert interval("relu-ball").low <= found.high
    assert found.width <= 1e-3 * UNREACHABLE["relu-ball"].fit.size


def test_neurons_of_free_weights_have_an_interval() -> None:
    """One is free as a whole: it reaches its least squares, and the others what their prices allow."""
    X, Y = gaussian(54, 30, 4), gaussian(55, 30, 3)
    found = feasible_eps(LayerProgram(X, Ball(Y, 1.0), L1(torch.tensor([[1.0, 0.0, 1.0]]))))
    rest = float((Y - X @ torch.linalg.pinv(X) @ Y).norm())
    assert found.low <= rest <= found.high * (1 + ROUNDING)
    assert found.width <= 1e-3 * float(Y.norm())


def test_ceilings_that_exclude_each_other_have_no_eps_at_all() -> None:
    X = torch.tensor([[1.0], [-1.0], [1.0]], dtype=torch.float64)
    Y = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    with pytest.raises(Infeasible, match="whatever eps"):
        feasible_eps(LayerProgram(X, NetTrimSet(Y, 1.0, ceiling=-1.0)))


def test_what_has_no_interval_is_refused() -> None:
    X, Y = gaussian(54, 30, 4), gaussian(55, 30, 3)
    for fit, reason in (
        (SquaredLoss(Y), "any weights satisfy"),
        (NetTrimLoss(Y), "SquaredLoss|NetTrimLoss"),
        (Ball(Y, torch.ones(3)), "one for each neuron"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            feasible_eps(LayerProgram(X, fit))
    with pytest.raises(InvalidInput, match="convex"):
        feasible_eps(LayerProgram(X, Ball(Y, 1.0), TopK(3)))
    with pytest.raises(InvalidTolerance, match="tol"):
        feasible_eps(LayerProgram(X, Ball(Y, 1.0)), tol=0.0)


# Samples


def test_some_samples_bound_all() -> None:
    """The set of some samples with the same eps is wider, its optimum is the best bound that they prove."""
    X, W = layer(56, 400, 8, 5)
    program, rows = pose(X, W, "relu-ball"), torch.arange(0, 400, 2)
    assert isinstance(program.fit, ReluBall)
    part = LayerProgram(X[rows], program.fit.map(lambda array: array[rows]))
    few, all_ = (solve(p, tol=TIGHT, feas_tol=TIGHT, max_iter=50_000) for p in (part, program))
    proven = certify(program, all_.weights, few.multipliers, samples=rows)
    assert math.isclose(proven.bound, few.certificate.bound, rel_tol=OPTIMUM)
    assert 0.5 * all_.certificate.value < proven.bound <= all_.certificate.value * (1 + OPTIMUM)
    standing = LayerProgram(X[rows], program.fit.sample(slice(None, None, 2)))
    other = solve(standing, tol=TIGHT, feas_tol=TIGHT, max_iter=50_000)
    assert certify(program, all_.weights, other.multipliers, samples=rows).bound <= proven.bound * (1 + OPTIMUM)
