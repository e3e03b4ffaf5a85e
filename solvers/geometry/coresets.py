"""Lewis weights with the ellipsoid of a sum of powers (f-SVD), and L∞ coresets.

Source: D. Lewis, Finite dimensional subspaces of L_p, 1978; M. B. Cohen and R. Peng, ℓp row sampling by Lewis weights,
2015; M. Tukan, A. Maalouf and D. Feldman, Coresets for near-convex functions, 2020.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, as_number, check_finite, checked_positive, working_dtype
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, SolverRefused
from convexprune.solvers.geometry.cloud import Cloud, Frame, as_weights, factor, inverse
from convexprune.solvers.geometry.ellipsoid import Ellipsoid, LownerEllipsoid, lowner_ellipsoid
from convexprune.solvers.geometry.hull import caratheodory

_LOST = 1e-3  # an error of the logarithms, or of Στ = r, that says that rounding has left nothing to go by


def lewis_weights(points: ArrayLike, z: float = 1.0, tol: float = 1e-9) -> Tensor:
    """The ℓ_z Lewis weights w [n] of points [n, d], Σw = r: w_i = τ_i(W^{1/2−1/z}A), the leverages of reweighted rows.

    For z ≤ 2 they bound the sensitivities: |a_iᵀx|^z ≤ w_i Σ|a_jᵀx|^z for every x; z = 2 gives the leverages. Found by
    w_i ← (a_iᵀ(AᵀW^{1−2/z}A)⁻¹a_i)^{z/2}, a contraction in the logarithms for z < 4; for z > 2 by steps 4/(2 + z) as
    long, which shrink errors by (z − 2)/(z + 2) in the end. Points of length 0 have weight 0.

    Args:
        points: As in ``lowner_ellipsoid``.
        z: The exponent, 0 < z < 4.
        tol: Largest |log(τ_i/w_i)| to stop at, where rounding does not stop it before.

    Raises:
        InvalidTolerance: z or tol outside its range; and of the points as ``lowner_ellipsoid``.
        SolverRefused: Rounding hides the weights, as it may for z < 1/2: W^{1−2/z} has too wide a range.
    """
    exponent = as_number("z", z)
    if not 0 < exponent < 4:
        raise InvalidTolerance(f"z: expected an exponent between 0 and 4, where the iteration converges; found {z}")
    return _lewis(Cloud.of(points, free=False), exponent, checked_positive("tol", tol))[0]


def _lewis(cloud: Cloud, z: float, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """w [n], the leverages τ [n] that they were last compared with, and C with CCᵀ = (AᵀW^{1−2/z}A)⁻¹, in the frame."""
    n, r = len(cloud), cloud.rank
    eye = torch.eye(r, dtype=torch.float64, device=cloud.points.device)
    size = cloud.leverages(eye) / n  # the leverages: the frame makes AᵀA = n·I
    if r == 0:
        return size, size, eye
    there = size ** max(z / 2, 1) > torch.finfo(torch.float64).tiny
    w = torch.where(there, size ** (z / 2) * (r / n) ** (1 - z / 2), 0.0)  # a step from equal weights
    part, last = min(1.0, 4 / (2 + z)), math.inf
    while True:
        c = torch.where(there, w ** (1 - 2 / z), 0.0)
        C = factor(cloud.moment(c))
        size = cloud.leverages(C)
        tau = c * size
        error = float((tau / w).log().abs()[there].max())
        if not tol < error < last:  # without rounding it always falls
            break
        w, last = torch.where(there, w ** (1 - part) * size ** (part * z / 2), 0.0), error
    if not error <= max(tol, _LOST) or abs(float(tau.sum()) - r) > _LOST * r:
        raise SolverRefused(
            f"z: rounding hides the weights for an exponent of {z} and these points; take a larger one, or points "
            "less far from the origin for their spread"
        )
    return w, tau, C


@dataclass(frozen=True, eq=False)
class LevelEllipsoid(Ellipsoid):
    """E with L ⊆ E ⊆ factor·L for the level set L = {x : Σ w_i|a_iᵀx|^z ≤ 1}, within the span of the points.

    Attributes:
        z: The exponent.
        factor: Proved from the weights, whatever they are: (Σv)^{1/z−1/2}·max(τ_i/v_i)^{1/z−1/2} for weights v and
            their leverages τ; r^{1/z−1/2} ≤ √r for Lewis weights.
        sensitivities: s [n] with w_i|a_iᵀx|^z ≤ s_i Σ w_j|a_jᵀx|^z for every x; their sum is r for Lewis weights.
    """

    z: float
    factor: float
    sensitivities: Tensor

    def basis(self, points: ArrayLike) -> Tensor:
        """U = PG [k, r], the f-SVD P = U(DVᵀ) with DVᵀ = G⁺: s_i = w_i‖u_i‖₂^z."""
        return self._points(points).to(self.generator) @ self.generator


def level_ellipsoid(
    points: ArrayLike, z: float = 1.0, weights: ArrayLike | None = None, tol: float = 1e-9
) -> LevelEllipsoid:
    """An ellipsoid around {x : Σ w_i|a_iᵀx|^z ≤ 1}, 1 ≤ z ≤ 2, that is at most r^{1/z−1/2} ≤ √r times as wide.

    With Q = AᵀV^{1−2/z}A of Lewis weights v and their leverages τ,
    ‖x‖_Q·min(v_i/τ_i)^{1/z−1/2} ≤ ‖Ax‖_z ≤ (Σv)^{1/z−1/2}·‖x‖_Q (docs/coresets.md has the proof). Along directions in
    which no point lies, the level set is unbounded; the ellipsoid is that of the points' span.

    Args:
        points: a_i [n, d], as in ``lowner_ellipsoid``.
        z: The exponent.
        weights: w [n] ≥ 0 of the points; None: all 1.
        tol: As in ``lewis_weights``.

    Raises:
        InvalidTolerance: z outside [1, 2]. InvalidInput: Negative weights; and of the points as ``lowner_ellipsoid``.
        SolverRefused: As in ``lewis_weights``.
    """
    exponent = as_number("z", z)
    if not 1 <= exponent <= 2:
        raise InvalidTolerance(f"z: expected an exponent from 1 to 2, found {z}")
    cloud = _weighted(points, weights, exponent)
    v, tau, C = _lewis(cloud, exponent, checked_positive("tol", tol))
    power, there = 1 / exponent - 0.5, v > 0
    lower = float((v / tau)[there].min()) ** power if cloud.rank else 1.0
    upper = max(lower, float(v.sum()) ** power)
    frame = cloud.frame
    assert frame is not None  # noqa: S101 - the caller's own points have one
    A = frame.back * frame.scale  # aᵀx = yᵀt for the point's y and t = Ax
    if cloud.rank == len(frame.scale):  # A⁺ [d, r]: no subspace to keep to, and no loss where scales differ
        right = frame.into / frame.scale[:, None]
    else:
        Q, R = torch.linalg.qr(A.T)
        right = Q @ inverse(R).T
    generator = right @ C / lower
    back = lower * torch.linalg.solve_triangular(C, A, upper=True)
    s = cloud.leverages(C / lower) ** (exponent / 2)
    origin, precision = torch.zeros_like(frame.origin), torch.finfo(cloud.points.dtype).eps
    return LevelEllipsoid(origin, generator, back, exponent, upper / lower, s, precision=precision)


def _weighted(points: ArrayLike, weights: ArrayLike | None, z: float) -> Cloud:
    """Of rows w_i^{1/z}a_i, whose powers are the weighted sum's; their span is judged in the points' precision."""
    if weights is None:
        return Cloud.of(points, free=False)
    a = as_matrix("points", points)
    w = as_weights(weights, len(a)).to(a.device)
    rows = check_finite("weights^(1/z)·points", a.to(torch.float64) * w[:, None] ** (1 / z))
    unit = math.ldexp(0.5, math.frexp(float(rows.abs().max()))[1])  # a power of two, for float32 to hold all of them
    frame = Frame.of((rows / unit).to(working_dtype(a.dtype)), centred=False)
    return Cloud(rows, replace(frame, scale=frame.scale * unit), free=False)


Kind = Literal["support", "axes", "caratheodory"]

_INSIDE = 1e-9  # so much is granted to rounding: of the ends of the axes, drawn in to be inside the hull, and of M


@dataclass(frozen=True, eq=False)
class MaxNormCoreset:
    """Indices S [k], ascending, with max_P |pᵀx| ≤ factor · max_S |pᵀx| for every x.

    The factor is proved from the certified gap of the ellipsoid; kind says how the coreset was made.
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
    points = as_matrix("points", points)
    ellipsoid = lowner_ellipsoid(points, tol, center="free" if kind == "caratheodory" else "origin")
    if not math.isfinite(ellipsoid.certificate.gap):
        raise SolverRefused(f"points: no ellipsoid around them could be certified ({ellipsoid.status}): rescale them")
    support, factor = ellipsoid.support, ellipsoid.radius_factor / (1 - _INSIDE)
    if ellipsoid.rank == 0:
        return MaxNormCoreset(support[:1], 1.0, kind, ellipsoid)
    if kind == "support":
        return MaxNormCoreset(support[_of_the_same_moment(ellipsoid, points[support])], factor, kind, ellipsoid)
    ends = support[_spanning(ellipsoid, points[support])]
    return MaxNormCoreset(ends, factor * math.sqrt(ellipsoid.rank), kind, ellipsoid)


def _of_the_same_moment(ellipsoid: LownerEllipsoid, support: Tensor) -> Tensor:
    """Which of the support points [k, d] are enough for Σ u_i v_i v_iᵀ, where the ellipsoid is the unit ball."""
    v, r = ellipsoid.transform(support), ellipsoid.rank
    if len(v) <= r * (r + 1) // 2 + 1:
        return torch.arange(len(v), device=v.device)
    rows, columns = torch.triu_indices(r, r, device=v.device)
    return caratheodory(v[:, rows] * v[:, columns], ellipsoid.weights).indices


def _spanning(ellipsoid: LownerEllipsoid, support: Tensor) -> Tensor:
    """Which of the support points [k, d] the ends of the shrunk axes are combinations of.

    In the coordinates w where the support has mean 0 (free centre) and Σ u wwᵀ = I, about the origin max |hᵀw| ≥ 1 for
    every h of length 1: the unit ball is in the hull of ±w. With a free centre the ball of radius 1/max ‖w‖ is, as in
    the proof of ``radius_factor``. This holds for w as rounded, so that no end is found outside.
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
    used = torch.cat([caratheodory(hull, target=end).indices for end in ends])
    chosen: Tensor = torch.unique(used % len(support))
    return chosen
