"""Multipliers made dual feasible: within the domain of f*, and orthogonal to the inputs of free weights.

Λ is projected (``fit.project_dual``), shifted by what takes from XᵀΛ the excess of free and nearly free entries over
their price, and projected again. Where that has cut the shift short, the next one leaves those multipliers alone.
Whatever is reached, f* is finite there (docs/program.md, 5.2).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convexprune.solvers.programs.fits import Fit
from convexprune.solvers.programs.program import LayerProgram

BLOCK_ENTRIES = 2**20  # float64 entries a block of rows may hold at once
NEGLIGIBLE = 2**-44  # of ‖x_j‖·‖λ_m‖: |XᵀΛ| that counts as 0
_MOST_CHEAP = 64  # inputs whose nearly free entries are repaired too
_GRAM_ENTRIES = 2**24  # of the matrices that are held at once, unless a single one is larger
_FEW = 2**16  # entries of those matrices, for fewer of which it is not looked whether they are all the same
_ROUNDS = 6


@dataclass(frozen=True, eq=False)
class Shift:
    """λ_m moves by X_F c_m: the inputs F [F] and the coefficients c [F, M]."""

    inputs: Tensor
    coefficients: Tensor


@dataclass(frozen=True)
class DualBlock:
    """Some samples of the program in float64, with the multipliers proposed for them and the shifts found so far."""

    inputs: Tensor  # in the caller's precision
    fit: Fit
    U: Tensor
    proposed: Tensor | None
    shifts: tuple[Shift, ...] = ()

    @cached_property
    def X(self) -> Tensor:
        """All inputs; most passes need a few of them."""
        return self.inputs.to(torch.float64)

    def some(self, inputs: Tensor) -> Tensor:
        """The columns of X for these inputs."""
        return self.inputs[:, inputs].to(torch.float64)

    @cached_property
    def Z(self) -> Tensor:
        """XU."""
        return self.X @ self.U

    @property
    def multipliers(self) -> Tensor:
        """Λ after all shifts, where f* is finite."""
        return self._shifted(mask=False)[0]

    @property
    def movable(self) -> Tensor:
        """The mask of the multipliers that a next shift may move.

        At first the unrestricted ones, then any that are not 0; but none that the projection took back.
        """
        return self._shifted(mask=True)[1]

    def _shifted(self, mask: bool) -> tuple[Tensor, Tensor]:
        proposed = self.fit.residual(self.Z).to(torch.float64) if self.proposed is None else self.proposed
        L = self.fit.project_dual(proposed)
        free = movable = self.fit.unrestricted()
        kept: Tensor | bool = True
        for k, shift in enumerate(self.shifts, 1):
            moved = L - torch.where(movable, self.some(shift.inputs) @ shift.coefficients, 0.0)
            L = self.fit.project_dual(moved)
            if mask or k < len(self.shifts):
                kept = kept & torch.isclose(L, moved, rtol=NEGLIGIBLE, atol=0.0)
                movable = (free | (L != 0)) & kept
        return L, movable


def blocks(
    program: LayerProgram, U: Tensor, multipliers: Tensor | None = None, shifts: tuple[Shift, ...] = ()
) -> Iterator[DualBlock]:
    """The program's samples in blocks of rows."""
    X, (N, M) = program.inputs, program.shape
    rows = max(1, BLOCK_ENTRIES // (N + 4 * M))
    for start in range(0, program.samples, rows):
        part = slice(start, start + rows)
        fit = program.fit.map(lambda array, part=part: array[part].to(torch.float64))  # type: ignore[misc]
        proposed = None if multipliers is None else multipliers[part].to(torch.float64)
        yield DualBlock(X[part], fit, U, proposed, shifts)


def cheap_entries(cost: Tensor, lengths: Tensor) -> Tensor:
    """[N, M]: entries that are free, or far cheaper than others for the same length of output."""
    price = cost / lengths.clamp(min=1e-300)
    cheap = (price <= 1e-2 * price.median()) & (lengths > 0)
    # Beyond a few inputs, only those that need it to have any bound are repaired.
    return cheap if int(cheap.any(1).sum()) <= _MOST_CHEAP else (cost == 0) & (lengths > 0)


def shifts(
    program: LayerProgram, U: Tensor, multipliers: Tensor | None, cheap: Tensor, limit: Tensor, lengths: Tensor
) -> tuple[Shift, ...]:
    """The shifts after which |XᵀΛ| ≤ limit [N, M] on every cheap entry (0 for free ones), if there are any.

    Without multipliers the residual of the weights U serves; lengths are ‖x_j‖ [N, 1].
    """
    if multipliers is None:
        multipliers = torch.cat([block.multipliers for block in blocks(program, U)])
    inputs = cheap.any(1).nonzero()[:, 0]
    repair = _Repair(program, U, multipliers, inputs, lengths[inputs], cheap[inputs].to(torch.float64))
    last = torch.full_like(U[0], torch.inf)
    for _ in range(_ROUNDS):
        excess, far = repair.excess(limit[inputs] / lengths[inputs])
        columns = (far > NEGLIGIBLE) & (far < last)
        if not bool(columns.any()):
            break
        repair.found = (*repair.found, repair.shift(excess, columns))
        last = far
    return repair.found


@dataclass(eq=False)
class _Repair:
    """Least squares problems over the cheap inputs F, whose columns are taken at unit length."""

    program: LayerProgram
    U: Tensor
    proposed: Tensor
    inputs: Tensor  # F
    lengths: Tensor  # [F, 1]
    mask: Tensor  # [F, M], 1 for cheap entries
    found: tuple[Shift, ...] = ()

    def excess(self, limit: Tensor) -> tuple[Tensor, Tensor]:
        """[F, M], what X_FᵀΛ exceeds the limit by after the shifts; and [M], the most of it, relative to ‖λ_m‖."""
        A, squares = torch.zeros_like(self.mask), torch.zeros_like(self.mask[0])
        for block, X in self._blocks():
            L = block.multipliers
            A += X.T @ L
            squares += L.square().sum(0)
        excess = (A - A.clamp(-limit, limit)) * self.mask
        return excess, excess.abs().amax(0) / squares.sqrt().clamp(min=1e-300)

    def shift(self, excess: Tensor, columns: Tensor) -> Shift:
        """The shortest shift of the movable multipliers of these columns that takes the excess away.

        With D_m the diagonal 0/1 matrix of the movable ones of column m: (X_FᵀD_mX_F) c_m = excess.
        """
        c, F = torch.zeros_like(excess), len(excess)
        chosen = columns.nonzero()[:, 0]
        alike = len(chosen) * F**2 > _FEW and bool((self.mask[:, chosen] == self.mask[:, chosen[:1]]).all())
        if alike and all(bool(block.movable.all()) for block, _ in self._blocks()):
            parts = [(chosen, chosen[:1])]  # all have the same matrix
        else:
            parts = [(part, part) for part in torch.split(chosen, max(1, _GRAM_ENTRIES // F**2))]
        for part, members in parts:
            inverse = torch.linalg.pinv(self._grams(members), hermitian=True)
            c[:, part] = (inverse @ excess.T[part, :, None])[:, :, 0].T
        return Shift(self.inputs, c * self.mask / self.lengths)

    def _grams(self, columns: Tensor) -> Tensor:
        """[c, F, F]: X_FᵀD_mX_F of these columns, 0 where an entry is not cheap."""
        mask = self.mask.T[columns]
        total = self.mask.new_zeros(*mask.shape, len(self.inputs))
        for block, X in self._blocks():
            total += torch.einsum("pf,pm,pg->mfg", X, block.movable[:, columns].to(torch.float64), X)
        return total * mask[:, :, None] * mask[:, None, :]

    def _blocks(self) -> Iterator[tuple[DualBlock, Tensor]]:
        """The samples after the shifts so far, and their columns X_F at unit length."""
        for block in blocks(self.program, self.U, self.proposed, self.found):
            yield block, block.some(self.inputs) / self.lengths.T
