"""Points in blocks, and the sums over them that every method is made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, add_gram, as_real, blocks_of, count_nonfinite
from convexprune.solvers.errors import EmptyInput, NonFinite, ShapeMismatch
from convexprune.solvers.geometry.frame import Frame

_ROWS = 4096  # at a time, where rows are gathered


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
        """The caller's points, checked as ``as_points`` does."""
        tensor = as_points(points)
        return cls(tensor, Frame.of(tensor, free), free)

    def __len__(self) -> int:
        return len(self.points)

    @property
    def rank(self) -> int:
        """r: the dimension of the ellipsoid."""
        return self.points.shape[1] - self.free if self.frame is None else self.frame.rank

    @property
    def size(self) -> int:
        """D = r, or r + 1 where the centre is free."""
        return self.rank + self.free

    def gap(self, largest: float) -> float:
        """max (a − c)ᵀS⁻¹(a − c)/r − 1 from κ = max g of weights that sum to 1: 0 where they are optimal."""
        return (largest - self.free) / self.rank - 1

    def rows(self, chosen: Tensor | slice) -> Tensor:
        """q [k, D] of some points, in float64."""
        if self.frame is None:
            return self.points[chosen]
        y = self.frame.apply(self.points[chosen])
        return torch.cat([y, y.new_ones(len(y), 1)], dim=1) if self.free else y

    def subset(self, chosen: Tensor) -> "Cloud":
        """Some points as a cloud of their own, their rows computed once."""
        return Cloud(self.rows(chosen), None, self.free)

    def moment(self, u: Tensor) -> Tensor:
        """M = Σ u_i q_i q_iᵀ [D, D] for u [n] ≥ 0."""
        total = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.points.device)
        for block in blocks_of(self.points):
            add_gram(total, u[block].sqrt()[:, None] * self.rows(block))
        return total

    def triangle(self, u: Tensor) -> Tensor:
        """R [D, D] upper triangular with RᵀR = Σ u_i q_i q_iᵀ, more accurate than that sum's own factor."""
        R = torch.zeros(0, self.size, dtype=torch.float64, device=self.points.device)
        for chosen in torch.split(u.nonzero()[:, 0], max(self.size, _ROWS)):
            R = torch.linalg.qr(torch.cat([R, u[chosen].sqrt()[:, None] * self.rows(chosen)]), mode="r").R
        return R

    def leverages(self, C: Tensor) -> Tensor:
        """g [n], g_i = ‖q_iC‖²: q_iᵀM⁻¹q_i where CCᵀ = M⁻¹."""
        g = torch.empty(len(self), dtype=torch.float64, device=self.points.device)
        for block, z in self.mapped(C):
            g[block] = z.square().sum(1)
        return g

    def mapped(self, C: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """QC for C [D, k], block by block."""
        frame = self.frame
        if frame is None:
            for block in blocks_of(self.points):
                yield block, self.points[block] @ C
            return
        A = (frame.into / frame.scale[:, None]) @ C[: frame.rank]  # one product a block, not two
        for block in blocks_of(self.points):
            a = self.points[block].to(torch.float64)
            yield block, (a - frame.origin) @ A + C[-1] if self.free else a @ A


def as_points(points: ArrayLike) -> Tensor:
    """Finite points [n, d], in the caller's memory where that can be shared.

    Raises:
        ShapeMismatch: Not [n, d]. EmptyInput: No point or no coordinate. NonFinite: NaN or infinity.
        InvalidInput: Complex numbers, or nothing that converts to a tensor.
    """
    tensor = as_real("points", points)
    if tensor.ndim != 2:
        raise ShapeMismatch(f"points: expected [n, d], a point a row; found shape {list(tensor.shape)}")
    if 0 in tensor.shape:
        raise EmptyInput(f"points: expected at least one point and one coordinate, found {list(tensor.shape)}")
    bad = count_nonfinite(tensor)
    if bad:
        raise NonFinite(f"points: {bad} of {tensor.numel()} coordinates are NaN or infinite; clean the data first")
    return tensor


def factor(M: Tensor) -> Tensor | None:
    """C upper triangular with CCᵀ = M⁻¹, or None where M is not positive definite."""
    L, info = torch.linalg.cholesky_ex(M)
    if int(info) or not bool(torch.isfinite(L).all()):
        return None
    eye = torch.eye(len(M), dtype=M.dtype, device=M.device)
    inverse: Tensor = torch.linalg.solve_triangular(L, eye, upper=False)
    return inverse.T
