"""Calls of ``lowner_ellipsoid``: what is taken and refused, limits, solvers of others, what comes back."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clouds import cloud, gaussian
from tolerances import EXACT, ROUNDING
from torch import Tensor

from convexprune.solvers.certificate.solution import Status, TracePoint
from convexprune.solvers.errors import (
    ConvexPruneError,
    EmptyInput,
    InvalidInput,
    InvalidTolerance,
    NonFinite,
    ShapeMismatch,
    SolverRefused,
    UnknownOption,
    UnknownSolver,
)
from convexprune.solvers.geometry.cloud import Cloud
from convexprune.solvers.geometry.ellipsoid import LownerEllipsoid, lowner_ellipsoid
from convexprune.solvers.methods.interface import Limits, Proposal, Start, Watch

CENTERS = ("origin", "free")


def around(points: Any, tol: float = 1e-3, **options: Any) -> LownerEllipsoid:
    return lowner_ellipsoid(points, tol, **options)


def spread(e: LownerEllipsoid, n: int) -> Tensor:
    """The weights [n] of an ellipsoid around n points."""
    return torch.zeros(n, dtype=torch.float64).index_put((e.support,), e.weights)


# Limits


def test_a_callback_sees_what_was_judged_and_stops() -> None:
    seen: list[TracePoint] = []

    def stop(point: TracePoint) -> bool:
        seen.append(point)
        return len(seen) == 2

    e = around(cloud("gaussian"), 1e-6, solver="khachiyan", callback=stop)
    assert e.status is Status.STOPPED
    assert tuple(seen) == e.trace
    assert len(seen) == 2
    assert e.log_volume == seen[-1].value
    assert all(p.gap == pytest.approx(p.residuals["gap"], rel=1e-6) for p in seen)
    assert all(p.value - p.bound == pytest.approx(3 * math.log1p(p.gap), rel=ROUNDING) for p in seen)


def test_a_callback_sees_a_solve_of_few_passes_from_its_first_one() -> None:
    points, seen = gaussian(0, 30_000, 5), []
    e = around(points, 1e-6, callback=seen.append)
    assert e.status is Status.SOLVED
    assert [point.iteration for point in seen][:2] == [1, 4]
    assert seen[0].gap > 1e-3
    stopped = around(points, 1e-6, callback=lambda _: True)
    assert (stopped.status, stopped.iterations) == (Status.STOPPED, 1)


def test_limits_set_the_status() -> None:
    points = cloud("gaussian")
    one = around(points, 1e-9, max_passes=1)
    assert (one.status, one.iterations) == (Status.ITERATION_LIMIT, 1)
    late = around(points, 1e-9, solver="khachiyan", time_limit=1e-9)
    assert late.status is Status.TIME_LIMIT
    for e in (one, late):
        assert float(e.norms(points).max()) <= 1 + ROUNDING
        assert e.certificate.bound <= around(points).log_volume
    assert e.provenance["limits"]["time_limit"] == 1e-9
    assert one.seconds.setup > 0


@pytest.mark.parametrize(
    ("points", "error", "words"),
    [
        (np.array([[1.0, math.nan]]), NonFinite, "1 of 2 entries are NaN or infinite"),
        (np.array([[math.inf], [1.0]]), NonFinite, "1 of 2"),
        (np.zeros((0, 3)), EmptyInput, r"\[0, 3\]"),
        (np.zeros((3, 0)), EmptyInput, r"\[3, 0\]"),
        (np.zeros(3), ShapeMismatch, "expected a matrix"),
        (np.zeros((2, 2, 2)), ShapeMismatch, r"\[2, 2, 2\]"),
        (np.zeros((2, 2), complex), InvalidInput, "real"),
        (np.eye(2, dtype=object), InvalidInput, "found one of object"),
        (np.ma.masked_less(np.eye(2), 1), InvalidInput, "masked entries"),
        (torch.eye(3).to_sparse(), InvalidInput, "dense tensor, found torch.sparse_coo"),
        (torch.eye(3, device="meta"), InvalidInput, "without data"),
        (3e307 * gaussian(0, 30, 3), InvalidInput, "expected 1e-300 to 1e300: rescale"),
        (1e-310 * gaussian(0, 30, 3), InvalidInput, "expected 1e-300 to 1e300: rescale"),
        ("points", InvalidInput, "expected a tensor or a numeric array"),
    ],
)
def test_points_it_cannot_take(points: Any, error: type[ConvexPruneError], words: str) -> None:
    with pytest.raises(error, match=words):
        around(points)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"tol": 0}, InvalidTolerance, "tol"),
        ({"tol": -1e-3}, InvalidTolerance, "tol"),
        ({"tol": math.nan}, InvalidTolerance, "tol"),
        ({"tol": math.inf}, InvalidTolerance, "tol"),
        ({"max_passes": 0}, InvalidTolerance, "max_passes: expected a whole number ≥ 1"),
        ({"max_passes": 1.5}, InvalidTolerance, "max_passes"),
        ({"time_limit": 0}, InvalidTolerance, "time_limit"),
        ({"center": "mean"}, InvalidInput, "'origin' or 'free', found 'mean'"),
        ({"center": np.zeros(3)}, InvalidInput, "'origin' or 'free', found array"),
        ({"callback": 3}, InvalidInput, "callback: expected a function"),
        ({"weights": np.ones(29)}, ShapeMismatch, r"expected \[30\].*found shape \[29\]"),
        ({"weights": np.ones((30, 1))}, ShapeMismatch, r"\[30, 1\]"),
        ({"weights": np.arange(30.0) - 1}, InvalidInput, "numbers ≥ 0"),
        ({"weights": np.zeros(30)}, InvalidInput, "at least one positive"),
        ({"weights": np.full(30, math.nan)}, NonFinite, "weights"),
        ({"solver": "working-sets"}, UnknownSolver, "did you mean 'working-set'"),
        ({"largset": 10}, UnknownOption, "did you mean 'largest'"),
        ({"largest": 0}, InvalidTolerance, "largest"),
        ({"solver": "multiplicative", "power": -1}, InvalidTolerance, "power"),
        ({"solver": 3}, InvalidInput, "a name or an instance"),
    ],
)
def test_arguments_it_cannot_take(arguments: dict[str, Any], error: type[ConvexPruneError], words: str) -> None:
    with pytest.raises(error, match=words):
        around(gaussian(0, 30, 3), **arguments)


def test_cvxpy_needs_a_backend_that_is_there() -> None:
    pytest.importorskip("cvxpy", reason="cvxpy is not installed")
    with pytest.raises(SolverRefused, match="not 'SIMPLEX'"):
        around(gaussian(0, 30, 3), solver="cvxpy", backend="SIMPLEX")
    e = around(gaussian(0, 30, 3), solver="cvxpy", backend="scs", settings={"eps_abs": 1e-6})
    assert e.status is Status.SOLVED
    assert e.provenance["effective"]["settings"]["eps_abs"] == 1e-6


def test_cvxpy_says_which_limit_it_ran_into() -> None:
    pytest.importorskip("cvxpy", reason="cvxpy is not installed")
    points = gaussian(0, 300, 4)
    for backend in ("CLARABEL", "SCS"):
        short = around(points, 1e-6, solver="cvxpy", backend=backend, max_passes=3)
        assert short.status is Status.ITERATION_LIMIT
    assert around(points, 1e-6, solver="cvxpy", time_limit=1e-3).status is Status.TIME_LIMIT


@pytest.mark.parametrize(("n", "d"), [(200, 1), (1000, 1), (1000, 2), (1000, 3), (500, 8)])
def test_the_reference_solver_takes_clouds_of_its_size(n: int, d: int) -> None:
    pytest.importorskip("cvxpy", reason="cvxpy is not installed")
    for seed in range(2):
        assert around(gaussian(seed, n, d), solver="cvxpy").status is Status.SOLVED


# Solvers of strangers


class Says:
    """A solver that hands back weights as told."""

    def __init__(self, weights: Tensor | None, ended: str = "own rule") -> None:
        self.weights, self.ended = weights, ended

    def refuses(self, program: Cloud) -> str | None:
        return "too many points" if len(program) > 100 else None

    def run(self, program: Cloud, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        return Proposal(self.weights, None, self.ended, 3, 0.0, "done")


def first(n: int, k: int = 1) -> Tensor:
    return (torch.arange(n) < k).double()


@pytest.mark.parametrize(
    ("weights", "status"),
    [
        (None, Status.FAILED),
        (torch.full((60,), math.nan), Status.DIVERGED),
        (first(60), Status.UNCERTIFIED),
        (torch.zeros(60), Status.UNCERTIFIED),
        (-torch.ones(60), Status.UNCERTIFIED),
        (first(60, 3), Status.UNCERTIFIED),
    ],
)
@pytest.mark.parametrize("center", CENTERS)
def test_weights_that_prove_nothing_get_an_honest_status(center: str, weights: Tensor | None, status: Status) -> None:
    e = around(gaussian(0, 60, 4), center=center, solver=Says(weights))
    assert e.status is status
    assert (e.log_volume, e.volume_factor, e.certificate.bound) == (math.inf, math.inf, -math.inf)
    assert e.rank == 4
    assert not bool(e.contains(gaussian(0, 60, 4)).any())
    assert json.dumps(e.to_dict())


def test_weights_that_are_singular_up_to_rounding_prove_next_to_nothing() -> None:
    points = np.concatenate([np.linspace(0.1, 1, 30)[:, None] * gaussian(0, 1, 40), gaussian(1, 60, 40)])
    e = around(points, solver=Says(first(90, 30)))
    assert e.status is Status.UNCERTIFIED
    assert e.log_volume == math.inf
    e = around(points, solver=Says(first(90, 60)))
    assert e.status is Status.UNCERTIFIED
    assert e.volume_factor == math.inf
    assert e.certificate.bound <= around(points).log_volume
    assert json.dumps(e.to_dict())


def test_a_solver_of_ones_own_is_judged_like_any_other() -> None:
    points = gaussian(0, 60, 4)
    u = spread(around(points, 1e-6), 60)
    for weights in (u, 3 * u, u.float(), (u - 1e-13 * u.max()).requires_grad_().detach()):
        e = around(points, 1e-4, solver=Says(weights))
        assert e.status is Status.SOLVED
        assert float(e.weights.sum()) == pytest.approx(1, rel=EXACT)
        assert (e.iterations, e.provenance["solver"], e.provenance["message"]) == (3, "Says", "done")
    even = around(points, 1e-4, solver=Says(torch.ones(60), ended="iteration limit"))
    assert even.status is Status.ITERATION_LIMIT
    assert math.isfinite(even.log_volume)
    with pytest.raises(SolverRefused, match="too many points"):
        around(gaussian(0, 101, 3), solver=Says(None))
    with pytest.raises(ShapeMismatch, match=r"expected \[60\] from the solver, found shape \[59\]"):
        around(points, solver=Says(torch.ones(59)))


# What it takes, and gives


@pytest.mark.parametrize("center", CENTERS)
def test_every_kind_of_array_gives_the_same(center: str, tmp_path: Path) -> None:
    points = gaussian(0, 200, 5).astype(np.float32).astype(np.float64)
    expected = around(points, center=center)
    file = np.memmap(tmp_path / "points", dtype=np.float64, mode="w+", shape=points.shape)
    file[:] = points
    file.flush()
    wide = np.zeros((200, 10))
    wide[:, ::2] = points
    single = points.astype(np.float32)
    kinds: list[Any] = [torch.from_numpy(points), torch.from_numpy(single), single]
    kinds += [np.memmap(tmp_path / "points", dtype=np.float64, mode="r", shape=points.shape), points.astype(">f8")]
    kinds += [wide[:, ::2], np.asfortranarray(points), points[::-1][::-1], torch.from_numpy(points).requires_grad_()]
    for kind in kinds:
        e = around(kind, center=center)
        assert e.log_volume == pytest.approx(expected.log_volume, rel=ROUNDING)
        assert {t.dtype for t in (e.center, e.generator, e.inverse, e.weights)} == {torch.float64}
        assert e.generator.requires_grad is False
    whole = np.round(10 * points)
    for kind in (np.int64, np.int8):
        e = around(whole.astype(kind), center=center)
        assert e.log_volume == pytest.approx(around(whole, center=center).log_volume, rel=ROUNDING)


@pytest.mark.parametrize("center", CENTERS)
def test_the_same_call_gives_the_same_bits_and_leaves_its_input_alone(center: str) -> None:
    points = gaussian(0, 500, 6)
    points.flags.writeable = False
    before = points.copy()
    first, second = around(points, center=center), around(points, center=center)
    for name in ("center", "generator", "inverse", "support", "weights"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert np.array_equal(points, before)
    tensor = torch.from_numpy(before)
    version = tensor._version
    around(tensor, center=center)
    assert tensor._version == version


def test_what_is_told_is_plain_data() -> None:
    told = json.loads(json.dumps(around(gaussian(0, 50, 3), 1e-3, center="free").to_dict()))
    assert (told["rank"], told["about"], told["status"]) == (3, "free", "solved")
    assert told["volume_factor"] <= 1.001**1.5
    assert told["certificate"]["value"] == told["log_volume"]
    assert told["provenance"]["solver"] == "working-set"
    assert told["provenance"]["options"] == {"largest": 4000}
    assert told["seconds"]["setup"] > 0
    assert "shape" not in told


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("center", CENTERS)
def test_on_an_accelerator(center: str) -> None:
    for name in ("gaussian", "many", "low rank float32", "one point"):
        points = torch.tensor(cloud(name)).cuda()
        e = around(points, 1e-6, center=center)
        assert e.generator.device.type == e.support.device.type == "cuda"
        assert e.log_volume == pytest.approx(around(cloud(name), 1e-6, center=center).log_volume, abs=1e-5)
        assert float(e.norms(points).max()) <= 1 + ROUNDING
