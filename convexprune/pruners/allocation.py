"""One total shared among layers: of the network's error, for the fewest weights, or of weights, for the least error.

Each layer has a measured curve of points (eps, nonzeros). Its lower convex hull is what mixtures of these points can
reach, a convex decreasing n_l(eps). Sharing is then a linear program, a fractional knapsack: a greedy choice of the
hulls' segments by slope is optimal, and the slope where it stops is the price that proves it (docs/networks.md).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from convexprune.solvers.arrays import checked_radius
from convexprune.solvers.errors import EmptyInput, Infeasible, InvalidInput

Curve: TypeAlias = Sequence[tuple[float, float]]
"""Points (eps, nonzeros) of one layer, in any order."""


@dataclass(frozen=True)
class Allocation:
    """Each layer's share, and the proof that no other split of the total is better.

    Attributes:
        values: The share of each layer: eps, or nonzeros. At most one layer lies between two vertices of its hull.
        objective: What the layers add up to on their hulls: nonzeros, or weighted eps.
        price: λ ≥ 0, by how much the objective would fall for one more unit of the total.
        bound: The dual value, Σ min (objective_l + λ·cost_l) − λ·total: no allocation on the hulls has less.
    """

    values: Mapping[str, float]
    objective: float
    price: float
    bound: float


def allocate_eps(curves: Mapping[str, Curve], coefficients: Mapping[str, float], total: float) -> Allocation:
    """Minimise Σ n_l(eps_l) over eps_l within each curve's range, subject to Σ c_l eps_l ≤ total.

    A layer with c_l = 0 costs nothing: it gets the eps from which on its curve falls no further.

    Args:
        curves: Points (eps, nonzeros) by layer.
        coefficients: c_l ≥ 0 by layer, in the units of its eps: of ``OutputBound`` for radii, times ‖Y‖ for relative
            eps.
        total: What the bound Σ c_l eps_l may come to.

    Raises:
        Infeasible: Even the smallest eps of all layers exceed the total; says which total they need.
        InvalidTolerance: A number that is negative, NaN or infinite.
        InvalidInput, EmptyInput: Layers that differ, or a layer without points.
    """
    hulls = _hulls(curves, coefficients, "coefficients")
    paths = {name: [(coefficients[name] * eps, n, eps) for eps, n in hull] for name, hull in hulls.items()}
    return _split(paths, total, "the smallest eps")


def allocate_nonzeros(curves: Mapping[str, Curve], weights: Mapping[str, float], total: float) -> Allocation:
    """Minimise Σ w_l eps_l(n_l) over n_l within each curve's range, subject to Σ n_l ≤ total.

    eps_l is the inverse of n_l, convex as well. It is summed as it is, not squared: with the coefficients of
    ``OutputBound`` for w the objective is the network's bound.

    Args:
        curves: Points (eps, nonzeros) by layer.
        weights: w_l ≥ 0 by layer; with 0 its error does not matter, and it gets the fewest nonzeros.
        total: Nonzeros of all layers; shares may be fractions.

    Raises:
        Infeasible: Even the fewest nonzeros of all layers exceed the total; says which total they need.
        InvalidTolerance, InvalidInput, EmptyInput: As in ``allocate_eps``.
    """
    hulls = _hulls(curves, weights, "weights")
    paths = {name: [(n, weights[name] * eps, n) for eps, n in reversed(hull)] for name, hull in hulls.items()}
    return _split(paths, total, "the fewest nonzeros")


def lower_hull(points: Curve) -> list[tuple[float, float]]:
    """The vertices of the lower convex hull of points (x, y), x ascending, as far as it falls."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if hull and y >= hull[-1][1]:  # no lower than what a smaller x gives
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):  # below the line from the vertex before to this point
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _hulls(
    curves: Mapping[str, Curve], factors: Mapping[str, float], what: str
) -> dict[str, list[tuple[float, float]]]:
    if set(curves) != set(factors):
        raise InvalidInput(f"{what}: expected one for each of {list(curves)}, found {list(factors)}")
    hulls = {}
    for name, points in curves.items():
        if not len(points):
            raise EmptyInput(f"curve of {name}: expected at least one point (eps, nonzeros), found none")
        checked_radius(f"{what} of {name}", factors[name])
        hulls[name] = lower_hull(
            [(checked_radius(f"eps of {name}", x), checked_radius(f"nonzeros of {name}", y)) for x, y in points]
        )
    return hulls


_ROUNDING = 1e-12  # by so much may a total that was computed elsewhere fall short

_Point: TypeAlias = tuple[float, float, float]
"""(cost, objective, share) on a path, which is convex and falls; a share between two of them is linear."""


def _split(paths: Mapping[str, Sequence[_Point]], total: float, least: str) -> Allocation:
    """Steps along the paths, the steepest first, until the total is spent."""
    room, needed = checked_radius("total", total), math.fsum(path[0][0] for path in paths.values())
    if needed > room * (1 + _ROUNDING):
        raise Infeasible(f"total: expected at least {needed:.12g}, which {least} need; found {room:.12g}")
    left, price = max(0.0, room - needed), 0.0
    reached = {name: path[0][1:] for name, path in paths.items()}  # objective and share of each
    for slope, name, start, end in sorted(_steps(paths), key=lambda step: -step[0]):
        cost = end[0] - start[0]
        part = 1.0 if cost <= left else left / cost
        reached[name] = ((1 - part) * start[1] + part * end[1], (1 - part) * start[2] + part * end[2])
        if part < 1:
            price = slope
            break
        left -= cost
    objective = math.fsum(value for value, _ in reached.values())
    dual = [min(value + price * cost for cost, value, _ in path) for path in paths.values()]
    shares = {name: share for name, (_, share) in reached.items()}
    return Allocation(shares, objective, price, math.fsum([*dual, -price * room]))


def _steps(paths: Mapping[str, Sequence[_Point]]) -> Iterator[tuple[float, str, _Point, _Point]]:
    """Steps that gain: the gain for a unit of cost, the path, and the points before and behind."""
    for name, path in paths.items():
        slope = math.inf
        for start, end in pairwise(path):
            gain, cost = start[1] - end[1], end[0] - start[0]
            if gain > 0:
                # In exact arithmetic slopes only fall; rounding must not put steps of a path in another order.
                slope = min(slope, gain / cost if cost > 0 else math.inf)
                yield slope, name, start, end
