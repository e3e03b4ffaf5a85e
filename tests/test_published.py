"""The baseline is the publication's algorithm, step by step, and nothing better."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tolerances import AGREEMENT, ITERATES
from zoo import build, gaussian, program, tight

from convexprune.solvers import L1, Ball, LayerProgram, NetTrimSet, Status, solve
from convexprune.solvers.errors import InvalidTolerance, SolverRefused
from convexprune.solvers.methods.published import Published

Matrix = npt.NDArray[np.float64]
NAMES = ["net-trim plain 20x8x5", "net-trim raised ceiling", "ball plain 20x8x5"]
RULE = {"tol": 0.0, "feas_tol": 0.0, "max_iter": 20_000}


def transcription(
    X: Matrix, Y: Matrix, V: Matrix, omega: npt.NDArray[np.bool_], eps: float, rho: float, steps: int
) -> tuple[list[Matrix], list[float], Matrix]:
    """Algorithm 1 as printed, features first (X [N, P], Y [M, P] transposed to P rows of outputs): W2 of every step,
    ‖ΔW3‖_F of every step, and the last U1."""
    c0 = 0.3 * np.sqrt((X @ X.T).max())
    X, Y, V, eps = X / c0, Y / c0, V / c0, eps / c0
    inverse = np.linalg.inv(X @ X.T + np.eye(len(X)))
    W3 = np.zeros((len(X), len(Y)))
    U1, U2 = np.zeros_like(Y), np.zeros_like(W3)
    found, moves = [], []
    for _ in range(steps):
        W1 = W3.T @ X - U1
        difference = (W1 - Y)[omega]
        W1[omega] = Y[omega] + min(1.0, eps / np.linalg.norm(difference)) * difference
        W1[~omega] = np.minimum(W1[~omega], V[~omega])
        W2 = W3 - U2
        W2 = np.sign(W2) * np.maximum(np.abs(W2) - 1 / rho, 0)
        before, W3 = W3, inverse @ (X @ (W1 + U1).T + W2 + U2)
        U1 = U1 + W1 - W3.T @ X
        U2 = U2 + W2 - W3
        found.append(W2)
        moves.append(float(np.linalg.norm(W3 - before)))
    return found, moves, U1 / c0


def printed(task: LayerProgram, rho: float, steps: int) -> tuple[list[Matrix], list[float], Matrix]:
    fit = task.fit
    V = fit.V.expand(fit.shape) if isinstance(fit, NetTrimSet) else fit.Y
    omega = fit.unrestricted()
    X, Y, V_, on = (array.T.numpy() for array in (task.inputs, fit.Y, V, omega))
    return transcription(X, Y, V_, on, fit.scale, rho, steps)


@pytest.mark.parametrize("rho", [100.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_iterates_are_those_of_the_publication(name: str, rho: float) -> None:
    method = Published(rho=rho)
    state = method.init(build(name), None)
    found, moves, U1 = printed(build(name), rho, 20)
    for W2, moved in zip(found, moves, strict=True):
        method.step(state)
        np.testing.assert_allclose(method.finish(state)[0].numpy(), W2, rtol=ITERATES, atol=ITERATES * np.abs(W2).max())
        assert method.residuals(state)["change W3"] == pytest.approx(moved, rel=ITERATES)
    np.testing.assert_allclose(method.finish(state)[1].numpy(), -rho * U1.T, rtol=ITERATES, atol=ITERATES * rho)


@pytest.mark.parametrize("threshold", [1e-5, 1e-8])
@pytest.mark.parametrize("name", NAMES[:1] + NAMES[2:])
def test_it_ends_by_its_own_rule_alone(name: str, threshold: float) -> None:
    """The first k with ‖ΔW3‖_F < M·N·threshold, though the loop looks at the certificate every tenth step only."""
    solution = solve(build(name), "published", threshold=threshold, **RULE)
    _, moves, _ = printed(build(name), 100.0, solution.iterations)
    bound = build(name).shape[0] * build(name).shape[1] * threshold
    assert [k for k, moved in enumerate(moves, 1) if moved < bound] == [solution.iterations]
    assert solution.provenance["ended"] == "own rule"
    assert solution.status is Status.UNCERTIFIED


def test_a_met_certificate_ends_it_sooner() -> None:
    loose = solve(build(NAMES[2]), "published", tol=0.1, feas_tol=0.1)
    assert loose.status is Status.SOLVED
    assert loose.provenance["ended"] == "watch"
    assert loose.iterations < solve(build(NAMES[2]), "published", **RULE).iterations


@pytest.mark.parametrize("name", NAMES)
def test_it_finds_the_optimum_in_the_end(name: str) -> None:
    solution = solve(build(name), "published", threshold=1e-13, max_iter=100_000)
    assert solution.status is Status.SOLVED
    assert solution.certificate.value == pytest.approx(tight(name).certificate.value, rel=2 * AGREEMENT)


@pytest.mark.parametrize("weights", [torch.tensor([[2.0]]), L1.free_bias(4).w, torch.ones(4, 3).tril()])
def test_a_weighted_norm_is_refused(weights: torch.Tensor) -> None:
    task = program(gaussian(0, 9, 4), gaussian(1, 4, 3), "ball", 0.1, L1(weights))
    with pytest.raises(SolverRefused, match=r"'published' cannot take.*unweighted L1 norm \(the bias is penalised"):
        solve(task, "published")


def test_weights_of_one_are_the_unweighted_norm() -> None:
    task = program(gaussian(0, 9, 4), gaussian(1, 4, 3), "ball", 0.1, L1(torch.ones(4, 3)))
    assert solve(task, "published", max_iter=5).iterations == 5


@pytest.mark.parametrize("option", ["rho", "scaling", "threshold"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_parameters_outside_their_range(option: str, value: float) -> None:
    with pytest.raises(InvalidTolerance, match=f"{option}: expected a positive number, found {value}"):
        Published(**{option: value})


def test_the_published_defaults() -> None:
    assert (Published().rho, Published().scaling, Published().threshold) == (100.0, 0.3, 1e-8)


def test_inputs_of_zeros_do_not_break_the_scaling() -> None:
    task = LayerProgram(torch.zeros(6, 3), Ball(torch.ones(6, 2), 0.1))
    assert not solve(task, "published", max_iter=20).weights.any()


def test_a_start_is_where_it_starts() -> None:
    """The publication has none: with the solution as start the first step moves less than from zero."""
    method, task = Published(), build(NAMES[0])
    moved = []
    for start in (None, tight(NAMES[0])):
        state = method.init(task, start)  # type: ignore[arg-type]
        method.step(state)
        moved.append(state.moved)
    assert moved[1] < moved[0]
