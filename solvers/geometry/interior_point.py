"""A primal-dual interior-point method for the optimal weights of a few thousand points.

In the form that needs no sum constraint, minimise −log det Σ u_i q_i q_iᵀ + Σ u_i over u ≥ 0, the optimum has Σ u = D
and g_i = q_iᵀM(u)⁻¹q_i ≤ 1 with equality where u_i > 0. The Hessian is H_ij = (q_iᵀM⁻¹q_j)², and a Newton step on
s = 1 − g(u), u∘s = σμ solves (H + diag(s/u)) Δu = g − 1 + σμ/u. Predictor and corrector share one factorisation.

Source: P. Sun and R. M. Freund, Computation of minimum-volume covering ellipsoids, 2004 (the dual reduced Newton
method, which has the same system); S. Mehrotra, On the implementation of a primal-dual interior point method, 1992.
"""

import math

import torch
from torch import Tensor

from convexprune.solvers.geometry.cloud import Cloud, factor

_STEPS = 60
_BOUNDARY = 0.99  # of the longest step that keeps u and s positive
_SLACK = 0.1  # the least s to start from


def interior_point(cloud: Cloud, u: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Weights u [K] ≥ 0 with a gap of at most ``tol`` over these points, and their g [K].

    Args:
        cloud: K points without a frame; memory is three K×K matrices.
        u: Where to start, positive, its moment positive definite.
        tol: Of the gap. The best weights seen are returned where rounding ends the progress before.
    """
    u, Y, g = _scaled(cloud, u)
    s = (1 - g).clamp_(min=_SLACK)
    best = (math.inf, u, g)
    for _ in range(_STEPS):
        gap = cloud.gap(float(g.max() * u.sum()))
        if gap < best[0]:
            best = (gap, u, g)
        if gap <= tol:
            break
        system, info = torch.linalg.cholesky_ex((Y @ Y.T).square_().diagonal_scatter(_diagonal(Y, s / u)))
        if int(info):
            break
        du, ds = _direction(system, u, s, g, -u * s)
        primal, dual = _longest(u, du), _longest(s, ds)
        mu = float((u * s).mean())
        ahead = float(((u + primal * du) * (s + dual * ds)).mean())
        du, ds = _direction(system, u, s, g, (ahead / mu) ** 3 * mu - u * s - primal * dual * du * ds)
        moved = _moved(cloud, u, du, _BOUNDARY * _longest(u, du))
        if moved is None:
            break
        u, Y, g = moved
        s = s + _BOUNDARY * _longest(s, ds) * ds
    return best[1], best[2]


def _scaled(cloud: Cloud, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u scaled so that max g = 1, with the rows Y = QC, CCᵀ = M⁻¹, and g."""
    C = factor(cloud.moment(u))
    assert C is not None  # noqa: S101 - the caller's promise
    Y = cloud.points @ C
    largest = float(Y.square().sum(1).max())
    Y = Y / math.sqrt(largest)
    return u * largest, Y, Y.square().sum(1)


def _diagonal(Y: Tensor, extra: Tensor) -> Tensor:
    return Y.square().sum(1).square_() + extra


def _direction(system: Tensor, u: Tensor, s: Tensor, g: Tensor, complement: Tensor) -> tuple[Tensor, Tensor]:
    """Δu, Δs that solve HΔu − Δs = g − 1 + s and sΔu + uΔs = ``complement``."""
    du = torch.cholesky_solve((g - 1 + s + complement / u)[:, None], system)[:, 0]
    return du, (complement - s * du) / u


def _longest(v: Tensor, dv: Tensor) -> float:
    """The largest t ≤ 1 with v + t·dv ≥ 0."""
    return min(1.0, float(torch.where(dv < 0, -v / dv, math.inf).min()))


def _moved(cloud: Cloud, u: Tensor, du: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """u + step·du, its Y and g; the step is halved until its moment is positive definite."""
    while step > 1e-8:
        C = factor(cloud.moment(u + step * du))
        if C is not None:
            Y = cloud.points @ C
            return u + step * du, Y, Y.square().sum(1)
        step /= 2
    return None
