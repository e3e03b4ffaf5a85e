"""Programs of the zoo, built from weights that reach the targets, so that eps (or the loss) is the only slack.

The optimum of some is known before any solver runs; others have no solution, or an exact budget.
"""

import math
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from convexprune.solvers.programs.fits import Fit, LossFit, SetFit
from convexprune.solvers.programs.geometries import Ball, NetTrimLoss, NetTrimSet, ReluBall, ReluLoss, SquaredLoss
from convexprune.solvers.programs.gram import Gram
from convexprune.solvers.programs.penalties import L1, GroupL2, Penalty
from convexprune.solvers.programs.program import LayerProgram
from convexprune.solvers.programs.supports import NM, TopK

SETS: dict[str, type[SetFit]] = {"relu-ball": ReluBall, "net-trim": NetTrimSet, "ball": Ball}
"""Fits with a radius, by their names in the zoo."""
LOSSES: dict[str, type[LossFit]] = {"relu-loss": ReluLoss, "net-trim-loss": NetTrimLoss, "squared-loss": SquaredLoss}
"""Fits with a weight, each with the geometry of the set in the same place."""
FITS = (*SETS, *LOSSES)


def gaussian(seed: int, *shape: int) -> Tensor:
    """Repeatable float64 standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed: int, *shape: int) -> Tensor:
    """Repeatable float64 numbers between 0 and 1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(seed: int, P: int, N: int, M: int, bias: bool = True) -> tuple[Tensor, Tensor]:
    """Inputs [P, N] (≥ 0, correlated, the last ones if ``bias``) and heavy-tailed weights [N, M], float64."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(P, N, generator=rng, dtype=torch.float64)
    mixing = torch.eye(N, dtype=torch.float64) + 0.3 * torch.randn(N, N, generator=rng, dtype=torch.float64) / N**0.5
    X = (noise @ mixing).clamp(min=0)
    if bias:
        X[:, -1] = 1
    return X, torch.randn(N, M, generator=rng, dtype=torch.float64) ** 3 / N**0.5


def targets_of(fit: str, Z: Tensor) -> Tensor:
    """What outputs Z are trained to: themselves, or their ReLU."""
    return Z if fit in ("ball", "squared-loss") else Z.clamp(min=0)


def critical_weight(X: Tensor, Y: Tensor, penalty: Penalty) -> float:
    """The weight of a loss up to which U = 0 is optimal: there −∇f(0) = weight·XᵀY₊ has dual norm 1."""
    reach = float(penalty.dual_norm(X.T @ Y).max())
    return 1 / reach if reach > 0 else 1.0


def program_of(X: Tensor, W: Tensor, fit: str, eps: float = 0.1, penalty: Penalty | None = None) -> LayerProgram:
    """The program of inputs X [P, N] with a fit of ``FITS`` whose targets W [N, M] reaches, by default with L1().

    eps is the radius relative to ‖Y‖_F; for a loss, the critical weight relative to the weight. So U = 0 is optimal
    for eps ≥ 1, the data are to be met for eps → 0.
    """
    penalty = penalty or L1()
    return LayerProgram(X, fit_of(fit, X, targets_of(fit, X @ W), eps, penalty), penalty)


def fit_of(fit: str, X: Tensor, Y: Tensor, eps: float, penalty: Penalty) -> Fit:
    """The fit of ``program_of`` for given targets."""
    return fit_around(fit, Y, eps * float(Y.norm()), critical_weight(X, Y, penalty) / (eps or 1.0))


def fit_around(fit: str, Y: Tensor, radius: float | Tensor, weight: float = 1.0) -> Fit:
    """The fit of this name of ``FITS``: a set of this radius, or a loss of this weight."""
    return SETS[fit](Y, radius) if fit in SETS else LOSSES[fit](Y, weight)


AWKWARD = {
    "free_bias": (11, 120, 16, 12),
    "dead_inputs": (12, 100, 20, 10),
    "duplicate_columns": (13, 100, 16, 10),
    "badly_scaled": (14, 100, 13, 10),
    "some_inactive": (15, 80, 12, 9),
    "all_active": (17, 60, 10, 8),
    "weighted": (18, 90, 14, 9),
    "wide": (19, 20, 40, 15),
    "large_units": (20, 90, 12, 8),
    "small_units": (20, 90, 12, 8),
    "low_rank": (21, 90, 18, 8),
    "nearly_collinear": (27, 100, 8, 6),
    "tall": (25, 3000, 5, 4),
    "one_sample": (26, 1, 6, 4),
}
"""The awkward programs that every fit has, with the seed and the size (P, N, M) of each."""


def awkward(fit: str, kind: str) -> LayerProgram:
    """One of the programs ``AWKWARD``."""
    (X, W), penalty = layer(*AWKWARD[kind]), L1()
    match kind:
        case "free_bias":
            penalty = L1.free_bias(16)
        case "dead_inputs":
            X[:, [0, 3, 7]] = 0
        case "duplicate_columns":  # and the double of another one
            X[:, 5], X[:, 6] = X[:, 4], 2 * X[:, 3]
        case "badly_scaled":  # units that differ by 10¹²
            d = torch.logspace(-6, 6, 13, dtype=torch.float64)
            X, W = X * d, W / d[:, None]
        case "some_inactive":  # neurons that are never active, others that always are
            W[:, :3], W[:, 3:6] = -W[:, :3].abs(), W[:, 3:6].abs()
            penalty = L1.free_bias(12)
        case "all_active" | "one_sample":
            W = W.abs()
        case "weighted":  # prices of all sizes, some of them 0
            prices = 3 * uniform(0, 14, 9)
            penalty = L1(prices.masked_fill(prices < 0.5, 0.0))
        case "large_units":
            X, W = 1e4 * X, 1e3 * W
        case "small_units":
            X, W = 1e-3 * X, 1e-4 * W
        case "low_rank":  # 18 inputs that are mixtures of 5
            X = X[:, :5] @ uniform(1, 5, 18)
        case "nearly_collinear":  # every input has a twin that differs by a thousandth
            X, W = torch.cat([X, X + 1e-3 * gaussian(28, 100, 8)], 1), W.repeat(2, 1) / 2
    return program_of(X, W, fit, penalty=penalty)


def rounded(fit: str, dtype: torch.dtype) -> LayerProgram:
    """Inputs and targets kept in half precision."""
    X, W = layer(29, 100, 14, 10)
    X = X.to(dtype).double()
    Y = targets_of(fit, X @ W)
    return LayerProgram(X.to(dtype), fit_of(fit, X, Y, 0.1, L1()).map(lambda array: array.to(dtype)))


def raised_ceiling() -> LayerProgram:
    """The Net-Trim set of a cascade: inputs have changed, the ceiling is what the trained weights reach with them."""
    X, W = layer(22, 90, 14, 9)
    Y = (X @ W).clamp(min=0)
    noisy = X + 0.05 * gaussian(2, 90, 14)
    Z, active = noisy @ W, Y > 0
    eps = 1.1 * float((Z - Y)[active].norm())
    return LayerProgram(noisy, NetTrimSet(Y, eps, torch.where(active, 0.0, Z)))


def neurons(fit: str, exact: int = 0) -> LayerProgram:
    """A ball for each neuron, of very different radii; the first ``exact`` ones are 0."""
    X, W = layer(30, 80, 10, 6)
    W[-1] = W[-1].abs() + 1  # enough active samples that a neuron with eps 0 is determined
    Y = targets_of(fit, X @ W)
    eps = torch.logspace(-2, -0.3, 6, dtype=torch.float64) * Y.norm(dim=0)
    eps[:exact] = 0
    return LayerProgram(X, SETS[fit](Y, eps))


def blocks(N: int, M: int) -> Tensor:
    """Labels of 2 × 2 blocks of weights [N, M]."""
    return torch.arange(N)[:, None] // 2 * ((M + 1) // 2) + torch.arange(M) // 2


GROUPS = {
    "rows": GroupL2("rows"),
    "columns": GroupL2("columns"),
    "blocks": GroupL2(blocks(12, 8)),
    "weighted rows": GroupL2("rows", torch.arange(11, -1, -1) / 4.0),
    "weighted columns": GroupL2("columns", torch.arange(8) / 2.0),
    "weighted blocks": GroupL2(blocks(12, 8), (torch.arange(24) % 4) / 2.0),
}
"""Group penalties for 12 inputs and 8 neurons; the weighted ones leave some groups free."""


def groups(fit: str, kind: str) -> LayerProgram:
    """A group penalty by its name in ``GROUPS``."""
    return program_of(*layer(31, 90, 12, 8), fit, penalty=GROUPS[kind])


def grams(kind: str, dtype: torch.dtype = torch.float64) -> LayerProgram:
    """Inputs known only by their Gram, from three batches: "ball", "ball a neuron", "squared-loss" or "rows"."""
    X, W = layer(32, 150, 12, 8)
    Y = X @ W + 0.05 * gaussian(33, 150, 8)
    gram = Gram.of(((X[i::3], Y[i::3]) for i in range(3)), dtype)
    if kind in ("ball", "ball a neuron"):
        lengths = Y.norm(dim=0)
        return LayerProgram(gram, Ball(gram, 0.2 * lengths if kind == "ball a neuron" else 0.2 * float(lengths.norm())))
    penalty: Penalty = GroupL2("rows") if kind == "rows" else L1()
    return LayerProgram(gram, SquaredLoss(gram, 10 * critical_weight(X, Y, penalty)), penalty)


Known = tuple[LayerProgram, float]
"""A program and its optimum; of a budget, that of the best support."""


def zero(fit: str) -> Known:
    """eps = 1.5, so U = 0 is optimal: it costs nothing, or half the squared length of the targets."""
    program = program_of(*layer(5, 80, 12, 8), fit, 1.5)
    return program, program.fit.value(program.fit.sums(torch.zeros_like(program.fit.Y)))


def all_inactive(fit: str) -> Known:
    """Targets of zeros: U = 0 costs nothing."""
    X, W = layer(16, 60, 10, 8)
    Y = torch.zeros(60, 8, dtype=torch.float64)
    return LayerProgram(X, fit_around(fit, Y, 0.1 * float((X @ W).norm()))), 0.0


def one_column(fit: str) -> Known:
    """One input of ones, one neuron, 25 targets 2: u = 2 − eps/5, or 2 − 1/(25·weight)."""
    X = torch.ones(25, 1, dtype=torch.float64)
    return LayerProgram(X, fit_around(fit, 2 * X, 1.0)), 2 - 1 / 5 if fit in SETS else 1.96 + 25 * 0.04**2 / 2


def one_column_a_neuron(fit: str) -> Known:
    """The same for three neurons with a ball each: u_m = 2 − eps_m/5, one of them exact, one 0."""
    X = torch.ones(25, 1, dtype=torch.float64)
    return LayerProgram(X, SETS[fit](2 * X.expand(25, 3), torch.tensor([1.0, 0.0, 11.0]))), 1.8 + 2.0 + 0.0


def exact(fit: str) -> Known:
    """eps = 0 and more active samples than inputs: only the trained weights are feasible."""
    X, W = layer(24, 60, 8, 5)
    W[-1] = 2
    return program_of(X, W, fit, 0.0), float(W.abs().sum())


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
        inside = 0.9 * torch.rand(U.shape, generator=torch.Generator().manual_seed(3)).double()
        S = torch.where(U == 0, inside, U.sign())
    else:  # every other row is 0, the last one 2, and S is a subgradient of Σ ‖row‖
        U = W.clone()
        U[::2], U[-1] = 0, 2
        inside = uniform(4, *W.shape) / math.sqrt(W.shape[1])
        S = torch.where(U == 0, inside, U / U.norm(dim=1, keepdim=True).clamp(min=1e-300))
    Z = X @ U
    L = torch.zeros_like(Z)
    for m in range(Z.shape[1]):
        active = X[Z[:, m] > 0]
        L[Z[:, m] > 0, m] = -active @ torch.linalg.solve(active.T @ active, S[:, m])
    direction = L / L.norm()
    s = 0.9 * float((Z / direction)[(Z > 0) & (direction > 0)].min())
    made = fit_around(fit, targets_of(fit, Z - s * direction), s, float(L.norm()) / s)
    cost = float(penalty.value(U)) + (0.0 if fit in SETS else s * float(L.norm()) / 2)
    return LayerProgram(X, made, penalty), cost


ORTHONORMAL = ("L1", "rows", "columns", "blocks")


def orthonormal(kind: str) -> Known:
    """XᵀX = I and the squared loss: U is the block soft threshold of XᵀY at 1/weight, entry by entry for L1."""
    N, M, weight = 9, 6, 1.5
    X = torch.linalg.qr(layer(34, 50, N, M)[0]).Q.contiguous()
    Y = X @ layer(35, 1, N, M)[1] + 0.1 * uniform(36, 50, M)
    V, row, column = X.T @ Y, torch.arange(N)[:, None], torch.arange(M)
    labels = {"L1": row * M + column, "rows": row, "columns": column, "blocks": (row // 3) * M + column // 2}[kind]
    labels = labels.expand(N, M).contiguous()
    lengths = V.new_zeros(N * M).index_add(0, labels.reshape(-1), V.square().reshape(-1)).sqrt()  # of each group
    U = V * (1 - 1 / (weight * lengths[labels])).clamp(min=0)
    cost = float((lengths - 1 / weight).clamp(min=0).sum())
    penalty = {"L1": L1(), "blocks": GroupL2(labels)}.get(kind) or GROUPS[kind]
    return LayerProgram(X, SquaredLoss(Y, weight), penalty), cost + weight * float((X @ U - Y).square().sum()) / 2


def infeasible_ceiling() -> LayerProgram:
    """Outputs must be ≤ −1 off Ω and near 5 on it, from one positive input."""
    X = torch.linspace(1, 2, 40, dtype=torch.float64)[:, None]
    Y = torch.where(torch.arange(40)[:, None] % 2 == 0, 5.0, 0.0).double()
    return LayerProgram(X, NetTrimSet(Y, 0.5, ceiling=-1.0))


def _out_of_reach(per_neuron: bool) -> LayerProgram:
    X, Y = gaussian(40, 30, 4), gaussian(41, 30, 3)
    rest = (Y - X @ torch.linalg.pinv(X) @ Y).norm(dim=0)
    eps = torch.stack([0.5 * rest[0], 2 * rest[1], 2 * rest[2]]) if per_neuron else 0.5 * float(rest.norm())
    return LayerProgram(X, Ball(Y, eps))


INFEASIBLE: dict[str, Callable[[], LayerProgram]] = {
    "net-trim infeasible ceiling": infeasible_ceiling,
    "net-trim-loss, a ceiling of both signs": lambda: LayerProgram(
        torch.tensor([[1.0], [-1.0], [1.0]]).double(), NetTrimLoss(torch.tensor([[0.0], [0.0], [1.0]]), ceiling=-1.0)
    ),
    "relu-ball, one output for two targets": lambda: LayerProgram(
        torch.ones(30, 1).double(), ReluBall(torch.tensor([5.0, 0.0, 0.0]).double().repeat(10)[:, None], 1.0)
    ),
    "ball out of reach": lambda: _out_of_reach(per_neuron=False),
    "ball, one neuron's out of reach": lambda: _out_of_reach(per_neuron=True),
}
"""Programs that no weights satisfy, by name."""

Budget = TopK | NM
BUDGETS: dict[str, Budget] = {
    "top-k a layer": TopK(10),
    "top-k a neuron": TopK(3, per="neuron"),
    "2:4": NM(2, 4),
    "top-k a neuron, free bias": TopK(2, per="neuron", rows=7),
}
"""Budgets for 8 inputs and 4 neurons."""


def orthonormal_budget(kind: str) -> Known:
    """XᵀX = I and the squared loss: what is lost is the sum of squares of XᵀY off the support, the largest stay."""
    X = torch.linalg.qr(layer(42, 40, 8, 4)[0]).Q.contiguous()
    Y, budget = gaussian(43, 40, 4), BUDGETS[kind]
    V = X.T @ Y
    U = torch.where(_largest(V, budget), V, 0.0)
    return LayerProgram(X, SquaredLoss(Y), budget), float((X @ U - Y).square().sum()) / 2


def _largest(V: Tensor, budget: Budget) -> Tensor:
    """The support of the largest entries that the budget allows, by counting the larger ones."""
    size, rows = V.abs(), budget.rows or len(V)
    if isinstance(budget, NM):
        blocks = size.reshape(-1, budget.m, V.shape[1])
        return ((blocks[:, None] > blocks[:, :, None]).sum(2) < budget.n).reshape(V.shape)
    compared = size[:rows] if budget.per == "neuron" else size.reshape(-1, 1)
    kept = (compared[None] > compared[:, None]).sum(1) < budget.k
    return torch.cat([kept.reshape(-1, V.shape[1]), torch.ones(len(V) - rows, V.shape[1], dtype=torch.bool)])


def small_budget() -> Known:
    """Correlated inputs, three of seven weights a neuron: all supports are tried."""
    X, W = layer(44, 40, 7, 3)
    Y = X @ W + 0.2 * gaussian(45, 40, 3)
    parts = [X[:, list(kept)] for kept in combinations(range(7), 3)]
    lost = torch.stack([(Y - part @ torch.linalg.pinv(part) @ Y).square().sum(0) for part in parts])
    return LayerProgram(X, SquaredLoss(Y), TopK(3, per="neuron")), float(lost.amin(0).sum()) / 2


def planted_budget(fit: str) -> Known:
    """Targets that weights within the budget reach: nothing need be lost."""
    X, W = layer(46, 200, 12, 6, bias=False)
    W = torch.where(_largest(W, TopK(4, per="neuron")), W, 0.0)
    loss = SquaredLoss(X @ W) if fit == "squared-loss" else ReluLoss((X @ W).clamp(min=0))
    return LayerProgram(X, loss, TopK(4, per="neuron")), 0.0
