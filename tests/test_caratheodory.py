"""Carathéodory: weighted means and points of the hull as combinations of few points, checked by definition."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convexprune.solvers.errors import EmptyInput, InvalidInput, NonFinite, ShapeMismatch, SolverRefused
from convexprune.solvers.geometry import hull
from convexprune.solvers.geometry.hull import Combination, OutsideHull, caratheodory

METHODS = ["classic", "grouped"]
SEEDS = st.integers(0, 10_000)
Randn = Callable[..., Tensor]


def source(seed: int) -> Randn:
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)


def low_rank(draw: Randn, n: int, d: int, r: int) -> Tensor:
    """Small integers times powers of two: the rank is exact."""
    return (3 * draw(n, r)).round() @ (3 * draw(r, d)).round() * (13 * draw(d)).round().exp2()


def outlier(draw: Randn, n: int, d: int) -> Tensor:
    P = draw(n, d)
    P[n // 2] *= 1e8
    return P


CLOUDS: dict[str, Callable[[Randn, int, int], Tensor]] = {
    "gaussian": lambda draw, n, d: draw(n, d),
    "sphere": lambda draw, n, d: torch.nn.functional.normalize(draw(n, d), dim=1),
    "cube": lambda draw, n, d: draw(n, d).sign(),
    "duplicates": lambda draw, n, d: draw(n, d)[torch.arange(n) % max(1, n // 3)],
    "all equal": lambda draw, n, d: draw(1, d).expand(n, d),
    "scales": lambda draw, n, d: draw(n, d) * torch.logspace(-8, 8, d, dtype=torch.float64),
    "far away": lambda draw, n, d: 1e-4 * draw(n, d) + draw(d),
    "moment curve": lambda draw, n, d: torch.linspace(-1, 1, n, dtype=torch.float64)[:, None] ** torch.arange(1, d + 1),
    "thin": lambda draw, n, d: draw(n, d) @ torch.diag(10 ** (-6 * draw(d).abs().clamp(max=1))) @ draw(d, d),
    "outlier": outlier,
    "half": lambda draw, n, d: draw(n, d).half(),
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "any": lambda u: u,
    "tiny": lambda u: 10 ** (-300 * u),
    "zeros": lambda u: torch.where(u > u.median(), u, 0.0),
    "spread": lambda u: 1e6 * 10 ** (-20 * u),
    "equal": lambda u: torch.full_like(u, 1e-5),
}


def longs(values: Tensor) -> npt.NDArray[np.longdouble]:
    return values.to(torch.float64).numpy().astype(np.longdouble)


def rank(points: Tensor) -> int:
    """The affine rank of points whose coordinates are scaled alike."""
    P = points.to(torch.float64) - points.to(torch.float64).mean(0)
    return int(np.linalg.matrix_rank((P / P.abs().amax(0).clamp(min=2**-1000)).numpy(), tol=1e-9))


def check_choice(found: Combination, n: int, most: int) -> None:
    """Form alone: few enough, ascending, positive."""
    indices, weights = found
    assert indices.dtype == torch.int64
    assert weights.dtype == torch.float64
    assert 1 <= len(indices) == len(weights) <= most
    assert bool((indices.diff() > 0).all())
    assert 0 <= int(indices.min()) <= int(indices.max()) < n
    assert bool((weights > 0).all())


def check_mean(found: Combination, points: Tensor, u: Tensor, most: int) -> None:
    """Σw = Σu, Σwp = Σup and a support within that of u, in extended precision, about the mean."""
    check_choice(found, len(points), most)
    assert bool((u[found.indices] > 0).all())
    P, v, w, carried = longs(points), longs(u), longs(found.weights), (u > 0).numpy()
    assert abs(w.sum() - v.sum()) <= tolerances.HULL_TOTAL * v.sum()
    near = P - P[carried][0]
    centred = near - v @ near / v.sum()
    reach = np.abs(centred[carried]).max(0)
    assert (np.abs(w @ centred[found.indices.numpy()]) <= tolerances.HULL_MEAN * reach * v.sum()).all()


def check_target(found: Combination, points: Tensor, target: Tensor, most: int) -> None:
    check_choice(found, len(points), most)
    P, w = longs(points), longs(found.weights)
    assert abs(w.sum() - 1) <= tolerances.HULL_TOTAL
    half = (P.max(0) - P.min(0)) / 2
    unit = np.where(half > 0, half, np.abs(P).max()).clip(2.0**-1000)
    error = np.abs(w @ (P[found.indices.numpy()] - longs(target))) / unit
    assert error.max() <= tolerances.HULL_TARGET + tolerances.HULL_STORED * (np.abs(longs(target)) / unit).max()


def check_plane(error: OutsideHull, points: Tensor, target: Tensor) -> None:
    """Every point is beyond the plane, seen from the target."""
    assert error.direction.dtype == torch.float64
    assert float(error.direction.norm()) == pytest.approx(1, rel=tolerances.HULL_TOTAL)
    assert error.margin > 0
    heights = longs(points - target) @ longs(error.direction)
    assert heights.max() <= -error.margin


# Weighted means


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cloud", CLOUDS)
@given(seed=SEEDS, n=st.integers(1, 200), d=st.integers(1, 12), kind=st.sampled_from(sorted(WEIGHTS)))
@settings(max_examples=12)
def test_totals_and_means_are_kept_by_few_points(cloud: str, method: str, seed: int, n: int, d: int, kind: str) -> None:
    draw = source(seed)
    P = CLOUDS[cloud](draw, n, d)
    u = WEIGHTS[kind](draw(n).abs().clamp(1e-3, 1))
    u[0] += 0.1
    check_mean(caratheodory(P, u, method=method), P, u, d + 1)


@pytest.mark.parametrize("method", METHODS)
@given(seed=SEEDS, n=st.integers(1, 200), d=st.integers(1, 10), r=st.integers(1, 10))
def test_points_of_low_rank_need_one_more_than_it(method: str, seed: int, n: int, d: int, r: int) -> None:
    draw = source(seed)
    P, u = low_rank(draw, n, d, min(r, d)), draw(n).abs()
    check_mean(caratheodory(P, u, method=method), P, u, rank(P) + 1)
    check_target(caratheodory(P, target=P[: min(n, 5)].mean(0)), P, P[: min(n, 5)].mean(0), rank(P) + 1)


@pytest.mark.parametrize("method", METHODS)
def test_many_levels_of_many_points(method: str) -> None:
    n, d = (200_000, 10) if method == "grouped" else (3_000, 10)
    draw = source(0)
    P, u = draw(n, d) + 1e3, draw(n).square()
    check_mean(caratheodory(P, u, method=method), P, u, d + 1)


@pytest.mark.parametrize("method", METHODS)
def test_many_dimensions(method: str) -> None:
    draw = source(1)
    P, u = draw(600, 80), draw(600).abs()
    check_mean(caratheodory(P, u, method=method), P, u, 81)


@pytest.mark.parametrize("method", METHODS)
def test_points_are_equally_heavy_without_weights(method: str) -> None:
    P = source(2)(100, 3)
    found = caratheodory(P, method=method)
    check_mean(found, P, torch.full((100,), 0.01, dtype=torch.float64), 4)
    assert float(found.weights.sum()) == pytest.approx(1, rel=tolerances.HULL_TOTAL)


@pytest.mark.parametrize("method", METHODS)
def test_independent_points_stay_as_they_are(method: str) -> None:
    P, u = torch.eye(5), torch.tensor([1.0, 2, 0, 4, 5])
    indices, weights = caratheodory(P, u, method=method)
    assert indices.tolist() == [0, 1, 3, 4]
    torch.testing.assert_close(
        weights, torch.tensor([1.0, 2, 4, 5], dtype=torch.float64), rtol=tolerances.HULL_TOTAL, atol=0
    )


@pytest.mark.parametrize("method", METHODS)
def test_equal_points_become_one_of_them_and_one_point_stays(method: str) -> None:
    for n in (1, 50):
        indices, weights = caratheodory(torch.full((n, 3), 0.1), torch.arange(1.0, n + 1), method=method)
        assert len(indices) == 1
        assert float(weights[0]) == pytest.approx(n * (n + 1) / 2, rel=tolerances.HULL_TOTAL)


@given(seed=SEEDS)
def test_any_order_of_the_points_will_do(seed: int) -> None:
    draw = source(seed)
    P, u = draw(90, 4), draw(90).abs()
    order = draw(90).argsort()
    for method in METHODS:
        check_mean(caratheodory(P[order], u[order], method=method), P[order], u[order], 5)
    check_target(caratheodory(P[order], target=P[:9].mean(0)), P[order], P[:9].mean(0), 5)


@pytest.mark.parametrize("method", METHODS)
def test_extreme_weights_and_coordinates_neither_overflow_nor_underflow(method: str) -> None:
    draw = source(3)
    P, u = draw(60, 3).clamp(-1, 1), draw(60).abs()
    for size, heavy in ((1e150, 1e300), (1.7e308, 1.0), (1e-300, 1e-290)):
        indices, weights = caratheodory(P * size, u * heavy, method=method)
        check_mean(Combination(indices, weights / heavy), P, u, 4)


# Targets


@pytest.mark.parametrize("cloud", CLOUDS)
@given(seed=SEEDS, n=st.integers(1, 200), d=st.integers(1, 12), mixed=st.integers(1, 20))
@settings(max_examples=12)
def test_points_of_the_hull_are_reached(cloud: str, seed: int, n: int, d: int, mixed: int) -> None:
    """A mixture of one point is a vertex, one of a few is near the boundary, one of many is inside."""
    draw = source(seed)
    P = CLOUDS[cloud](draw, n, d).to(torch.float64)
    w = draw(min(n, mixed)).abs()
    chosen = draw(n).argsort()[: len(w)]
    t = P[chosen[0]] + w / w.sum() @ (P[chosen] - P[chosen[0]])
    check_target(caratheodory(P, target=t), P, t, d + 1)


@given(seed=SEEDS, d=st.integers(1, 8))
def test_a_vertex_is_itself(seed: int, d: int) -> None:
    """±10 along each axis, among points of the unit ball and in any order."""
    draw = source(seed)
    P = torch.cat([10 * torch.eye(d), -10 * torch.eye(d), torch.nn.functional.normalize(draw(50, d), dim=1)])
    P = P[draw(len(P)).argsort()]
    for vertex in (P.norm(dim=1) > 5).nonzero()[:, 0].tolist():
        indices, weights = caratheodory(P, target=P[vertex])
        assert (indices.tolist(), weights.tolist()) == ([vertex], [1.0])


@given(seed=SEEDS, d=st.integers(2, 8), power=st.floats(-13, 1), outside=st.booleans())
def test_targets_just_inside_a_face_are_reached_and_those_just_outside_refused(
    seed: int, d: int, power: float, outside: bool
) -> None:
    """Points below the plane x₀ = 0, and a face in it: the distance of a target above its middle is known."""
    draw = source(seed)
    face, others = draw(3 * d, d), draw(100, d)
    face[:, 0], others[:, 0] = 0, -others[:, 0].abs() - 0.1
    P, t = torch.cat([others, face]), face.mean(0)
    t[0] = 10**power if outside else -min(10**power, 1e-2)
    if not outside or 10**power <= tolerances.HULL_TARGET / 10:
        check_target(caratheodory(P, target=t), P, t, d + 1)
    if outside and 10**power >= tolerances.HULL_OUTSIDE:
        with pytest.raises(OutsideHull, match=r"at least .* outside") as refused:
            caratheodory(P, target=t)
        check_plane(refused.value, P, t)
        assert 10**power * (1 - tolerances.HULL_MARGIN) <= refused.value.margin <= 10**power


@pytest.mark.parametrize("cloud", CLOUDS)
@given(seed=SEEDS, n=st.integers(1, 100), d=st.integers(1, 8), power=st.floats(-13, 3))
@settings(max_examples=15)
def test_every_answer_is_a_combination_or_a_plane(cloud: str, seed: int, n: int, d: int, power: float) -> None:
    """Beyond a vertex by any amount, scaled like the coordinates: both answers prove themselves."""
    draw = source(seed)
    P = CLOUDS[cloud](draw, n, d).to(torch.float64)
    x = draw(d)
    half = (P.amax(0) - P.amin(0)) / 2
    t = P[(P @ (x / half.clamp(min=2**-1000))).argmax()] + 10**power * x * half
    try:
        check_target(caratheodory(P, target=t), P, t, d + 1)
    except OutsideHull as error:
        check_plane(error, P, t)


def test_points_of_a_plane_do_not_reach_out_of_it() -> None:
    draw = source(4)
    P = torch.cat([draw(50, 2), torch.full((50, 1), 3.0, dtype=torch.float64)], 1)
    t = P[:4].mean(0)
    check_target(caratheodory(P, target=t), P, t, 3)
    t[2] += 1e-6
    with pytest.raises(OutsideHull) as refused:
        caratheodory(P, target=t)
    check_plane(refused.value, P, t)
    assert refused.value.margin == pytest.approx(1e-6, rel=tolerances.HULL_MARGIN)


def test_large_sets_are_searched_in_blocks() -> None:
    draw = source(5)
    P = torch.nn.functional.normalize(draw(200_000, 10).float(), dim=1)
    for t in (P[:2].mean(0), P[7], 0.9 * P[8], P.mean(0)):
        check_target(caratheodory(P, target=t), P, t, 11)
    with pytest.raises(OutsideHull) as refused:
        caratheodory(P, target=2 * P[0])
    check_plane(refused.value, P.to(torch.float64), 2 * P[0])


def test_a_search_that_ends_early_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    P = source(7)(50, 3)
    monkeypatch.setattr(hull, "_STEPS", 0)
    with pytest.raises(SolverRefused, match="rounding"):
        caratheodory(P, target=P.mean(0))


# Inputs


def kinds(tmp_path: Path) -> dict[str, tuple[Any, Any]]:
    """The same points and weights in every form; float32 holds them exactly."""
    draw = source(8)
    P, u = draw(300, 4).float(), draw(300).abs().float()
    file = np.lib.format.open_memmap(tmp_path / "points.npy", mode="w+", dtype=np.float32, shape=(300, 4))
    file[:] = P.numpy()
    file.flush()
    return {
        "torch": (P, u),
        "float64": (P.double(), u.double()),
        "numpy": (P.numpy(), u.numpy()),
        "memmap": (np.load(tmp_path / "points.npy", mmap_mode="r"), u.numpy()),
        "columns": (P.T.contiguous().T, u),
        "gradients": (P.clone().requires_grad_(), u.clone().requires_grad_()),
    }


@pytest.mark.parametrize("method", METHODS)
def test_all_forms_of_the_same_points_give_the_same_answer(tmp_path: Path, method: str) -> None:
    forms = kinds(tmp_path)
    P, u = forms["torch"]
    t = P[:6].mean(0)
    for points, weights in forms.values():
        for found, first in (
            (caratheodory(points, weights, method=method), caratheodory(P, u, method=method)),
            (caratheodory(points, target=t.numpy()), caratheodory(P, target=t)),
        ):
            assert torch.equal(found.indices, first.indices)
            torch.testing.assert_close(
                found.weights, first.weights, rtol=tolerances.HULL_TOTAL, atol=tolerances.HULL_TOTAL
            )


def test_integers_are_points_too() -> None:
    P = np.arange(40).reshape(20, 2) ** 2
    check_mean(caratheodory(P), torch.from_numpy(P).double(), torch.full((20,), 0.05, dtype=torch.float64), 3)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_left_as_they_were(method: str) -> None:
    draw = source(9)
    P, u = draw(400, 3), draw(400).abs()
    t = P.mean(0)
    before = P.clone(), u.clone(), t.clone()
    caratheodory(P, u, method=method)
    caratheodory(P, target=t)
    assert all(torch.equal(a, b) for a, b in zip(before, (P, u, t), strict=True))


@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        (lambda P: caratheodory(P[0]), ShapeMismatch, "expected a matrix"),
        (lambda P: caratheodory(P[:0]), EmptyInput, "at least one row"),
        (lambda P: caratheodory(P / 0), NonFinite, "points"),
        (lambda P: caratheodory(P, method="fast"), InvalidInput, "'classic' or 'grouped', found 'fast'"),
        (lambda P: caratheodory(P, torch.ones(9)), ShapeMismatch, r"expected \[10\], .*found shape \[9\]"),
        (lambda P: caratheodory(P, torch.ones(10, 1)), ShapeMismatch, "one for each of 10 points"),
        (lambda P: caratheodory(P, P[:, 0] / 0), NonFinite, "weights"),
        (lambda P: caratheodory(P, -torch.ones(10)), InvalidInput, "≥ 0, found -1"),
        (lambda P: caratheodory(P, torch.zeros(10)), InvalidInput, "positive finite total, found 0"),
        (lambda P: caratheodory(P, 1e308 * torch.ones(10).double()), InvalidInput, "found inf"),
        (lambda P: caratheodory(P, torch.ones(10), P[0]), InvalidInput, "found both"),
        (lambda P: caratheodory(P, target=P[0, :2]), ShapeMismatch, r"expected shape \[3\].*found \[2\]"),
        (lambda P: caratheodory(P, target=P[:1]), ShapeMismatch, "a point like the others"),
        (lambda P: caratheodory(P, target=P[0] / 0), NonFinite, "target"),
    ],
)
def test_errors_say_what_is_wrong(call: Callable[[Tensor], object], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        call(torch.ones(10, 3))
