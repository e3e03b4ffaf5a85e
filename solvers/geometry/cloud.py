"""Points in blocks, in coordinates that are fit to compute in, and the sums that every method is made of."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, add_gram, as_matrix, as_real, blocks_of, check_finite
from convexprune.solvers.errors import InvalidInput, ShapeMismatch

_WELL_CONDITIONED = 1e-8  # of a Gram matrix: its own rounding, 1e-16 n, is then far below its least eigenvalue
_ARITHMETIC = 4 * torch.finfo(torch.float64).eps  # times √d: of products, relative to the largest direction
_VECTORS = 16  # times that: of vectors that an SVD returns
_OUTSIDE = 8  # times the precision: how far from their span rounding may take points, relative to their size
_LARGEST = 2.0**1000  # of a coordinate, and its inverse the least: what lies beyond overflows on the way
_ROWS = 4096  # at a time, where rows are gathered


@dataclass(frozen=True, eq=False)
class Frame:
    """Coordinates in which the points have mean 0 (or none is taken), second moment I, and no redundant dimension.

    a = origin + scale∘(yB) and y = ((a − origin)/scale) C with BC = I: an inverse on the points' span.

    Attributes:
        origin: [d]; 0 for ellipsoids about the origin.
        scale: [d] powers of two, so that dividing by it is exact.
        into: C [d, r].
        back: B [r, d].
    """

    origin: Tensor
    scale: Tensor
    into: Tensor
    back: Tensor

    @classmethod
    def of(cls, points: Tensor, centred: bool) -> Self:
        """The frame of points [n, d]; ``centred``: about their mean. Two passes, or six, in blocks."""
        reference = points[0].to(torch.float64) if centred else torch.zeros_like(points[0], dtype=torch.float64)
        largest, total = torch.zeros_like(reference), torch.zeros_like(reference)
        for rows in blocks_of(points):
            block = points[rows].to(torch.float64) - reference
            largest = torch.maximum(largest, block.abs().amax(0))
            total += block.sum(0)
        wrong = (largest > _LARGEST) | ((largest > 0) & (largest < 1 / _LARGEST))
        if bool(wrong.any()):
            far = f"coordinates as far as {float(largest[wrong][0]):.3g} apart"
            raise InvalidInput(f"points: found {far}, expected 1e-300 to 1e300: rescale")
        origin = reference + total / len(points) if centred else reference
        scale = torch.where(largest > 0, torch.exp2(torch.frexp(largest).exponent.to(torch.float64)), 1.0)
        root, into, vectors = _axes(points, origin, scale)
        same = largest[:, None] == 0  # there, anything else than 0 is rounding
        into, vectors = into.masked_fill(same, 0), vectors.masked_fill(same, 0)
        return cls(origin, scale, into / root, (vectors * root).T)


def _axes(points: Tensor, origin: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Root mean squares [r] > 0 of z = (a − origin)/scale along orthonormal vectors V [d, r], and L with VᵀL = I.

    zL are the coordinates of z along V. Where r < d, L takes them from the columns with the least rounding.
    """
    (n, d), precision = points.shape, torch.finfo(points.dtype).eps
    gram = torch.zeros(d, d, dtype=torch.float64, device=points.device)
    for z in _scaled(points, origin, scale):
        add_gram(gram, z)
    values, vectors = torch.linalg.eigh(gram / n)
    # The largest |z| + |origin|/scale: times the precision, what rounding may make of z. Means round, too.
    mean = (origin != 0) * torch.finfo(torch.float64).eps / precision
    unit = 1 + origin.abs() / scale + mean
    rounding = 4 * math.sqrt(d) * precision * float(unit.max())
    if float(values[0]) > max(_WELL_CONDITIONED * float(values[-1]), rounding**2):
        return values.sqrt(), vectors, vectors
    # Products square the condition number; triangular factors of blocks do not.
    basis, left = _span(points, origin, scale, unit)
    _, singular, right = torch.linalg.svd(
        _triangle(z @ left for z in _scaled(points, origin, scale)), full_matrices=False
    )
    return singular / math.sqrt(n), left @ right.T, basis @ right.T


def _span(points: Tensor, origin: Tensor, scale: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis Q [d, r] of what z span, each of them up to its own rounding, and L [d, r] with QᵀL = I.

    Rounding moves z by at most half the precision times |z| + unit − 1. Columns, then rows are divided by a bound on
    that, which changes no span: neither a far point nor a far origin hides, or feigns, a direction. Twice as much of it
    is taken for rounding, and what float64 products add.
    """
    n, d = points.shape

    def along(V: Tensor) -> Iterator[Tensor]:
        for z in _scaled(points, origin, scale):
            size = torch.linalg.vector_norm((z.abs() + unit - 1) / unit, dim=1, keepdim=True)
            yield (z / unit / torch.where(size > 0, size, 1.0)) @ V

    V = torch.eye(d, dtype=torch.float64, device=points.device)
    for _ in range(2):  # a triangle's error is relative to each column: the second one's small columns are exact
        _, singular, right = torch.linalg.svd(_triangle(along(V)), full_matrices=False)
        V = V @ right.T
    extent = torch.stack([z.abs().amax(0) for z in along(V)]).amax(0)
    precision, arithmetic = torch.finfo(points.dtype).eps, _ARITHMETIC * math.sqrt(d)
    noise = singular <= precision * math.sqrt(n) + arithmetic * float(singular[0])
    noise &= extent <= _OUTSIDE * precision + _VECTORS * arithmetic * float(extent.max())
    V = V[:, ~noise]  # orthonormal where columns are in units of their rounding, and least squares are best
    Q, R = torch.linalg.qr(unit[:, None] * V)
    return Q, (V / unit[:, None]) @ R.T


def _triangle(blocks: Iterator[Tensor]) -> Tensor:
    """R upper triangular of blocks of rows [·, k], one below the other: that of their QR factorisation."""
    R: Tensor = torch.linalg.qr(next(blocks), mode="r").R
    for rows in blocks:
        R = torch.linalg.qr(torch.cat([R, rows]), mode="r").R
    return R


def _scaled(points: Tensor, origin: Tensor, scale: Tensor) -> Iterator[Tensor]:
    for rows in blocks_of(points):
        yield (points[rows].to(torch.float64) - origin) / scale


def log_content(columns: Tensor) -> float:
    """½ log det(AᵀA) of A [d, r]: the logarithm of the r-dimensional volume that it gives the unit cube."""
    _, L, U = torch.linalg.lu(columns)  # rows of very different size spoil orthogonal factors, not these
    R = torch.linalg.qr(L).R
    return float((U.diagonal() * R.diagonal()).abs().log().sum())


@dataclass(frozen=True, eq=False)
class Cloud:
    """Points a_i as rows q_i [D] whose central ellipsoid is sought: q = y, or q = (y, 1) where the centre is free.

    Attributes:
        points: [n, d] the caller's, never copied whole; or [n, D] the rows themselves where there is no frame.
        frame: From points to coordinates y.
        free: Whether the centre is free.
    """

    points: Tensor
    frame: Frame | None
    free: bool

    @classmethod
    def of(cls, points: ArrayLike, free: bool) -> Self:
        """The caller's points, checked."""
        tensor = as_matrix("points", points)
        return cls(tensor, Frame.of(tensor, free), free)

    def __len__(self) -> int:
        return len(self.points)

    @property
    def rank(self) -> int:
        """r: the dimension of the ellipsoid, and of the points' span (affine, if the centre is free)."""
        return self.points.shape[1] - self.free if self.frame is None else len(self.frame.back)

    @property
    def size(self) -> int:
        """D = r, or r + 1 where the centre is free."""
        return self.rank + self.free

    def gap(self, largest: float) -> float:
        """max (a − c)ᵀS⁻¹(a − c)/r − 1 from κ = max g of weights that sum to 1: 0 where they are optimal."""
        return (largest - self.free) / self.rank - 1 if self.rank else 0.0

    def rows(self, chosen: Tensor | slice) -> Tensor:
        """q [k, D] of some points, in float64."""
        if self.frame is None:
            return self.points[chosen]
        y = ((self.points[chosen].to(torch.float64) - self.frame.origin) / self.frame.scale) @ self.frame.into
        return torch.cat([y, y.new_ones(len(y), 1)], dim=1) if self.free else y

    def moment(self, u: Tensor) -> Tensor:
        """M = Σ u_i q_i q_iᵀ [D, D] for u [n] ≥ 0."""
        total = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.points.device)
        for block in blocks_of(self.points):
            add_gram(total, u[block].sqrt()[:, None] * self.rows(block))
        return total

    def triangle(self, u: Tensor) -> Tensor:
        """R [D, D] upper triangular with RᵀR = Σ u_i q_i q_iᵀ, more accurate than that sum's own factor.

        NaN where that sum is singular, or not finite.
        """
        parts = torch.split(u.nonzero()[:, 0], max(self.size, _ROWS))
        R = _triangle(u[chosen].sqrt()[:, None] * self.rows(chosen) for chosen in parts)
        usable = len(R) == self.size and bool(torch.isfinite(R).all()) and bool((R.diagonal() != 0).all())
        return R if usable else R.new_full((self.size, self.size), torch.nan)

    def leverages(self, C: Tensor) -> Tensor:
        """g [n], g_i = ‖q_iC‖²: q_iᵀM⁻¹q_i where CCᵀ = M⁻¹."""
        g = torch.empty(len(self), dtype=torch.float64, device=self.points.device)
        for block, z in self.mapped(C):
            g[block] = z.square().sum(1)
        return g

    def mapped(self, C: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """QC for C [D, k], block by block."""
        frame = self.frame
        A = C if frame is None else (frame.into / frame.scale[:, None]) @ C[: self.rank]  # one product a block
        for block in blocks_of(self.points):
            a = self.points[block].to(torch.float64)
            yield block, a @ A if frame is None or not self.free else (a - frame.origin) @ A + C[-1]


def as_weights(value: ArrayLike, count: int) -> Tensor:
    """``value`` as [count] finite numbers ≥ 0 in float64; raises ShapeMismatch, NonFinite, or InvalidInput below 0."""
    weights = check_finite("weights", as_real("weights", value)).to(torch.float64)
    if tuple(weights.shape) != (count,):
        raise ShapeMismatch(
            f"weights: expected [{count}], one for each of {count} points, found shape {list(weights.shape)}"
        )
    if bool((weights < 0).any()):
        raise InvalidInput(f"weights: expected numbers ≥ 0, found {float(weights.min()):.3g}; leave such points out")
    return weights


def factor(M: Tensor) -> Tensor:
    """C upper triangular with CCᵀ = M⁻¹; NaN where M is not positive definite."""
    L, info = torch.linalg.cholesky_ex(M)
    usable = not int(info) and bool(torch.isfinite(L).all())
    return inverse(L.mT) if usable else torch.full_like(M, torch.nan)


def inverse(R: Tensor) -> Tensor:
    """R⁻¹ of an upper triangular R [k, k]."""
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    found: Tensor = torch.linalg.solve_triangular(R, eye, upper=True)
    return found
