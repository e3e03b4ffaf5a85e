"""L∞ coresets: few points whose max |pᵀx| is within the proved factor of all points', random and worst directions."""

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tolerances
import torch
from clouds import CLOUDS, Points, cloud, coordinates, gaussian, rank
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import ROUNDING

from convexprune.solvers.errors import (
    ConvexPruneError,
    EmptyInput,
    InvalidInput,
    InvalidTolerance,
    NonFinite,
    ShapeMismatch,
)
from convexprune.solvers.geometry.coresets import Kind, MaxNormCoreset, max_norm_coreset

KINDS: tuple[Kind, ...] = ("support", "axes", "caratheodory")
EVERY = [(name, kind) for name in CLOUDS for kind in KINDS]
SEEDS = st.integers(0, 10**6)
DIRECTIONS = 2_000  # of each sort
PROGRAMS = 8  # linear programs a coreset


@cache
def coreset(name: str, kind: Kind) -> MaxNormCoreset:
    return max_norm_coreset(cloud(name), kind)


def center(kind: Kind) -> str:
    return "free" if kind == "caratheodory" else "origin"


def proved(kind: Kind, r: int, gap: float) -> float:
    """√(r(1 + ε)), r√(1 + ε), r^{3/2}(1 + ε)."""
    return {"support": math.sqrt(r * (1 + gap)), "axes": r * math.sqrt(1 + gap)}.get(kind, r**1.5 * (1 + gap))


def slack(name: str) -> float:
    return (
        tolerances.SINGLE_RATIO
        if "float32" in name
        else tolerances.FAR_RATIO
        if "far" in name or "outlier" in name
        else ROUNDING
    )


class Spread(NamedTuple):
    """Points [n, d], and y [n, r] with {(pᵀx)_p : x} = {(yᵀt)_p : t}: orthonormal columns, however the points scale."""

    points: Points
    y: Points
    directions: Points  # x [d, k]
    turned: Points  # t [r, k]

    def reach(self, chosen: slice | Points = slice(None)) -> Points:
        """max |pᵀx| over the chosen points, for every direction."""
        along = np.abs(self.points[chosen] @ self.directions).max(0), np.abs(self.y[chosen] @ self.turned).max(0)
        return np.concatenate(along)


def spread(points: Points, r: int) -> Spread:
    a = points.astype(np.float64)
    size = np.abs(a).max(0)
    size[size == 0] = 1
    y = coordinates(points, r)
    x, t = gaussian(0, a.shape[1], DIRECTIONS) / size[:, None], gaussian(1, r, DIRECTIONS)
    return Spread(a, y, x, t)


@cache
def whole(name: str) -> tuple[Spread, Points]:
    cloud_spread = spread(cloud(name), rank(name, "origin"))
    return cloud_spread, cloud_spread.reach()


def worst(y: Points, chosen: Points, point: int) -> Points:
    """t that maximises yᵀt of a point where |qᵀt| ≤ 1 for all chosen points q."""
    optimize = pytest.importorskip("scipy.optimize", reason="the worst directions are linear programs")
    Q = np.unique(y[chosen], axis=0)
    sides = np.ones(2 * len(Q))
    found = optimize.linprog(-y[point], A_ub=np.concatenate([Q, -Q]), b_ub=sides, bounds=(None, None))
    assert found.status == 0, found.message  # it is bounded: the chosen points span what all do
    t: Points = found.x
    return t


def others(c: MaxNormCoreset, y: Points) -> list[int]:
    """Some of the points outside the coreset, no two the same: the longest in orthonormal coordinates, and others."""
    outside = np.setdiff1d(np.arange(len(y)), c.indices.numpy())
    outside = outside[np.unique(y[outside], axis=0, return_index=True)[1]]
    order = outside[np.argsort(-np.linalg.norm(y[outside], axis=1), kind="stable")]
    few = PROGRAMS // 2
    return [*order[:few].tolist(), *order[few :: max(1, len(order) // few)].tolist()][:PROGRAMS]


# What is promised


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_no_random_direction_is_worse_than_the_factor(name: str, kind: Kind) -> None:
    c, (points, top) = coreset(name, kind), whole(name)
    kept = points.reach(c.indices.numpy())
    assert (top <= c.factor * kept * (1 + slack(name))).all()


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in EVERY if rank(name, "origin") > 0])
def test_no_direction_is_worse_than_the_factor(name: str, kind: Kind) -> None:
    """The worst for a point outside is a linear program; its solution is judged by the ratio, not by the program."""
    c, (points, _) = coreset(name, kind), whole(name)
    chosen = c.indices.numpy()
    for point in others(c, points.y):
        values = np.abs(points.y @ worst(points.y, chosen, point))
        assert values.max() <= c.factor * values[chosen].max() * (1 + slack(name))


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_few_points_and_the_factor_that_their_ellipsoid_proves(name: str, kind: Kind) -> None:
    c, n, r = coreset(name, kind), len(cloud(name)), rank(name, center(kind))
    assert c.kind == kind
    assert c.ellipsoid.about == center(kind)
    assert c.ellipsoid.rank == r
    assert c.ellipsoid.certificate.gap <= tolerances.MAX_NORM
    most = {"support": r * (r + 1) // 2 + 1, "axes": r * (r + 1), "caratheodory": 2 * r * (r + 1)}[kind]
    assert 1 <= len(c.indices) <= min(n, max(1, most))
    assert c.indices.dtype == torch.int64
    assert bool((c.indices.diff() > 0).all())
    assert 0 <= int(c.indices[0]) <= int(c.indices[-1]) < n
    assert set(c.indices.tolist()) <= set(c.ellipsoid.support.tolist())
    assert c.factor == pytest.approx(max(1, proved(kind, r, c.ellipsoid.certificate.gap)), rel=tolerances.DRAWN_IN)
    if kind == "support" and len(c.ellipsoid.support) <= most:
        assert torch.equal(c.indices, c.ellipsoid.support)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tol", [0.3, 5.0])
@pytest.mark.parametrize("name", ["gaussian", "simplex", "low rank", "columns of all sizes"])
def test_loose_ellipsoids_prove_what_they_say(name: str, tol: float, kind: Kind) -> None:
    c, (points, top) = max_norm_coreset(cloud(name), kind, tol), whole(name)
    chosen = c.indices.numpy()
    assert (top <= c.factor * points.reach(chosen) * (1 + slack(name))).all()
    for point in others(c, points.y):
        values = np.abs(points.y @ worst(points.y, chosen, point))
        assert values.max() <= c.factor * values[chosen].max() * (1 + slack(name))
    assert c.ellipsoid.certificate.gap <= tol
    assert c.factor == pytest.approx(
        proved(kind, rank(name, center(kind)), c.ellipsoid.certificate.gap), rel=tolerances.DRAWN_IN
    )


@given(seed=SEEDS, n=st.integers(1, 60), d=st.integers(1, 8), shift=st.sampled_from([0.0, 1.0, 30.0]))
@settings(max_examples=25)
def test_every_point_outside_has_its_worst_direction_within_the_factor(seed: int, n: int, d: int, shift: float) -> None:
    points = gaussian(seed, n, d) * np.random.default_rng(seed).uniform(0.1, 1, (n, 1)) + shift
    y = spread(points, min(n, d)).y
    for kind in KINDS:
        c = max_norm_coreset(points, kind)
        chosen = c.indices.numpy()
        for point in others(c, y):
            values = np.abs(y @ worst(y, chosen, point))
            assert values.max() <= c.factor * values[chosen].max() * (1 + ROUNDING)


@pytest.mark.parametrize("d", [2, 5, 20])
def test_the_factor_of_the_support_is_attained(d: int) -> None:
    """The ball is the ellipsoid of the unit vectors and of a point just inside, which x = 1 sees √d times as long."""
    points = np.concatenate([np.eye(d), np.full((1, d), (1 - 1e-3) / math.sqrt(d))])
    c = max_norm_coreset(points, tol=1e-12)
    assert c.indices.tolist() == list(range(d))
    ratio = np.abs(points @ np.ones(d)).max() / np.abs(points[c.indices] @ np.ones(d)).max()
    assert c.factor * (1 - 2e-3) <= ratio <= c.factor


@pytest.mark.parametrize("kind", KINDS)
def test_many_points_and_dimensions(kind: Kind) -> None:
    for n, d in ((20_000, 3), (400, 20)):
        points = spread(gaussian(0, n, d), d)._replace(directions=gaussian(2, d, 200), turned=gaussian(3, d, 200))
        c = max_norm_coreset(points.points, kind)
        assert len(c.indices) <= {"support": d * (d + 1) // 2 + 1, "axes": d * (d + 1)}.get(kind, 2 * d * (d + 1))
        assert (points.reach() <= c.factor * points.reach(c.indices.numpy()) * (1 + ROUNDING)).all()


# Centres


@pytest.mark.parametrize("name", [name for name in CLOUDS if rank(name, "free") > 0])
def test_a_free_centre_keeps_widths_as_well(name: str) -> None:
    """max pᵀx − min pᵀx, by the same factor: the hull of the coreset holds the ellipsoid shrunk about its centre."""
    c = coreset(name, "caratheodory")
    a = cloud(name).astype(np.float64) - cloud(name)[0]
    size = np.abs(a).max(0)
    along = a / np.where(size > 0, size, 1) @ gaussian(4, a.shape[1], 10_000)
    assert (np.ptp(along, axis=0) <= c.factor * np.ptp(along[c.indices], axis=0) * (1 + 10 * slack(name))).all()


def test_only_a_free_centre_keeps_widths() -> None:
    """About the origin, far outside of the hull, the farthest point stands for all on its line."""
    points = 1000 + np.arange(10.0)[:, None]
    for kind in ("support", "axes"):
        assert max_norm_coreset(points, kind, tol=1e-12).indices.tolist() == [9]
    c = max_norm_coreset(points, "caratheodory")
    assert c.indices.tolist() == [0, 9]
    assert c.factor == pytest.approx(1, rel=tolerances.MAX_NORM)


def test_a_line_that_misses_the_origin_is_its_two_ends() -> None:
    """Of rank 2 about the origin, where the factor is √2 or 2; with a free centre it is 1, whatever x."""
    points = 50 * gaussian(0, 1, 4) + np.outer(np.linspace(-1, 1, 21), gaussian(1, 1, 4))
    c = max_norm_coreset(points, "caratheodory")
    assert c.indices.tolist() == [0, 20]
    assert c.factor == pytest.approx(1, rel=tolerances.MAX_NORM)
    along = np.abs(points @ gaussian(2, 4, 10_000))
    assert (along.max(0) <= along[c.indices].max(0) * (1 + ROUNDING)).all()
    assert max_norm_coreset(points, "support").factor == pytest.approx(math.sqrt(2), rel=tolerances.MAX_NORM)
    assert max_norm_coreset(points, "axes").factor == pytest.approx(2, rel=tolerances.MAX_NORM)


def test_points_that_are_all_one() -> None:
    for points in (np.full((5, 3), 0.3), np.zeros((4, 2)), np.array([[2.0, -1.0]])):
        for kind in KINDS:
            c = max_norm_coreset(points, kind)
            assert c.factor == pytest.approx(1, abs=tolerances.DRAWN_IN)
            assert len(c.indices) >= 1
        assert max_norm_coreset(points, "caratheodory").indices.tolist() == [0]


# Symmetries


@st.composite
def instances(draw: st.DrawFn) -> tuple[Points, Points, Kind, int]:
    """Points, an invertible matrix of condition below a thousand, a kind and a seed."""
    seed, d = draw(SEEDS), draw(st.integers(1, 5))
    n = draw(st.integers(d + 1, 60))
    U, _, V = np.linalg.svd(gaussian(seed + 1, d, d))
    A = (U * np.random.default_rng(seed).uniform(0.03, 30, d)) @ V
    return gaussian(seed, n, d), A, draw(st.sampled_from(KINDS)), seed


@given(instances())
def test_an_invertible_map_of_the_points_keeps_the_factor(instance: tuple[Points, Points, Kind, int]) -> None:
    """And the image's coreset is one of the points: pᵀAx is the image's value in direction x."""
    points, A, kind, seed = instance
    c, image = max_norm_coreset(points, kind), max_norm_coreset(points @ A, kind)
    assert image.factor == pytest.approx(c.factor, rel=2 * tolerances.MAX_NORM)
    along = np.abs(points @ gaussian(seed + 2, len(A), 1000))
    assert (along.max(0) <= image.factor * along[image.indices].max(0) * (1 + ROUNDING)).all()


@given(instances())
def test_order_and_signs_change_nothing_about_the_origin(instance: tuple[Points, Points, Kind, int]) -> None:
    points, _, kind, seed = instance
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(points))
    signs = rng.choice([-1.0, 1.0], (len(points), 1)) if center(kind) == "origin" else 1.0
    c, same = max_norm_coreset(points, kind), max_norm_coreset((signs * points)[order], kind)
    assert same.factor == pytest.approx(c.factor, rel=2 * tolerances.MAX_NORM)
    along = np.abs(points @ gaussian(seed + 2, points.shape[1], 1000))
    assert (along.max(0) <= same.factor * along[order[same.indices]].max(0) * (1 + ROUNDING)).all()


# Inputs


@pytest.mark.parametrize("kind", KINDS)
def test_all_forms_of_the_same_points_give_the_same_answer(kind: Kind, tmp_path: Path) -> None:
    points = gaussian(0, 100, 4).astype(np.float32)
    file = np.memmap(tmp_path / "points", dtype=np.float32, mode="w+", shape=points.shape)
    file[:] = points
    file.flush()
    c = max_norm_coreset(points.astype(np.float64), kind)
    forms: list[Any] = [points, torch.from_numpy(points), torch.from_numpy(points).requires_grad_()]
    forms += [np.asfortranarray(points), np.memmap(tmp_path / "points", dtype=np.float32, mode="r", shape=(100, 4))]
    for form in forms:
        same = max_norm_coreset(form, kind)
        assert torch.equal(same.indices, c.indices)
        assert same.factor == pytest.approx(c.factor, rel=ROUNDING)
        assert not same.ellipsoid.generator.requires_grad
    whole_numbers = np.array(list(itertools.product([-2, 0, 1], repeat=3)))
    c, same = max_norm_coreset(whole_numbers, kind), max_norm_coreset(whole_numbers.astype(np.float64), kind)
    assert torch.equal(same.indices, c.indices)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_call_gives_the_same_indices_and_leaves_its_input_alone(kind: Kind) -> None:
    points = torch.from_numpy(gaussian(0, 200, 5))
    before = points.clone()
    first, second = max_norm_coreset(points, kind), max_norm_coreset(points, kind)
    assert torch.equal(first.indices, second.indices)
    assert first.factor == second.factor
    assert torch.equal(points, before)


@pytest.mark.parametrize(
    ("points", "arguments", "error", "words"),
    [
        (np.eye(3), {"kind": "axis"}, InvalidInput, "'support', 'axes' or 'caratheodory', found 'axis'"),
        (np.eye(3), {"kind": None}, InvalidInput, "kind.*found None"),
        (np.array([[1.0, math.nan]]), {}, NonFinite, "1 of 2 entries"),
        (np.array([[math.inf], [1.0]]), {"kind": "axes"}, NonFinite, "1 of 2"),
        (np.zeros((0, 3)), {"kind": "caratheodory"}, EmptyInput, r"\[0, 3\]"),
        (np.zeros((3, 0)), {}, EmptyInput, r"\[3, 0\]"),
        (np.zeros(3), {}, ShapeMismatch, "expected a matrix"),
        (np.eye(3) * 1j, {}, InvalidInput, "real"),
        (np.eye(3), {"tol": 0}, InvalidTolerance, "tol"),
        (np.eye(3), {"tol": math.nan}, InvalidTolerance, "tol"),
    ],
)
def test_errors_say_what_is_wrong(
    points: Points, arguments: dict[str, Any], error: type[ConvexPruneError], words: str
) -> None:
    with pytest.raises(error, match=words):
        max_norm_coreset(points, **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_an_accelerator(kind: Kind) -> None:
    for name in ("gaussian", "low rank", "columns of all sizes", "one point"):
        c, (points, top) = max_norm_coreset(torch.tensor(cloud(name)).cuda(), kind), whole(name)
        assert c.indices.device.type == "cuda"
        assert c.factor == pytest.approx(coreset(name, kind).factor, rel=2 * tolerances.MAX_NORM)
        assert (top <= c.factor * points.reach(c.indices.cpu().numpy()) * (1 + slack(name))).all()


def dyadic(seed: int) -> torch.Tensor:
    """Points [n, d] on a grid of 2⁻²⁰, so that moves by some 2²⁷ round nothing: pairs, lines, clusters."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).clamp(-4, 4)

    n, d = int(torch.randint(2, 12, (), generator=rng)), int(torch.randint(1, 5, (), generator=rng))
    points = (normal(2, 2), normal(n, d), normal(n, 1) @ normal(1, d) / 4, normal(n, d) / 2**14)[seed % 4]
    return (torch.cat([points, points[:1]]) * 2**20).round() / 2**20


@pytest.mark.parametrize("kind", KINDS)
def test_points_far_from_the_origin_are_taken(kind: Kind) -> None:
    """At 1e8 the centre is rounded to 1e-8 of the spread, and coordinates about the origin have a condition of 1e8."""
    for seed in range(16):
        points = dyadic(seed)
        shift = (gaussian(seed, 1, points.shape[1]) * 2**27).round()
        far = max_norm_coreset(points + torch.from_numpy(shift), kind)
        assert far.factor >= 1
        if kind == "caratheodory":  # widths do not see a move
            near = max_norm_coreset(points, kind)
            assert far.factor == pytest.approx(near.factor, rel=tolerances.MAX_NORM)
            along = (points - points[0]) @ torch.from_numpy(gaussian(seed, points.shape[1], 200))
            width, kept = (a.amax(0) - a.amin(0) for a in (along, along[far.indices]))
            assert bool((width <= far.factor * kept * (1 + tolerances.FAR)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_units_and_order_of_far_points_do_not_matter(kind: Kind) -> None:
    for seed in range(8):
        points = dyadic(seed) + 2.0**27
        found = max_norm_coreset(points, kind)
        scaled = max_norm_coreset(points * 2.0**-40, kind)
        assert torch.equal(scaled.indices, found.indices)
        turned = max_norm_coreset(points.flip(0), kind)
        assert turned.factor == pytest.approx(found.factor, rel=tolerances.MAX_NORM)
