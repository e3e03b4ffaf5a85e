"""The eps path: each point certified and equal to its own solve, the curve monotone and convex, the search exact."""

import json
import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from tolerances import AGREEMENT, FEASIBLE, TIGHT
from zoo import FITS, build, infeasible_ceiling

from convexprune.solvers import Ball, LayerProgram, Solution, Status, solve, solve_path
from convexprune.solvers.errors import Infeasible, InvalidInput, InvalidTolerance, MissingExtra, UnknownSolver
from convexprune.solvers.methods import EpsPath, PathPoint, smallest_eps
from convexprune.solvers.methods.admm import ADMM
from convexprune.solvers.programs import ReluLoss

EASY = "relu-ball plain 20x8x5"
RELATIVE = (0.05, 0.3, 0.1, 0.2)


def radii(program: LayerProgram, relative: tuple[float, ...] = RELATIVE) -> list[float]:
    return [share * program.fit.size for share in relative]


def at(program: LayerProgram, eps: float, **limits: Any) -> Solution:
    return solve(replace(program, fit=program.fit.with_eps(eps)), **limits)  # type: ignore[attr-defined]


@cache
def alone(fit: str, eps: float) -> Solution:
    return at(build(f"{fit} plain 60x30x40"), eps)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("solver", "order"), [("admm", "tighten"), ("admm", "loosen"), ("clarabel", "tighten")])
def test_every_point_is_the_solution_of_its_own_program(fit: str, order: Any, solver: str) -> None:
    program = build(f"{fit} plain 60x30x40")
    path = solve_path(program, radii(program), solver, order=order)
    for eps, point in zip(radii(program), path, strict=True):
        assert point.eps == eps
        assert point.solution.status is Status.SOLVED
        assert point.solution.certificate.value == pytest.approx(alone(fit, eps).certificate.value, rel=2 * AGREEMENT)
        assert point.solution.multipliers is None
        assert point.error <= eps * (1 + 2 * FEASIBLE) + TIGHT


@pytest.mark.parametrize("fit", FITS)
def test_the_optimal_value_is_convex_and_falls_as_eps_grows(fit: str) -> None:
    """v(ε) is the value of a convex program under perturbation: bounds lie on or below every chord of values."""
    program = build(f"{fit} plain 200x40x12")
    path = solve_path(program, radii(program, (0.05, 0.1, 0.15, 0.2)))
    points = [(point.eps, point.solution.certificate) for point in path]
    for (_, tight), (_, loose) in pairwise(points):
        assert loose.bound <= tight.value
    for (a, first), (b, middle), (c, last) in zip(points, points[1:], points[2:], strict=False):
        share = (c - b) / (c - a)
        assert middle.bound <= share * first.value + (1 - share) * last.value


def test_warm_starts_pay() -> None:
    program = build("relu-ball plain 200x40x12")
    wanted = radii(program, (0.1, 0.12, 0.14, 0.16, 0.18))
    path = solve_path(program, wanted)
    alone = sum(at(program, eps).iterations for eps in wanted)
    assert sum(point.solution.iterations for point in path) < 0.8 * alone


def test_one_gram_serves_the_whole_path(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    init = ADMM.init
    monkeypatch.setattr(ADMM, "init", lambda self, *rest: made.append(rest) or init(self, *rest))
    program = build(EASY)
    solve_path(program, radii(program))
    assert len(made) == 1


def test_points_come_in_the_order_asked_for_and_the_callback_ends_it() -> None:
    program = build(EASY)
    seen: list[float] = []
    path = solve_path(program, radii(program), callback=lambda point: seen.append(point.eps) or len(seen) == 2)
    assert seen == sorted(radii(program))[:2]
    assert [point.eps for point in path] == [eps for eps in radii(program) if eps in seen]


@pytest.mark.parametrize("solver", ["admm", "quadratic"])
def test_a_path_and_a_search_end_within_a_point_when_asked(solver: str) -> None:
    """What was cut short is the last point of a path, and counts for nothing in a search."""
    program = build("ball plain 60x30x40")
    each = [point.solution.iterations for point in solve_path(program, sorted(radii(program)), solver)]
    answers = iter([*[False] * (each[0] + 5), True])
    path = solve_path(program, radii(program), solver, stop=lambda: next(answers))
    assert [point.eps for point in path] == [eps for eps in radii(program) if eps <= sorted(radii(program))[1]]
    by_eps = sorted(path, key=lambda point: point.eps)
    assert [point.solution.status for point in by_eps] == [Status.SOLVED, Status.STOPPED]

    seen: list[PathPoint] = []
    found = smallest_eps(program, 200, solver, callback=seen.append, stop=lambda: len(seen) == 4)
    enough = [point for point in seen if point.nonzeros <= 200]
    assert len(seen) == 4
    assert enough
    assert found is enough[-1]


def test_the_programs_own_eps_is_not_used() -> None:
    program = build(EASY)
    other = replace(program, fit=program.fit.with_eps(1e-3))  # type: ignore[attr-defined]
    paths = [solve_path(one, radii(program)) for one in (program, other)]
    assert all(torch.equal(a.solution.weights, b.solution.weights) for a, b in zip(*paths, strict=True))


def test_the_error_is_the_distance_that_the_fit_measures() -> None:
    program = build("net-trim plain 20x8x5")
    for point in solve_path(program, radii(program)):
        Z, Y = program.inputs @ point.solution.weights, program.fit.Y
        assert point.error == pytest.approx(float((Z - Y)[Y > 0].norm()))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_the_smallest_eps_is_the_smallest_to_the_width_asked_for(fit: str, share: float) -> None:
    program = build(f"{fit} plain {'20x8x5' if fit == 'net-trim' else '200x40x12'}")  # a set that takes longer
    most = int(share * program.shape[0] * program.shape[1])
    sharp = {"tol": 1e-5, "feas_tol": 1e-6}  # near-optimal points have more nonzeros than optimal ones
    point = smallest_eps(program, most, rtol=0.02, **sharp)
    assert point.nonzeros <= most
    assert point.solution.status is Status.SOLVED
    assert at(program, point.eps / 1.1, **sharp).nonzeros > most


def test_a_path_is_plain_data_and_a_picture() -> None:
    program = build(EASY)
    path = solve_path(program, radii(program))
    assert isinstance(path, EpsPath)
    assert len(path) == 4
    assert json.loads(json.dumps(path.to_dict()))["points"][0]["eps"] == path[0].eps
    axes = path.plot()
    x, y = axes.lines[0].get_data()
    assert list(x) == sorted(x)
    assert sorted(y) == sorted(point.nonzeros for point in path)
    assert path.plot(axes) is axes


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    program = build(EASY)
    path = solve_path(program, radii(program)[:1])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtra, match="pip install"):
        path.plot()


Y = torch.ones(20, 2)
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no eps": (lambda p: solve_path(p, []), InvalidInput, "at least one radius"),
    "negative": (lambda p: solve_path(p, [-1.0]), InvalidTolerance, "found -1"),
    "infinite": (lambda p: solve_path(p, [math.inf]), InvalidTolerance, "found inf"),
    "order": (lambda p: solve_path(p, [1.0], order="up"), InvalidInput, '"tighten" or "loosen", found \'up\''),
    "solver": (lambda p: solve_path(p, [1.0], "none"), UnknownSolver, "none"),
    "a loss": (lambda p: solve_path(replace(p, fit=ReluLoss(p.fit.Y)), [1.0]), InvalidInput, "found ReluLoss"),
    "balls a neuron": (
        lambda p: solve_path(LayerProgram(torch.ones(20, 3), Ball(Y, torch.ones(2))), [1.0]),
        InvalidInput,
        "one eps for the layer",
    ),
    "nonzeros": (lambda p: smallest_eps(p, -1), InvalidInput, "found -1"),
    "out of reach": (lambda p: smallest_eps(infeasible_ceiling(), 0, max_iter=50), Infeasible, "found 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_calls_are_refused_with_a_reason(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(build(EASY))
