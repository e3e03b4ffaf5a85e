"""Lewis weights, and the ellipsoid that they give the level set of a sum of powers (f-SVD).

Source: D. Lewis, Finite dimensional subspaces of L_p, 1978; M. B. Cohen and R. Peng, ℓp row sampling by Lewis weights,
2015; M. Tukan, A. Maalouf and D. Feldman, Coresets for near-convex functions, 2020.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_number, as_real, check_finite, checked_positive, working_dtype
from convexprune.solvers.errors import InvalidInput, InvalidTolerance, ShapeMismatch, SolverRefused
from convexprune.solvers.geometry.cloud import Cloud, as_points, factor
from convexprune.solvers.geometry.ellipsoid import Ellipsoid
from convexprune.solvers.geometry.frame import Frame

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
        if C is None:
            break
        size = cloud.leverages(C)
        tau = c * size
        error = float((tau / w).log().abs()[there].max())
        if not tol < error < last:  # without rounding it always falls
            break
        w, last = torch.where(there, w ** (1 - part) * size ** (part * z / 2), 0.0), error
    if C is None or not error <= max(tol, _LOST) or abs(float(tau.sum()) - r) > _LOST * r:
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
        P = as_real("points", points).to(self.generator)
        if P.ndim != 2 or P.shape[1] != len(self.generator):
            raise ShapeMismatch(f"points: expected [k, {len(self.generator)}], found shape {list(P.shape)}")
        return P @ self.generator


def level_ellipsoid(
    points: ArrayLike, z: float = 1.0, weights: ArrayLike | None = None, tol: float = 1e-9
) -> LevelEllipsoid:
    """An ellipsoid around {x : Σ w_i|a_iᵀx|^z ≤ 1}, 1 ≤ z ≤ 2, that is at most r^{1/z−1/2} ≤ √r times as wide.

    The one of least volume is hard to find (for z = 1 the set is a polytope given by 2^n inequalities), and promises
    √r only. That of the Lewis weights comes from reweighting alone and promises r^{1/z−1/2}: with Q = AᵀV^{1−2/z}A,
    ‖x‖_Q·min(v_i/τ_i)^{1/z−1/2} ≤ ‖Ax‖_z ≤ (Σv)^{1/z−1/2}·‖x‖_Q (docs/coresets.md has the proof). Along directions
    in which no point lies, the level set is unbounded; the ellipsoid is that of the points' span.

    Args:
        points: a_i [n, d], as in ``lowner_ellipsoid``.
        z: The exponent.
        weights: w [n] ≥ 0 of the points; None: all 1.
        tol: As in ``lewis_weights``.

    Raises:
        InvalidTolerance: z outside [1, 2]. InvalidInput: Negative weights; and of the points as ``lowner_ellipsoid``.
        SolverRefused: As in ``lewis_weights``; weights that have not converged are no reason.
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
    generator = _right_inverse(frame) @ C / lower
    inverse = lower * torch.linalg.solve_triangular(C, A, upper=True)
    s = cloud.leverages(C / lower) ** (exponent / 2)
    origin, precision = torch.zeros_like(frame.origin), torch.finfo(cloud.points.dtype).eps
    return LevelEllipsoid(origin, generator, inverse, exponent, upper / lower, s, precision=precision)


def _right_inverse(frame: Frame) -> Tensor:
    """A⁺ [d, r] of A = B diag(scale), which has full rank r."""
    if frame.rank == len(frame.scale):  # no subspace to keep to, and no loss where scales differ
        return frame.into / frame.scale[:, None]
    Q, R = torch.linalg.qr((frame.back * frame.scale).T)
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    product: Tensor = Q @ torch.linalg.solve_triangular(R.T, eye, upper=False)
    return product


def _weighted(points: ArrayLike, weights: ArrayLike | None, z: float) -> Cloud:
    """Of rows w_i^{1/z}a_i, whose powers are the weighted sum's; their span is judged in the points' precision."""
    if weights is None:
        return Cloud.of(points, free=False)
    a, w = as_points(points), check_finite("weights", as_real("weights", weights))
    if tuple(w.shape) != (len(a),):
        raise ShapeMismatch(f"weights: expected one for each of {len(a)} points, found shape {list(w.shape)}")
    if bool((w < 0).any()):
        raise InvalidInput(f"weights: expected numbers ≥ 0, found {float(w.min())}")
    rows = check_finite("weights^(1/z)·points", a.to(torch.float64) * w.to(a.device, torch.float64)[:, None] ** (1 / z))
    unit = math.ldexp(0.5, math.frexp(float(rows.abs().max()))[1])  # a power of two, for float32 to hold all of them
    frame = Frame.of((rows / unit).to(working_dtype(a.dtype)), centred=False)
    return Cloud(rows, replace(frame, scale=frame.scale * unit), free=False)
