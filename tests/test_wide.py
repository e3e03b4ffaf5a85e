"""More inputs than samples: nothing is as large as [N, N], and answers are those of the [N, N] computation."""

import pytest
import torch
from tolerances import AGREEMENT, EXACT, FEASIBLE, ROUNDING, SINGLE
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convexprune.solvers import L1, Ball, LayerProgram, ReluBall, Status, TopK, solve
from convexprune.solvers.methods.normal import NormalMatrix
from convexprune.solvers.methods.refit import refit
from convexprune.solvers.programs import GroupL2, ReluLoss, SquaredLoss
from convexprune.solvers.programs.fits import Fit
from convexprune.solvers.testing.layers import critical_weight, gaussian, layer

P, N, M = 12, 60, 4


class Largest(TorchFunctionMode):
    """Notes how many entries the largest tensor has that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        sizes = [tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in made if isinstance(tensor, Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return result


def data(P: int = P, N: int = N, M: int = M) -> tuple[Tensor, Tensor]:
    """Inputs of lengths that differ, two of them dead or the same, and noisy outputs of sparse weights."""
    X = layer(1, P, N, M, bias=False)[0] * torch.logspace(-1, 1, N, dtype=torch.float64)
    X[:, 3], X[:, 5] = 0, X[:, 4]
    W = torch.where(gaussian(2, N, M) > 1, gaussian(3, N, M), 0.0)
    return X, X @ W + 0.1 * gaussian(4, P, M)


def both(X: Tensor, fit: Fit, penalty: object) -> tuple[LayerProgram, LayerProgram]:
    """The program, and the same one with so many samples of zeros, targets 0, that it is not wide."""
    more = X.shape[1]
    padded = fit.map(lambda Y: torch.cat([Y, Y.new_zeros(more, Y.shape[1])]))
    return LayerProgram(X, fit, penalty), LayerProgram(torch.cat([X, X.new_zeros(more, X.shape[1])]), padded, penalty)  # type: ignore[arg-type]


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("rank", [3, P])
def test_products_and_inverses_are_those_of_the_matrix(rank: int, ridge: float) -> None:
    X, d, V = (
        gaussian(0, P, rank) @ gaussian(1, rank, N),
        torch.logspace(-1, 1, N, dtype=torch.float64)[:, None],
        data()[0].T,
    )
    wide = NormalMatrix.of(X).plus(ridge).scaled(d)
    full = NormalMatrix.of(torch.cat([X, X.new_zeros(N, N)])).plus(ridge).scaled(d)
    assert type(wide) is not type(full)
    assert torch.allclose(wide.diagonal(), full.diagonal(), rtol=EXACT)
    assert torch.allclose(wide @ V, full @ V, rtol=EXACT, atol=EXACT * float((full @ V).abs().max()))
    rows = torch.tensor([[0, 5, 7], [59, 1, 2]])
    assert torch.allclose(wide.block(rows), full.block(rows), rtol=EXACT, atol=EXACT)
    for shift in (1e-3, 1.0, 1e3):
        expected = torch.linalg.solve((full.plus(shift) @ torch.eye(N, dtype=X.dtype)), V)
        close = {"rtol": ROUNDING, "atol": ROUNDING * float(expected.abs().max())}
        assert torch.allclose(wide.inverse(shift)[0] @ V, expected, **close)
        assert torch.allclose(wide.inverses(X.dtype)(shift) @ V, expected, **close)
        assert torch.allclose(full.inverses(X.dtype)(shift) @ V, expected, **close)
    if ridge == 0:
        (values, vectors), (known, _) = wide.eigen(), full.eigen()
        assert torch.allclose(values.sort().values, known[-P:], atol=EXACT * float(known[-1]), rtol=EXACT)
        assert torch.allclose(
            (vectors * values) @ vectors.T @ V, full @ V, atol=ROUNDING * float((full @ V).abs().max())
        )


@pytest.mark.parametrize(
    "penalty", [L1(), L1(torch.linspace(0, 1, N)[:, None]), GroupL2()], ids=["l1", "bias", "group"]
)
@pytest.mark.parametrize(
    ("solver", "fit"),
    [("admm", "relu"), ("admm", "loss"), ("quadratic", "ball"), ("quadratic", "loss"), ("published", "ball")],
)
def test_a_wide_program_has_the_answer_of_its_tall_form(solver: str, fit: str, penalty: object) -> None:
    X, Y = data()
    if solver == "published" and not (isinstance(penalty, L1) and penalty.weights is None):
        pytest.skip("published for the plain norm")
    fits = {
        "relu": lambda: ReluBall(Y.clamp(min=0), 0.1 * float(Y.norm())),
        "ball": lambda: Ball(Y, 0.1 * float(Y.norm())),
        "loss": lambda: SquaredLoss(Y, 20 * critical_weight(X, Y, L1())),
    }
    steps = {"tol": 0.0, "max_iter": 40}
    wide, tall = (solve(program, solver, **steps) for program in both(X, fits[fit](), penalty))  # type: ignore[arg-type]
    scale = float(tall.weights.abs().max())
    assert torch.allclose(wide.weights, tall.weights, rtol=0, atol=AGREEMENT * scale)
    assert wide.certificate.value == pytest.approx(tall.certificate.value, rel=AGREEMENT)
    close = {"rel": AGREEMENT, "abs": AGREEMENT * abs(tall.certificate.value)}
    assert wide.certificate.bound == pytest.approx(tall.certificate.bound, **close)


@pytest.mark.parametrize("solver", ["admm", "quadratic"])
@pytest.mark.parametrize("times", [2, 100])
def test_a_wide_lasso_is_certified(solver: str, times: float) -> None:
    X, Y = data(40, 400, 1)
    program = LayerProgram(X, SquaredLoss(Y, times * critical_weight(X, Y, L1())))
    found = solve(program, solver, tol=1e-6)
    assert found.status is Status.SOLVED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_budgets_and_refits_of_wide_programs(dtype: torch.dtype) -> None:
    X, Y = (array.to(dtype) for array in data())
    X[:, 5] = 1  # of two inputs that are the same either would do
    for fit in (SquaredLoss(Y), ReluLoss(Y.clamp(min=0))):
        wide, tall = (solve(program) for program in both(X, fit, TopK(3, per="neuron")))
        close = SINGLE if dtype == torch.float32 else ROUNDING
        assert wide.certificate.value == pytest.approx(tall.certificate.value, rel=close)
        support = wide.weights != 0
        again = [refit(program, support) for program in both(X, fit, TopK(3, per="neuron"))]
        outputs = [fit.value(fit.sums(X @ U)) for U in again]
        assert outputs[0] == pytest.approx(outputs[1], rel=close)


@pytest.mark.parametrize("solver", ["admm", "quadratic", "published", "continuation"])
def test_nothing_is_as_large_as_inputs_squared(solver: str) -> None:
    P, N, M = 20, 2_000, 2
    X, Y = gaussian(1, P, N), gaussian(2, P, M)
    program = {
        "admm": lambda: LayerProgram(X, ReluBall(Y, 0.5 * float(Y.norm()))),
        "quadratic": lambda: LayerProgram(X, SquaredLoss(Y, 2 * critical_weight(X, Y, L1()))),
        "published": lambda: LayerProgram(X, Ball(Y, 0.5 * float(Y.norm()))),
        "continuation": lambda: LayerProgram(X, SquaredLoss(Y), TopK(5, per="neuron")),
    }[solver]()
    with Largest() as made:
        found = solve(program, solver, tol=1e-3, feas_tol=1e-3, max_iter=30)
    assert found.certificate.violation < FEASIBLE or solver == "published"
    assert made.entries <= 3 * P * N


@pytest.mark.parametrize("solver", ["quadratic", "admm"])
def test_next_to_no_penalty(solver: str) -> None:
    """Nine tenths of the gap were the loss of the sparse iterate, times 1e9, though its support is nearly right."""
    rng = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(64, n, generator=rng, dtype=torch.float64) for n in (128, 40))
    program = LayerProgram(X, SquaredLoss(Y, 1e9 / float((X.T @ Y).abs().max())))
    solution = solve(program, solver, tol=3e-3, max_iter=700)
    assert solution.status is Status.SOLVED
    assert solution.nonzeros <= 1.15 * 64 * 40  # a vertex has as many as there are targets
