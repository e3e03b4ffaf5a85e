"""Sparse weights of a squared loss with next to no penalty, moved to where they meet the targets.

Where inputs are more than samples and the penalty is small, outputs of optimal weights all but equal the targets. The
sparse iterate of an ADMM is near the optimum long before its outputs are, and what they lack is squared and multiplied
by a large weight. So each neuron moves by weighted least squares, large weights the most, along its support and as many
inputs more as it has samples: for r = y − Xu and D = diag(|u|), by D²Xᵀ(XD²Xᵀ)⁻¹r.
"""

import torch
from torch import Tensor

from convexprune.solvers.programs.claims import is_plain
from convexprune.solvers.programs.fits import SquaredLoss
from convexprune.solvers.programs.program import LayerProgram

_SPARE = 1.1  # times as many inputs as samples: with no more, those chosen may depend on each other
_EXCESS = 2.0  # times the loss of what meets the targets: with no more, nothing is wrong with the sparse weights
_LEAST = 1e-3  # of a neuron's largest weight: what those that are 0 count as
_ROUNDING = 1e-14  # of the largest diagonal entry, added to all
_REFINEMENTS = 3
_ENTRIES = 2**24  # that are held at once


def interpolated(program: LayerProgram, U: Tensor, V: Tensor, tension: Tensor) -> Tensor:
    """U or, if they cost less, weights near U that meet the targets.

    Args:
        program: Only ``SquaredLoss`` with fewer samples than inputs is looked at.
        U: [N, M], sparse, in float64.
        V: [N, M], near U and the targets.
        tension: [N, M], how near each entry that is 0 is to being none.
    """
    fit, size = program.fit, min(len(U), int(_SPARE * program.samples) + 1)
    if not is_plain(fit, (SquaredLoss,)) or program.samples >= len(U) or int((U != 0).sum(0).max()) > size:
        return U
    X, Y = program.inputs.to(U), program.fit.anchor.to(U)
    before, near = (float((X @ A - Y).square().sum()) for A in (U, V))
    if before <= _EXCESS * near:
        return U
    chosen = torch.where(U != 0, torch.inf, tension).topk(size, dim=0).indices
    moved = U.clone()
    for columns in torch.split(torch.arange(U.shape[1]), max(1, _ENTRIES // (size * len(X)))):
        rows = chosen[:, columns]
        moved[rows, columns] += _moves(X, Y[:, columns], U[:, columns], rows)
    assert isinstance(fit, SquaredLoss)  # noqa: S101 - is_plain saw to it
    penalty, after = program.penalty.to(U), float((X @ moved - Y).square().sum())
    cheaper = float(penalty.value(moved)) + fit.weight / 2 * after < float(penalty.value(U)) + fit.weight / 2 * before
    return moved if cheaper else U


def _moves(X: Tensor, Y: Tensor, U: Tensor, rows: Tensor) -> Tensor:
    """[S, M], the moves of the weights in these rows [S, M]."""
    size = U.abs()
    D = torch.maximum(size.gather(0, rows), _LEAST * size.amax(0)).T[:, None]
    inputs = X.T[rows.T].mT * D  # [M, P, S]
    normal = inputs @ inputs.mT
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += _ROUNDING * diagonal.amax(1, keepdim=True)
    factor, _ = torch.linalg.cholesky_ex(normal)
    left, moves = (Y - X @ U).T[:, :, None], torch.zeros_like(D).mT
    for _ in range(_REFINEMENTS):
        move = inputs.mT @ torch.cholesky_solve(left, factor)
        moves, left = moves + move, left - inputs @ move
    return (moves * D.mT)[:, :, 0].T.nan_to_num(0.0)
