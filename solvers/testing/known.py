"""Programs whose optimum is known before any solver runs: (program, optimum)."""

import math

import torch
from torch import Tensor

from convexprune.solvers.programs.fits import SquaredLoss
from convexprune.solvers.programs.penalties import L1, GroupL2, Penalty
from convexprune.solvers.programs.program import LayerProgram
from convexprune.solvers.testing.layers import LOSSES, SETS, layer, pose, targets_of, uniform

Known = tuple[LayerProgram, float]


def zero(fit: str) -> Known:
    """eps = 1.5, so U = 0 is optimal: it costs nothing, or half the squared length of the targets."""
    program = pose(*layer(5, 80, 12, 8), fit, 1.5)
    return program, program.fit.value(program.fit.sums(torch.zeros_like(program.fit.Y)))


def all_inactive(fit: str) -> Known:
    """Targets of zeros: U = 0 costs nothing."""
    X, W = layer(16, 60, 10, 8)
    Y = torch.zeros(60, 8, dtype=torch.float64)
    return LayerProgram(X, SETS[fit](Y, 0.1 * float((X @ W).norm())) if fit in SETS else LOSSES[fit](Y)), 0.0


def one_column(fit: str) -> Known:
    """One input of ones, one neuron, 25 targets 2: u = 2 − eps/5, or 2 − 1/(25·weight)."""
    X = torch.ones(25, 1, dtype=torch.float64)
    if fit in SETS:
        return LayerProgram(X, SETS[fit](2 * X, 1.0)), 2 - 1 / 5
    return LayerProgram(X, LOSSES[fit](2 * X, 1.0)), 1.96 + 25 * 0.04**2 / 2


def one_column_a_neuron(fit: str) -> Known:
    """The same for three neurons with a ball each: u_m = 2 − eps_m/5, one of them exact, one 0."""
    X = torch.ones(25, 1, dtype=torch.float64)
    return LayerProgram(X, SETS[fit](2 * X.expand(25, 3), torch.tensor([1.0, 0.0, 11.0]))), 1.8 + 2.0 + 0.0


def exact(fit: str) -> Known:
    """eps = 0 and more active samples than inputs: only the trained weights are feasible."""
    X, W = layer(24, 60, 8, 5)
    W[-1] = 2
    return pose(X, W, fit, 0.0), float(W.abs().sum())


def backwards(fit: str, penalty: L1 | GroupL2 | None = None) -> Known:
    """Sparse U and multipliers that prove it optimal are chosen first, the targets follow.

    Λ lives on the active outputs of each neuron and has XᵀΛ = −S, S in the subdifferential of the penalty at U. The
    targets are Y = XU − s·Λ/‖Λ‖ with s so small that Y > 0 stays the same Ω: then Λ is normal to the ball of radius s
    around Y at XU, and the gradient there of the loss of weight ‖Λ‖/s. The optimum is g(U), for a loss g(U) + ½s‖Λ‖.
    """
    penalty = penalty or L1()
    X, W = layer(23, 120, 10, 6)
    if isinstance(penalty, L1):
        U = torch.where(W.abs() > W.abs().median(), W, 0.0)
        U[-1] = 2  # a bias that keeps most outputs active
        S = torch.where(
            U == 0, 0.9 * torch.rand(U.shape, generator=torch.Generator().manual_seed(3)).double(), U.sign()
        )
    else:
        U, S = _sparse_rows(W)
    Z = X @ U
    L = torch.zeros_like(Z)
    for m in range(Z.shape[1]):
        active = X[Z[:, m] > 0]
        L[Z[:, m] > 0, m] = -active @ torch.linalg.solve(active.T @ active, S[:, m])
    direction = L / L.norm()
    s = 0.9 * float((Z / direction)[(Z > 0) & (direction > 0)].min())
    Y, cost = targets_of(fit, Z - s * direction), float(penalty.value(U))
    if fit in SETS:
        return LayerProgram(X, SETS[fit](Y, s), penalty), cost
    return LayerProgram(X, LOSSES[fit](Y, float(L.norm()) / s), penalty), cost + s * float(L.norm()) / 2


def _sparse_rows(W: Tensor) -> tuple[Tensor, Tensor]:
    """U with every other row 0 and a last row of 2, and a subgradient of Σ ‖row‖ there."""
    U = W.clone()
    U[::2] = 0
    U[-1] = 2
    inside = uniform(4, *W.shape) / math.sqrt(W.shape[1])
    return U, torch.where(U == 0, inside, U / U.norm(dim=1, keepdim=True).clamp(min=1e-300))


def _labels(kind: str, N: int, M: int) -> Tensor:
    rows, columns = torch.arange(N)[:, None], torch.arange(M)
    return {
        "L1": rows * M + columns,
        "rows": rows.expand(N, M),
        "columns": columns.expand(N, M),
        "blocks": (rows // 3) * M + columns // 2,
    }[kind].contiguous()


ORTHONORMAL = ("L1", "rows", "columns", "blocks")


def orthonormal(kind: str) -> Known:
    """XᵀX = I and the squared loss: U is the block soft threshold of XᵀY at 1/weight, entry by entry for L1."""
    N, M, weight = 9, 6, 1.5
    X = torch.linalg.qr(layer(34, 50, N, M)[0]).Q.contiguous()
    Y = X @ layer(35, 1, N, M)[1] + 0.1 * uniform(36, 50, M)
    V, labels = X.T @ Y, _labels(kind, N, M)
    U = torch.zeros_like(V)
    cost = 0.0
    for g in sorted(set(labels.reshape(-1).tolist())):  # not every label below the largest is there
        length = float(V[labels == g].norm())
        U[labels == g] = max(0.0, 1 - 1 / (weight * length)) * V[labels == g]
        cost += max(0.0, length - 1 / weight)
    penalties: dict[str, Penalty] = {"L1": L1(), "rows": GroupL2("rows"), "columns": GroupL2("columns")}
    penalty = penalties.get(kind) or GroupL2(labels)
    return LayerProgram(X, SquaredLoss(Y, weight), penalty), cost + weight * float((X @ U - Y).square().sum()) / 2
