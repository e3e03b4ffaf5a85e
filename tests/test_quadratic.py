"""The ADMM on the Gram: optimality, agreement with other solvers, projections in the eigenbasis, no need of samples."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import AGREEMENT, EXACT, FEASIBLE, ITERATES, KKT, OPTIMUM, REFERENCE, ROUNDING, TIGHT
from torch import Tensor

from convexprune.solvers import L1, Ball, LayerProgram, Solution, Status, TopK, certify, solve
from convexprune.solvers.errors import InvalidTolerance, SolverRefused
from convexprune.solvers.methods import Start
from convexprune.solvers.methods.interface import Limits
from convexprune.solvers.methods.quadratic import Eigenbasis, QuadraticADMM
from convexprune.solvers.methods.solve import attempt
from convexprune.solvers.programs import Gram, GroupL2, SquaredLoss
from convexprune.solvers.testing import zoo
from convexprune.solvers.testing.layers import critical_weight, gaussian, layer

TAKEN = [m.name for m in zoo.members() if QuadraticADMM().refuses(zoo.program(m.name)) is None]
_SLOW = ("badly_scaled", "nearly_collinear", "exact", "low_rank", "0.0001", "eps 0")
CLOSING = [name for name in TAKEN if not name.endswith(_SLOW)]
"""Those that take few iterations to many digits; ``ball exact`` (eps 0) and nearly parallel inputs do not."""
CONIC = ["ball free_bias", "squared-loss weighted", "squared-loss weighted rows", "ball neurons", "gram ball"]


@cache
def answer(name: str) -> Solution:
    return solve(zoo.program(name), "quadratic", tol=TIGHT, feas_tol=TIGHT)


def multipliers(solution: Solution) -> Tensor:
    assert solution.multipliers is not None
    return solution.multipliers


@pytest.mark.parametrize("name", TAKEN)
def test_solves_every_ball_and_squared_loss_of_the_zoo(name: str) -> None:
    solution = solve(zoo.program(name), "quadratic", tol=AGREEMENT, feas_tol=FEASIBLE)
    assert solution.status is Status.SOLVED


@pytest.mark.parametrize("name", CLOSING)
def test_eight_digits_and_the_known_optimum(name: str) -> None:
    solution, reference = answer(name), zoo.member(name).reference
    assert solution.status is Status.SOLVED
    assert reference is not None
    assert abs(solution.certificate.value - reference) <= 2 * OPTIMUM * solution.certificate.scale


@pytest.mark.parametrize("name", CONIC)
def test_agrees_with_admm_and_a_conic_solver(name: str) -> None:
    ours, program = answer(name).certificate, zoo.program(name)
    conic = solve(program, "cvxpy", tol=REFERENCE, feas_tol=REFERENCE).certificate
    admm = solve(program, "admm", tol=REFERENCE, feas_tol=REFERENCE).certificate
    for other in (conic, admm):
        assert abs(ours.value - other.value) <= 3 * REFERENCE * ours.scale
        assert other.bound <= ours.value * (1 + 3 * REFERENCE)


@pytest.mark.parametrize("name", [n for n in CLOSING if n.endswith(("12", "40", "free_bias", " weighted"))])
def test_optimality_conditions(name: str) -> None:
    """Λ is a multiple of the residual, −XᵀΛ = w·sign(U) on the support, and |XᵀΛ| ≤ w off it."""
    solution, program = answer(name), zoo.program(name)
    X, U, L = program.inputs, solution.weights, multipliers(solution)
    w = program.penalty.cost(program.shape)
    A, size = X.T @ L, X.norm(dim=0)[:, None] * L.norm(dim=0)
    # The gap is a sum of w|u| + A·u and more: weights that cost a fair part of the value have A near −w·sign(u).
    large = w * U.abs() > 1e-4 * solution.certificate.value
    assert bool(((A + w * U.sign()).abs() <= KKT * w)[large].all())
    assert bool((A.abs() <= w + KKT * (w + 1e-2 * size)).all())
    h = X @ U - program.fit.Y
    weight = solution.provenance["effective"]["weight"]
    assert float((L - weight * h).norm()) <= KKT * float(L.norm())


# The projection


@given(seed=st.integers(0, 10**6), eps=st.floats(0.01, 2.0), neurons=st.booleans(), N=st.integers(1, 12))
def test_projection_on_balls(seed: int, eps: float, neurons: bool, N: int) -> None:
    """V = q − ν·gradient(V), ν ≥ 0, inside, and on the boundary where ν > 0: the optimality conditions."""
    X, Y = gaussian(seed, 8, N), gaussian(seed + 1, 8, 3)
    least = (Y - X @ (torch.linalg.pinv(X) @ Y)).norm(dim=0)
    radii = least + eps * Y.norm(dim=0) * torch.tensor([0.3, 1.0, 2.0], dtype=Y.dtype)
    eps = radii if neurons else float(radii.norm())
    basis = Eigenbasis(LayerProgram(X, Ball(Y, radii)), 1.0)
    q = gaussian(seed + 2, N, 3) * basis.d
    V, reach = basis.project(q, eps, q.new_zeros(3 if neurons else 1))
    gradient = basis.gradient(V)
    assert bool((reach >= 0).all())
    assert torch.allclose(V, q - reach * gradient, rtol=ROUNDING, atol=ROUNDING * float(q.norm() + V.norm()))
    distances = (X @ (V / basis.d) - Y).norm(dim=0)
    found = distances if neurons else distances.norm()[None]
    allowed = radii if neurons else radii.norm()[None]
    assert bool((found <= allowed * (1 + ROUNDING)).all())
    assert torch.allclose(found[reach > 0], allowed[reach > 0], rtol=ROUNDING)
    again = basis.project(V, eps, reach)[0]
    assert torch.allclose(again, V, rtol=ROUNDING, atol=ROUNDING * float(V.norm()))
    other = basis.project(q, eps, 10 * reach + 1)[1]
    assert torch.allclose(other, reach, rtol=ROUNDING, atol=ROUNDING)  # wherever Newton begins


def test_eigenbasis_knows_what_inputs_cannot_reach() -> None:
    X, Y = gaussian(0, 30, 5), gaussian(1, 30, 4)
    X = torch.cat([X, X[:, :2], torch.zeros(30, 1, dtype=X.dtype)], 1)  # dependent and dead inputs
    basis = Eigenbasis(LayerProgram(X, SquaredLoss(Y)), 0.6)
    assert int((basis.values > 0).sum()) == 5
    assert math.isclose(float(basis.gram.diagonal().mean()), 1, rel_tol=EXACT)
    rest = (Y - X @ (torch.linalg.pinv(X) @ Y)).square().sum(0)
    assert torch.allclose(basis.rest, rest, rtol=ROUNDING)
    V = gaussian(2, 8, 4)
    h = X @ (V / basis.d) - Y
    assert torch.allclose(basis.gradient(V), X.T @ h / basis.d, rtol=ROUNDING)
    assert torch.allclose(basis.distances(V, basis.gradient(V)), h.square().sum(0), rtol=ROUNDING)


# Samples are not needed


@pytest.mark.parametrize("fit", ["loss", "ball", "balls"])
def test_iterates_depend_on_the_gram_alone(fit: str) -> None:
    X, W = layer(7, 60, 10, 6)
    Y = X @ W + 0.1 * gaussian(8, 60, 6)
    gram = Gram.of([(X[:25], Y[:25]), (X[25:], Y[25:])], torch.float64)

    def program(inputs: Tensor | Gram, targets: Tensor | Gram) -> LayerProgram:
        eps = 0.2 * Y.norm(dim=0)
        if fit == "loss":
            return LayerProgram(inputs, SquaredLoss(targets, 3.0))
        return LayerProgram(inputs, Ball(targets, eps if fit == "balls" else float(eps.norm())))

    method = QuadraticADMM()
    states = [method.init(program(*data), None) for data in ((X, Y), (gram, gram), (X.flip(0), Y.flip(0)))]
    for _ in range(25):
        for state in states:
            method.step(state)
    for other in states[1:]:
        assert torch.allclose(other.T, states[0].T, rtol=ITERATES, atol=ITERATES * float(states[0].T.norm()))
    assert certify(program(X, Y), states[1].T / states[1].basis.d).value > 0


def test_a_sample_twice_is_a_sample_of_twice_the_weight() -> None:
    X, W = layer(9, 50, 8, 5)
    Y = X @ W
    once = solve(LayerProgram(X, SquaredLoss(Y, 4.0)), "quadratic", tol=TIGHT)
    twice = solve(LayerProgram(torch.cat([X, X]), SquaredLoss(torch.cat([Y, Y]), 2.0)), "quadratic", tol=TIGHT)
    assert torch.allclose(once.weights, twice.weights, rtol=ROUNDING, atol=ROUNDING)


# What it tells, and from where it goes on


@pytest.mark.parametrize("name", ["ball plain 200x40x12", "ball free_bias", "ball rows", "gram ball"])
def test_a_ball_is_a_squared_loss_of_the_weight_it_tells(name: str) -> None:
    program, ball = zoo.program(name), answer(name)
    loss = SquaredLoss(program.fit.Y, ball.provenance["effective"]["weight"])
    same = solve(LayerProgram(program.inputs, loss, program.penalty), "quadratic", tol=TIGHT)
    value = float(program.penalty.value(same.weights))
    assert math.isclose(value, ball.certificate.value, rel_tol=KKT)
    distance = float((program.inputs @ same.weights - program.fit.Y).norm())
    assert math.isclose(distance, program.fit.scale, rel_tol=KKT)


@pytest.mark.parametrize("name", ["ball plain 500x20x10", "squared-loss plain 500x20x10", "squared-loss rows"])
def test_a_solution_is_a_fixed_point(name: str) -> None:
    program, solution = zoo.program(name), answer(name)
    again = solve(program, "quadratic", start=Start(solution.weights, None), tol=REFERENCE, feas_tol=FEASIBLE)
    assert again.iterations <= 10
    assert again.status is Status.SOLVED


@pytest.mark.parametrize("fit", ["loss", "ball"])
def test_goes_on_with_another_radius_or_weight(fit: str) -> None:
    X, W = layer(11, 200, 30, 10)
    Y = X @ W

    def program(k: float) -> LayerProgram:
        return LayerProgram(X, SquaredLoss(Y, 2 * k) if fit == "loss" else Ball(Y, 0.1 * k * float(Y.norm())))

    first, second = program(1.0), program(1.1)
    second = LayerProgram(X, first.fit.times(1.1) if fit == "loss" else first.fit.with_eps(second.fit.eps))  # type: ignore[attr-defined]
    limits, method = Limits(1e-6, 1e-6, None, None), QuadraticADMM()
    solution, state = attempt(first, "quadratic", method, limits, None, None)
    fresh = attempt(second, "quadratic", method, limits, None, None)[0]
    warm = attempt(second, "quadratic", method, limits, Start(solution.weights, None, state), None)[0]
    assert warm.status is fresh.status is Status.SOLVED
    assert warm.iterations <= fresh.iterations
    assert math.isclose(warm.certificate.value, fresh.certificate.value, rel_tol=3e-6)
    elsewhere = LayerProgram(X, first.fit.map(torch.clone))
    assert method.retarget(state, elsewhere) is None  # other targets


@pytest.mark.parametrize("neurons", [False, True])
def test_restoration_keeps_the_zeros_and_reaches_the_ball(neurons: bool) -> None:
    X, W = layer(12, 100, 20, 8)
    Y = X @ W
    eps = 0.1 * Y.norm(dim=0)
    program = LayerProgram(X, Ball(Y, eps if neurons else float(eps.norm())))
    method = QuadraticADMM()
    state = method.init(program, None)
    for _ in range(30):
        method.step(state)
    U, L = method.finish(state)
    assert torch.equal(U == 0, state.T == 0)
    assert certify(program, state.T / state.basis.d, L).violation > ROUNDING
    assert certify(program, U, L).violation <= ROUNDING


def test_same_bits_twice() -> None:
    program = zoo.program("ball neurons")
    first, second = (solve(program, "quadratic") for _ in range(2))
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(multipliers(first), multipliers(second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["ball plain 200x40x12", "squared-loss plain 200x40x12"])
def test_closes_the_gap_whatever_the_precision_of_the_data(dtype: torch.dtype, name: str) -> None:
    solution = solve(zoo.program(name).to(dtype), "quadratic", tol=TIGHT, feas_tol=TIGHT)
    assert solution.status is Status.SOLVED
    assert solution.weights.dtype == torch.float64


@pytest.mark.parametrize("penalty", [L1(), GroupL2("rows"), GroupL2("columns")], ids=["l1", "rows", "columns"])
def test_sigma_finds_its_size(penalty: L1 | GroupL2) -> None:
    """A sigma four orders off costs iterations, not the answer."""
    program = zoo.program("squared-loss plain 200x40x12")
    program = LayerProgram(program.inputs, program.fit, penalty)
    base = solve(program, "quadratic", tol=REFERENCE)
    sigma = base.provenance["effective"]["sigma"]
    for off in (1e-4, 1e4):
        solution = solve(program, "quadratic", tol=REFERENCE, sigma=sigma * off)
        assert solution.status is Status.SOLVED
        assert 0.02 < solution.provenance["effective"]["sigma"] / sigma < 50


# Refusals


def test_refuses_with_a_reason() -> None:
    X, W = layer(13, 20, 6, 4)
    with pytest.raises(SolverRefused, match="'continuation' takes it"):
        solve(LayerProgram(X, SquaredLoss(X @ W), TopK(5)), "quadratic")
    with pytest.raises(SolverRefused, match=r"ReluLoss is more than ‖XU − Y‖ .* 'admm' takes it"):
        solve(zoo.program("relu-loss plain 20x8x5"), "quadratic")


@pytest.mark.parametrize("option", [{"relaxation": 2.0}, {"scaling": 1.5}, {"sigma": 0.0}, {"sigma": math.inf}])
def test_options_outside_their_range(option: dict[str, float]) -> None:
    with pytest.raises(InvalidTolerance, match=next(iter(option))):
        solve(zoo.program("ball plain 20x8x5"), "quadratic", **option)


@pytest.mark.parametrize("part", [1e-2, 1e-5, 1e-8], ids=lambda part: f"{part:.0e}")
@pytest.mark.parametrize(
    ("P", "N", "penalty"),
    [(128, 256, GroupL2()), (96, 128, GroupL2()), (128, 48, GroupL2()), (128, 48, L1())],
    ids=["wide groups", "more inputs groups", "groups", "l1"],
)
def test_very_small_penalties(P: int, N: int, penalty: L1 | GroupL2, part: float) -> None:
    """Rounding of XᵀY off the span of X, times a large weight, must not be in the steps."""
    X = gaussian(1, P, N)
    Y = X @ torch.where(gaussian(2, N, 1).abs() > 1.5, gaussian(3, N, 5), 0.0) + 0.1 * gaussian(4, P, 5)
    program = LayerProgram(X, SquaredLoss(Y, critical_weight(X, Y, penalty) / part), penalty)
    assert solve(program, "quadratic", max_iter=1_000).status is Status.SOLVED
