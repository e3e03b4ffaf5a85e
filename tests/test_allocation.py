"""A total is shared as a linear program over mixtures of the measured points shares it; the price proves it."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from convexprune.pruners.allocation import allocate_eps, allocate_nonzeros, lower_hull
from convexprune.solvers.errors import EmptyInput, Infeasible, InvalidInput, InvalidTolerance

EPS = st.integers(0, 50).map(lambda k: k / 50)
POINT = st.tuples(EPS, st.integers(0, 1000).map(float))
CURVES = st.lists(st.lists(POINT, min_size=1, max_size=6), min_size=1, max_size=4)
FACTORS = st.lists(st.integers(0, 40).map(lambda k: k / 8), min_size=4, max_size=4)


def named(curves, factors):
    names = "abcd"[: len(curves)]
    return dict(zip(names, curves, strict=True)), dict(zip(names, factors, strict=False))


def mixtures(curves, costs, values, total):
    """The least Σ value over mixtures of each curve's points that cost no more than the total."""
    counts = [len(curve) for curve in curves]
    ones = np.zeros((len(curves), sum(counts)))
    for row, (start, count) in enumerate(zip(np.cumsum([0, *counts[:-1]]), counts, strict=True)):
        ones[row, start : start + count] = 1
    return linprog(values, A_ub=[costs], b_ub=[total], A_eq=ones, b_eq=np.ones(len(curves)), bounds=(0, None))


def on_hull(curve, x):
    hull = lower_hull(curve)
    return float(np.interp(x, [p[0] for p in hull], [p[1] for p in hull]))


def check(found, best):
    """No worse than the program's optimum, and proven so by the price alone."""
    scale = 1 + abs(best.fun)
    assert found.objective == pytest.approx(best.fun, abs=1e-8 * scale)
    assert found.bound == pytest.approx(found.objective, abs=1e-9 * scale)
    assert found.price >= 0


@given(CURVES, FACTORS, st.floats(0, 1))
def test_shares_of_eps_are_the_linear_programs_optimum(curves, factors, tightness):
    layers, coefficients = named(curves, factors)
    least = math.fsum(c * min(layers[name])[0] for name, c in coefficients.items())
    most = math.fsum(c * max(layers[name])[0] for name, c in coefficients.items())
    total = least + tightness * (most - least) + 1e-9
    found = allocate_eps(layers, coefficients, total)
    points = [(coefficients[name] * eps, n) for name in layers for eps, n in layers[name]]
    check(found, mixtures(curves, [p[0] for p in points], [p[1] for p in points], total))
    assert math.fsum(c * found.values[name] for name, c in coefficients.items()) <= total * (1 + 1e-12)
    assert all(min(layers[name])[0] <= eps <= max(layers[name])[0] for name, eps in found.values.items())
    reached = math.fsum(on_hull(layers[name], eps) for name, eps in found.values.items())
    assert reached == pytest.approx(found.objective, rel=1e-9, abs=1e-6)


@given(CURVES, FACTORS, st.floats(0, 1))
def test_shares_of_nonzeros_are_the_linear_programs_optimum(curves, factors, tightness):
    layers, weights = named(curves, factors)
    least = math.fsum(min(n for _, n in curve) for curve in curves)
    most = math.fsum(max(n for _, n in curve) for curve in curves)
    total = least + tightness * (most - least)
    found = allocate_nonzeros(layers, weights, total)
    points = [(n, weights[name] * eps) for name in layers for eps, n in layers[name]]
    check(found, mixtures(curves, [p[0] for p in points], [p[1] for p in points], total))
    assert math.fsum(found.values.values()) <= total * (1 + 1e-12)


@given(st.lists(POINT, min_size=1, max_size=8))
def test_the_hull_lies_below_every_point_and_is_convex_and_falling(points):
    hull = lower_hull(points)
    assert set(hull) <= set(points)
    assert all(on_hull(points, x) <= y + 1e-9 for x, y in points)
    slopes = [(d - b) / (c - a) for (a, b), (c, d) in pairwise(hull)]
    assert all(slope < 0 for slope in slopes)
    assert slopes == sorted(slopes)


def test_the_steepest_segment_is_taken_first_and_its_slope_is_the_price():
    steep, flat = [(0.0, 100.0), (1.0, 0.0)], [(0.0, 50.0), (1.0, 0.0)]
    found = allocate_eps({"steep": steep, "flat": flat}, {"steep": 1.0, "flat": 1.0}, 1.5)
    assert found.values == {"steep": 1.0, "flat": 0.5}
    assert (found.objective, found.price, found.bound) == (25.0, 50.0, 25.0)


def test_both_sides_of_the_trade_off_meet():
    curves = {"a": [(0.0, 90.0), (0.1, 40.0), (0.5, 10.0)], "b": [(0.0, 60.0), (0.2, 20.0), (0.6, 5.0)]}
    coefficients = {"a": 2.0, "b": 1.0}
    fewest = allocate_eps(curves, coefficients, 0.7)
    least = allocate_nonzeros(curves, coefficients, fewest.objective)
    assert least.objective == pytest.approx(0.7)
    assert least.price == pytest.approx(1 / fewest.price)


def test_a_layer_that_does_not_count_gets_the_loosest_eps():
    curves = {"free": [(0.1, 9.0), (0.7, 2.0)], "dear": [(0.1, 9.0), (0.7, 2.0)]}
    assert allocate_eps(curves, {"free": 0.0, "dear": 3.0}, 0.3).values == pytest.approx({"free": 0.7, "dear": 0.1})


def test_a_layer_whose_error_does_not_matter_gets_the_fewest_nonzeros():
    curves = {"free": [(0.1, 9.0), (0.7, 2.0)], "dear": [(0.1, 9.0), (0.7, 2.0)]}
    assert allocate_nonzeros(curves, {"free": 0.0, "dear": 1.0}, 11).values == {"free": 2.0, "dear": 9.0}


def test_a_total_that_is_too_small_names_the_least():
    curves = {"a": [(0.1, 9.0), (0.7, 2.0)], "b": [(0.2, 5.0)]}
    with pytest.raises(Infeasible, match=r"expected at least 0\.5, which the smallest eps need; found 0\.4"):
        allocate_eps(curves, {"a": 1.0, "b": 2.0}, 0.4)
    with pytest.raises(Infeasible, match="expected at least 7, which the fewest nonzeros need; found 6"):
        allocate_nonzeros(curves, {"a": 1.0, "b": 2.0}, 6)


@pytest.mark.parametrize(
    ("curves", "coefficients", "error"),
    [
        ({"a": [(0.1, 9.0)]}, {"b": 1.0}, InvalidInput),
        ({"a": []}, {"a": 1.0}, EmptyInput),
        ({"a": [(0.1, math.nan)]}, {"a": 1.0}, InvalidTolerance),
        ({"a": [(-0.1, 9.0)]}, {"a": 1.0}, InvalidTolerance),
        ({"a": [(0.1, 9.0)]}, {"a": math.inf}, InvalidTolerance),
    ],
)
def test_unusable_numbers_are_refused(curves, coefficients, error):
    with pytest.raises(error):
        allocate_eps(curves, coefficients, 1.0)
    with pytest.raises(error):
        allocate_nonzeros(curves, coefficients, 10.0)
