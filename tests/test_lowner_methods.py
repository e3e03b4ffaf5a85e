"""The methods behind ``lowner_ellipsoid``: they agree, keep their own invariants, and start from any weights."""

import math
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from clouds import CLOUDS, cloud, gaussian, rank
from tolerances import EXACT, ROUNDING
from torch import Tensor

from convexprune.solvers.certificate.solution import Status
from convexprune.solvers.geometry import working_set
from convexprune.solvers.geometry.cloud import Cloud, factor
from convexprune.solvers.geometry.ellipsoid import LownerEllipsoid, lowner_ellipsoid
from convexprune.solvers.geometry.method import ELLIPSOIDS, Khachiyan, Multiplicative, WolfeAtwood
from convexprune.solvers.geometry.working_set import WorkingSet, interior_point

NAMES = ("khachiyan", "multiplicative", "wolfe-atwood", "working-set")
CENTERS = ("origin", "free")


def around(points: Any, tol: float = 1e-3, **options: Any) -> LownerEllipsoid:
    return lowner_ellipsoid(points, tol, **options)


def spread(e: LownerEllipsoid, n: int) -> Tensor:
    """The weights [n] of an ellipsoid around n points."""
    return torch.zeros(n, dtype=torch.float64).index_put((e.support,), e.weights)


# Every method


def test_methods_are_known_by_name() -> None:
    known = ELLIPSOIDS.available()
    assert set(known) == {*NAMES, "cvxpy"}
    assert all(info.summary for info in known.values())
    assert known["working-set"].options == {"largest": 4000}


@pytest.mark.parametrize("solver", [*NAMES, "cvxpy"])
@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("name", ["gaussian", "hypercube", "d + 1 points", "low rank", "one dimension, one at 0"])
def test_methods_agree_within_their_certified_gaps(name: str, center: str, solver: str) -> None:
    if solver == "cvxpy":
        pytest.importorskip("cvxpy", reason="cvxpy is not installed")
    best, e = around(cloud(name), 1e-8, center=center), around(cloud(name), 1e-2, center=center, solver=solver)
    assert e.status is Status.SOLVED
    assert e.certificate.gap <= 1e-2
    assert float(e.norms(cloud(name)).max()) <= 1 + ROUNDING
    assert e.certificate.bound - ROUNDING <= best.log_volume <= e.log_volume + e.rank * 1e-8
    assert e.provenance["solver"] == solver


@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize("name", CLOUDS)
def test_every_method_takes_every_cloud(name: str, solver: str) -> None:
    for center in CENTERS:
        e = around(cloud(name), 0.1, center=center, solver=solver, max_passes=10_000)
        assert e.status is Status.SOLVED
        assert e.rank == rank(name, center)
        assert float(e.norms(cloud(name)).max()) <= 1 + tolerances.FAR


def test_multiplicative_steps_never_lower_the_determinant() -> None:
    for name in ("gaussian", "cauchy", "simplex", "clusters"):
        for power in (0.5, 1.0, 8.0):
            method, points = Multiplicative(power=power), Cloud.of(cloud(name), free=True)
            state = method.init(points, None)
            for _ in range(50):
                before = state.log_det
                method.step(state)
                assert state.log_det >= before - EXACT * max(1, abs(before))
                assert float(state.u.sum()) == pytest.approx(1, rel=EXACT)


@pytest.mark.parametrize("method", [Khachiyan(), WolfeAtwood()], ids=["khachiyan", "wolfe-atwood"])
@pytest.mark.parametrize("free", [False, True])
def test_exchange_steps_raise_the_determinant_and_keep_the_leverages(method: Khachiyan, free: bool) -> None:
    points = Cloud.of(cloud("gaussian"), free)
    state = method.init(points, None)
    last = -math.inf
    for step in range(2000):
        method.step(state)
        if step % 100 == 0:
            log_det = float(torch.linalg.slogdet(points.moment(state.u)).logabsdet)
            assert log_det >= last - ROUNDING
            last = log_det
    C = factor(points.moment(state.u))
    assert C is not None
    assert torch.allclose(state.g, points.leverages(C), rtol=tolerances.RANK_ONE, atol=tolerances.RANK_ONE)
    assert torch.allclose(state.inverse, C @ C.T, rtol=tolerances.RANK_ONE, atol=tolerances.RANK_ONE)
    assert float(state.u.sum()) == pytest.approx(1, rel=tolerances.RANK_ONE)
    assert float(state.u @ state.g) == pytest.approx(
        points.size, rel=tolerances.RANK_ONE
    )  # Σ u_i g_i = trace of the identity


@pytest.mark.parametrize("seed", range(10))
def test_the_interior_point_method_reaches_nine_digits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, d, free = int(rng.integers(20, 400)), int(rng.integers(1, 15)), bool(seed % 2)
    rows = gaussian(seed, n, d) if seed % 3 else rng.standard_cauchy((n, d))
    rows = np.concatenate([rows / np.abs(rows).max(0), np.ones((n, 1))], axis=1) if free else rows / np.abs(rows).max(0)
    points = Cloud(torch.from_numpy(rows), None, free)
    u, g = interior_point(points, torch.ones(n, dtype=torch.float64), tolerances.INTERIOR)
    assert bool((u >= 0).all())
    C = factor(points.moment(u / u.sum()))
    assert C is not None
    again = points.leverages(C)
    assert float(again.max()) - points.size <= 2 * tolerances.INTERIOR * points.size
    assert torch.allclose(g * u.sum(), again, rtol=1e-6)
    assert float((u / u.sum() * (again - points.size).abs()).sum()) <= 2 * tolerances.INTERIOR * points.size


@pytest.mark.parametrize("copied", [2**25, 0])
@pytest.mark.parametrize("center", CENTERS)
def test_a_set_too_large_for_newton_is_solved_by_multiplicative_steps(
    center: str, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its rows are kept or computed again, and however the set shrinks and grows."""
    monkeypatch.setattr(working_set, "_COPIED", copied)
    points = cloud("gaussian")[:120]
    best = around(points, 1e-8, center=center)
    e = around(points, 1e-3, center=center, largest=1)
    assert e.status is Status.SOLVED
    assert e.provenance["effective"]["largest set"] == 120
    assert best.log_volume - 1e-7 <= e.log_volume <= best.log_volume + 3.5e-3
    method, state = WorkingSet(largest=1), WorkingSet().init(Cloud.of(points, center == "free"), None)
    for _ in range(6):
        method.step(state)
        assert bool((state.chosen.diff() > 0).all())
        C = factor(state.cloud.moment(method.weights(state)))
        assert C is not None
        assert torch.allclose(state.cloud.leverages(C), state.g, rtol=tolerances.RANK_ONE)


def test_few_passes_over_many_points() -> None:
    e = around(gaussian(0, 100_000, 5), 1e-6)
    assert e.status is Status.SOLVED
    assert e.iterations <= 10
    assert e.provenance["effective"]["largest set"] <= 1000


def test_a_gap_below_rounding_is_given_up_soon() -> None:
    e = around(cloud("gaussian"), 1e-15)
    assert e.status in (Status.SOLVED, Status.UNCERTIFIED)
    assert e.certificate.gap <= 1e-11
    assert e.iterations < 100


# Starts


@pytest.mark.parametrize("solver", NAMES)
def test_a_warm_start_saves_steps(solver: str) -> None:
    points = gaussian(0, 5000, 4)
    tol = 1e-3 if solver != "khachiyan" else 1e-1
    cold = around(points, tol, solver=solver)
    u = spread(around(points, tol / 100, solver="working-set"), len(points)).numpy()
    warm = around(points, tol, solver=solver, weights=7 * u)
    assert warm.status is cold.status is Status.SOLVED
    assert warm.iterations < cold.iterations
    assert around(torch.from_numpy(points), tol, solver=solver, weights=torch.from_numpy(u)).status is Status.SOLVED


def test_a_start_that_knows_nothing_leaves_the_set_small() -> None:
    points, even = gaussian(0, 20_000, 5), np.ones(20_000)
    even[0] = 0
    cold, warm = around(points), around(points, weights=even)
    assert warm.provenance["effective"]["largest set"] <= cold.provenance["effective"]["largest set"]
    assert warm.iterations <= cold.iterations + 1


@pytest.mark.parametrize("solver", NAMES)
def test_points_without_weight_in_the_start_may_get_some(solver: str) -> None:
    some = np.repeat([0.0, 1.0], [100, 200])
    assert around(gaussian(0, 300, 4), 1e-2, solver=solver, weights=some).status is Status.SOLVED


@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("rest", [0.0, 1e-300, 1e-30, 1e-14, 1e-6])
def test_weights_that_span_too_little_are_a_start_too(rest: float, center: str, solver: str) -> None:
    weights = np.full(60, rest)
    weights[3] = 1
    e = around(gaussian(0, 60, 4), 1e-2, center=center, solver=solver, weights=weights)
    assert e.status is Status.SOLVED
