"""Inputs and targets known only through their products: memory does not depend on the number of samples.

‖XU − Y‖² for each neuron depends on XᵀX, XᵀY and ‖y_m‖² alone. So the N + 1 samples X̃ = (R; 0), Ỹ = (R⁻ᵀXᵀY; o) with
RᵀR = XᵀX and o_m² = ‖y_m‖² − ‖R⁻ᵀXᵀy_m‖² pose the same ball and squared-loss programs as all P samples do, to every
solver and to the certificate.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, check_shape
from convexprune.solvers.errors import EmptyInput, InvalidInput, ShapeMismatch

__all__ = ["Gram"]


@dataclass(frozen=True, eq=False)
class Gram:
    """XᵀX, XᵀY and ‖y_m‖² of streamed samples, in float64.

    Use it in the place of both arrays: ``LayerProgram(gram, Ball(gram, eps))``. Multipliers of such a program are
    [N + 1, M]; the bound that they prove holds for the streamed samples.

    Attributes:
        XX: XᵀX [N, N].
        XY: XᵀY [N, M].
        YY: ‖y_m‖² [M].
        samples: P.
        dtype: What products of a batch were computed in; they are added up in float64.
    """

    XX: Tensor = field(repr=False)
    XY: Tensor = field(repr=False)
    YY: Tensor = field(repr=False)
    samples: int
    dtype: torch.dtype = torch.float64

    @classmethod
    def of(cls, batches: Iterable[tuple[ArrayLike, ArrayLike]], dtype: torch.dtype = torch.float32) -> Self:
        """Accumulate batches (X [P_b, N], Y [P_b, M]); each is let go before the next is asked for.

        Args:
            batches: Any number of samples each, the same N and M, on one device.
            dtype: torch.float32 or torch.float64, for the products of each batch. float32 products round to about
                1e-7 of the entries' size, so a relative eps below 1e-3 asks for float64.

        Raises:
            EmptyInput: No batch at all. ShapeMismatch, NonFinite: A batch does not fit, or holds NaN or infinity.
            InvalidInput: Another dtype.
        """
        if dtype not in (torch.float32, torch.float64):
            raise InvalidInput(f"dtype: expected torch.float32 or torch.float64, found {dtype!r}")
        total: Self | None = None
        for number, (X, Y) in enumerate(batches):
            batch = cls._products(as_matrix(f"inputs X of batch {number}", X), Y, number, dtype)
            total = batch if total is None else total._absorb(batch)
        if total is None:
            raise EmptyInput("batches: expected at least one pair (X, Y), found none")
        return total

    @classmethod
    def _products(cls, X: Tensor, Y: ArrayLike, number: int, dtype: torch.dtype) -> Self:
        targets = as_matrix(f"targets Y of batch {number}", Y)
        check_shape(f"targets Y of batch {number}", targets, (X.shape[0], targets.shape[1]), "the samples of X")
        X, T = X.to(dtype), targets.to(X.device, dtype)
        products = (X.T @ X, X.T @ T, T.square().sum(0, dtype=torch.float64))
        return cls(*(product.to(torch.float64) for product in products), len(X), dtype)

    def __add__(self, other: "Gram") -> Self:
        """Those of both sets of samples together, whatever machines they came from: exact up to rounding."""
        if not isinstance(other, Gram):
            return NotImplemented
        copies = (self.XX.clone(), self.XY.clone(), self.YY.clone())
        return type(self)(*copies, self.samples, self.dtype)._absorb(other)

    def _absorb(self, other: "Gram") -> Self:
        if self.XY.shape != other.XY.shape:
            raise ShapeMismatch(
                f"Grams of {list(self.XY.shape)} and of {list(other.XY.shape)} inputs and outputs cannot be added; "
                "expected the same [N, M]"
            )
        for mine, theirs in ((self.XX, other.XX), (self.XY, other.XY), (self.YY, other.YY)):
            mine.add_(theirs.to(mine.device))
        coarser = torch.float32 if torch.float32 in (self.dtype, other.dtype) else torch.float64
        return type(self)(self.XX, self.XY, self.YY, self.samples + other.samples, coarser)

    @property
    def size(self) -> float:
        """‖Y‖_F."""
        return float(self.YY.sum().sqrt())

    @property
    def inputs(self) -> Tensor:
        """X̃ [N + 1, N] in float64, with X̃ᵀX̃ = XᵀX."""
        return self._root[0]

    @property
    def targets(self) -> Tensor:
        """Ỹ [N + 1, M] in float64, with X̃ᵀỸ = XᵀY and the same length of each column as Y."""
        return self._root[1]

    @cached_property
    def _root(self) -> tuple[Tensor, Tensor]:
        d = self.XX.diagonal().clamp(min=0).sqrt()
        d = torch.where(d > 0, d, 1.0)
        scaled = self.XX / d / d[:, None]
        scaled = (scaled + scaled.T) / 2
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if not bool(failed):
            root, targets = factor.T, torch.linalg.solve_triangular(factor, self.XY / d[:, None], upper=False)
        else:  # only semidefinite, up to the rounding of the products
            values, vectors = torch.linalg.eigh(scaled)
            kept = values > len(values) * torch.finfo(self.dtype).eps * values[-1].clamp(min=1e-300)
            half = torch.where(kept, values.clamp(min=0).sqrt(), 0.0)[:, None]
            root = half * vectors.T
            targets = torch.where(kept[:, None], vectors.T @ (self.XY / d[:, None]) / half.clamp(min=1e-300), 0.0)
        rest = (self.YY - targets.square().sum(0)).clamp(min=0).sqrt()
        return torch.cat([root * d, root.new_zeros(1, len(d))]), torch.cat([targets, rest[None]])

    def to_dict(self) -> dict[str, Any]:
        """Shapes and provenance as plain data, without the arrays."""
        N, M = self.XY.shape
        return {"samples": self.samples, "inputs": N, "outputs": M, "dtype": str(self.dtype)}
