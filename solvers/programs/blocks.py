"""A program's samples in blocks that a cache can hold: products with X, and what a fit says of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from convexprune.solvers.arrays import add_gram, blocks_of
from convexprune.solvers.programs.fits import Fit
from convexprune.solvers.programs.program import LayerProgram


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of a program.

    Attributes:
        rows: Which.
        X: Their inputs in the caller's own precision, shared.
        fit: Their fit in the precision that is worked in.
    """

    rows: slice
    X: Tensor
    fit: Fit

    def inputs(self, like: Tensor) -> Tensor:
        """X in the dtype of ``like``; a copy of the block only where that is not its own."""
        return self.X.to(like.dtype)

    def outputs(self, U: Tensor, precision: torch.dtype) -> Tensor:
        """XU in the dtype of U, the product in ``precision``."""
        return torch.mm(self.X.to(precision), U.to(precision)).to(U.dtype)

    def adjoint(self, R: Tensor, precision: torch.dtype) -> Tensor:
        """XᵀR in the dtype of R, the product in ``precision``."""
        return torch.mm(self.X.to(precision).T, R.to(precision)).to(R.dtype)


@dataclass(frozen=True, eq=False)
class Samples:
    """All blocks of a program. Whole passes over [P, M] arrays cost as much as the memory traffic; these are fewer."""

    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, program: LayerProgram, dtype: torch.dtype) -> Self:
        """X is not copied; targets are where they have another dtype."""
        X, fit = program.inputs, program.fit
        parts = ((rows, fit.map(lambda a, rows=rows: a[rows].to(dtype))) for rows in blocks_of(X, program.shape[1]))  # type: ignore[misc]
        return cls(tuple(Block(rows, X[rows], part) for rows, part in parts))

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def outputs(self, U: Tensor, out: Tensor) -> Tensor:
        """XU, written to ``out`` [P, M]."""
        for block in self:
            torch.mm(block.inputs(out), U, out=out[block.rows])
        return out

    def adjoint(self, rows_of: Callable[[Block], Tensor], like: Tensor) -> Tensor:
        """XᵀA [N, M] for an A that ``rows_of`` gives block by block, in the shape and dtype of ``like``."""
        total = torch.zeros_like(like)
        for block in self:
            total.addmm_(block.inputs(like).T, rows_of(block))
        return total

    def sums(self, Z: Tensor) -> Tensor:
        """The fit's sums of Z [P, M], in float64."""
        return torch.stack([block.fit.sums(Z[block.rows]).to(torch.float64) for block in self]).sum(0)


def gram_matrix(X: Tensor) -> Tensor:
    """XᵀX in float64, by blocks of rows so that X is never copied whole."""
    gram = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=X.device)
    for rows in blocks_of(X):
        add_gram(gram, X[rows].to(torch.float64))
    return gram
