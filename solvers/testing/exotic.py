"""Programs apart from the others: impossible ones, and exact budgets, which are not convex."""

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from convexprune.solvers.programs.fits import Ball, NetTrimLoss, NetTrimSet, ReluBall, ReluLoss, SquaredLoss
from convexprune.solvers.programs.penalties import NM, TopK
from convexprune.solvers.programs.program import LayerProgram
from convexprune.solvers.testing.layers import gaussian, layer

Known = tuple[LayerProgram, float]


def infeasible_ceiling() -> LayerProgram:
    """Outputs must be ≤ −1 off Ω and near 5 on it, from one positive input: impossible."""
    X = torch.linspace(1, 2, 40, dtype=torch.float64)[:, None]
    Y = torch.where(torch.arange(40)[:, None] % 2 == 0, 5.0, 0.0).double()
    return LayerProgram(X, NetTrimSet(Y, 0.5, ceiling=-1.0))


def _two_signs() -> LayerProgram:
    X = torch.tensor([[1.0], [-1.0], [1.0]], dtype=torch.float64)
    return LayerProgram(X, NetTrimLoss(torch.tensor([[0.0], [0.0], [1.0]]), ceiling=-1.0))


def _contradiction() -> LayerProgram:
    X = torch.ones(30, 1, dtype=torch.float64)
    Y = torch.where(torch.arange(30)[:, None] % 3 == 0, 5.0, 0.0).double()
    return LayerProgram(X, ReluBall(Y, 1.0))


def _out_of_reach(per_neuron: bool) -> LayerProgram:
    X, Y = gaussian(40, 30, 4), gaussian(41, 30, 3)
    rest = (Y - X @ torch.linalg.pinv(X) @ Y).norm(dim=0)
    eps = torch.stack([0.5 * rest[0], 2 * rest[1], 2 * rest[2]]) if per_neuron else 0.5 * float(rest.norm())
    return LayerProgram(X, Ball(Y, eps))


IMPOSSIBLE: dict[str, Callable[[], LayerProgram]] = {
    "net-trim infeasible ceiling": infeasible_ceiling,
    "net-trim-loss, a ceiling of both signs": _two_signs,
    "relu-ball, one output for two targets": _contradiction,
    "ball out of reach": lambda: _out_of_reach(per_neuron=False),
    "ball, one neuron's out of reach": lambda: _out_of_reach(per_neuron=True),
}
"""Programs that no weights satisfy, by name."""

Budget = TopK | NM
BUDGETS: dict[str, Callable[[], Budget]] = {
    "top-k a layer": lambda: TopK(10),
    "top-k a neuron": lambda: TopK(3, per="neuron"),
    "2:4": lambda: NM(2, 4),
    "top-k a neuron, free bias": lambda: TopK(2, per="neuron", rows=7),
}
"""Budgets for 8 inputs and 4 neurons."""


def orthonormal_budget(kind: str) -> Known:
    """XᵀX = I and the squared loss: what is given up is the sum of squares of XᵀY off the support, the largest stay."""
    X = torch.linalg.qr(layer(42, 40, 8, 4)[0]).Q.contiguous()
    Y, budget = gaussian(43, 40, 4), BUDGETS[kind]()
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
    best = 0.0
    for m in range(3):
        rests = []
        for kept in combinations(range(7), 3):
            Xk = X[:, list(kept)]
            rests.append(float((Y[:, m] - Xk @ torch.linalg.pinv(Xk) @ Y[:, m]).square().sum()))
        best += min(rests) / 2
    return LayerProgram(X, SquaredLoss(Y), TopK(3, per="neuron")), best


def planted_budget(fit: str) -> Known:
    """Targets that weights within the budget reach: nothing need be lost."""
    X, W = layer(46, 200, 12, 6, bias=False)
    W = torch.where(_largest(W, TopK(4, per="neuron")), W, 0.0)
    loss = SquaredLoss(X @ W) if fit == "squared-loss" else ReluLoss((X @ W).clamp(min=0))
    return LayerProgram(X, loss, TopK(4, per="neuron")), 0.0
