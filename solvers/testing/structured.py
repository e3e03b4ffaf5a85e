"""Programs with more structure: a ball a neuron, groups of weights, inputs known by their Gram."""

import torch
from torch import Tensor

from convexprune.solvers.programs.fits import Ball, SquaredLoss
from convexprune.solvers.programs.gram import Gram
from convexprune.solvers.programs.penalties import L1, GroupL2, Penalty
from convexprune.solvers.programs.program import LayerProgram
from convexprune.solvers.testing.layers import SETS, critical_weight, gaussian, layer, pose, targets_of


def neurons(fit: str, exact: int = 0) -> LayerProgram:
    """A ball for each neuron, of very different radii; the first ``exact`` ones are 0."""
    X, W = layer(30, 80, 10, 6)
    W[-1] = W[-1].abs() + 1  # enough active samples that a neuron with eps 0 is determined
    Y = targets_of(fit, X @ W)
    eps = torch.logspace(-2, -0.3, 6, dtype=torch.float64) * Y.norm(dim=0)
    eps[:exact] = 0
    return LayerProgram(X, SETS[fit](Y, eps))


def _blocks(N: int, M: int) -> Tensor:
    """Labels of 2 × 2 blocks of weights."""
    return torch.arange((N + 1) // 2)[:, None].repeat_interleave(2, 0)[:N] * ((M + 1) // 2) + torch.arange(M) // 2


GROUPS = {
    "rows": lambda: GroupL2("rows"),
    "columns": lambda: GroupL2("columns"),
    "blocks": lambda: GroupL2(_blocks(12, 8)),
    "weighted rows": lambda: GroupL2("rows", torch.arange(11, -1, -1) / 4.0),
    "weighted columns": lambda: GroupL2("columns", torch.arange(8) / 2.0),
    "weighted blocks": lambda: GroupL2(_blocks(12, 8), (torch.arange(24) % 4) / 2.0),
}
"""Group penalties for 12 inputs and 8 neurons; the weighted ones leave some groups free."""


def groups(fit: str, kind: str) -> LayerProgram:
    """A group penalty by its name in ``GROUPS``."""
    return pose(*layer(31, 90, 12, 8), fit, penalty=GROUPS[kind]())


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
