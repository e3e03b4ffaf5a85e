"""Lewis weights by their fixed point, and the ellipsoids of level sets by what lies inside of what."""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from clouds import CLOUDS, Points, cloud, coordinates, gaussian, rank
from hypothesis import given
from hypothesis import strategies as st
from tolerances import EXACT, ROUNDING
from torch import Tensor

from convexprune.solvers.errors import (
    ConvexPruneError,
    EmptyInput,
    InvalidInput,
    InvalidTolerance,
    NonFinite,
    ShapeMismatch,
    SolverRefused,
)
from convexprune.solvers.geometry.coresets import LevelEllipsoid, level_ellipsoid, lewis_weights

EXPONENTS = (0.5, 1, 1.5, 2, 3, 3.5)
LEVELS = (1, 1.3, 1.7, 2)
SEEDS = st.integers(0, 10**6)
DIRECTIONS = 2000


@cache
def weights(name: str, z: float) -> Points:
    w: Points = lewis_weights(cloud(name), z).numpy()
    return w


@cache
def level(name: str, z: float) -> LevelEllipsoid:
    return level_ellipsoid(cloud(name), z)


def slack(name: str) -> float:
    return (
        tolerances.LEWIS_SINGLE
        if "float32" in name
        else tolerances.LEWIS_FAR
        if "far" in name or "outlier" in name
        else tolerances.LEWIS_FIXED
    )


@cache
def spanning(name: str) -> Points:
    return coordinates(cloud(name), rank(name, "origin"))


def leverages(rows: Points) -> Points:
    """The diagonal of R(RᵀR)⁺Rᵀ: the longest rows first, for theirs not to swamp the others."""
    order = np.argsort(-np.linalg.norm(rows, axis=1))
    squares = np.empty(len(rows))
    squares[order] = np.square(np.linalg.qr(rows[order])[0]).sum(1)
    return squares


def reweighted(w: Points, z: float) -> Points:
    """w^{1/2 − 1/z}, 0 where w is."""
    factors: Points = np.where(w > 0, np.where(w > 0, w, 1) ** (0.5 - 1 / z), 0)
    return factors


def worst(y: Points, z: float, chosen: Points) -> Points:
    """t [k, r] that make |yᵀt|^z large against its sum, for each of the chosen points: reweighted least squares."""
    t = np.stack([np.linalg.lstsq(y.T @ y, y[i], rcond=None)[0] for i in chosen])
    for _ in range(12):
        along = np.abs(t @ y.T)
        d = np.maximum(along, 1e-6 * along.max(1, keepdims=True)) ** (z - 2)
        d /= d.max(1, keepdims=True)
        moments = np.einsum("kn,ni,nj->kij", d, y, y)
        moments += 1e-12 * np.trace(moments, axis1=1, axis2=2)[:, None, None] * np.eye(y.shape[1])
        t = np.linalg.solve(moments, y[chosen][:, :, None])[:, :, 0]
        t /= np.linalg.norm(t, axis=1, keepdims=True)
    return t


def many_directions(y: Points, z: float, count: int = DIRECTIONS) -> Points:
    """t [k, r]: random ones, the points' own, and the worst for some of the points."""
    few = np.unique(np.linspace(0, len(y) - 1, 10).astype(int))
    few = few[np.linalg.norm(y[few], axis=1) > 0]
    return np.concatenate([gaussian(0, count, y.shape[1]), y[few], worst(y, z, few)])


def powers(points: Points, directions: Points, z: float) -> Iterator[Tensor]:
    """|aᵀx|^z [n, k], for some of the directions at a time."""
    a = torch.from_numpy(points)
    for x in torch.split(torch.from_numpy(directions), 1000):
        yield (a @ x.T).abs().pow(z)


def bounded(y: Points, s: Points, z: float, digits: float, count: int = DIRECTIONS) -> bool:
    """Whether |yᵀt|^z ≤ s_y Σ|yᵀt|^z for many directions t."""
    most = torch.from_numpy(s * (1 + digits) + 1e-15)[:, None]
    return all(bool((p <= most * p.sum(0)).all()) for p in powers(y, many_directions(y, z, count), z))


# Lewis weights


@pytest.mark.parametrize("z", EXPONENTS)
@pytest.mark.parametrize("name", CLOUDS)
def test_weights_are_the_leverages_of_the_rows_that_they_reweight(name: str, z: float) -> None:
    w, y, r = weights(name, z), spanning(name), rank(name, "origin")
    tau = leverages(reweighted(w, z)[:, None] * y)
    assert w.dtype == np.float64
    assert w.shape == (len(y),)
    assert (np.abs(tau - w) <= tolerances.LEWIS_FIXED + slack(name) * w).all()
    positive = w > 0
    assert (np.abs(np.log(tau[positive] / w[positive])) <= slack(name)).all()
    assert np.array_equal(positive, np.any(cloud(name) != 0, axis=1))
    assert w.sum() == pytest.approx(r, rel=slack(name), abs=0)
    assert (w <= 1 + slack(name)).all()  # as leverages are


@pytest.mark.parametrize("name", CLOUDS)
def test_for_squares_they_are_the_leverages(name: str) -> None:
    """At most 1, with the rank as their sum: the diagonal of the projection onto the columns' span."""
    y = spanning(name)
    assert weights(name, 2) == pytest.approx(leverages(y), rel=slack(name), abs=EXACT)
    if len(y) <= 60 and slack(name) == tolerances.LEWIS_FIXED and "of all sizes" not in name:
        A = cloud(name) / max(np.abs(cloud(name)).max(), 1e-300)
        hat = A @ np.linalg.pinv(A)
        assert weights(name, 2) == pytest.approx(np.diag(hat), rel=slack(name), abs=EXACT)


@pytest.mark.parametrize("z", [0.1, 0.3, 1, 2.5, 3.9, 3.999])
def test_in_one_dimension_they_are_the_parts_of_the_sum(z: float) -> None:
    a = np.array([[3.0], [-1.0], [0.0], [1e-3], [2.0]])
    powers = np.abs(a[:, 0]) ** z
    assert lewis_weights(a, z, tol=1e-12).numpy() == pytest.approx(powers / powers.sum(), rel=ROUNDING)


@pytest.mark.parametrize("z", [0.05, 0.2, 3.9, 3.999])
@pytest.mark.parametrize("name", ["gaussian", "cauchy", "simplex", "outlier", "low rank", "columns of all sizes"])
def test_exponents_near_the_ends_of_their_range(name: str, z: float) -> None:
    w, y = lewis_weights(cloud(name), z).numpy(), spanning(name)
    tau = leverages(reweighted(w, z)[:, None] * y)
    assert (
        np.abs(tau - w) <= 10 * tolerances.LEWIS_FIXED * w + slack(name) * (slack(name) > tolerances.LEWIS_FIXED)
    ).all()
    assert w.sum() == pytest.approx(rank(name, "origin"), rel=10 * tolerances.LEWIS_FIXED)


def test_where_rounding_hides_them_there_are_none() -> None:
    """Weights of 1 and of 4e-4 to the power of −19: next to the moment of the others that of one point is rounding."""
    turn = np.linalg.qr(gaussian(0, 5, 5))[0]
    points = np.concatenate([gaussian(1, 10_000, 5) * [1, 1, 1, 1, 0], [[0, 0, 0, 0, 1]]]) @ turn
    assert float(lewis_weights(points, 0.8)[-1]) == pytest.approx(1, abs=tolerances.LEWIS_FIXED)
    for z in (0.1, 0.01, 1e-3):
        with pytest.raises(SolverRefused, match=f"exponent of {z}"):
            lewis_weights(points, z)


def test_a_point_too_short_for_its_weight_to_be_a_number_has_none() -> None:
    points = gaussian(0, 30, 3)
    points[4] *= 1e-120
    for z in EXPONENTS:
        w = lewis_weights(points, z).numpy()
        assert np.isfinite(w).all()
        assert w[4] <= 1e-59
        rest = lewis_weights(np.delete(points, 4, 0), z).numpy()
        assert np.delete(w, 4) == pytest.approx(rest, rel=tolerances.LEWIS_FIXED)


@pytest.mark.parametrize("z", [0.5, 1, 1.5, 2])
@pytest.mark.parametrize("name", [name for name in CLOUDS if rank(name, "origin") > 0])
def test_weights_bound_sensitivities(name: str, z: float) -> None:
    """|a_iᵀx|^z ≤ w_i Σ|a_jᵀx|^z for z ≤ 2."""
    assert bounded(spanning(name), weights(name, z), z, slack(name))


def test_independent_points_attain_the_bound() -> None:
    for z in (0.5, 1, 2):
        assert lewis_weights(gaussian(0, 4, 7), z).numpy() == pytest.approx(np.ones(4), abs=tolerances.LEWIS_FIXED)


# Their symmetries


@st.composite
def instances(draw: st.DrawFn) -> tuple[Points, float, Points]:
    """Points [n, d], an exponent and their weights."""
    seed, d, z = draw(SEEDS), draw(st.integers(1, 6)), draw(st.sampled_from(EXPONENTS))
    points = gaussian(seed, draw(st.integers(d, 60)), d)
    return points, z, lewis_weights(points, z).numpy()


@given(instances(), SEEDS)
def test_invertible_maps_order_signs_and_size_change_nothing(instance: tuple[Points, float, Points], seed: int) -> None:
    points, z, w = instance
    n, d = points.shape
    rng = np.random.default_rng(seed)
    U, _, V = np.linalg.svd(gaussian(seed, d, d))
    order, signs = rng.permutation(n), rng.choice([-1.0, 1.0], (n, 1))
    into = np.concatenate([U @ V, gaussian(seed + 1, d, 3)], axis=1)
    for image in (points @ (U * rng.uniform(0.03, 30, d)) @ V, points @ U, points @ into, signs * points, 1e9 * points):
        assert lewis_weights(image, z).numpy() == pytest.approx(w, rel=4 * tolerances.LEWIS_FIXED)
    assert lewis_weights(points[order], z).numpy() == pytest.approx(w[order], rel=4 * tolerances.LEWIS_FIXED)


@given(instances(), st.integers(2, 5))
def test_a_point_in_parts_shares_its_weight(instance: tuple[Points, float, Points], k: int) -> None:
    """k copies of k^{−1/z}a make up the same sum; for z = 1 the parts are a/2 and a/2."""
    points, z, w = instance
    split = np.concatenate([points[1:], np.repeat(k ** (-1 / z) * points[:1], k, axis=0)])
    expected = np.concatenate([w[1:], np.repeat(w[:1] / k, k)])
    assert lewis_weights(split, z).numpy() == pytest.approx(expected, rel=4 * tolerances.LEWIS_FIXED)
    copied = lewis_weights(np.repeat(points, k, axis=0), z).numpy()
    assert copied == pytest.approx(np.repeat(w / k, k), rel=4 * tolerances.LEWIS_FIXED)


@given(instances(), SEEDS)
def test_points_at_the_origin_weigh_nothing(instance: tuple[Points, float, Points], seed: int) -> None:
    points, z, w = instance
    where = np.random.default_rng(seed).permutation(len(points) + 4)
    more = np.concatenate([points, np.zeros((4, points.shape[1]))])[where]
    expected = np.concatenate([w, np.zeros(4)])[where]
    found = lewis_weights(more, z).numpy()
    assert found == pytest.approx(expected, rel=4 * tolerances.LEWIS_FIXED, abs=0)
    assert (found[expected == 0] == 0).all()


@given(instances(), SEEDS)
def test_more_points_weigh_the_others_less(instance: tuple[Points, float, Points], seed: int) -> None:
    """For z ≤ 2 the map whose fixed point is the moment is monotone."""
    points, z, w = instance
    if z <= 2:
        more = lewis_weights(np.concatenate([points, gaussian(seed + 1, 3, points.shape[1])]), z).numpy()
        assert (more[: len(points)] <= w * (1 + 4 * tolerances.LEWIS_FIXED)).all()


@given(instances(), SEEDS)
def test_points_of_orthogonal_spaces_do_not_see_each_other(instance: tuple[Points, float, Points], seed: int) -> None:
    points, z, w = instance
    other = gaussian(seed + 1, 12, 3)
    both = np.zeros((len(points) + 12, points.shape[1] + 3))
    both[: len(points), :-3], both[len(points) :, -3:] = points, other
    turned = both @ np.linalg.qr(gaussian(seed, both.shape[1], both.shape[1]))[0]
    expected = np.concatenate([w, lewis_weights(other, z).numpy()])
    assert lewis_weights(turned, z).numpy() == pytest.approx(expected, rel=4 * tolerances.LEWIS_FIXED)


def test_the_tolerance_is_what_it_stops_at() -> None:
    y = spanning("cauchy")
    for z in (0.5, 1, 3.5):
        for tol in (1.0, 1e-2, 1e-5):
            w = lewis_weights(cloud("cauchy"), z, tol).numpy()
            tau = leverages(reweighted(w, z)[:, None] * y)
            assert np.abs(np.log(tau / w)).max() <= tol + tolerances.LEWIS_FIXED
        assert bool(torch.isfinite(lewis_weights(cloud("cauchy"), z, 1e-30)).all())  # rounding stops it


# Level sets


def measured(points: Points, directions: Points, z: float, w: Points | float = 1.0) -> Points:
    """(Σ w|aᵀx|^z)^{1/z} for directions [k, d]: at most 1 in the level set."""
    u = torch.from_numpy(np.broadcast_to(w, len(points)).astype(np.float64))
    return torch.cat([u @ p for p in powers(points, directions, z)]).numpy() ** (1 / z)


def sandwiched(
    e: LevelEllipsoid, points: Points, z: float, digits: float, w: Points | float = 1.0, count: int = DIRECTIONS
) -> None:
    """L ⊆ E ⊆ factor·L: ‖x‖_E ≤ (Σ w|aᵀx|^z)^{1/z} ≤ factor·‖x‖_E on E's boundary, and for any x with ‖x‖_E = ‖G⁺x‖."""
    if e.rank == 0:
        return
    a = points.astype(np.float64)
    unit = np.abs(a).max(0)
    v = gaussian(0, count // 2, e.rank)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    x = gaussian(1, count // 2, a.shape[1]) / np.where(unit > 0, unit, 1)
    for directions, size in (
        (v @ e.generator.numpy().T, np.ones(len(v))),
        (x, np.linalg.norm(x @ e.inverse.numpy().T, axis=1)),
    ):
        sums = measured(a, directions, z, w)
        assert (size <= sums * (1 + digits)).all()
        assert (sums <= e.factor * size * (1 + digits)).all()


@pytest.mark.parametrize("z", LEVELS)
@pytest.mark.parametrize("name", CLOUDS)
def test_the_level_set_is_between_the_ellipsoid_and_it_shrunk(name: str, z: float) -> None:
    e, r, d = level(name, z), rank(name, "origin"), cloud(name).shape[1]
    assert (e.z, e.rank) == (z, r)
    assert (e.center.shape, e.generator.shape, e.inverse.shape) == ((d,), (d, r), (r, d))
    assert not bool(e.center.any())
    assert torch.allclose(e.inverse @ e.generator, torch.eye(r, dtype=torch.float64), atol=tolerances.LEWIS_FAR, rtol=0)
    assert 1 <= e.factor <= max(1, r) ** (1 / z - 0.5) * (1 + 1e-6)
    sandwiched(e, cloud(name), z, slack(name))


@pytest.mark.parametrize("z", [1, 1.7])
@pytest.mark.parametrize("name", CLOUDS)
def test_sensitivities_bound_and_add_up_to_the_rank(name: str, z: float) -> None:
    e, points, y, r = level(name, z), cloud(name), spanning(name), rank(name, "origin")
    s = e.sensitivities.numpy()
    assert s.sum() == pytest.approx(r, rel=slack(name), abs=0)
    u = e.basis(points)
    rows = torch.from_numpy(points.astype(np.float64))
    rounding = float(torch.finfo(torch.tensor(points[:1]).dtype).eps)
    assert bool(((u @ e.inverse - rows).abs() <= 1e3 * rounding * rows.abs().amax(0)).all())  # P = UG⁺
    assert torch.linalg.vector_norm(u, dim=1).numpy() ** z == pytest.approx(s, rel=tolerances.LEWIS_FAR, abs=EXACT)
    assert r == 0 or bounded(y, s, z, slack(name), 1000)
    assert s == pytest.approx(weights(name, z), rel=slack(name))


@pytest.mark.parametrize("z", [1, 1.3, 1.7])
@pytest.mark.parametrize("tol", [0.1, 100.0])
@pytest.mark.parametrize("name", ["gaussian", "cauchy", "columns of all sizes", "outlier", "low rank", "clusters"])
def test_the_factor_is_proved_for_weights_that_have_not_converged(name: str, tol: float, z: float) -> None:
    e = level_ellipsoid(cloud(name), z, tol=tol)
    sandwiched(e, cloud(name), z, slack(name), count=2000)
    assert e.factor >= level(name, z).factor * (1 - tolerances.LEWIS_FIXED)
    assert bounded(spanning(name), e.sensitivities.numpy(), z, slack(name), 1000)


@pytest.mark.parametrize("name", [name for name in CLOUDS if rank(name, "origin") > 0])
def test_squares_have_their_own_ellipsoid(name: str) -> None:
    """{‖Ax‖ ≤ 1}, exactly: AG has orthonormal columns."""
    e = level(name, 2)
    assert e.factor == 1
    columns = cloud(name).astype(np.float64) @ e.generator.numpy()
    assert columns.T @ columns == pytest.approx(np.eye(e.rank), abs=slack(name))


def test_a_box_and_a_cross_polytope() -> None:
    """{Σ|x_i| ≤ 1} is inside the unit ball, which is inside √d of it; the square's is its circumscribed disc."""
    for d in (1, 3, 8):
        e = level_ellipsoid(np.eye(d))
        assert torch.allclose(e.shape, torch.eye(d, dtype=torch.float64), atol=tolerances.LEWIS_FIXED)
        assert e.factor == pytest.approx(math.sqrt(d), rel=tolerances.LEWIS_FIXED)
    e = level_ellipsoid(np.array([[1.0, 1.0], [1.0, -1.0]]) / 2)  # max |x_i| ≤ 1: the disc of radius √2
    assert torch.allclose(e.shape, 2 * torch.eye(2, dtype=torch.float64), atol=tolerances.LEWIS_FIXED)
    assert e.contains(np.array([[1.0, 1.0], [1.01, 1.0]])).tolist() == [True, False]
    assert e.factor == pytest.approx(math.sqrt(2), rel=tolerances.LEWIS_FIXED)


@given(SEEDS, st.integers(1, 5), st.floats(1, 2))
def test_maps_carry_the_ellipsoid_along(seed: int, d: int, z: float) -> None:
    """The points A of the image set {x : Ax ∈ L} are rows PA: its ellipsoid is A⁻¹E."""
    points, A = gaussian(seed, 40, d), gaussian(seed + 1, d, d) + 3 * np.eye(d)
    e, image = level_ellipsoid(points, z), level_ellipsoid(points @ A, z)
    back = np.linalg.inv(A)
    assert image.shape.numpy() == pytest.approx(back @ e.shape.numpy() @ back.T, rel=1e-6, abs=1e-6 / d)
    assert image.factor == pytest.approx(e.factor, rel=4 * tolerances.LEWIS_FIXED)
    assert image.log_volume == pytest.approx(e.log_volume - np.linalg.slogdet(A)[1], abs=d * tolerances.LEWIS_FIXED)


# Weighted sums


@given(SEEDS, st.integers(1, 5), st.floats(1, 2))
def test_weights_scale_the_points(seed: int, d: int, z: float) -> None:
    points, w = gaussian(seed, 40, d), 10 ** np.random.default_rng(seed).uniform(-3, 3, 40)
    e, same = level_ellipsoid(points, z, w), level_ellipsoid(w[:, None] ** (1 / z) * points, z)
    assert e.shape.numpy() == pytest.approx(
        same.shape.numpy(), rel=4 * tolerances.LEWIS_FIXED, abs=4 * tolerances.LEWIS_FIXED
    )
    assert e.factor == pytest.approx(same.factor, rel=tolerances.LEWIS_FIXED)
    assert e.sensitivities.numpy() == pytest.approx(same.sensitivities.numpy(), rel=4 * tolerances.LEWIS_FIXED)
    lengths = torch.linalg.vector_norm(e.basis(points), dim=1).numpy()
    assert e.sensitivities.numpy() == pytest.approx(w * lengths**z, rel=tolerances.LEWIS_FIXED)
    sandwiched(e, points, z, tolerances.LEWIS_FIXED, w)


@pytest.mark.parametrize("z", [1, 1.7])
@pytest.mark.parametrize("name", CLOUDS)
def test_weights_keep_the_span_and_the_precision_of_the_points(name: str, z: float) -> None:
    n = len(cloud(name))
    e = level_ellipsoid(cloud(name), z, np.full(n, 7.0))
    assert e.rank == rank(name, "origin")
    assert e.factor == pytest.approx(level(name, z).factor, rel=slack(name))
    assert e.sensitivities.numpy() == pytest.approx(level(name, z).sensitivities.numpy(), rel=slack(name))
    assert e.log_volume == pytest.approx(level(name, z).log_volume - e.rank / z * math.log(7), abs=slack(name))
    some = 10 ** np.random.default_rng(0).uniform(-2, 2, n)
    sandwiched(level_ellipsoid(cloud(name), z, some), cloud(name), z, slack(name), some, 1000)


def test_extreme_weights_neither_overflow_nor_underflow() -> None:
    points = gaussian(0, 40, 3)
    e = level_ellipsoid(points)
    for kind in (np.float32, np.float64):
        for size in (1e-200, 1e-60, 1e60, 1e200):
            same = level_ellipsoid(points.astype(kind), 1, np.full(40, size))
            root = size * same.generator.numpy()
            assert root @ root.T == pytest.approx(
                e.shape.numpy(), rel=tolerances.LEWIS_SINGLE, abs=tolerances.LEWIS_SINGLE * float(e.shape.max())
            )
    with pytest.raises(NonFinite, match="weights"):
        level_ellipsoid(1e200 * points, 1, np.full(40, 1e200))


@pytest.mark.parametrize("z", LEVELS)
def test_points_without_weight_are_left_out(z: float) -> None:
    """Even where they alone reach some direction."""
    points = np.concatenate([gaussian(0, 30, 2) @ gaussian(1, 2, 4), gaussian(2, 10, 4)])
    w = np.where(np.arange(40) < 30, 2.0, 0.0)
    e, same = level_ellipsoid(points, z, w), level_ellipsoid(points[:30], z, w[:30])
    assert (e.rank, same.rank) == (2, 2)
    assert e.shape.numpy() == pytest.approx(same.shape.numpy(), rel=tolerances.LEWIS_FIXED, abs=tolerances.LEWIS_FIXED)
    assert (e.sensitivities[30:] == 0).all()
    assert level_ellipsoid(points, z, np.ones(40)).rank == 4
    nothing = level_ellipsoid(points, z, np.zeros(40))
    assert (nothing.rank, nothing.factor, float(nothing.sensitivities.sum())) == (0, 1, 0)


# Inputs


def test_all_forms_of_the_same_points_give_the_same() -> None:
    points, w = gaussian(0, 50, 4).astype(np.float32), gaussian(1, 50, 1)[:, 0].astype(np.float32) ** 2
    forms: list[tuple[Any, Any]] = [(points.astype(np.float64), w.astype(np.float64)), (points, w)]
    forms += [(torch.from_numpy(points), w), (torch.from_numpy(points).requires_grad_(), torch.from_numpy(w))]
    expected, e = lewis_weights(forms[0][0]), level_ellipsoid(*forms[0][:1], weights=forms[0][1])
    for form, weighted in forms:
        before = torch.as_tensor(form).detach().clone()
        found, same = lewis_weights(form), level_ellipsoid(form, weights=weighted)
        assert (found.dtype, found.requires_grad) == (torch.float64, False)
        assert torch.allclose(found, expected, rtol=ROUNDING)
        assert torch.allclose(same.shape, e.shape, rtol=tolerances.LEWIS_SINGLE)
        assert same.factor == pytest.approx(e.factor, rel=tolerances.LEWIS_FIXED)
        assert torch.equal(torch.as_tensor(form).detach(), before)
    whole = np.array([[1, 2], [3, -1], [0, 0], [5, 4]])
    assert torch.equal(lewis_weights(whole), lewis_weights(whole.astype(np.float64)))
    assert torch.equal(lewis_weights(points, np.float32(1)), lewis_weights(points, torch.tensor(1.0)))


def lewis(points: Any = None, z: Any = 1.0, tol: Any = 1e-9) -> Tensor:
    return lewis_weights(np.eye(3) if points is None else points, z, tol)


def around(points: Any = None, z: Any = 1.0, weights: Any = None, tol: Any = 1e-9) -> LevelEllipsoid:
    return level_ellipsoid(np.eye(3) if points is None else points, z, weights, tol)


@pytest.mark.parametrize("call", [lewis, around])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"z": 0}, InvalidTolerance, "z: expected an exponent .*found 0"),
        ({"z": -1}, InvalidTolerance, "z: expected an exponent"),
        ({"z": 4}, InvalidTolerance, "z: expected an exponent .*found 4"),
        ({"z": math.nan}, InvalidTolerance, "z: expected an exponent .*found nan"),
        ({"z": math.inf}, InvalidTolerance, "z: expected an exponent"),
        ({"z": "1"}, InvalidTolerance, "z: expected a number"),
        ({"tol": 0}, InvalidTolerance, "tol"),
        ({"tol": -1e-9}, InvalidTolerance, "tol"),
        ({"tol": math.nan}, InvalidTolerance, "tol"),
        ({"points": np.array([[1.0, math.nan]])}, NonFinite, "1 of 2"),
        ({"points": np.zeros((0, 3))}, EmptyInput, r"\[0, 3\]"),
        ({"points": np.zeros((3, 0))}, EmptyInput, r"\[3, 0\]"),
        ({"points": np.zeros(3)}, ShapeMismatch, "expected a matrix"),
        ({"points": np.eye(2) * 1j}, InvalidInput, "real"),
    ],
)
def test_errors_say_what_is_wrong(
    call: Any, arguments: dict[str, Any], error: type[ConvexPruneError], words: str
) -> None:
    with pytest.raises(error, match=words):
        call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"z": 0.99}, InvalidTolerance, "from 1 to 2, found 0.99"),
        ({"z": 2.01}, InvalidTolerance, "from 1 to 2, found 2.01"),
        ({"weights": -np.ones(3)}, InvalidInput, "≥ 0, found -1"),
        ({"weights": np.ones(2)}, ShapeMismatch, r"one for each of 3 points, found shape \[2\]"),
        ({"weights": np.ones((3, 1))}, ShapeMismatch, r"found shape \[3, 1\]"),
        ({"weights": np.array([1, math.inf, 1])}, NonFinite, "weights"),
        ({"weights": np.array([1, 1, math.nan])}, NonFinite, "weights"),
        ({"weights": np.ones(3), "points": np.ones(3)}, ShapeMismatch, "expected a matrix"),
        ({"weights": np.ones(1), "points": np.array(1.0)}, ShapeMismatch, "expected a matrix"),
        ({"weights": np.ones(0), "points": np.zeros((0, 2))}, EmptyInput, r"\[0, 2\]"),
        ({"weights": np.ones(1), "points": np.array([[math.nan]])}, NonFinite, "points"),
    ],
)
def test_errors_of_level_sets(arguments: dict[str, Any], error: type[ConvexPruneError], words: str) -> None:
    with pytest.raises(error, match=words):
        around(**arguments)


def test_a_basis_is_of_points_of_the_same_space() -> None:
    e = level_ellipsoid(gaussian(0, 20, 3))
    assert e.basis(torch.zeros(2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]
    for other in (np.zeros((2, 4)), np.zeros(3)):
        with pytest.raises(ShapeMismatch, match=r"expected \[k, 3\]"):
            e.basis(other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_an_accelerator() -> None:
    for name in ("gaussian", "low rank", "columns of all sizes", "one point"):
        points = torch.tensor(cloud(name)).cuda()
        assert lewis_weights(points).cpu().numpy() == pytest.approx(weights(name, 1), rel=tolerances.LEWIS_FIXED)
        e = level_ellipsoid(points, 1.5, np.ones(len(points)))
        assert e.generator.device.type == e.sensitivities.device.type == "cuda"
        assert e.factor == pytest.approx(level(name, 1.5).factor, rel=tolerances.LEWIS_FIXED)
