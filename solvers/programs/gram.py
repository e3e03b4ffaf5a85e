"""Inputs and targets known only through their products: memory does not depend on the number of samples.

‖XU − Y‖² for each neuron depends on XᵀX, XᵀY and ‖y_m‖² alone. So the N + 1 samples X̃ = (R; 0), Ỹ = (R⁻ᵀXᵀY; o) with
RᵀR = XᵀX and o_m² = ‖y_m‖² − ‖R⁻ᵀXᵀy_m‖² give the same ball and squared-loss programs as all P samples do.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, add_gram, as_matrix, check_shape, unit_of
from convexprune.solvers.errors import EmptyInput, InvalidInput, NonFinite, ShapeMismatch

_ROUNDING = 16  # units of the products' precision that an eigenvalue, or a squared length, may owe to rounding


@dataclass(frozen=True, eq=False)
class Gram:
    """XᵀX, XᵀY and ‖y_m‖² of streamed samples, in float64, in the place of both arrays.

    ``LayerProgram(gram, Ball(gram, eps))`` has multipliers [N + 1, M]; their bound holds for the streamed samples.

    Attributes:
        XX: XᵀX [N, N].
        XY: XᵀY [N, M].
        YY: ‖y_m‖² [M].
        samples: P.
        dtype: What products of a batch were computed in; they are added up in float64.

    Raises:
        ShapeMismatch: Products of different N or M. NonFinite: Overflow in the products.
    """

    XX: Tensor = field(repr=False)
    XY: Tensor = field(repr=False)
    YY: Tensor = field(repr=False)
    samples: int
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        N, M = self.XY.shape if self.XY.ndim == 2 else (0, 0)
        found = [list(array.shape) for array in (self.XX, self.XY, self.YY)]
        if found != [[N, N], [N, M], [M]]:
            raise ShapeMismatch(f"Gram: expected products [N, N], [N, M] and [M], found {found}")
        for name in ("XX", "XY", "YY"):
            product = getattr(self, name)
            if not bool(torch.isfinite(product).all()):
                raise NonFinite(f"Gram {name}: products overflow float64; divide inputs and targets by the same number")
            object.__setattr__(self, name, product.detach().to(torch.float64))

    @classmethod
    def of(cls, batches: Iterable[tuple[ArrayLike, ArrayLike]], dtype: torch.dtype = torch.float32) -> Self:
        """Accumulate batches (X [P_b, N], Y [P_b, M]) of any sizes; each is let go before the next is taken.

        Args:
            batches: The pairs.
            dtype: torch.float32 or torch.float64, for the products of each batch. Squared distances from the targets
                round to about 1e-6 of ‖Y‖² in float32, 1e-14 in float64: a relative eps below 1e-2 needs float64.

        Raises:
            EmptyInput: No batch at all. ShapeMismatch, NonFinite: A batch does not fit, or holds NaN or infinity.
            InvalidInput: Another dtype, or a batch that is no pair.
        """
        if dtype not in (torch.float32, torch.float64):
            raise InvalidInput(f"dtype: expected torch.float32 or torch.float64, found {dtype!r}")
        total: Self | None = None
        number = 0  # counted by hand: enumerate would keep the last batch
        for pair in batches:
            batch = cls._products(pair, number, dtype)
            del pair  # else it would live while the next one is made
            if total is not None and batch.XY.shape != total.XY.shape:
                found, expected = list(batch.XY.shape), list(total.XY.shape)
                raise ShapeMismatch(f"batch {number}: expected {expected} inputs and outputs as before, found {found}")
            total = batch if total is None else total + batch
            number += 1  # noqa: SIM113
        if total is None:
            raise EmptyInput("batches: expected at least one pair (X, Y), found none")
        return total

    @classmethod
    def _products(cls, pair: tuple[ArrayLike, ArrayLike], number: int, dtype: torch.dtype) -> Self:
        try:
            inputs, targets = pair
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"batch {number}: expected a pair (X, Y), found {type(pair).__name__}") from error
        X, Y = as_matrix(f"inputs X of batch {number}", inputs), as_matrix(f"targets Y of batch {number}", targets)
        check_shape(f"targets Y of batch {number}", Y, (X.shape[0], Y.shape[1]), "the samples of X")
        unit = unit_of(X, Y)
        X, Y = (A if unit == 1 else A / unit for A in (X, Y))
        X, Y = X.to(dtype), Y.to(X.device, dtype)
        XX = add_gram(X.new_zeros(X.shape[1], X.shape[1]), X)
        XY, YY = X.T @ Y, Y.square().sum(0, dtype=torch.float64)
        XX, XY, YY = (product.to(torch.float64) * (unit * unit) for product in (XX, XY, YY))
        return cls(XX, XY, YY, len(X), dtype)

    def __add__(self, other: "Gram") -> Self:
        """That of both sets of samples together, exact up to rounding; ShapeMismatch for another [N, M]."""
        if not isinstance(other, Gram):
            return NotImplemented
        if self.XY.shape != other.XY.shape:
            shapes = f"{list(self.XY.shape)} and of {list(other.XY.shape)}"
            raise ShapeMismatch(f"Grams of {shapes} inputs and outputs cannot be added; expected the same [N, M]")
        pairs = ((self.XX, other.XX), (self.XY, other.XY), (self.YY, other.YY))
        XX, XY, YY = (mine + theirs.to(mine.device) for mine, theirs in pairs)
        coarser = torch.float32 if torch.float32 in (self.dtype, other.dtype) else torch.float64
        return type(self)(XX, XY, YY, self.samples + other.samples, coarser)

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
        """(X̃, Ỹ). Inputs are scaled to unit length first, so that one floor for rounding serves them all."""
        d = self.XX.diagonal().sqrt()
        unit = torch.where(d > 0, d, 1.0)
        scaled = self.XX / unit / unit[:, None]
        scaled = (scaled + scaled.T) / 2
        scaled.diagonal().masked_fill_(d == 0, 1.0)  # any row will do for a dead input: its column is multiplied by 0
        R, T = self._factored(scaled, self.XY / unit[:, None])
        # Where only rounding says that X does not reach y_m, it does.
        rest = self.YY - T.square().sum(0)
        rest = torch.where(rest > _ROUNDING * torch.finfo(self.dtype).eps * self.YY, rest, 0.0).sqrt()
        return torch.cat([R * d, R.new_zeros(1, len(d))]), torch.cat([T, rest[None]])

    def _factored(self, G: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """R with RᵀR = G, and T with RᵀT = B: Cholesky's, or where G is as good as singular the symmetric root.

        Directions whose eigenvalue is all rounding are left out: B divided by its root would be rounding magnified.
        """
        own, double = torch.finfo(self.dtype).eps, torch.finfo(torch.float64).eps
        factor, failed = torch.linalg.cholesky_ex(G)
        if not bool(failed) and float(factor.diagonal().min()) ** 2 > _ROUNDING * (own + double * len(G)):
            return factor.T, torch.linalg.solve_triangular(factor, B, upper=False)
        values, vectors = torch.linalg.eigh(G)
        kept = values > _ROUNDING * (own + double * values[-1])
        root = torch.where(kept, values, 1.0).sqrt()[:, None]
        return torch.where(kept[:, None], root * vectors.T, 0.0), torch.where(kept[:, None], vectors.T @ B / root, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Shapes and provenance as plain data, without the arrays."""
        N, M = self.XY.shape
        return {"samples": self.samples, "inputs": N, "outputs": M, "dtype": str(self.dtype)}
