"""Points as combinations of at most d + 1 others: Carathéodory's theorem, and the point of a hull nearest to a target.

[maalouf2019] Maalouf, Jubran and Feldman, Fast and accurate least-mean-squares solvers, NeurIPS 2019.
[wolfe1976] Wolfe, Finding the nearest point in a polytope, Mathematical Programming 11, 1976.
"""

import math
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, as_real, blocks_of, check_finite, stratified
from convexprune.solvers.errors import InvalidInput, ShapeMismatch, SolverRefused
from convexprune.solvers.geometry.cloud import as_weights

_POOL = 4  # times d + 1 points to begin with
_INSIDE = 1e-12  # times √d, in half-widths of the points: a target this near to the hull is in it
_ROUNDING = 2**-50  # of a target's coordinates: four units in the last place
_NEAREST = 0.99  # of the distance to the nearest point: what a separating plane shows before a target is refused
_STEPS = 100  # times d + 1: far more than any target took
_CLUSTERS = 4  # times d + 1, at each level: more take longer to reduce, fewer leave more points to read again
_DEPENDENT = 1e-14  # singular values below this part of the largest are rounding
_NEGLIGIBLE = 1e-280  # parts of the total weight that no mean can notice; products of smaller ones underflow


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

    def lifted(self, indices: Tensor) -> Tensor:
        """A [k, d + 1], rows (p, 1): Aᵀv = 0 where Σvp = 0 and Σv = 0, so that steps along v keep total and mean."""
        rows = self.rows(indices)
        return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)

    def moment(self, indices: Tensor, weights: Tensor) -> Tensor:
        """Σ w(p, 1) [d + 1]."""
        parts = zip(parts_of(self.points, indices), parts_of(self.points, weights), strict=True)
        return torch.stack([w.to(self.centre.device) @ self.lifted(part) for part, w in parts]).sum(0).cpu()


def parts_of(points: Tensor, each: Tensor) -> tuple[Tensor, ...]:
    """Indices or weights of points, by the blocks that the points are read in."""
    return torch.split(each, blocks_of(points)[0].stop)


class _Nearest(NamedTuple):
    """A mean of members of a pool, the point of their hull nearest to a target: Σwp − t is the gap [d]."""

    members: Tensor  # affinely independent, by their positions in the pool
    weights: Tensor
    gap: Tensor
    distance: float


def _reached(points: Tensor, target: Tensor) -> Combination:
    """The target [d] as a combination of points [n, d].

    The nearest point of a pool's hull, while points nearer to the target than its plane there join the pool
    [wolfe1976].
    """
    n, d = points.shape
    cloud = Box.of(points, torch.arange(n))
    wide = target.to(cloud.centre)
    t = check_finite("target, in half-widths of the points", (wide - cloud.centre) / cloud.scale).cpu()
    near = d**0.5 * (_INSIDE + _ROUNDING * float((wide / cloud.scale).abs().max()))
    pool = stratified(n, min(n, _POOL * (d + 1)))
    Y = cloud.rows(pool).cpu() - t
    at, steps = _contracted(Y, torch.tensor([0]), torch.ones(1, dtype=torch.float64)), _STEPS * (d + 1)
    while at.distance > near:
        normal, after, steps = at.gap / at.distance, at, steps - 1
        lowest = (Y @ normal).argmin()[None]
        if steps >= 0 and Y[lowest] @ normal < _NEAREST * at.distance:
            after = _contracted(Y, torch.cat([at.members, lowest]), torch.cat([at.weights, Y.new_zeros(1)]))
        if not torch.equal(after.members, at.members):  # they are the same where rounding made it leave at once
            at = after
            continue
        heights, beyond = _lowest(cloud, normal)
        heights = heights - t @ normal
        fresh = beyond[(heights < _NEAREST * at.distance) & ~torch.isin(beyond, pool)]
        if not len(fresh):
            _refuse(cloud, t, normal, float(heights[0]))
        pool, Y = torch.cat([pool, fresh]), torch.cat([Y, cloud.rows(fresh).cpu() - t])
    # Without weights that are rounding: all of them move the mean by less than targets may be outside.
    keep = at.weights > _INSIDE / (d + 1)
    indices, order = pool[at.members[keep]].sort()
    w = at.weights[keep][order]
    return Combination(indices.to(cloud.centre.device), (w / w.sum()).to(cloud.centre))


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
    """The point nearest to 0 of the affine hull of the rows of Y: its coefficients, and the point."""
    Q, R = torch.linalg.qr((Y[1:] - Y[0]).T)
    others = -torch.linalg.solve_triangular(R, (Q.T @ Y[0])[:, None], upper=True)[:, 0]
    once = Y[0] - Q @ (Q.T @ Y[0])  # twice: orthogonal to the hull relative to its own length, however short
    return torch.cat([1 - others.sum()[None], others]), once - Q @ (Q.T @ once)


def _lowest(cloud: Box, normal: Tensor) -> tuple[Tensor, Tensor]:
    """⟨normal, p⟩, ascending: the least 2(d + 1) over all points p, and whose they are."""
    parts = parts_of(cloud.points, torch.arange(len(cloud.points)))
    heights = torch.cat([cloud.rows(part) @ normal.to(cloud.scale) for part in parts])
    low = heights.topk(min(2 * (len(normal) + 1), len(heights)), largest=False)
    return low.values.cpu(), low.indices.cpu()


def _refuse(cloud: Box, t: Tensor, normal: Tensor, height: float) -> NoReturn:
    """All points lie at least this high along the normal, seen from the target, but for the rounding of d terms."""
    height -= (len(t) + 8) * 2**-52 * float(normal.abs() @ (1 + t.abs()))
    direction = -normal.to(cloud.scale) / cloud.scale
    direction /= torch.linalg.vector_norm(direction)
    margin = height * float(torch.linalg.vector_norm(direction * cloud.scale))
    if margin <= 0:
        raise SolverRefused("target: found where rounding hides the hull's surface, expected inside; move it inwards")
    error = OutsideHull(
        f"target: expected a point of the convex hull, found one at least {margin:.3g} outside it; "
        "move it towards the points, or add points around it"
    )
    error.direction, error.margin = direction, margin
    raise error


def caratheodory(
    points: ArrayLike, weights: ArrayLike | None = None, target: ArrayLike | None = None, *, method: str = "grouped"
) -> Combination:
    """At most r + 1 of the points with the total weight and the weighted mean of all, or with a target as their mean.

    r ≤ d is the affine rank: singular values above 1e-14 of the largest, coordinates scaled alike. In each coordinate
    means agree to 1e-10 of the half-width of the points that carry weight, and mostly to 1e-15.

    Args:
        points: P [n, d]; read by blocks, never copied whole.
        weights: u [n] ≥ 0, 1/n each by default: the result has Σu and Σup. Points of weight 0 are never chosen.
        target: t [d], instead of weights: the result has Σw = 1 and Σwp = t, by Wolfe's method (``hull``). As near to
            the hull as 1e-12·√d half-widths of it, or as t's own float64 rounding, is inside.
        method: For weights. "classic" passes all points through the elimination, O(nd²); "grouped" the means of
            clusters, and keeps the points of those that are left, O(nd + log n·d³) [maalouf2019].

    Raises:
        OutsideHull: The target is outside; the exception holds a plane that separates it.
        ShapeMismatch, NonFinite, EmptyInput: Of the arrays.
        InvalidInput: Negative weights, none positive, weights beside a target, or an unknown method.
        SolverRefused: Rounding hides on which side of the hull's surface the target is.
    """
    P = as_matrix("points", points)
    if method not in ("classic", "grouped"):
        raise InvalidInput(f"method: expected 'classic' or 'grouped', found {method!r}")
    if target is not None and weights is not None:
        raise InvalidInput("weights, target: expected one of them, found both; leave the weights out to reach a target")
    n, d = P.shape
    if target is not None:
        t = check_finite("target", as_real("target", target))
        if tuple(t.shape) != (d,):
            raise ShapeMismatch(f"target: expected shape [{d}], a point like the others, found {list(t.shape)}")
        return _reached(P, t)
    u = torch.full((n,), 1 / n, dtype=torch.float64) if weights is None else as_weights(weights, n)
    u = u.to("cpu")  # like all that is smaller than the points
    total = u.sum()
    if not 0 < float(total) < math.inf:
        raise InvalidInput(
            f"weights: expected a positive finite total, found {float(total)}; weigh some point, or rescale"
        )
    indices, parts = _kept(torch.arange(n), u / total)  # parts of the total until the end
    cloud = Box.of(P, indices)
    kept, w = _grouped(cloud, indices, parts, n if method == "classic" else _CLUSTERS * (d + 1))
    A = cloud.lifted(kept).cpu()
    residual = cloud.moment(indices, parts) - w @ A
    # What rounding has added up to is taken off again, if weights stay positive.
    better = w + torch.linalg.lstsq(A.T, residual[:, None], driver="gelsd").solution[:, 0]
    w = better if bool((better > 0).all()) else w
    return Combination(kept.to(P.device), (w * (total / w.sum())).to(P.device))


def _kept(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    keep = weights > _NEGLIGIBLE
    return indices[keep], weights[keep]


def _grouped(cloud: Box, indices: Tensor, weights: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """[maalouf2019]: a cluster g of total weight U_g at its mean becomes U'_g; u ← u·U'_g/U_g for its points."""
    while len(indices) > clusters:
        size = -(-len(indices) // clusters)
        groups = list(zip(torch.split(indices, size), torch.split(weights, size), strict=True))
        sums = torch.stack([cloud.moment(*group) for group in groups])
        totals, means = sums[:, -1], sums[:, :-1] / sums[:, -1:]
        left, U = _classic(Box(means, torch.zeros(()), torch.ones(())), torch.arange(len(groups)), totals)
        factors = torch.zeros_like(totals).scatter(0, left, U / totals[left])
        indices, weights = _kept(indices, weights * factors.repeat_interleave(size)[: len(weights)])
    return _classic(cloud, indices, weights)


def _classic(cloud: Box, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Takes in d + 1 points at a time, and cancels until those held are affinely independent."""
    size = cloud.points.shape[1] + 1
    held, w = indices[:0], weights[:0]
    for fresh, u in zip(torch.split(indices, size), torch.split(weights, size), strict=True):
        held, w = torch.cat([held, fresh]), torch.cat([w, u])
        while True:
            _, sizes, right = torch.linalg.svd(cloud.lifted(held).cpu().T)
            null = right[int((sizes > _DEPENDENT * sizes[0]).sum()) :]  # orthonormal rows v with Aᵀv = 0
            if not len(null):
                break
            held, w = _kept(held, _cancelled(w, null))
    return held, w


def _cancelled(weights: Tensor, null: Tensor) -> Tensor:
    """Weights with a zero for each of the null vectors, orthonormal rows [k, m].

    A step along the first vector v brings a weight i to 0; a reflection then leaves v alone with an entry i, and v is
    left out: the others stay null vectors and orthonormal.
    """
    w, null = weights.clone(), null.clone(memory_format=torch.contiguous_format)
    while len(null):
        v = null[0]
        ratios = torch.where(v > 2**-52, w / v, torch.inf)  # lesser entries are rounding
        i = int(ratios.argmin())
        w = (w - ratios[i] * v).clamp_(min=0)
        w[i] = 0
        mirror = null[:, i].clone()
        mirror[0] += torch.linalg.vector_norm(mirror)
        null.addr_(mirror, mirror @ null, alpha=-2 / float(mirror @ mirror))
        null[:, i] = 0
        null = null[1:]
    return w
