"""The problem zoo: small layer programs, built to be awkward, each small enough for a general conic solver.

Each is built backwards from trained-looking weights, so that the targets are reachable and eps is the only slack.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from tolerances import TIGHT
from torch import Tensor

from convexprune.solvers import L1, Ball, LayerProgram, NetTrimSet, ReluBall, Solution, solve

FITS = {"relu-ball": ReluBall, "net-trim": NetTrimSet, "ball": Ball}


@dataclass(frozen=True)
class Member:
    """One program of the zoo; ``optimum`` where it is known in closed form."""

    name: str
    build: Callable[[], LayerProgram]
    optimum: float | None = None


def layer(seed: int, P: int, N: int, M: int, bias: bool = True) -> tuple[Tensor, Tensor]:
    """Inputs [P, N] (nonnegative, correlated, last column ones if ``bias``) and dense weights [N, M], float64."""
    rng = torch.Generator().manual_seed(seed)
    X = (torch.randn(P, N, generator=rng, dtype=torch.float64) @ mixing(N, rng)).clamp(min=0)
    if bias:
        X[:, -1] = 1
    heavy = torch.randn(N, M, generator=rng, dtype=torch.float64) ** 3
    return X, heavy / N**0.5


def mixing(N: int, rng: torch.Generator) -> Tensor:
    return torch.eye(N, dtype=torch.float64) + 0.3 * torch.randn(N, N, generator=rng, dtype=torch.float64) / N**0.5


def program(X: Tensor, W: Tensor, fit: str, eps: float = 0.1, penalty: L1 | None = None) -> LayerProgram:
    """The program whose targets W reaches exactly, eps relative to ‖Y‖_F."""
    Z = X @ W
    Y = Z if fit == "ball" else Z.clamp(min=0)
    return LayerProgram(X, FITS[fit](Y, eps * float(Y.norm())), penalty or L1())


def plain(fit: str, seed: int, P: int, N: int, M: int, eps: float = 0.1) -> Callable[[], LayerProgram]:
    return lambda: program(*layer(seed, P, N, M), fit, eps)


def free_bias(fit: str) -> LayerProgram:
    X, W = layer(11, 120, 16, 12)
    return program(X, W, fit, 0.1, L1.free_bias(16))


def dead_inputs(fit: str) -> LayerProgram:
    X, W = layer(12, 100, 20, 10)
    X[:, [0, 3, 7]] = 0
    return program(X, W, fit)


def duplicate_columns(fit: str) -> LayerProgram:
    X, W = layer(13, 100, 16, 10)
    X[:, 5], X[:, 6] = X[:, 4], 2 * X[:, 3]
    return program(X, W, fit)


def badly_scaled(fit: str) -> LayerProgram:
    X, W = layer(14, 100, 13, 10)
    d = torch.logspace(-6, 6, 13, dtype=torch.float64)
    return program(X * d, W / d[:, None], fit)


def some_inactive(fit: str) -> LayerProgram:
    X, W = layer(15, 80, 12, 9)
    W[:, :3] = -W[:, :3].abs()
    W[:, 3:6] = W[:, 3:6].abs()
    return program(X, W, fit, 0.1, L1.free_bias(12))


def all_inactive(fit: str) -> LayerProgram:
    X, W = layer(16, 60, 10, 8)
    return LayerProgram(X, FITS[fit](torch.zeros(60, 8, dtype=torch.float64), 0.1 * float((X @ W).norm())))


def all_active(fit: str) -> LayerProgram:
    X, W = layer(17, 60, 10, 8)
    return program(X, W.abs(), fit)


def weighted(fit: str) -> LayerProgram:
    X, W = layer(18, 90, 14, 9)
    weights = torch.rand(14, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    weights[weights < 0.5] = 0
    return program(X, W, fit, 0.1, L1(weights))


def wide(fit: str) -> LayerProgram:
    return program(*layer(19, 20, 40, 15), fit)


def large_units(fit: str) -> LayerProgram:
    X, W = layer(20, 90, 12, 8)
    return program(1e4 * X, 1e3 * W, fit)


def small_units(fit: str) -> LayerProgram:
    X, W = layer(20, 90, 12, 8)
    return program(1e-3 * X, 1e-4 * W, fit)


def low_rank(fit: str) -> LayerProgram:
    X, W = layer(21, 90, 18, 8)
    return program(
        X[:, :5] @ torch.rand(5, 18, generator=torch.Generator().manual_seed(1), dtype=torch.float64), W, fit
    )


def raised_ceiling() -> LayerProgram:
    X, W = layer(22, 90, 14, 9)
    Y = (X @ W).clamp(min=0)
    noisy = X + 0.05 * torch.randn(X.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    Z = noisy @ W
    active = Y > 0
    eps = 1.1 * float((Z - Y)[active].norm())
    return LayerProgram(noisy, NetTrimSet(Y, eps, torch.where(active, 0.0, Z)))


def one_column(fit: str) -> tuple[LayerProgram, float]:
    """One input of ones, one neuron, targets 2: the optimum is 2 − eps/√P."""
    X = torch.ones(25, 1, dtype=torch.float64)
    return LayerProgram(X, FITS[fit](2 * X, 1.0)), 2 - 1 / 5


def backwards(fit: str) -> tuple[LayerProgram, float]:
    """Sparse U and multipliers that prove it optimal are chosen first, the targets follow: the optimum is ‖U‖₁.

    Λ lives on the active outputs of each neuron and has XᵀΛ = −S, S in the subdifferential of ‖·‖₁ at U; the outputs
    XU lie on the ball around Y = XU − eps·Λ/‖Λ‖ in the direction Λ, with eps so small that Y > 0 stays the same Ω.
    """
    X, W = layer(23, 120, 10, 6)
    U = torch.where(W.abs() > W.abs().median(), W, 0.0)
    U[-1] = 2  # a bias that keeps most outputs active
    S = torch.where(U == 0, 0.9 * torch.rand(U.shape, generator=torch.Generator().manual_seed(3)).double(), U.sign())
    Z = X @ U
    L = torch.zeros_like(Z)
    for m in range(Z.shape[1]):
        active = X[Z[:, m] > 0]
        L[Z[:, m] > 0, m] = -active @ torch.linalg.solve(active.T @ active, S[:, m])
    direction = L / L.norm()
    eps = 0.9 * float((Z / direction)[(Z > 0) & (direction > 0)].min())
    Y = Z - eps * direction
    return LayerProgram(X, FITS[fit](Y if fit == "ball" else Y.clamp(min=0), eps)), float(U.abs().sum())


def exact(fit: str) -> tuple[LayerProgram, float]:
    """eps = 0 and more active samples than inputs: only the trained weights are feasible."""
    X, W = layer(24, 60, 8, 5)
    W[-1] = 2
    return program(X, W, fit, 0.0), float(W.abs().sum())


def no_slack(fit: str) -> LayerProgram:
    """eps = 0 and neurons with fewer active samples than inputs: a linear program with many vertices."""
    return program(*layer(24, 60, 8, 5), fit, 0.0)


def infeasible_ceiling() -> LayerProgram:
    """Outputs must be ≤ −1 off Ω and near 5 on it, from one positive input: impossible."""
    X = torch.linspace(1, 2, 40, dtype=torch.float64)[:, None]
    Y = torch.where(torch.arange(40)[:, None] % 2 == 0, 5.0, 0.0).double()
    return LayerProgram(X, NetTrimSet(Y, 0.5, ceiling=-1.0))


ZOO = [
    *(
        Member(f"{fit} plain {P}x{N}x{M}", plain(fit, s, P, N, M))
        for fit in FITS
        for s, P, N, M in [(1, 20, 8, 5), (2, 500, 20, 10), (3, 200, 40, 12), (4, 60, 30, 40)]
    ),
    *(Member(f"{fit} eps {eps:g}", plain(fit, 5, 80, 12, 8, eps)) for fit in FITS for eps in (1e-4, 0.5, 0.98)),
    *(Member(f"{fit} eps 1.5, U = 0", plain(fit, 5, 80, 12, 8, 1.5), 0.0) for fit in FITS),
    *(
        Member(f"{fit} {build.__name__}", lambda fit=fit, build=build: build(fit))
        for fit in FITS
        for build in (
            free_bias,
            dead_inputs,
            duplicate_columns,
            badly_scaled,
            some_inactive,
            all_active,
            weighted,
            wide,
            large_units,
            small_units,
            low_rank,
        )
    ),
    *(
        Member(f"{fit} all inactive, U = 0", lambda fit=fit: all_inactive(fit), 0.0)
        for fit in ("relu-ball", "net-trim")
    ),
    *(
        Member(f"{fit} {build.__name__}", lambda fit=fit, build=build: build(fit)[0], build(fit)[1])
        for fit in FITS
        for build in (one_column, backwards, exact)
    ),
    Member("net-trim raised ceiling", raised_ceiling),
]

MEMBERS = {member.name: member for member in ZOO}
NAMES = list(MEMBERS)
CLOSING = [name for name in NAMES if not name.endswith(("U = 0", "badly_scaled", "exact", "one_column", "0.98"))]
"""Members that ADMM takes a while to solve, and whose certificate closes to eight digits in float64."""
SMALL = [f"{fit} {build}" for fit in FITS for build in ("plain 20x8x5", "free_bias", "weighted")]
"""One of each fit without free weights, with a free bias, and with weights of all sizes."""


@cache
def build(name: str) -> LayerProgram:
    """The member's program, built once."""
    return MEMBERS[name].build()


@cache
def tight(name: str) -> Solution:
    """The member's solution by ADMM to eight digits, computed once."""
    return solve(build(name), tol=TIGHT, feas_tol=TIGHT, max_iter=50_000)


def multipliers(solution: Solution) -> Tensor:
    """The solution's multipliers, which every solver tested here gives."""
    assert solution.multipliers is not None
    return solution.multipliers


def gaussian(seed: int, *shape: int) -> Tensor:
    """Repeatable float64 standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
