"""The default method: solve for few points, look at all of them once, take in those that stick out, repeat.

The weights of the few follow by a primal-dual interior-point method. In the form without sum constraint, minimise
−log det Σ u_i q_i q_iᵀ + Σ u_i over u ≥ 0, the optimum has Σ u = D and g_i = q_iᵀM(u)⁻¹q_i ≤ 1 with equality where
u_i > 0. The Hessian is H_ij = (q_iᵀM⁻¹q_j)², and a Newton step on s = 1 − g(u), u∘s = σμ solves
(H + diag(s/u)) Δu = g − 1 + σμ/u. Predictor and corrector share one factorisation.

Source: P. Sun and R. M. Freund, Computation of minimum-volume covering ellipsoids, 2004 (the dual reduced Newton
method); S. Mehrotra, On the implementation of a primal-dual interior point method, 1992.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexprune.solvers.arrays import checked_count
from convexprune.solvers.geometry.cloud import Cloud, factor
from convexprune.solvers.geometry.method import ELLIPSOIDS, EllipsoidMethod, Multiplicative, Weighted
from convexprune.solvers.methods.interface import Start

_STEPS = 60
_BOUNDARY = 0.99  # of the longest step that keeps u and s positive
_SLACK = 0.1  # the least s to start from
_WHOLE = 20  # times D: so few points are taken all at once
_AT_ONCE = 4  # times D: points taken in at a time
_FEWEST = 200  # points that are always taken in together
_NEWCOMER = 0.1  # weight of a point just taken in, relative to the mean
_SHARPER = 10.0  # how much smaller the gap on the set is to be than the last one on all points
_FLOOR = 1e-12
_IDLE = 20  # steps without a smaller gap
_NEGLIGIBLE = 1e-5  # a weight relative to the largest
_MOST_STEPS = 30  # multiplicative ones between two looks at all points
_SPANNED = 1e-9  # a set's second moment along a direction relative to the largest, below which it is left out
_COPIED = 2**25  # entries of rows that are computed once and kept; more are computed again when they are needed


def interior_point(cloud: Cloud, u: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Weights u [K] ≥ 0 with a gap of at most ``tol`` over these points, and their g [K].

    The cloud has no frame; memory is three K×K matrices. u > 0, with a positive definite moment, is where to start. The
    best weights seen are returned where rounding ends the progress before.
    """
    Y = cloud.points @ factor(cloud.moment(u))
    largest = float(Y.square().sum(1).max())
    Y = Y / math.sqrt(largest)  # u is scaled so that max g = 1
    u, g = u * largest, Y.square().sum(1)
    s = (1 - g).clamp_(min=_SLACK)
    best = (math.inf, u, g)
    for _ in range(_STEPS):
        gap = cloud.gap(float(g.max() * u.sum()))
        if gap < best[0]:
            best = (gap, u, g)
        if not gap > tol:  # NaN where rounding has made the moment singular
            break
        diagonal = Y.square().sum(1).square_() + s / u
        system, info = torch.linalg.cholesky_ex((Y @ Y.T).square_().diagonal_scatter(diagonal))
        if int(info):
            break
        du, ds = _direction(system, u, s, g, -u * s)
        primal, dual = _longest(u, du), _longest(s, ds)
        mu = float((u * s).mean())
        ahead = float(((u + primal * du) * (s + dual * ds)).mean())
        du, ds = _direction(system, u, s, g, (ahead / mu) ** 3 * mu - u * s - primal * dual * du * ds)
        u, s = (v + _BOUNDARY * _longest(v, dv) * dv for v, dv in ((u, du), (s, ds)))
        Y = cloud.points @ factor(cloud.moment(u))
        g = Y.square().sum(1)
    return best[1], best[2]


def _direction(system: Tensor, u: Tensor, s: Tensor, g: Tensor, complement: Tensor) -> tuple[Tensor, Tensor]:
    """Δu, Δs that solve HΔu − Δs = g − 1 + s and sΔu + uΔs = ``complement``."""
    du = torch.cholesky_solve((g - 1 + s + complement / u)[:, None], system)[:, 0]
    return du, (complement - s * du) / u


def _longest(v: Tensor, dv: Tensor) -> float:
    """The largest t ≤ 1 with v + t·dv ≥ 0."""
    return min(1.0, float(torch.where(dv < 0, -v / dv, math.inf).min()))


@dataclass
class _State(Weighted):
    """u [K] are the working set's; g [n] all points', under uniform weights before the first step."""

    chosen: Tensor  # [K] indices of the working set
    steps: int = 0
    most: int = 0
    best: float = math.inf  # the least gap so far
    idle: int = 0  # steps since then


@ELLIPSOIDS.register("working-set")
@dataclass(frozen=True)
class WorkingSet(EllipsoidMethod[_State]):
    """Few points at a time: those of largest leverage first, then those that stick out; one pass over all a step.

    A primal-dual interior-point method finds the weights of the set, the multiplicative algorithm where the set is too
    large for it. Exact optimality on the set makes for two to ten passes, whatever n.

    Args:
        largest: The largest set that the interior-point method takes; it holds three matrices of that size squared.
    """

    default_max_iter: ClassVar[int] = 1000
    first_judged: ClassVar[int] = 1
    largest: int = 4000

    def __post_init__(self) -> None:
        checked_count("largest", self.largest)

    def init(self, program: Cloud, start: Start | None) -> _State:
        """The points of largest leverage under uniform weights, or those that have weight in the start."""
        eye = torch.eye(program.size, dtype=torch.float64, device=program.points.device)
        g = program.leverages(eye)  # the frame makes M = I for uniform weights
        given = torch.ones_like(g) if start is None else start.weights
        chosen = (given > _NEGLIGIBLE * given.max()).nonzero()[:, 0]
        if len(chosen) > max(_FEWEST, _WHOLE * program.size):  # weights on so many points know little of the support
            chosen = chosen[(given * g)[chosen].topk(_AT_ONCE * program.size).indices]
        u = given[chosen]
        chosen, u = _joined(chosen, u.clamp(min=_NEWCOMER * float(u.mean())), _missing(program, chosen))
        return _State(program, u, g, chosen)

    def step(self, state: _State) -> None:
        """Take in what stuck out in the last step, find the set's weights, look at all points."""
        if state.steps:
            _exchange(state)
        cloud, K = state.cloud, len(state.chosen)
        whole = len(cloud) == K > self.largest and K * cloud.size > _COPIED
        subset = cloud if whole else Cloud(cloud.rows(state.chosen), None, cloud.free)  # rows are computed once
        u = self._weights(subset, state.u, max(_FLOOR, self.own_gap(state) / _SHARPER))
        state.u = u / u.sum()
        state.g = cloud.leverages(factor(subset.moment(state.u)))
        state.steps, state.most = state.steps + 1, max(state.most, K)
        gap = self.own_gap(state)
        state.best, state.idle = (gap, 0) if gap < state.best else (state.best, state.idle + 1)

    def done(self, state: _State) -> bool:
        """Rounding leaves nothing to gain."""
        return state.idle >= _IDLE

    def weights(self, state: _State) -> Tensor:
        """u [n]."""
        u = torch.zeros(len(state.cloud), dtype=torch.float64, device=state.u.device)
        u[state.chosen] = state.u
        return u

    def effective(self, state: _State) -> dict[str, Any]:
        """The size of the largest set."""
        return {"largest set": state.most}

    def _weights(self, subset: Cloud, u: Tensor, tol: float) -> Tensor:
        if len(u) <= self.largest:
            return interior_point(subset, u, tol)[0]
        method = Multiplicative()
        state = method.init(subset, Start(u))
        for _ in range(_MOST_STEPS):
            if method.own_gap(state) <= tol:
                break
            method.step(state)
        return state.u


def _exchange(state: _State) -> None:
    """Drop the points without weight that lie well inside; add those that stick out most."""
    D, g, u = state.cloud.size, state.g, state.u
    gap = state.cloud.gap(float(g.max()))
    kept = (u > _NEGLIGIBLE * u.max()) | (g[state.chosen] > D * (1 - gap))
    outside = g.index_fill(0, state.chosen, 0.0)
    farthest = outside.topk(min(len(g), max(_AT_ONCE * D, _FEWEST)))
    newcomers = farthest.indices[farthest.values > D]
    state.chosen, state.u = _joined(state.chosen[kept], u[kept], newcomers)


def _joined(chosen: Tensor, u: Tensor, newcomers: Tensor) -> tuple[Tensor, Tensor]:
    """Indices, ascending, and their weights."""
    weights = torch.cat([u, torch.full_like(newcomers, float(_NEWCOMER * u.mean()), dtype=u.dtype)])
    chosen, order = torch.cat([chosen, newcomers]).sort()
    return chosen, weights[order] / weights.sum()


def _missing(cloud: Cloud, chosen: Tensor) -> Tensor:
    """Points that, with those chosen, span what all points span: for each direction left out, the farthest along it."""
    extra = chosen[:0]
    while len(chosen) < len(cloud):
        rows = cloud.rows(torch.cat([chosen, extra]))
        _, singular, right = torch.linalg.svd(rows.T @ rows)
        directions = right[singular <= _SPANNED * singular[0]].T
        if directions.shape[1] == 0:
            return extra
        farthest = torch.zeros(directions.shape[1], dtype=directions.dtype, device=rows.device)
        found = torch.zeros_like(farthest, dtype=torch.int64)
        for block, z in cloud.mapped(directions):
            best = z.abs().max(0)
            found = torch.where(best.values > farthest, best.indices + block.start, found)
            farthest = torch.maximum(farthest, best.values)
        extra = torch.unique(torch.cat([extra, found]))
    return extra
