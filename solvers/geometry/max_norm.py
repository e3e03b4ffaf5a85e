"""L∞ coresets: a few of the points whose largest |pᵀx| is nearly that of all, whatever x."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike
from convexprune.solvers.errors import InvalidInput, SolverRefused
from convexprune.solvers.geometry.caratheodory import caratheodory, combinations
from convexprune.solvers.geometry.cloud import as_points
from convexprune.solvers.geometry.ellipsoid import LownerEllipsoid, lowner_ellipsoid

Kind = Literal["support", "axes", "caratheodory"]

_INSIDE = 1e-9  # so much is granted to rounding: of the ends of the axes, drawn in to be inside the hull, and of M


@dataclass(frozen=True, eq=False)
class MaxNormCoreset:
    """Indices S with max_P |pᵀx| ≤ factor · max_S |pᵀx| for every x.

    Attributes:
        indices: [k] ascending.
        factor: What is proved, from the certified gap of the ellipsoid.
        kind: How it was made.
        ellipsoid: The one that proves it.
    """

    indices: Tensor
    factor: float
    kind: Kind
    ellipsoid: LownerEllipsoid


def max_norm_coreset(points: ArrayLike, kind: Kind = "support", tol: float = 1e-9) -> MaxNormCoreset:
    """Some of the points [n, d] that stand for all of them in max |pᵀx|, with a proved factor.

    With r the rank and ε the certified gap of a Löwner ellipsoid of the points:

    - "support": the points with a dual weight in the one about the origin, or at most r(r + 1)/2 + 1 of them with the
      same M (Carathéodory); factor √(r(1 + ε)). For (pᵀx)² ≤ (pᵀM⁻¹p)(xᵀMx) ≤ r(1 + ε)·Σ u_i(a_iᵀx)², and a mean is at
      most the maximum over the support.
    - "axes": that ellipsoid shrunk into the hull of ±P, the ends of its axes as combinations of at most r + 1 points
      each (Carathéodory); at most r(r + 1) points, factor r√(1 + ε).
    - "caratheodory": the same with a free centre, as published (Tukan et al. 2022): the 2r ends of its axes, at most
      2r(r + 1) points, factor r^{3/2}(1 + ε); widths max pᵀx − min pᵀx keep within it, too.

    Args:
        points: As in ``lowner_ellipsoid``.
        kind: See above.
        tol: Of the ellipsoid; where it is small, few points have a dual weight that do not need one.

    Raises:
        InvalidInput: An unknown kind; and as ``lowner_ellipsoid``.
        SolverRefused: Nothing is proved of the ellipsoid.
    """
    if kind not in ("support", "axes", "caratheodory"):
        raise InvalidInput(f"kind: expected 'support', 'axes' or 'caratheodory', found {kind!r}")
    points = as_points(points)
    ellipsoid = lowner_ellipsoid(points, tol, center="free" if kind == "caratheodory" else "origin")
    if not math.isfinite(ellipsoid.certificate.gap):
        raise SolverRefused(f"points: no ellipsoid around them could be certified ({ellipsoid.status}): rescale them")
    if ellipsoid.rank == 0:
        return MaxNormCoreset(ellipsoid.support[:1], 1.0, kind, ellipsoid)
    if kind == "support":
        kept = _of_the_same_moment(ellipsoid, points[ellipsoid.support])
        return MaxNormCoreset(ellipsoid.support[kept], ellipsoid.radius_factor / (1 - _INSIDE), kind, ellipsoid)
    chosen = ellipsoid.support[_spanning(ellipsoid, points[ellipsoid.support])]
    factor = ellipsoid.radius_factor * math.sqrt(ellipsoid.rank) / (1 - _INSIDE)
    return MaxNormCoreset(chosen, factor, kind, ellipsoid)


def _of_the_same_moment(ellipsoid: LownerEllipsoid, support: Tensor) -> Tensor:
    """Which of the support points [k, d] are enough for Σ u_i v_i v_iᵀ, where the ellipsoid is the unit ball."""
    v, r = ellipsoid.transform(support), ellipsoid.rank
    if len(v) <= r * (r + 1) // 2 + 1:
        return torch.arange(len(v), device=v.device)
    rows, columns = torch.triu_indices(r, r, device=v.device)
    return caratheodory(v[:, rows] * v[:, columns], ellipsoid.weights).indices


def _spanning(ellipsoid: LownerEllipsoid, support: Tensor) -> Tensor:
    """Which of the support points [k, d] the ends of the shrunk axes are combinations of.

    In the coordinates w where the support has mean 0 (free centre) and Σ u ww^T = I, and about the origin max |hᵀw| ≥ 1
    for every h of length 1: the unit ball is in the hull of ±w. With a free centre the ball of radius 1/max ‖w‖ is, as
    in the proof of ``radius_factor``. Whatever rounding made of the ellipsoid, of points far from the origin say, this
    holds for w as they are, so that no end is found outside.
    """
    u, v = ellipsoid.weights, ellipsoid.transform(support)
    if ellipsoid.about == "free":
        v = v - u @ v
    R = torch.linalg.qr(u.sqrt()[:, None] * v, mode="r").R
    w, axes = (
        torch.linalg.solve_triangular(R, A, upper=True, left=False)
        for A in (v, torch.linalg.svd(ellipsoid.generator, full_matrices=False).Vh)
    )
    ends = axes / torch.linalg.vector_norm(axes, dim=1, keepdim=True) * (1 - _INSIDE)
    if ellipsoid.about == "origin":  # one end of each axis is enough, from points of either sign
        hull = torch.cat([w, -w])
    else:
        hull, ends = w, torch.cat([ends, -ends]) / torch.linalg.vector_norm(w, dim=1).max()
    used = torch.cat([combination.indices for combination in combinations(hull, ends)])
    chosen: Tensor = torch.unique(used % len(support))
    return chosen
