"""The point of a convex hull that is nearest to a target, as a combination of few points, or a plane between the two.

[wolfe1976] Wolfe, Finding the nearest point in a polytope, Mathematical Programming 11, 1976.
"""

import math
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from convexprune.solvers.arrays import blocks_of, check_finite, stratified
from convexprune.solvers.errors import InvalidInput, SolverRefused

_POOL = 4  # times d + 1 points to begin with
_INSIDE = 1e-12  # times √d, in half-widths of the points: a target this near to the hull is in it
_ROUNDING = 2**-50  # of a target's coordinates: four units in the last place
_NEAREST = 0.99  # of the distance to the nearest point: what a separating plane shows before a target is refused
_STEPS = 100  # times d + 1: far more than any target took


class Combination(NamedTuple):
    """A weighted choice of points: their indices [k] int64, ascending, and their weights [k] float64, positive."""

    indices: Tensor
    weights: Tensor


class OutsideHull(InvalidInput):
    """⟨direction, p − target⟩ ≤ −margin < 0 for all points p: the direction [d] float64 has length 1."""

    direction: Tensor
    margin: float


class Box(NamedTuple):
    """Points, read as (p − centre)/scale: the box around them has half-widths in [1, 2) and the origin as centre."""

    points: Tensor
    centre: Tensor
    scale: Tensor

    @classmethod
    def of(cls, points: Tensor, indices: Tensor) -> "Box":
        """The box around the points of these indices; scales are powers of two, so that dividing rounds nothing."""
        extremes = [torch.stack(torch.aminmax(points[part], dim=0)) for part in parts_of(points, indices)]
        low, high = (extreme.to(torch.float64) / 2 for extreme in torch.stack(extremes, 1).aminmax(dim=1))
        centre, size = low[0] + high[1], high[1] - low[0]
        size = torch.where(size > 0, size, centre.abs())  # a constant coordinate is as exact as it is large
        size = torch.where(size > 0, size, size.max())
        return cls(points, centre, torch.where(size > 0, size / (2 * torch.frexp(size).mantissa), 1.0))

    def rows(self, indices: Tensor) -> Tensor:
        """[k, d] in float64."""
        return (self.points[indices].to(torch.float64) - self.centre) / self.scale

    def moment(self, indices: Tensor, weights: Tensor) -> Tensor:
        """Σ wp [d]."""
        parts = zip(parts_of(self.points, indices), parts_of(self.points, weights), strict=True)
        return torch.stack([w.to(self.centre.device) @ self.rows(part) for part, w in parts]).sum(0).cpu()


def parts_of(points: Tensor, each: Tensor) -> tuple[Tensor, ...]:
    """Indices or weights of points, by the blocks that the points are read in."""
    return torch.split(each, blocks_of(points)[0].stop)


class _Nearest(NamedTuple):
    """A mean of members of a pool, the point of their hull nearest to a target: Σwp − t is the gap [d]."""

    members: Tensor  # affinely independent, by their positions in the pool
    weights: Tensor
    gap: Tensor
    distance: float


def reached(points: Tensor, targets: Tensor, name: str) -> list[Combination]:
    """Each of the targets [k, d] as a combination of points [n, d]; ``name`` is a target's in errors, "{}" its number.

    The nearest points of a pool's hull, while points nearer to a target than its plane there join the pool [wolfe1976].

    Raises:
        OutsideHull: A target is outside. SolverRefused: Rounding hides on which side of the hull's surface one is.
    """
    n, d = points.shape
    cloud = Box.of(points, torch.arange(n))
    wide = targets.to(points.device, torch.float64)
    T = check_finite("targets, in half-widths of the points", (wide - cloud.centre) / cloud.scale).cpu()
    near = (d**0.5 * (_INSIDE + _ROUNDING * (wide / cloud.scale).abs().amax(1))).tolist()
    pool = stratified(n, min(n, _POOL * (d + 1)))
    X = cloud.rows(pool).cpu()
    first = torch.tensor([0]), torch.ones(1, dtype=torch.float64)
    answers = [_approached(X - t, _contracted(X - t, *first), tol) for t, tol in zip(T, near, strict=True)]
    while waiting := [j for j, at in enumerate(answers) if at.distance > near[j]]:
        normals = torch.stack([answers[j].gap / answers[j].distance for j in waiting])
        fresh = []
        for j, normal, heights, lowest in zip(waiting, normals, *_lowest(cloud, T[waiting], normals), strict=True):
            beyond = lowest[heights < _NEAREST * answers[j].distance]
            fresh.append(beyond[~torch.isin(beyond, pool)])
            if not len(fresh[-1]):
                _refuse(cloud, T[j], normal, float(heights[0]), name.format(j))
        more = torch.unique(torch.cat(fresh))
        pool, X = torch.cat([pool, more]), torch.cat([X, cloud.rows(more).cpu()])
        for j in waiting:
            answers[j] = _approached(X - T[j], answers[j], near[j])
    return [_combination(pool, at, points.device) for at in answers]


def _approached(Y: Tensor, at: _Nearest, tol: float) -> _Nearest:
    """[wolfe1976]: the row of Y [k, d], points less the target, lowest along the gap joins, until none is lower."""
    for _ in range(_STEPS * (Y.shape[1] + 1)):
        if at.distance <= tol:
            break
        heights = Y @ (at.gap / at.distance)
        lowest = heights.argmin()[None]
        if heights[lowest] >= _NEAREST * at.distance:
            break
        after = _contracted(Y, torch.cat([at.members, lowest]), torch.cat([at.weights, Y.new_zeros(1)]))
        if torch.equal(after.members, at.members):  # rounding made it leave as soon as it had joined
            break
        at = after
    return at


def _contracted(Y: Tensor, members: Tensor, weights: Tensor) -> _Nearest:
    """Straight to the nearest affine combination of the members; one whose weight reaches 0 on the way leaves."""
    while True:
        affine, gap = _affine(Y[members])
        if bool((affine > 0).all()):
            return _Nearest(members, affine, gap, math.hypot(*gap.tolist()))  # whose squares overflow nowhere
        steps = torch.where(affine > 0, torch.inf, weights / (weights - affine).clamp(min=2**-1022))
        i = steps.argmin()
        weights = (weights + steps[i] * (affine - weights)).clamp(min=0)
        weights[i] = 0
        members, weights = members[weights > 0], weights[weights > 0]


def _affine(Y: Tensor) -> tuple[Tensor, Tensor]:
    """The point nearest to 0 of the affine hull of the rows of Y: its coefficients, and the point.

    The second projection makes it orthogonal to the hull relative to its own length, however short it is.
    """
    Q, R = torch.linalg.qr((Y[1:] - Y[0]).T)
    others = -torch.linalg.solve_triangular(R, (Q.T @ Y[0])[:, None], upper=True)[:, 0]
    once = Y[0] - Q @ (Q.T @ Y[0])
    return torch.cat([1 - others.sum()[None], others]), once - Q @ (Q.T @ once)


def _lowest(cloud: Box, T: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
    """⟨normal, p − t⟩ for each of k targets, ascending: the least 2(d + 1) over all points, and whose they are."""
    n, d = cloud.points.shape
    found = []
    for part in torch.split(torch.arange(n), blocks_of(cloud.points, max(d, len(T)))[0].stop):
        low = (normals.to(cloud.scale) @ cloud.rows(part).T).topk(min(2 * (d + 1), len(part)), largest=False)
        found.append((low.values.cpu(), part[low.indices.cpu()]))
    heights, indices = (torch.cat(both, 1) for both in zip(*found, strict=True))
    low = heights.topk(min(2 * (d + 1), n), largest=False)
    return low.values - (T * normals).sum(1, keepdim=True), indices.gather(1, low.indices)


def _refuse(cloud: Box, t: Tensor, normal: Tensor, height: float, name: str) -> NoReturn:
    """All points lie at least this high along the normal, seen from the target, but for the rounding of d terms."""
    height -= (len(t) + 8) * 2**-52 * float(normal.abs() @ (1 + t.abs()))
    direction = -normal.to(cloud.scale) / cloud.scale
    direction /= torch.linalg.vector_norm(direction)
    margin = height * float(torch.linalg.vector_norm(direction * cloud.scale))
    if margin <= 0:
        raise SolverRefused(f"{name}: found where rounding hides the hull's surface, expected inside; move it inwards")
    error = OutsideHull(
        f"{name}: expected a point of the convex hull, found one at least {margin:.3g} outside it; "
        "move it towards the points, or add points around it"
    )
    error.direction, error.margin = direction, margin
    raise error


def _combination(pool: Tensor, at: _Nearest, device: torch.device) -> Combination:
    """Without weights that are rounding: all of them move the mean by less than targets may be outside."""
    keep = at.weights > _INSIDE / (len(at.gap) + 1)
    indices, order = pool[at.members[keep]].sort()
    w = at.weights[keep][order]
    return Combination(indices.to(device), (w / w.sum()).to(device))
