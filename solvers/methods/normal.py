"""XᵀX of a layer's inputs X [P, N]: the matrix where samples are many, or X itself where inputs are far more.

XᵀX [N, N] has rank ≤ P. Where P < N/2 it is never formed: products go through X, and the singular vectors of X [N, P]
take the place of the eigenvectors, so that (XᵀX + sI)⁻¹ costs P²N once and 4PNM for each product with an [N, M] array.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from convexprune.solvers.programs.program import gram_matrix

_LEAST_SHIFT = 1e-12  # of the largest diagonal entry, in an inverse: less drowns in the rounding of XᵀX


def positive_or_one(A: Tensor) -> Tensor:
    """A with 1 in the place of entries that are not positive: lengths to divide by."""
    return torch.where(A > 0, A, 1.0)


@dataclass(frozen=True, eq=False)
class LowRank:
    """diag(a) + Q diag(w) Qᵀ as an operator on [N, M] arrays: a [N, 1] or a number, Q [N, r], w [r, 1]."""

    a: Tensor | float
    Q: Tensor
    w: Tensor

    def __matmul__(self, V: Tensor) -> Tensor:
        return self.a * V + self.Q @ (self.w * (self.Q.T @ V))

    def to(self, like: Tensor) -> "LowRank":
        """The same in the dtype and on the device of ``like``."""
        a = self.a.to(like) if isinstance(self.a, Tensor) else self.a
        return LowRank(a, self.Q.to(like), self.w.to(like))


Operator: TypeAlias = Tensor | LowRank
"""What an [N, M] array can be multiplied with by ``@``."""


class NormalMatrix:
    """G = XᵀX + ridge·I [N, N], or in scaled variables, by the matrix itself; in float64 unless converted."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @staticmethod
    def of(X: Tensor) -> "NormalMatrix":
        """XᵀX for X [P, N] of any dtype; where P < N/2, which is where it saves work, by X itself."""
        if 2 * X.shape[0] >= X.shape[1]:
            return NormalMatrix(gram_matrix(X))
        return _ByInputs(X.to(torch.float64), X.new_zeros(X.shape[1], 1, dtype=torch.float64))

    def diagonal(self) -> Tensor:
        """[N]."""
        return self.matrix.diagonal()

    def lengths(self) -> Tensor:
        """[N, 1], the square roots of the diagonal, 1 in the place of 0: columns of X divided by them have length 1."""
        return positive_or_one(self.diagonal().clamp(min=0).sqrt()[:, None])

    def __matmul__(self, V: Tensor) -> Tensor:
        """GV for V [N, M]."""
        return self.matrix @ V

    def to(self, dtype: torch.dtype) -> "NormalMatrix":
        """The same in another precision."""
        return NormalMatrix(self.matrix.to(dtype))

    def scaled(self, d: Tensor) -> "NormalMatrix":
        """diag(1/d) G diag(1/d) for d [N, 1] > 0."""
        return NormalMatrix((self.matrix / d).div_(d.T))

    def plus(self, ridge: float) -> "NormalMatrix":
        """G + ridge·I."""
        matrix = self.matrix.clone()
        matrix.diagonal().add_(ridge)
        return NormalMatrix(matrix)

    def block(self, rows: Tensor) -> Tensor:
        """[c, s, s]: G restricted to the inputs in each of the rows [c, s]."""
        return self.matrix[rows[:, :, None], rows[:, None, :]]

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ≥ 0 [r], r = N or P, and their vectors [N, r]; all others are 0. Without the ridge if r = P."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values.clamp(min=0), vectors

    def inverse(self, shift: float) -> tuple[Operator, float]:
        """(G + shift·I)⁻¹ and its shift: the one given, or as much more as rounding of G asks for.

        Raises:
            ArithmeticError: Numbers that are not finite.
        """
        shift = self._least(shift)
        while math.isfinite(shift):
            matrix = self.matrix.clone()
            matrix.diagonal().add_(shift)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if not bool(failed):
                return torch.cholesky_inverse(factor), shift
            shift *= 10
        raise ArithmeticError("XᵀX or what is added to its diagonal is not finite")

    def inverses(self, dtype: torch.dtype) -> Callable[[float], LowRank]:
        """``inverse`` in this precision for many shifts, what they have in common computed once."""
        values, vectors = self.eigen()
        values, vectors = values[:, None].to(dtype), vectors.to(dtype)
        return lambda shift: LowRank(0.0, vectors, 1 / (values + shift))

    def _least(self, shift: float) -> float:
        return max(shift, _LEAST_SHIFT * float(self.diagonal().max()))


class _ByInputs(NormalMatrix):
    """By X [P, N] and the ridge [N, 1]."""

    known: tuple[Tensor, Tensor] | None = None  # what ``eigen`` gave

    def __init__(self, X: Tensor, ridge: Tensor) -> None:
        self.X, self.ridge = X, ridge

    def diagonal(self) -> Tensor:
        return self.X.square().sum(0) + self.ridge[:, 0]

    def __matmul__(self, V: Tensor) -> Tensor:
        return (self.X.T @ (self.X @ V)).add_(self.ridge * V)

    def to(self, dtype: torch.dtype) -> NormalMatrix:
        return _ByInputs(self.X.to(dtype), self.ridge.to(dtype))

    def scaled(self, d: Tensor) -> NormalMatrix:
        return _ByInputs(self.X / d.T, self.ridge / d.square())

    def plus(self, ridge: float) -> NormalMatrix:
        return _ByInputs(self.X, self.ridge + ridge)

    def block(self, rows: Tensor) -> Tensor:
        products = self.X.new_empty(*rows.shape, rows.shape[1])
        for product, inputs in zip(products, rows, strict=True):
            x = self.X[:, inputs]
            torch.mm(x.T, x, out=product)
        products.diagonal(dim1=1, dim2=2).add_(self.ridge[rows, 0])
        return products

    def eigen(self) -> tuple[Tensor, Tensor]:
        if self.known is None:
            # From X, not from XXᵀ: the vectors are then orthonormal to rounding, however small their values are.
            vectors, sizes, _ = torch.linalg.svd(self.X.T, full_matrices=False)
            self.known = sizes.square(), vectors
        return self.known

    def inverse(self, shift: float) -> tuple[LowRank, float]:
        shift = self._least(shift)
        if not bool(self.ridge.any()):
            values, vectors = self.eigen()
            return LowRank(1 / shift, vectors, -(values / (shift * (values + shift)))[:, None]), shift
        # (XᵀX + E)⁻¹ = E⁻¹ − E⁻¹Xᵀ(I + XE⁻¹Xᵀ)⁻¹XE⁻¹, E = diag(ridge) + shift·I: one Cholesky factor [P, P].
        inverse = 1 / (self.ridge + shift)
        S = self.X * inverse.T
        inner = S @ self.X.T
        inner.diagonal().add_(1)
        Q = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), S, upper=False).T
        return LowRank(inverse, Q, -inverse.new_ones(len(inner), 1)), shift

    def inverses(self, dtype: torch.dtype) -> Callable[[float], LowRank]:
        return lambda shift: self.inverse(shift)[0].to(self.X.new_empty(0, dtype=dtype))
