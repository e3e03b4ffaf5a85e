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
    hulls, prices = _checked(curves, coefficients, "coefficients")
    paths = {name: [(prices[name] * eps, n) for eps, n in hull] for name, hull in hulls.items()}
    return _split(paths, {name: [eps for eps, _ in hull] for name, hull in hulls.items()}, total, "the smallest eps")


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
    hulls, prices = _checked(curves, weights, "weights")
    paths = {name: [(n, prices[name] * eps) for eps, n in reversed(hull)] for name, hull in hulls.items()}
    return _split(paths, {name: [n for n, _ in path] for name, path in paths.items()}, total, "the fewest nonzeros")


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


def _checked(
    curves: Mapping[str, Curve], factors: Mapping[str, float], what: str
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
    if set(curves) != set(factors):
        raise InvalidInput(f"{what}: expected one for each of {list(curves)}, found {list(factors)}")
    empty = [name for name, points in curves.items() if not len(points)]
    if empty:
        raise EmptyInput(f"curve of {empty[0]}: expected at least one point (eps, nonzeros), found none")
    points = {
        name: [(checked_radius(f"eps of {name}", x), checked_radius(f"nonzeros of {name}", y)) for x, y in curve]
        for name, curve in curves.items()
    }
    scaled = {name: checked_radius(f"{what} of {name}", factors[name]) for name in curves}
    return {name: lower_hull(curve) for name, curve in points.items()}, scaled


_ROUNDING = 1e-12  # by so much may a total that was computed elsewhere fall short


def _split(paths: Mapping[str, Curve], shares: Mapping[str, Sequence[float]], total: float, least: str) -> Allocation:
    """Steps along paths of points (cost, objective), convex and falling, the steepest first, until the total is spent.

    ``shares`` are what the points of each path mean; a share between two of them is linear.
    """
    room, needed = checked_radius("total", total), math.fsum(path[0][0] for path in paths.values())
    if needed > room * (1 + _ROUNDING):
        raise Infeasible(f"total: expected at least {needed:.12g}, which {least} need; found {room:.12g}")
    left, price, places = max(0.0, room - needed), 0.0, dict.fromkeys(paths, (0, 0.0))
    for slope, name, vertex, cost in sorted(_steps(paths), key=lambda step: -step[0]):
        part = 1.0 if cost <= left else left / cost
        places[name] = (vertex, part)  # the vertex before, and the part of the way to the next
        if part < 1:
            price = slope
            break
        left -= cost

    def at(name: str, values: Sequence[float]) -> float:
        vertex, part = places[name]
        return (1 - part) * values[vertex] + part * values[min(vertex + 1, len(values) - 1)]

    objective = math.fsum(at(name, [value for _, value in path]) for name, path in paths.items())
    dual = [min(value + price * cost for cost, value in path) for path in paths.values()]
    values = {name: at(name, shares[name]) for name in paths}
    return Allocation(values, objective, price, math.fsum([*dual, -price * room]))


def _steps(paths: Mapping[str, Curve]) -> Iterator[tuple[float, str, int, float]]:
    """Steps that gain: the gain for a unit of cost, the path, the vertex before, and the cost."""
    for name, path in paths.items():
        slope = math.inf
        for vertex, ((cost, value), (dearer, lower)) in enumerate(pairwise(path)):
            if lower < value:
                # In exact arithmetic slopes only fall; rounding must not put steps of a path in another order.
                slope = min(slope, (value - lower) / (dearer - cost) if dearer > cost else math.inf)
                yield slope, name, vertex, dearer - cost
