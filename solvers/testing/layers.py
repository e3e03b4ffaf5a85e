"""Data for the zoo: inputs and trained-looking weights, and the programs that they pose.

Every program is built backwards from weights that reach its targets, so that eps (or the loss) is the only slack.
"""

import torch
from torch import Tensor

from convexprune.solvers.programs.fits import Ball, Fit, NetTrimLoss, NetTrimSet, ReluBall, ReluLoss, SquaredLoss
from convexprune.solvers.programs.fits.base import LossFit, SetFit
from convexprune.solvers.programs.penalties import L1, Penalty
from convexprune.solvers.programs.program import LayerProgram

SETS: dict[str, type[SetFit]] = {"relu-ball": ReluBall, "net-trim": NetTrimSet, "ball": Ball}
"""Fits with a radius, by their names in the zoo."""
LOSSES: dict[str, type[LossFit]] = {"relu-loss": ReluLoss, "net-trim-loss": NetTrimLoss, "squared-loss": SquaredLoss}
"""Fits with a weight, by their names in the zoo, each with the geometry of the set in the same place."""
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
    """What outputs Z are trained to: themselves, or what a ReLU passes on."""
    return Z if fit in ("ball", "squared-loss") else Z.clamp(min=0)


def critical_weight(X: Tensor, Y: Tensor, penalty: Penalty) -> float:
    """The weight of a loss up to which U = 0 is optimal: there −∇f(0) = weight·XᵀY₊ has dual norm 1."""
    reach = float(penalty.dual_norm(X.T @ Y).max())
    return 1 / reach if reach > 0 else 1.0


def pose(X: Tensor, W: Tensor, fit: str, eps: float = 0.1, penalty: Penalty | None = None) -> LayerProgram:
    """The program whose targets W reaches: U = 0 is optimal for eps ≥ 1, the data are to be met for eps → 0.

    Args:
        X: Inputs [P, N].
        W: Weights [N, M].
        fit: One of ``FITS``.
        eps: The radius relative to ‖Y‖_F; for a loss, the critical weight relative to the weight.
        penalty: L1() if None.
    """
    penalty = penalty or L1()
    Y = targets_of(fit, X @ W)
    return LayerProgram(X, fit_of(fit, X, Y, eps, penalty), penalty)


def fit_of(fit: str, X: Tensor, Y: Tensor, eps: float, penalty: Penalty) -> Fit:
    """The fit of ``pose`` for given targets."""
    if fit in SETS:
        return SETS[fit](Y, eps * float(Y.norm()))
    return LOSSES[fit](Y, critical_weight(X, Y, penalty) / eps)
