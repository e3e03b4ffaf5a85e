"""The Löwner ellipsoid: what it holds, what is proven of it, known optima, a conic solver's answers, its symmetries."""

import itertools
import math
import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from clouds import CLOUDS, Points, cloud, gaussian, rank
from hypothesis import given
from hypothesis import strategies as st
from tolerances import ROUNDING, SINGLE

from convexprune.solvers.certificate.solution import Status
from convexprune.solvers.errors import NonFinite, ShapeMismatch
from convexprune.solvers.geometry.ellipsoid import Ellipsoid, LownerEllipsoid, lowner_ellipsoid

CENTERS = ("origin", "free")
EVERY = [(name, center) for name in CLOUDS for center in CENTERS]
SEEDS = st.integers(0, 10**6)


def log_ball(r: int) -> float:
    """Volumes of unit balls are π^{r/2}/Γ(r/2 + 1)."""
    return r / 2 * math.log(math.pi) - math.lgamma(r / 2 + 1)


def around(points: Any, tol: float = tolerances.ELLIPSOID, center: str = "origin", **options: Any) -> LownerEllipsoid:
    return lowner_ellipsoid(points, tol, center=center, **options)  # type: ignore[arg-type]


def log_content(columns: Points) -> float:
    """½ log det AᵀA of A [d, r], as the sum of its squared minors (Cauchy and Binet)."""
    d, r = columns.shape
    unit = float(np.abs(columns).max())
    minors = [np.linalg.det(columns[list(rows)] / unit) for rows in itertools.combinations(range(d), r)]
    return r * math.log(unit) + 0.5 * math.log(sum(minor**2 for minor in minors))


@cache
def tight(name: str, center: str) -> LownerEllipsoid:
    return around(cloud(name), center=center)


def by_hand(points: Points, e: LownerEllipsoid) -> tuple[float, float]:
    """Gap and log-volume from weights, support and points alone, in numpy, without a dimension more for the centre."""
    a, chosen, u = points.astype(np.float64), e.support.numpy(), e.weights.numpy()
    a = a - a[0] if e.about == "free" else a
    a = a - u @ a[chosen] if e.about == "free" else a
    scale = np.abs(a).max(0)
    scale[scale == 0] = 1
    a = a / scale
    length = np.linalg.norm(a, axis=1, keepdims=True)
    basis = np.linalg.svd(a / np.where(length > 0, length, 1), full_matrices=False)[2][: e.rank]
    y = a @ basis.T
    root = np.linalg.svd(np.sqrt(u)[:, None] * y[chosen], full_matrices=False)
    leverages = np.square(y @ root[2].T / root[1]).sum(1)  # yᵀS⁻¹y with S = Σ u yyᵀ
    kappa = float(leverages.max())
    size = log_content(scale[:, None] * basis.T) + np.log(root[1]).sum()
    return kappa / e.rank - 1, size + e.rank / 2 * math.log(kappa) + log_ball(e.rank)


# What holds of every cloud


@pytest.mark.parametrize(("name", "center"), EVERY)
def test_holds_all_points_and_its_span_is_theirs(name: str, center: str) -> None:
    e, points = tight(name, center), cloud(name)
    assert e.status is Status.SOLVED
    assert e.rank == rank(name, center)
    assert float(e.norms(points).max()) <= 1 + tolerances.FAR
    assert bool(e.contains(points, tol=tolerances.FAR).all())
    assert e.about == center
    if center == "origin":
        assert not bool(e.center.any())


@pytest.mark.parametrize(("name", "center"), EVERY)
def test_the_certificate_is_what_weights_and_points_give_by_hand(name: str, center: str) -> None:
    for e in (tight(name, center), around(cloud(name), 0.5, center)):
        c = e.certificate
        assert float(e.weights.sum()) == pytest.approx(1, rel=ROUNDING)
        assert bool((e.weights > 0).all())
        assert bool((e.support.diff() > 0).all())
        if e.rank == 0:
            assert (c.value, c.bound, c.gap) == (0, 0, 0)
            continue
        gap, log_volume = by_hand(cloud(name), e)
        digits = (
            SINGLE if cloud(name).dtype == np.float32 else tolerances.ELLIPSOID_CONDITION
        )  # a span known to the data's precision
        assert c.gap == pytest.approx(max(gap, 0), rel=digits, abs=digits)
        assert c.value == pytest.approx(log_volume, rel=digits, abs=digits)
        assert c.value - c.bound == pytest.approx(e.rank / 2 * math.log1p(c.gap), rel=ROUNDING, abs=ROUNDING)
        assert c.violation == 0
        assert e.log_volume == c.value
        assert math.log(e.volume_factor) == pytest.approx(c.value - c.bound, rel=ROUNDING, abs=ROUNDING)


@pytest.mark.parametrize(("name", "center"), EVERY)
def test_optimality_conditions(name: str, center: str) -> None:
    """Σ u vvᵀ = I/(r(1 + gap)), Σ u v = 0 where the centre is free, and u(1 − ‖v‖²) ≥ 0 adds up to the gap."""
    e, points = tight(name, center), cloud(name)
    v, u, r = e.transform(points[e.support.numpy()]), e.weights, e.rank
    size = 1 / (max(r, 1) * (1 + e.certificate.gap))
    assert torch.allclose((v.T * u) @ v, size * torch.eye(r, dtype=v.dtype), atol=tolerances.FAR, rtol=0)
    if center == "free":
        assert torch.allclose(u @ v, v.new_zeros(r), atol=tolerances.FAR, rtol=0)
    slack = u * (1 - v.square().sum(1))
    assert float(slack.min()) >= -2 * tolerances.FAR
    if r > 0:
        assert float(slack.sum()) <= 2 * (tolerances.ELLIPSOID + tolerances.FAR)


@pytest.mark.parametrize(("name", "center"), EVERY)
def test_relations_of_the_arrays(name: str, center: str) -> None:
    """G⁺G = I, Σ = GGᵀ and its volume; points go to their coordinates and back."""
    e = tight(name, center)
    d, r = cloud(name).shape[1], e.rank
    assert (e.center.shape, e.generator.shape, e.inverse.shape) == ((d,), (d, r), (r, d))
    assert torch.allclose(e.inverse @ e.generator, torch.eye(r, dtype=torch.float64), atol=tolerances.FAR, rtol=0)
    assert torch.equal(e.shape, e.generator @ e.generator.T)
    same = Ellipsoid(e.center, e.generator, e.inverse)
    assert same.log_volume == pytest.approx(
        e.log_volume, rel=tolerances.ELLIPSOID_CONDITION, abs=tolerances.ELLIPSOID_CONDITION
    )
    points = torch.tensor(cloud(name)[:20], dtype=torch.float64)
    back = e.center + e.transform(points) @ e.generator.T
    size = points.abs().amax(0) + torch.linalg.vector_norm(e.generator, dim=1)
    rounding = float(torch.finfo(torch.tensor(cloud(name)[:1]).dtype).eps)
    assert bool(((back - points).abs() <= 100 * rounding * size).all())


@pytest.mark.parametrize(("name", "center"), [(n, c) for n, c in EVERY if not n.endswith("of all sizes")])
def test_axes(name: str, center: str) -> None:
    """Orthogonal, longest first, the shape's own, with their ends on the boundary; their lengths give the volume."""
    e = tight(name, center)
    axes, r = e.axes(), e.rank
    lengths = torch.linalg.vector_norm(axes, dim=1)
    assert axes.shape == (r, cloud(name).shape[1])
    assert bool((lengths.diff() <= tolerances.ELLIPSOID_CONDITION * lengths[1:]).all())
    cosines = (axes / lengths[:, None]) @ (axes / lengths[:, None]).T
    assert torch.allclose(cosines, torch.eye(r, dtype=torch.float64), atol=tolerances.FAR, rtol=0)
    largest = float(e.shape.abs().max())
    assert torch.allclose(axes.T @ axes, e.shape, atol=ROUNDING * largest, rtol=0)
    assert float(lengths.log().sum()) + log_ball(r) == pytest.approx(
        e.log_volume, rel=tolerances.ELLIPSOID_CONDITION, abs=tolerances.ELLIPSOID_CONDITION
    )
    ends = torch.linalg.vector_norm(axes @ e.inverse.T, dim=1)
    assert torch.allclose(ends, torch.ones_like(ends), atol=tolerances.ELLIPSOID_CONDITION, rtol=0)


@pytest.mark.parametrize(("name", "center"), [(n, c) for n, c in EVERY if rank(n, c) > 0])
@pytest.mark.parametrize("tol", [tolerances.ELLIPSOID, 0.3])
def test_shrunk_it_lies_in_the_hull_of_the_support(name: str, center: str, tol: float) -> None:
    """Support functions, in directions h with hᵀΣh = 1: 1/ρ ≤ max |aᵀh|, or max (a − c)ᵀh with a free centre."""
    e, points = around(cloud(name), tol, center), cloud(name)
    square = e.rank * (1 + e.certificate.gap)
    assert e.radius_factor == pytest.approx(square if center == "free" else math.sqrt(square), rel=ROUNDING)
    w = torch.from_numpy(gaussian(0, 2000, e.rank))
    h = torch.cat([w / torch.linalg.vector_norm(w, dim=1, keepdim=True), *(s * torch.eye(e.rank) for s in (1, -1))])
    along = e.transform(points[e.support.numpy()]) @ h.T
    reach = along.amax(0) if center == "free" else along.abs().amax(0)
    assert bool((e.radius_factor * reach >= 1 - e.radius_factor * tolerances.FAR).all())


@pytest.mark.parametrize(("name", "center"), EVERY)
def test_no_other_ellipsoid_around_the_points_beats_the_bound(name: str, center: str) -> None:
    """Balls in coordinates v of the ellipsoid, and images of it by random matrices, grown until they hold all."""
    loose, e = around(cloud(name), 0.3, center), tight(name, center)
    assert loose.certificate.bound <= e.log_volume + tolerances.ELLIPSOID_CONDITION * max(1, abs(e.log_volume))
    assert e.log_volume <= loose.log_volume + tolerances.ELLIPSOID_VOLUME * max(1, abs(e.log_volume))
    excess = loose.log_volume - e.certificate.bound
    assert excess <= math.log(loose.volume_factor) + 2 * tolerances.ELLIPSOID_VOLUME * max(1, abs(e.log_volume))
    v, r = e.transform(cloud(name)), e.rank
    for seed in range(5 if r else 0):
        image = torch.eye(r, dtype=v.dtype) + 0.1 * seed * torch.from_numpy(gaussian(seed, r, r))
        middle = 0.05 * seed * torch.from_numpy(gaussian(seed, 1, r)) if center == "free" else v.new_zeros(1, r)
        radius = float(torch.linalg.vector_norm((v - middle) @ image.T, dim=1).max())
        other = e.log_volume + r * math.log(radius) - float(torch.linalg.slogdet(image).logabsdet)
        assert e.certificate.bound <= other + 2 * r * tolerances.FAR + tolerances.ELLIPSOID_CONDITION


# Known optima


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("d", [1, 2, 5, 30])
def test_crosspolytope_box_and_simplex(d: int, center: str) -> None:
    cross = np.concatenate([np.eye(d), -np.eye(d)])
    e = around(cross, center=center)
    assert e.log_volume == pytest.approx(log_ball(d), abs=tolerances.ELLIPSOID_VOLUME)
    assert torch.allclose(e.shape, torch.eye(d, dtype=torch.float64), atol=tolerances.ELLIPSOID_SHAPE)
    sides = np.logspace(-3, 3, d)
    corners = sides * np.array(list(itertools.product([-1, 1], repeat=min(d, 8))) if d <= 8 else _hadamard(d))
    e = around(corners, center=center)
    assert torch.allclose(
        e.axes().square().sum(1).sqrt().flip(0), torch.from_numpy(sides * d**0.5), rtol=tolerances.ELLIPSOID_SHAPE
    )
    assert e.log_volume == pytest.approx(
        log_ball(d) + d / 2 * math.log(d) + np.log(sides).sum(), abs=tolerances.ELLIPSOID_VOLUME
    )
    if center == "free":
        e = around(np.eye(d + 1), center=center)  # its circumscribed ball has the radius √(d/(d + 1))
        assert e.log_volume == pytest.approx(
            log_ball(d) + d / 2 * math.log(d / (d + 1)), abs=tolerances.ELLIPSOID_VOLUME
        )
        assert torch.allclose(e.center, torch.full((d + 1,), 1 / (d + 1), dtype=torch.float64))


def _hadamard(d: int) -> Points:
    """Corners ±1 of which Σ aaᵀ is a multiple of I: rows of a Hadamard matrix of 32 columns, the first d of them."""
    H = np.ones((1, 1))
    for _ in range(5):
        H = np.block([[H, H], [H, -H]])
    return np.concatenate([H[:, 1 : d + 1], -H[:, 1 : d + 1]])


@pytest.mark.parametrize("center", CENTERS)
def test_points_on_an_ellipsoid_have_that_one(center: str) -> None:
    """Where Σ vvᵀ ∝ I over points v of the unit sphere, theirs is the ball; so is that of any image an image of it."""
    sphere = np.concatenate([cloud("sphere"), np.eye(5), -np.eye(5)])
    A, b = gaussian(0, 5, 5), gaussian(1, 1, 5) if center == "free" else 0.0
    e = around(sphere @ A.T + b, center=center)
    assert e.log_volume == pytest.approx(log_ball(5) + np.linalg.slogdet(A)[1], abs=tolerances.ELLIPSOID_VOLUME)
    assert torch.allclose(
        e.shape, torch.from_numpy(A @ A.T), rtol=tolerances.ELLIPSOID_SHAPE, atol=tolerances.ELLIPSOID_SHAPE
    )
    assert torch.allclose(
        e.center, torch.as_tensor(b, dtype=torch.float64).expand(1, 5)[0], atol=tolerances.ELLIPSOID_SHAPE
    )


def test_radius_factors_are_attained() -> None:
    """√d by the cube about the origin, d by the simplex: the shrunk ellipsoids touch the faces."""
    cube, simplex = around(cloud("hypercube")), around(np.eye(5), center="free")
    face = torch.eye(7, dtype=torch.float64)[0]
    assert float(face @ cube.shape @ face) ** 0.5 / cube.radius_factor == pytest.approx(
        1, abs=tolerances.ELLIPSOID_SHAPE
    )
    normal = 0.2 - torch.eye(5, dtype=torch.float64)[0]
    reach = float(normal @ simplex.shape @ normal) ** 0.5 / simplex.radius_factor
    assert reach == pytest.approx(
        float(((torch.eye(5) - simplex.center) @ normal).max()), abs=tolerances.ELLIPSOID_SHAPE
    )


def test_one_point_and_none_in_all_are_no_volume() -> None:
    e = around(np.array([[2.0, -1.0]]), center="free")
    assert (e.rank, e.log_volume, e.volume_factor, e.radius_factor) == (0, 0, 1, 0)
    assert e.center.tolist() == [2, -1]
    assert e.contains(np.array([[2.0, -1.0], [2.0, -1.001]])).tolist() == [True, False]
    assert e.axes().shape == (0, 2)
    assert around(np.zeros((3, 2))).norms(np.array([[0.0, 0.0], [1e-300, 0.0]])).tolist() == [0, math.inf]


@pytest.mark.parametrize(
    ("kind", "d", "offset"),
    [(np.float32, 2, 1e5), (np.float32, 100, 3e5), (np.float64, 3, 1e15), (np.float64, 40, 1e14)],
)
def test_a_spread_of_some_roundings_is_a_spread(kind: type, d: int, offset: float) -> None:
    """Far from the origin, but their coordinates are far from being the same."""
    points = (offset + gaussian(7, 20 * d, d)).astype(kind)
    e = around(points, 1e-3, "free")
    assert (e.rank, str(e.status)) == (d, "solved")
    assert bool(e.contains(points).all())
    assert not e.contains(e.center + 2 * e.axes()).any()


T = np.linspace(-1, 1, 50)


@pytest.mark.parametrize("tol", [1e-6, 1e-3])
@pytest.mark.parametrize(
    "points",
    [np.c_[1e6 * T, 1e5 + 1e-6 * T], np.c_[T, 1e3 + 1e-6 * T], np.c_[T, 10 + 1e-3 * T].astype(np.float32)],
    ids=["1e11 apart", "1e9 apart", "float32"],
)
def test_a_line_is_measured_by_its_columns_with_the_least_rounding(points: Points, tol: float) -> None:
    e = around(points, tol, "free")
    assert e.rank == 1
    assert bool(e.contains(points).all())


def test_rounding_of_the_centre_puts_no_point_outside() -> None:
    points = 1e5 + 1e-6 * gaussian(0, 50, 2)
    e = around(points, 1e-6, "free")
    assert float(e.norms(points).max()) > 1 + 1e-9  # the centre is a float64, too
    assert bool(e.contains(points).all())
    assert not e.contains(e.center + 1.01 * e.axes()).any()


def test_the_span_is_as_exact_as_the_points_were_whatever_the_query_is() -> None:
    flat = (gaussian(0, 200, 2) @ gaussian(1, 2, 5)).astype(np.float32)
    e = around(flat)
    for same in (flat, flat.astype(np.float64), flat.tolist()):
        assert bool(e.contains(same, 1e-6).all())


def test_a_query_is_finite() -> None:
    for e in (around(np.ones((4, 3)), center="free"), around(gaussian(0, 9, 3))):
        with pytest.raises(NonFinite, match="points: 1 of 3 entries"):
            e.contains([[1.0, math.nan, 1.0]])


def test_outside_the_span_is_outside() -> None:
    points = cloud("low rank")
    for kind in (np.float64, np.float32):
        e = around(points.astype(kind))
        off = np.linalg.svd(points)[2][-1]
        inside, outside = 0.5 * points[:3], 0.5 * points[:3] + off
        assert bool(e.contains(inside.astype(kind), tol=1e-6).all())
        assert bool(torch.isinf(e.norms(outside.astype(kind))).all())
    with pytest.raises(ShapeMismatch, match=r"expected \[k, 8\], found shape \[3, 7\]"):
        e.norms(inside[:, :7])


# A conic solver's answers, from the reference formulations


def conic(points: Points, center: str) -> float:
    """Maximise log det of X with aᵀXa ≤ 1, or of B with ‖Ba + b‖ ≤ 1; the log-volume of the ellipsoid."""
    import cvxpy as cp

    n, d = points.shape
    shape, shift = cp.Variable((d, d), PSD=True), cp.Variable((1, d))
    if center == "origin":
        inside = cp.sum(cp.multiply(points @ shape, points), axis=1) <= 1
    else:
        inside = cp.norm(points @ shape + np.ones((n, 1)) @ shift, axis=1) <= 1
    problem = cp.Problem(cp.Maximize(cp.log_det(shape)), [inside])
    with warnings.catch_warnings():
        # At this tolerance, which the largest clouds need, rounding may be what ends the progress.
        warnings.filterwarnings("ignore", "Solution may be inaccurate")
        problem.solve(solver="CLARABEL", **dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-9))
    assert problem.status in ("optimal", "optimal_inaccurate")
    return log_ball(d) - float(problem.value) / (2 if center == "origin" else 1)


CONIC: dict[str, Points] = {
    **{f"gaussian {n}×{d}": gaussian(d, n, d) for n, d in ((20, 2), (500, 5), (300, 8), (200, 12), (100, 15))},
    **{
        name: cloud(name) for name in ("hypercube", "sphere", "duplicates", "clusters", "d + 1 points", "one dimension")
    },
    "simplex": np.concatenate([np.eye(4), [[-0.5] * 4]]),
    "cross-polytope": np.concatenate([np.eye(6), -np.eye(6)]),
    "cauchy": np.random.default_rng(3).standard_cauchy((200, 3)) / 10,
    "far": 3 + gaussian(4, 100, 4),
    "uniform": np.random.default_rng(5).random((150, 5)),
}


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("name", CONIC)
def test_agrees_with_the_reference_formulations(name: str, center: str) -> None:
    pytest.importorskip("cvxpy", reason="the reference formulations need cvxpy")
    points = CONIC[name]
    reference = conic(points, center)
    assert around(points, center=center).log_volume == pytest.approx(reference, abs=tolerances.ELLIPSOID_CONIC)
    loose = around(points, 0.1, center)
    assert (
        loose.certificate.bound - tolerances.ELLIPSOID_CONIC
        <= reference
        <= loose.log_volume + tolerances.ELLIPSOID_CONIC
    )


# Symmetries


@st.composite
def instances(draw: st.DrawFn) -> tuple[Points, Points, str, int]:
    """Points, an invertible matrix of condition below a thousand, a centre and a seed."""
    seed, d = draw(SEEDS), draw(st.integers(1, 5))
    n = draw(st.integers(d + 1, 60))
    U, _, V = np.linalg.svd(gaussian(seed + 1, d, d))
    spread = np.random.default_rng(seed).uniform(0.03, 30, d)
    return gaussian(seed, n, d), (U * spread) @ V, draw(st.sampled_from(CENTERS)), seed


@given(instances())
def test_affine_maps_carry_the_ellipsoid_along(instance: tuple[Points, Points, str, int]) -> None:
    points, A, center, seed = instance
    b = 10 * gaussian(seed + 2, 1, len(A)) if center == "free" else np.zeros((1, len(A)))
    e, image = around(points, center=center), around(points @ A.T + b, center=center)
    assert image.log_volume == pytest.approx(e.log_volume + np.linalg.slogdet(A)[1], abs=tolerances.ELLIPSOID_VOLUME)
    expected = torch.from_numpy(A) @ e.shape @ torch.from_numpy(A).T
    assert float((image.shape - expected).abs().max()) <= 10 * tolerances.ELLIPSOID_SHAPE * float(expected.abs().max())
    moved = torch.from_numpy(A) @ e.center + torch.from_numpy(b[0])
    assert torch.allclose(
        image.center, moved, atol=10 * tolerances.ELLIPSOID_SHAPE * float(expected.abs().max()) ** 0.5
    )


@given(instances())
def test_order_duplicates_and_points_inside_change_nothing(instance: tuple[Points, Points, str, int]) -> None:
    points, _, center, seed = instance
    e = around(points, center=center)
    order = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(points)), 2))
    within = (e.center + 0.9 * torch.from_numpy(gaussian(seed, 5, e.rank)).tanh() / e.rank**0.5 @ e.generator.T).numpy()
    for same in (points[order], np.concatenate([within, points])):
        assert around(same, center=center).log_volume == pytest.approx(e.log_volume, abs=tolerances.ELLIPSOID_VOLUME)


@given(instances())
def test_more_points_need_no_less_volume_and_a_free_centre_no_more(instance: tuple[Points, Points, str, int]) -> None:
    points, _, center, seed = instance
    fewer = around(points, center=center)
    more = around(np.concatenate([points, 2 * gaussian(seed + 3, 3, points.shape[1])]), center=center)
    assert more.log_volume >= fewer.certificate.bound - ROUNDING
    if center == "origin":
        assert around(points, center="free").certificate.bound <= fewer.log_volume + ROUNDING
