"""What weights u prove: the ellipsoid that they give, judged in float64 from the points alone."""

import math

import torch
from torch import Tensor

from convexprune.solvers.certificate.certificate import Certificate
from convexprune.solvers.errors import ShapeMismatch
from convexprune.solvers.geometry.cloud import Cloud

_NO_WEIGHT = 1e-12  # relative to the largest: rounding of an interior-point method's zeros


def certify_weights(cloud: Cloud, weights: Tensor, _: Tensor | None = None) -> Certificate:
    """Value, bound and gap of the ellipsoid that weights [n] give; infinite where their moment is singular.

    value: the logarithm of its volume. bound: no ellipsoid around the points (about the same origin, if that is given)
    has a smaller one. gap: max (a − c)ᵀS⁻¹(a − c)/r − 1, so that value − bound = (r/2) log(1 + gap). violation: 0, for
    the ellipsoid is scaled to hold all the points.
    """
    r = cloud.rank
    if r == 0:
        return Certificate(0.0, 0.0, 0.0, 0.0, 0.0)
    if tuple(weights.shape) != (len(cloud),):
        raise ShapeMismatch(f"weights: expected [{len(cloud)}] from the solver, found shape {list(weights.shape)}")
    R = _triangle(cloud, weights)
    largest = math.inf if R is None else float(cloud.leverages(_inverse(R)).max())
    if R is None or not math.isfinite(largest):
        return Certificate(math.inf, -math.inf, math.inf, 0.0, r / 2)
    gap = max(0.0, cloud.gap(largest))
    # The last row and column of a lifted moment are those of the constant 1: det M = det S.
    bound = float(R.diagonal().abs().log().sum()) + r / 2 * math.log(r) + log_unit_ball(r)
    bound += 0.0 if cloud.frame is None else cloud.frame.log_det
    return Certificate(bound + r / 2 * math.log1p(gap), bound, gap, 0.0, r / 2)


def proposed_ellipsoid(cloud: Cloud, weights: Tensor, gap: float) -> tuple[Tensor, Tensor, Tensor]:
    """c [d], G [d, r] and G⁺ [r, d] of the ellipsoid {c + Gv : ‖v‖ ≤ 1} that weights [n] give.

    Its size follows from the gap, as the certificate found it. Where the moment is singular, everything is NaN.
    """
    frame, r = cloud.frame, cloud.rank
    assert frame is not None  # noqa: S101 - the caller's own points have one
    if r == 0:
        return frame.origin, frame.into, frame.back
    R = _triangle(cloud, weights)
    if R is None or not math.isfinite(gap):
        nan = torch.full((len(frame.origin), r), math.nan, dtype=torch.float64, device=frame.origin.device)
        return nan[:, 0], nan, nan.T
    y = torch.zeros(r, dtype=R.dtype, device=R.device)
    if cloud.free:  # RᵀR = Σ u (y, 1)(y, 1)ᵀ: the constant comes last
        y, R = _centred(R)
    radius = math.sqrt(r * (1 + gap))
    generator = radius * (R @ frame.back).T * frame.scale[:, None]
    inverse = ((frame.into / frame.scale[:, None]) @ _inverse(R)).T / radius
    return frame.undo(y[None])[0], generator, inverse


def dual_weights(weights: Tensor) -> Tensor:
    """u ≥ 0 with Σu = 1, without what is only rounding; all 0 where there is nothing finite and positive."""
    u = weights.to(torch.float64).clamp(min=0)
    u = torch.where(u > _NO_WEIGHT * u.max(), u, 0.0)
    total = float(u.sum())
    return u / total if 0 < total < math.inf else torch.zeros_like(u)


def log_unit_ball(r: int) -> float:
    """The logarithm of the volume of the unit ball in R^r."""
    return r / 2 * math.log(math.pi) - math.lgamma(r / 2 + 1)


def _triangle(cloud: Cloud, weights: Tensor) -> Tensor | None:
    R = cloud.triangle(dual_weights(weights))
    usable = len(R) == cloud.size and bool(torch.isfinite(R).all()) and bool((R.diagonal() != 0).all())
    return R if usable else None


def _inverse(R: Tensor) -> Tensor:
    """R⁻¹: its product with its transpose is M⁻¹."""
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    inverse: Tensor = torch.linalg.solve_triangular(R, eye, upper=True)
    return inverse


def _centred(R: Tensor) -> tuple[Tensor, Tensor]:
    """Mean c [r] and triangle of S = Σ u yyᵀ − ccᵀ, from the triangle of the lifted moment."""
    c = (R.T @ R[:, -1])[:-1]
    # M = [[S + ccᵀ, c], [cᵀ, 1]]; with the constant first, its triangle has that of S below.
    order = torch.cat([torch.tensor([len(R) - 1], device=R.device), torch.arange(len(R) - 1, device=R.device)])
    return c, torch.linalg.qr(R[:, order], mode="r").R[1:, 1:]
