"""Carathéodory's theorem: a weighted mean, or a point of the hull, as a combination of at most d + 1 points.

[maalouf2019] Maalouf, Jubran and Feldman, Fast and accurate least-mean-squares solvers, NeurIPS 2019.
"""

import math

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, as_real, check_finite, check_shape
from convexprune.solvers.errors import InvalidInput, ShapeMismatch
from convexprune.solvers.geometry.hull import Box, Combination, reached

_CLUSTERS = 4  # times d + 1, at each level: more take longer to reduce, fewer leave more points to read again
_DEPENDENT = 1e-14  # singular values below this part of the largest are rounding
_NEGLIGIBLE = 1e-280  # parts of the total weight that no mean can notice; products of smaller ones underflow


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
    if method not in _METHODS:
        raise InvalidInput(f"method: expected {' or '.join(map(repr, _METHODS))}, found {method!r}")
    if target is None:
        return _reduced(P, _checked_weights(weights, P), method)
    if weights is not None:
        raise InvalidInput("weights, target: expected one of them, found both; leave the weights out to reach a target")
    t = as_real("target", target)
    if tuple(t.shape) != (P.shape[1],):
        raise ShapeMismatch(f"target: expected shape [{P.shape[1]}], a point like the others, found {list(t.shape)}")
    return reached(P, check_finite("target", t)[None], "target")[0]


def combinations(points: ArrayLike, targets: ArrayLike) -> list[Combination]:
    """``caratheodory(points, target=t)`` for every row t of the targets [k, d]: they share all passes over the points.

    Raises as it does; the message says which target is outside.
    """
    P, T = as_matrix("points", points), as_matrix("targets", targets)
    check_shape("targets", T, (len(T), P.shape[1]), "rows that are points like the others")
    return reached(P, T, "targets[{}]")


def _checked_weights(weights: ArrayLike | None, points: Tensor) -> Tensor:
    """u [n] in float64, on the CPU like all that is smaller than the points."""
    n = len(points)
    u = torch.full((n,), 1 / n, dtype=torch.float64) if weights is None else as_real("weights", weights)
    if tuple(u.shape) != (n,):
        raise ShapeMismatch(f"weights: expected shape [{n}], one for each point, found {list(u.shape)}")
    u = check_finite("weights", u).to("cpu", torch.float64)
    if float(u.min()) < 0:
        raise InvalidInput(f"weights: expected numbers ≥ 0, found {float(u.min()):.3g}; leave such points out")
    if not 0 < float(u.sum()) < math.inf:
        raise InvalidInput(
            f"weights: expected a positive finite total, found {float(u.sum())}; weigh some point, or rescale"
        )
    return u


def _reduced(points: Tensor, u: Tensor, method: str) -> Combination:
    """Weights are parts of the total until the end; the last are corrected by least squares if they stay positive."""
    total = u.sum()
    indices, weights = _kept(torch.arange(len(u)), u / total)
    cloud = Box.of(points, indices)
    kept, w = _METHODS[method](cloud, indices, weights)
    A = _lifted(cloud, kept)
    residual = torch.cat([cloud.moment(indices, weights), torch.ones(1)]) - w @ A
    better = w + torch.linalg.lstsq(A.T, residual[:, None], driver="gelsd").solution[:, 0]
    w = better if bool((better > 0).all()) else w
    return Combination(kept.to(points.device), (w * (total / w.sum())).to(points.device))


def _kept(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    keep = weights > _NEGLIGIBLE
    return indices[keep], weights[keep]


def _grouped(cloud: Box, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """[maalouf2019]: a cluster g of total weight U_g at its mean becomes U'_g; u ← u·U'_g/U_g for its points."""
    clusters = _CLUSTERS * (cloud.points.shape[1] + 1)
    while len(indices) > clusters:
        size = -(-len(indices) // clusters)
        groups = list(zip(torch.split(indices, size), torch.split(weights, size), strict=True))
        totals = torch.stack([u.sum() for _, u in groups])
        means = torch.stack([cloud.moment(*group) for group in groups]) / totals[:, None]
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
        while len(null := _null(_lifted(cloud, held))):
            held, w = _kept(held, _cancelled(w, null))
    return held, w


_METHODS = {"classic": _classic, "grouped": _grouped}


def _lifted(cloud: Box, indices: Tensor) -> Tensor:
    """A [k, d + 1], rows (p, 1): Aᵀv = 0 where Σvp = 0 and Σv = 0, so that steps along v keep total and mean."""
    rows = cloud.rows(indices).cpu()
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def _null(A: Tensor) -> Tensor:
    """Orthonormal rows v with Aᵀv = 0."""
    _, sizes, right = torch.linalg.svd(A.T)
    null: Tensor = right[int((sizes > _DEPENDENT * sizes[0]).sum()) :]
    return null


def _cancelled(weights: Tensor, null: Tensor) -> Tensor:
    """Weights with a zero for each of the null vectors, orthonormal rows [k, m].

    A step along the first vector v brings one weight, i, to 0. A reflection then leaves v alone with an entry i, and v
    is left out: the others stay null vectors and orthonormal, however many steps there are.
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
