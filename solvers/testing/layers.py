"""Programs of the zoo, built from weights that reach the targets, so that eps (or the loss) is the only slack."""

import torch
from torch import Tensor

from convexprune.solvers.programs.fits import Ball, Fit, NetTrimLoss, NetTrimSet, ReluBall, ReluLoss, SquaredLoss
from convexprune.solvers.programs.fits.base import LossFit, SetFit
from convexprune.solvers.programs.gram import Gram
from convexprune.solvers.programs.penalties import L1, GroupL2, Penalty
from convexprune.solvers.programs.program import LayerProgram

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
    if fit in SETS:
        return SETS[fit](Y, eps * float(Y.norm()))
    return LOSSES[fit](Y, critical_weight(X, Y, penalty) / eps)


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
    "rows": lambda: GroupL2("rows"),
    "columns": lambda: GroupL2("columns"),
    "blocks": lambda: GroupL2(blocks(12, 8)),
    "weighted rows": lambda: GroupL2("rows", torch.arange(11, -1, -1) / 4.0),
    "weighted columns": lambda: GroupL2("columns", torch.arange(8) / 2.0),
    "weighted blocks": lambda: GroupL2(blocks(12, 8), (torch.arange(24) % 4) / 2.0),
}
"""Group penalties for 12 inputs and 8 neurons; the weighted ones leave some groups free."""


def groups(fit: str, kind: str) -> LayerProgram:
    """A group penalty by its name in ``GROUPS``."""
    return program_of(*layer(31, 90, 12, 8), fit, penalty=GROUPS[kind]())


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
