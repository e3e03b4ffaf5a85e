"""solve: names, options, limits, every status, what is recorded, and solvers written by others."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import AGREEMENT, EXACT, FEASIBLE, KKT, SINGLE
from torch import Tensor
from zoo import SMALL, build, gaussian, infeasible_ceiling, multipliers, tight

from convexprune.solvers import (
    L1,
    Ball,
    LayerProgram,
    NetTrimSet,
    ReluBall,
    Solution,
    Status,
    available,
    certify,
    register,
    solve,
)
from convexprune.solvers.certificate.solution import TracePoint
from convexprune.solvers.errors import (
    ConvexPruneError,
    InvalidInput,
    InvalidTolerance,
    MissingExtra,
    NonFinite,
    ShapeMismatch,
    SolverRefused,
    UnknownOption,
    UnknownSolver,
)
from convexprune.solvers.methods import IterativeSolver, Proposal, Start, registry
from convexprune.solvers.methods.admm import ADMM
from convexprune.solvers.methods.interface import Limits, Watch
from convexprune.solvers.methods.iterate import PenaltyParameter
from convexprune.solvers.programs.program import Scaling
from convexprune.solvers.testing.layers import layer

EASY = "relu-ball plain 20x8x5"
BUILT_IN = ("admm", "clarabel", "continuation", "cvxpy", "osqp", "published", "quadratic", "scs")


@dataclass(frozen=True)
class Says:
    """A solver that hands back what it is told to, and claims what it is told to."""

    weights: Any = None
    multipliers: Any = None
    ended: str = "own rule"
    message: str = "solved"

    def refuses(self, program: LayerProgram) -> str | None:
        return None

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        weights = None if self.weights is None else torch.full(program.shape, float(self.weights))
        L = None if self.multipliers is None else torch.full(program.fit.shape, float(self.multipliers))
        return Proposal(weights, L, self.ended, 7, 0.0, self.message)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What is registered in a test is gone after it."""
    names = dict(registry.PROGRAMS.factories)
    monkeypatch.setattr(registry.PROGRAMS, "factories", names)
    return names  # type: ignore[return-value]


# Bad calls

BAD_CALLS: dict[str, tuple[dict[str, Any], type[ConvexPruneError], str]] = {
    "unknown solver": ({"solver": "adnm"}, UnknownSolver, "no solver named 'adnm'; did you mean 'admm'?.*clarabel"),
    "nothing like a solver": ({"solver": "zzzz"}, UnknownSolver, "no solver named 'zzzz'.*Known: admm, clarabel"),
    "unknown option": ({"rhoo": 1.0}, UnknownOption, "'admm' has no option 'rhoo'; did you mean 'rho'?.*relaxation"),
    "another's option": ({"threshold": 1.0}, UnknownOption, "'admm' has no option 'threshold'"),
    "option of an instance": ({"solver": ADMM(), "steps": 1}, UnknownOption, "'ADMM' has no option 'steps'"),
    "option of an optionless": ({"solver": Says(), "steps": 1}, UnknownOption, "'Says' has no option 'steps'"),
    "solver a class": ({"solver": ADMM}, InvalidInput, "solver: expected a name or an instance.*class"),
    "solver a number": ({"solver": 3}, InvalidInput, "solver: expected a name or an instance with `refuses` and `run`"),
    "tol < 0": ({"tol": -1e-4}, InvalidTolerance, "tol: expected a finite number ≥ 0, found -0.0001"),
    "tol NaN": ({"tol": float("nan")}, InvalidTolerance, "tol.*nan"),
    "tol inf": ({"tol": float("inf")}, InvalidTolerance, "tol.*inf"),
    "tol text": ({"tol": "small"}, InvalidTolerance, "tol.*'small'"),
    "feas_tol < 0": ({"feas_tol": -1}, InvalidTolerance, "feas_tol"),
    "max_iter 0": ({"max_iter": 0}, InvalidTolerance, "max_iter: expected a whole number ≥ 1 or None, found 0"),
    "max_iter 1.5": ({"max_iter": 1.5}, InvalidTolerance, "max_iter.*1.5"),
    "time_limit 0": ({"time_limit": 0}, InvalidTolerance, "time_limit: expected seconds > 0 or None, found 0"),
    "time_limit NaN": ({"time_limit": float("nan")}, InvalidTolerance, "time_limit"),
    "time_limit text": ({"time_limit": "1 h"}, InvalidTolerance, "time_limit"),
    "relaxation 2": ({"relaxation": 2.0}, InvalidTolerance, "relaxation: expected a number strictly between 0 and 2"),
    "balance < 1": ({"balance": 0.5}, InvalidTolerance, "balance: expected a factor ≥ 1"),
    "rho 0": ({"rho": 0.0}, InvalidTolerance, "rho: expected a positive number"),
    "sigma inf": ({"sigma": float("inf")}, InvalidTolerance, "sigma"),
    "rho text": ({"rho": "big"}, InvalidTolerance, "rho"),
    "restorations -1": ({"restorations": -1}, InvalidTolerance, "restorations: expected a whole number"),
    "restorations 1.5": ({"restorations": 1.5}, InvalidTolerance, "restorations: expected a whole number"),
    "dtype half": ({"dtype": torch.float16}, InvalidInput, "dtype: expected torch.float32, torch.float64 or None"),
    "published dtype": (
        {"solver": "published", "dtype": torch.int32},
        InvalidInput,
        "dtype: expected torch.float32",
    ),
    "published rho": ({"solver": "published", "rho": -1.0}, InvalidTolerance, "rho: expected a positive number"),
    "start transposed": (
        {"start": torch.zeros(5, 8)},
        ShapeMismatch,
        r"start: expected shape \[8, 5\].*found \[5, 8\]",
    ),
    "start NaN": ({"start": torch.full((8, 5), float("nan"))}, NonFinite, "start: 40 of 40"),
    "start's multipliers": (
        {"start": Start(torch.zeros(8, 5), torch.zeros(5, 20))},
        ShapeMismatch,
        r"start multipliers: expected shape \[20, 5\]",
    ),
    "start's multipliers NaN": (
        {"start": Start(torch.zeros(8, 5), torch.full((20, 5), float("nan")))},
        NonFinite,
        "start multipliers",
    ),
    "start text": ({"start": "weights"}, InvalidInput, "start: expected a tensor"),
    "backend of another kind": ({"solver": "cvxpy", "backend": "OSQP"}, SolverRefused, "'OSQP'.*it has.*CLARABEL"),
    "unknown backend": ({"solver": "cvxpy", "backend": "nonsense"}, SolverRefused, "'nonsense'.*Choose another solver"),
    "unknown setting": ({"solver": "clarabel", "settings": {"digits": 9}}, UnknownOption, "digits"),
    "published on the ReLU ball": ({"solver": "published"}, SolverRefused, "NetTrimSet and Ball, not ReluBall"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused_with_a_reason(case: str) -> None:
    arguments, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message) as caught:
        solve(build("net-trim plain 20x8x5" if case in ("published dtype", "published rho") else EASY), **arguments)
    assert caught.type is error


@pytest.mark.parametrize(
    "limits", [{"max_iter": np.int64(20)}, {"tol": np.float32(1e-3)}, {"time_limit": 1}, {"tol": 0, "max_iter": 20}]
)
def test_limits_may_be_numpys_numbers(limits: dict[str, Any]) -> None:
    assert solve(build(EASY), **limits).iterations > 0


# Missing packages


@pytest.mark.parametrize("solver", ["clarabel", "scs", "osqp", "cvxpy"])
def test_a_missing_package_is_named_with_its_command(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, solver, None)
    with pytest.raises(
        MissingExtra, match=rf'{solver}, which is not installed: pip install "convexprune\[reference\]"'
    ):
        solve(build(EASY), solver)
    assert available()[solver].missing == 'pip install "convexprune[reference]"'
    assert available()["admm"].missing is None
    assert solve(build(EASY)).status is Status.SOLVED


def test_the_reference_formulation_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(MissingExtra, match=r"pip install \"convexprune\[reference\]\""):
        build(EASY).to_cvxpy()


# The registry


def test_available_lists_every_solver_with_its_options() -> None:
    listed = available()
    assert tuple(listed) == BUILT_IN
    assert listed["admm"].options == {
        "relaxation": 1.7,
        "rho": None,
        "sigma": None,
        "balance": 1.2,
        "evening": 0.4,
        "sampled": 30,
        "seed": 0,
        "restorations": 2,
        "dtype": None,
        "products": "auto",
    }
    assert set(listed["clarabel"].options) == {"settings"}
    for name, info in listed.items():
        assert info.name == name
        assert len(info.summary) > 20
        assert "\n" not in info.summary
        assert info.missing is None


def test_registered_solvers_are_found_by_name(own_registry: dict[str, Any]) -> None:
    assert register("says")(Says) is Says
    assert available()["says"].options["message"] == "solved"
    assert solve(build(EASY), "says", weights=0.0, message="hello").provenance["message"] == "hello"
    register("says")(Says)  # the same class again


@pytest.mark.parametrize("name", ["admm", "says"])
def test_taken_names_are_refused(name: str, own_registry: dict[str, Any]) -> None:
    register("says")(Says)

    @dataclass(frozen=True)
    class Other(Says):
        pass

    with pytest.raises(InvalidInput, match=f"named '{name}' is registered already; choose another.*replace=True"):
        register(name)(Other)
    assert register(name, replace=True)(Other) is Other
    assert isinstance(registry.make_solver(name, {})[1], Other)


def test_a_class_of_the_same_name_elsewhere_is_another_solver(own_registry: dict[str, Any]) -> None:
    namesake = type("ADMM", (Says,), {"__module__": "somewhere_else"})
    with pytest.raises(InvalidInput, match="'admm' is registered already"):
        register("admm")(namesake)


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, registry.PROGRAMS.group)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that packages with these entry points are installed."""

    def install(*points: EntryPoint) -> None:
        monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])

    return install


def test_solvers_of_installed_packages_are_found(installed: Callable[..., None]) -> None:
    installed(
        point("theirs", "convexprune.solvers.methods.admm:ADMM"),
        point("admm", "convexprune.solvers.methods.published:Published"),
    )
    assert "theirs" in available()
    assert solve(build(EASY), "theirs").provenance["solver"] == "theirs"
    assert isinstance(registry.make_solver("admm", {})[1], ADMM), "an installed package must not replace ours"


def test_a_broken_package_does_not_break_the_others(installed: Callable[..., None]) -> None:
    installed(point("broken", "a_package_that_is_not_there:Solver"))
    assert solve(build(EASY), "admm").status is Status.SOLVED
    assert "admm" in available()


@pytest.mark.parametrize("solver", [ADMM(dtype=torch.float32), Says(0.0)])
def test_instances_need_no_registration(solver: Any) -> None:
    solution = solve(build(EASY), solver)
    assert solution.provenance["solver"] == type(solver).__name__
    assert solution.iterations > 0


def test_options_of_an_instance_can_be_overridden() -> None:
    given = ADMM(relaxation=1.2, balance=3.0)
    solution = solve(build(EASY), given, relaxation=1.5)
    assert given.relaxation == 1.2
    assert (solution.provenance["options"]["relaxation"], solution.provenance["options"]["balance"]) == (1.5, 3.0)


# Statuses


def test_every_status_has_advice() -> None:
    assert len({status.advice for status in Status}) == len(Status) == 9
    assert all(len(status.advice) > 30 and str(status) == status.value for status in Status)


@pytest.mark.parametrize("max_iter", [1, 5, 10, 13, 25])
def test_the_iteration_limit(max_iter: int) -> None:
    solution = solve(build(EASY), tol=0.0, max_iter=max_iter)
    assert (solution.status, solution.iterations) == (Status.ITERATION_LIMIT, max_iter)
    assert solution.trace[-1].iteration == max_iter
    assert solution.certificate.bound > 0


@pytest.mark.parametrize(("solver", "limit"), [("admm", 0.2), ("published", 0.2), ("admm", 1e-9)])
def test_the_time_limit(solver: str, limit: float) -> None:
    """An unreachable tolerance, rules of their own switched off: only the clock can end it."""
    options = {"threshold": 1e-300} if solver == "published" else {}
    began = time.perf_counter()
    solution = solve(
        build("net-trim plain 20x8x5"), solver, tol=0, feas_tol=0, max_iter=200_000, time_limit=limit, **options
    )
    assert limit <= time.perf_counter() - began < limit + 1
    assert solution.status is Status.TIME_LIMIT
    assert solution.seconds.total >= 0.9 * limit


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
@pytest.mark.parametrize(
    ("limits", "status"), [({"max_iter": 2}, Status.ITERATION_LIMIT), ({"time_limit": 1e-5}, Status.TIME_LIMIT)]
)
def test_the_limits_of_other_packages(solver: str, limits: dict[str, Any], status: Status) -> None:
    """They were not content, they were stopped: the advice must say so."""
    assert solve(build("relu-ball plain 60x30x40"), solver, **limits).status is status


def test_stopped_by_the_callback() -> None:
    seen: list[TracePoint] = []

    def second_time(point: TracePoint) -> bool:
        seen.append(point)
        return len(seen) == 2

    solution = solve(build(EASY), tol=0, callback=second_time)
    assert solution.status is Status.STOPPED
    assert solution.trace == tuple(seen)
    assert solution.iterations == seen[-1].iteration == 20


@pytest.mark.parametrize("program", ["relu-ball plain 60x30x40", "ball plain 60x30x40"])
def test_stopped_between_iterations(program: str) -> None:
    """By the first true answer, whatever comes after it: not only where the certificate is due."""
    for asked in (1, 7, 13):
        answers = iter([*[False] * (asked - 1), True])
        solution = solve(build(program), tol=0, stop=lambda: next(answers))  # noqa: B023
        assert solution.status is Status.STOPPED
        assert solution.iterations == asked
        assert not list(answers)


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(InvalidInput, match="stop: expected a function"):
        solve(build(EASY), stop=3)


def test_a_callback_that_says_nothing_stops_nothing() -> None:
    assert solve(build(EASY), callback=lambda point: None).status is Status.SOLVED


@pytest.mark.parametrize("weights", [0.0, 1.0, 1e9])
@pytest.mark.parametrize("L", [None, 0.0, -1.0])
def test_a_lie_is_never_called_solved(weights: float, L: float | None) -> None:
    solution = solve(build(EASY), Says(weights, L))
    assert solution.status is Status.UNCERTIFIED
    assert solution.provenance["message"] == "solved"


@pytest.mark.parametrize(
    ("solver", "status"),
    [
        (Says(float("nan")), Status.DIVERGED),
        (Says(float("inf"), 1.0), Status.DIVERGED),
        (Says(1.0, float("nan")), Status.DIVERGED),
        (Says(1.0, ended="diverged"), Status.DIVERGED),
        (Says(None), Status.FAILED),
        (Says(1.0, ended="iteration limit"), Status.ITERATION_LIMIT),
        (Says(1.0, ended="time limit"), Status.TIME_LIMIT),
    ],
)
def test_other_endings(solver: Says, status: Status) -> None:
    solution = solve(build(EASY), solver)
    assert solution.status is status
    assert solution.weights.shape == (8, 5)
    assert solution.iterations == 7
    json.dumps(solution.to_dict())


def test_the_truth_is_solved_whatever_the_solver_says() -> None:
    """Zero weights where zero is optimal: the status comes from the certificate."""
    solution = solve(build("ball eps 1.5, U = 0"), Says(0.0, ended="diverged", message="failed"))
    assert solution.status is Status.SOLVED


def test_an_impossible_program_is_called_so() -> None:
    solution = solve(infeasible_ceiling())
    assert solution.status is Status.INFEASIBLE
    assert solution.certificate.violation > 1
    assert solution.iterations < 10_000


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_a_backend_that_finds_nothing_proves_it(solver: str) -> None:
    """Its ray is the proof, and the certificate checks it; weights given to start from come back."""
    solution = solve(infeasible_ceiling(), solver)
    assert solution.status is Status.INFEASIBLE
    assert solution.iterations < 100
    assert "infeasible" in solution.provenance["message"].lower()
    W = torch.ones_like(solution.weights)
    assert torch.equal(solve(infeasible_ceiling(), solver, start=W).weights, W)


# What is recorded


@pytest.mark.parametrize(
    ("name", "solver"),
    [(EASY, "admm"), ("net-trim plain 20x8x5", "published"), (EASY, "clarabel"), (EASY, "scs"), (EASY, "cvxpy")],
)
def test_the_trace_and_the_provenance(name: str, solver: str) -> None:
    solution = solve(build(name), solver, **({"threshold": 1e-12} if solver == "published" else {}))
    trace, c, told = solution.trace, solution.certificate, solution.provenance
    assert solution.status is Status.SOLVED
    assert all(a.iteration < b.iteration and a.seconds <= b.seconds for a, b in pairwise(trace))
    assert (trace[-1].value, trace[-1].bound, trace[-1].gap, trace[-1].violation) == (
        c.value,
        c.bound,
        c.gap,
        c.violation,
    )
    assert trace[-1].iteration == solution.iterations > 0
    assert 0 < solution.seconds.setup <= solution.seconds.total
    assert solution.seconds.total == pytest.approx(
        sum((solution.seconds.setup, solution.seconds.solve, solution.seconds.certify))
    )
    assert (told["solver"], told["dtype"], told["device"]) == (solver, "torch.float64", "cpu")
    assert told["threads"] == torch.get_num_threads()
    assert told["limits"] == {"tol": 1e-4, "feas_tol": 1e-5, "max_iter": None, "time_limit": None}
    assert told["options"].keys() == available()[solver].options.keys()
    wanted = {"python", "convexprune", "torch"} | ({solver} if solver in ("clarabel", "scs", "cvxpy") else set())
    assert wanted <= told["versions"].keys()
    assert json.loads(json.dumps(solution.to_dict(), allow_nan=False))["status"] == "solved"


def test_options_of_every_type_can_be_written_to_a_file() -> None:
    assert json.dumps(solve(build(EASY), dtype=torch.float32).to_dict()["provenance"])
    settings = {"max_iter": 50}
    assert json.dumps(solve(build(EASY), "clarabel", settings=settings).to_dict()["provenance"]["options"])


@pytest.mark.parametrize(("name", "solver"), [(n, s) for n in SMALL[::2] for s in ("admm", "clarabel", "cvxpy", "scs")])
def test_nothing_of_the_callers_is_changed(name: str, solver: str) -> None:
    X, Y = build(name).inputs.clone(), build(name).fit.Y.clone()
    start = Start(0.5 * tight(name).weights, multipliers(tight(name)).clone())
    w = torch.ones(X.shape[1], 1)
    program = LayerProgram(X, type(build(name).fit)(Y, build(name).fit.scale), L1(w))  # type: ignore[call-arg]
    arrays = (X, Y, w, start.weights, start.multipliers)
    before = [array.clone() for array in arrays if array is not None]
    solution = solve(program, solver, start=start, max_iter=100)
    assert all(torch.equal(a, b) for a, b in zip(arrays, before, strict=True) if a is not None)
    for mine in (solution.weights, solution.multipliers):
        assert all(mine is not None and a is not None and mine.data_ptr() != a.data_ptr() for a in arrays)


def test_published_changes_nothing_of_the_callers() -> None:
    program = build("net-trim plain 20x8x5")
    start = gaussian(0, *program.shape)
    arrays = (program.inputs, program.fit.Y, start)
    before = [array.clone() for array in arrays]
    solution = solve(program, "published", start=start, max_iter=20)
    assert all(torch.equal(a, b) for a, b in zip(arrays, before, strict=True))
    assert solution.weights.data_ptr() != start.data_ptr()


@pytest.mark.parametrize(
    ("name", "solver"), [(EASY, "admm"), ("ball plain 200x40x12", "published"), (EASY, "clarabel")]
)
def test_two_runs_are_identical(name: str, solver: str) -> None:
    first, second = (solve(build(name), solver, max_iter=100) for _ in range(2))
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(multipliers(first), multipliers(second))
    assert first.certificate == second.certificate


# ADMM


@pytest.mark.parametrize("name", [*SMALL, "relu-ball large_units", "net-trim small_units"])
@pytest.mark.parametrize("start", ["solution", "nearby eps"])
def test_a_warm_start_saves_iterations(name: str, start: str) -> None:
    program, cold = build(name), solve(build(name))
    if start == "nearby eps":
        program = LayerProgram(program.inputs, program.fit.map(lambda array: 1.001 * array), program.penalty)
        cold = solve(program)
    warm = solve(program, start=tight(name))
    assert warm.status is Status.SOLVED
    assert warm.iterations < cold.iterations


STARTED = [*SMALL, "relu-ball badly_scaled"]


@pytest.mark.parametrize(("name", "start"), [*zip(STARTED, [0.0, 1.0, 1e3] * 4, strict=False), (SMALL[0], 1e3)])
def test_any_start_is_as_good_in_the_end(name: str, start: float) -> None:
    solution = solve(build(name), start=torch.full(build(name).shape, start))
    assert solution.status is Status.SOLVED


@pytest.mark.parametrize("name", [*SMALL, "relu-ball plain 500x20x10", "ball wide"])
def test_single_and_double_precision_agree(name: str) -> None:
    double, single = solve(build(name)), solve(build(name), dtype=torch.float32)
    assert (double.weights.dtype, single.weights.dtype) == (torch.float64, torch.float32)
    assert single.status is Status.SOLVED
    assert single.certificate.value == pytest.approx(double.certificate.value, rel=2 * AGREEMENT)
    assert float((single.weights - double.weights).abs().max()) <= 100 * SINGLE * float(double.weights.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["relu-ball plain 200x40x12", "ball free_bias", "net-trim plain 20x8x5"])
def test_data_of_low_precision_are_solved(name: str, dtype: torch.dtype) -> None:
    """The certificate is that of the rounded data; the value stays close to that of the exact ones."""
    solution = solve(build(name).to(dtype))
    assert solution.status is Status.SOLVED
    assert solution.weights.dtype == torch.float32
    assert solution.certificate.value == pytest.approx(tight(name).certificate.value, rel=20 * SINGLE)


@pytest.mark.parametrize("options", [{"relaxation": 1.0}, {"balance": float("inf")}, {"restorations": 0}, {"rho": 1.0}])
def test_every_option_still_leads_to_the_optimum(options: dict[str, Any]) -> None:
    solution = solve(build(EASY), feas_tol=1e-3 if "restorations" in options else FEASIBLE, **options)
    assert solution.status is Status.SOLVED
    assert solution.certificate.value == pytest.approx(tight(EASY).certificate.value, rel=10 * SINGLE)


def test_every_piece_can_be_called_by_hand() -> None:
    """The loop of solve is init, step and finish, nothing else: the same iterates without it."""
    program, method = build(EASY), ADMM()
    state = method.init(program, None)
    for _ in range(30):
        method.step(state)
    weights, L = method.finish(state)
    driven = solve(program, max_iter=30, tol=0, feas_tol=0)  # nothing to steer by
    assert torch.equal(weights, driven.weights)
    assert torch.equal(L, multipliers(driven))
    assert set(method.residuals(state)) == {"primal Z", "dual Z", "primal T", "dual T"}
    assert all(0 < residual < 1 for residual in method.residuals(state).values())
    again = method.finish(state)
    assert torch.equal(again[0], weights), "finish must not move the state"


@pytest.mark.parametrize(
    ("name", "factor"),
    [("ball wide", 0.1), ("relu-ball wide", 0.1), ("relu-ball plain 60x30x40", 0.1), ("net-trim wide", 1.0)],
)
def test_restorations_bring_the_sparse_iterate_back(name: str, factor: float) -> None:
    """At the same iteration, on the same support: far nearer to a ball, and never further from any set."""
    plain, restored = (solve(build(name), max_iter=40, tol=0, feas_tol=0, restorations=k) for k in (0, 2))
    assert restored.certificate.violation <= factor * plain.certificate.violation
    assert not restored.weights[plain.weights == 0].any()


# The reference solvers


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
@pytest.mark.parametrize("name", [EASY, "net-trim weighted", "relu-ball large_units", "ball small_units"])
def test_multipliers_come_back_in_the_callers_units(name: str, solver: str) -> None:
    """The certificate does not see a wrong scale, optimality does: the dual norm of XᵀΛ is 1 at an optimum U ≠ 0."""
    program = build(name)
    A = program.inputs.T @ multipliers(solve(program, solver))
    assert float(program.penalty.dual_norm(A).max()) == pytest.approx(1, rel=KKT)


def test_a_change_of_units_has_an_inverse() -> None:
    """V = c·diag(d) U solves the scaled program at b·c times the value; both are certified alike."""
    for name in ("net-trim weighted", "ball badly_scaled", "relu-ball dead_inputs"):
        program = build(name)
        scaling = Scaling.of(program)
        scaled = scaling.apply(program)
        solution = solve(scaled)
        back = certify(
            program,
            scaling.undo_weights(solution.weights),
            scaling.undo_multipliers(multipliers(solution)),
        )
        assert scaled.inputs.square().mean(0).max() == pytest.approx(1)
        assert scaled.fit.Y.square().mean() == pytest.approx(1)
        assert back.value * scaling.b * scaling.c == pytest.approx(solution.certificate.value)
        assert back.bound * scaling.b * scaling.c == pytest.approx(solution.certificate.bound, rel=AGREEMENT)
        assert back.violation == pytest.approx(solution.certificate.violation, abs=FEASIBLE)


# A solver of one's own


@dataclass
class _Plain:
    program: LayerProgram
    factor: Tensor
    U: Tensor
    Z: Tensor
    T: Tensor
    duals: list[Tensor] = field(default_factory=list)
    primal: float = float("inf")


@dataclass(frozen=True)
class PlainADMM(IterativeSolver[_Plain]):
    """The textbook's ADMM in twenty lines, with one fixed penalty."""

    rho: float = 1.0

    def refuses(self, program: LayerProgram) -> str | None:
        return "it takes ReLU balls only" if not isinstance(program.fit, ReluBall) else None

    def init(self, program: LayerProgram, start: Start | None) -> _Plain:
        X = program.inputs
        factor = torch.linalg.cholesky(X.T @ X + torch.eye(X.shape[1]).to(X))
        U, Z = X.new_zeros(program.shape), X.new_zeros(program.fit.shape)
        return _Plain(program, factor, U, Z, U, [torch.zeros_like(Z), torch.zeros_like(U)])

    def step(self, s: _Plain) -> None:
        X, (A, B) = s.program.inputs, s.duals
        s.U = torch.cholesky_solve(X.T @ (s.Z + A) + s.T + B, s.factor)
        s.Z, s.T = s.program.fit.prox(X @ s.U - A, self.rho), s.program.penalty.prox(s.U - B, 1 / self.rho)
        s.duals = [A + s.Z - X @ s.U, B + s.T - s.U]
        s.primal = float((s.T - s.U).norm())

    def residuals(self, s: _Plain) -> Mapping[str, float]:
        return {"primal": s.primal}

    def finish(self, s: _Plain) -> tuple[Tensor, Tensor]:
        return s.T, -self.rho * s.duals[0]


def test_a_solver_of_ones_own_is_driven_and_judged(own_registry: dict[str, Any]) -> None:
    register("plain")(PlainADMM)
    solution = solve(build(EASY), "plain", rho=5.0)
    assert solution.status is Status.SOLVED
    assert solution.certificate.value == pytest.approx(tight(EASY).certificate.value, rel=AGREEMENT)
    assert set(solution.trace[0].residuals) == {"primal"}
    assert solution.provenance["options"] == {"rho": 5.0}
    with pytest.raises(SolverRefused, match="'plain' cannot take this program: it takes ReLU balls only"):
        solve(build("ball plain 20x8x5"), "plain")


def test_an_iterate_that_blows_up_ends_the_loop() -> None:
    @dataclass(frozen=True)
    class Explodes(PlainADMM):
        def step(self, s: _Plain) -> None:
            super().step(s)
            s.primal = s.primal if s.primal > 1e9 else float("nan")

    solution = solve(build(EASY), Explodes())
    assert (solution.status, solution.iterations) == (Status.DIVERGED, 10)


def test_judging_comes_ever_more_rarely() -> None:
    """Every tenth iteration at first, then every tenth of those done: a long solve is not spent on judging."""
    solution: Solution = solve(build("net-trim plain 20x8x5"), tol=0, feas_tol=0, max_iter=1000)
    steps = [point.iteration for point in solution.trace]
    assert steps[:3] == [10, 20, 30]
    assert all(b - a == max(10, a // 10) for a, b in pairwise(steps[:-1]))
    assert steps[-1] == 1000
    assert EXACT < solution.seconds.certify


@pytest.mark.parametrize("fit", [ReluBall, NetTrimSet])
def test_targets_of_zeros_are_solved_by_zero_weights(fit: Any) -> None:
    for eps in (0.0, 1.0):
        solution = solve(LayerProgram(gaussian(0, 20, 4), fit(torch.zeros(20, 3, dtype=torch.float64), eps)))
        assert solution.status is Status.SOLVED
        assert solution.nonzeros == 0


def test_what_comes_back_is_judged_not_what_was_shown() -> None:
    """A solver that shows good weights and returns others, of one iteration, gets the certificate of the others."""
    program = build(EASY)
    good = solve(program)

    class Switches:
        def refuses(self, program: LayerProgram) -> None:
            return None

        def run(self, program: LayerProgram, limits: Any, start: Any, watch: Any) -> Proposal:
            watch(5, lambda: Proposal(good.weights, good.multipliers, "watch", 5, 0.0), {})
            return Proposal(0 * good.weights, good.multipliers, "watch", 5, 0.0)

    solution = solve(program, Switches())
    assert solution.status is not Status.SOLVED
    assert solution.certificate == certify(program, 0 * good.weights, good.multipliers)


def test_a_solve_may_stand_in_inference_mode() -> None:
    """Inference tensors keep no version; they are judged again rather than refused."""
    with torch.inference_mode():
        program = build("ball plain 20x8x5")
        fresh = LayerProgram(program.inputs.clone(), program.fit.map(torch.clone))
        assert solve(fresh).status is Status.SOLVED


@pytest.mark.parametrize("fit", ["relu-ball", "net-trim", "ball"])
@pytest.mark.parametrize(
    ("dtype", "products"),
    [(torch.float32, torch.bfloat16), (torch.float64, torch.float32), (torch.float64, torch.bfloat16)],
)
def test_coarse_products_of_changes_lead_to_the_same_certified_answer(
    fit: str, dtype: torch.dtype, products: torch.dtype
) -> None:
    """Their errors are relative to changes, which vanish: the gap asked for is far below the coarse precision."""
    program = build(f"{fit} plain 200x40x12").to(dtype)
    tol = 1e-4 if dtype == torch.float32 else 1e-7
    exact = solve(program, tol=tol, feas_tol=tol, products=None)
    coarse = solve(program, tol=tol, feas_tol=tol, products=products)
    assert exact.status is coarse.status is Status.SOLVED
    assert coarse.certificate.value == pytest.approx(exact.certificate.value, rel=3 * tol)
    assert coarse.iterations <= 1.5 * exact.iterations + 10
    assert coarse.provenance["effective"]["products dtype"] == str(products)


@pytest.mark.parametrize("seed", [3, 14])
def test_coarse_products_end_where_they_are_wrong_by_what_is_left(seed: int) -> None:
    """Fewer samples than inputs: weights move far without moving outputs, and coarse products see the weights move."""
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(2, 8, generator=rng).clamp(min=0)
    Y = X @ torch.randn(8, 6, generator=rng)
    program = LayerProgram(X, Ball(Y, 1e-6 * float(Y.norm())))
    solution = solve(program, "admm", products=torch.bfloat16)
    assert solution.status is Status.SOLVED
    assert solution.provenance["effective"]["products dtype"] == "torch.float32"
    stages = [point.stage for point in solution.trace]
    assert (stages[0], stages[-1]) == ("", "clarabel")
    assert "products in float32" in stages


def test_a_shift_that_rounding_asks_for_is_told() -> None:
    X = torch.ones(20, 3, dtype=torch.float64) + 1e-9 * gaussian(0, 20, 3)
    program = LayerProgram(X, Ball(X, 0.5))
    told = solve(program, rho=1e20, balance=math.inf, max_iter=1).provenance["effective"]
    assert told["shift raised to"] > told["sigma"] / told["rho"]
    assert "shift raised to" not in solve(build(EASY)).provenance["effective"]


def test_the_best_iterate_before_numbers_were_no_longer_finite() -> None:
    """The last one shown has none: what comes back is uncertified, not diverged, and the message says what happened."""

    @dataclass(frozen=True)
    class Explodes(PlainADMM):
        def finish(self, s: _Plain) -> tuple[Tensor, Tensor]:
            U, L = super().finish(s)
            return (U, L) if s.primal > 1e-3 else (U * math.nan, L)

    solution = solve(build(EASY), Explodes())
    assert solution.status is Status.UNCERTIFIED
    assert bool(solution.weights.isfinite().all())
    assert "no longer finite after" in solution.provenance["message"]


def test_products_are_coarse_by_themselves_only_in_single_precision() -> None:
    assert solve(build(EASY)).provenance["effective"]["products dtype"] == "torch.float64"
    with pytest.raises(InvalidInput, match=r"products: expected a floating torch\.dtype"):
        solve(build(EASY), products=torch.int8)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9, 3e-12, 1e-20])
@pytest.mark.parametrize("constant", [False, True])
def test_columns_far_shorter_than_others_are_solved_as_well(size: float, constant: bool) -> None:
    """A change of a column's unit changes nothing; a constant one, as a pruned channel leaves it, is no second bias."""
    torch.manual_seed(0)
    X = torch.cat([torch.randn(200, 12).clamp(min=0), torch.ones(200, 1)], 1)
    X[:, 3] = 1.0 if constant else X[:, 3]
    Y = (X @ torch.randn(13, 5)).clamp(min=0)
    X[:, 3] *= size
    solution = solve(LayerProgram(X, ReluBall(Y, 0.2 * float(Y.norm())), L1.free_bias(13)), "admm", tol=1e-3)
    assert solution.status is Status.SOLVED
    assert solution.iterations < 300


def test_a_solve_that_is_stopped_gives_the_best_feasible_weights_that_it_had() -> None:
    """The last iterate may be outside the set; one before it that was inside keeps the promise."""
    torch.manual_seed(0)
    X, W = torch.randn(40, 6), torch.randn(6, 3)
    program = LayerProgram(X, Ball(X @ W, 0.1))

    class Strays:
        def refuses(self, program: LayerProgram) -> None:
            return None

        def run(self, program: LayerProgram, limits: Any, start: Any, watch: Any) -> Proposal:
            for iteration, U in enumerate((1.001 * W, W, 0.5 * W), start=1):
                watch(iteration, lambda U=U: Proposal(U, None, "watch", 1, 0.0), {})
            return Proposal(0.5 * W, None, "time limit", 3, 0.0)

    solution = solve(program, Strays(), tol=1e-9)
    assert solution.status is Status.TIME_LIMIT
    assert torch.equal(solution.weights, W)
    assert solution.certificate == certify(program, W)


# Where a method can go no further


def no_room(dtype: torch.dtype) -> LayerProgram:
    X, W = layer(24, 60, 8, 5)
    Y = (X @ W).clamp(min=0).to(dtype)
    return LayerProgram(X.to(dtype), ReluBall(Y, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_went_on_is_said(dtype: torch.dtype) -> None:
    solution = solve(no_room(dtype), "admm")
    assert solution.status is Status.SOLVED
    assert "iterations: clarabel went on" in solution.provenance["message"]
    stages = [point.stage for point in solution.trace]
    assert stages[0] == ""
    assert stages[-1] == "clarabel"
    assert [point.iteration for point in solution.trace] == sorted(point.iteration for point in solution.trace)
    assert solution.trace[-1].iteration == solution.iterations
    json.dumps(solution.to_dict())


def test_limits_hold_for_all_methods_together() -> None:
    solution = solve(no_room(torch.float64), tol=1e-12, feas_tol=1e-13, max_iter=250)
    assert solution.iterations <= 250
    assert solution.trace[-1].iteration <= 250


@pytest.mark.parametrize("seed", [13, 19, 38])
def test_the_gram_solver_goes_on_too(seed: int) -> None:
    """Balls of 1e-9 of the targets, on which it used up its iterations before."""
    rng = torch.Generator().manual_seed(seed)
    P, N, M = (int(torch.randint(1, 25, (1,), generator=rng)) for _ in range(3))
    X = torch.randn(P, N, generator=rng, dtype=torch.float64).clamp(min=0)
    Y = X @ torch.randn(N, M, generator=rng, dtype=torch.float64)
    solution = solve(LayerProgram(X, Ball(Y, 1e-9 * float(Y.norm()))), "quadratic")
    assert solution.status is Status.SOLVED
    assert "clarabel went on" in solution.provenance["message"]


def test_large_programs_go_on_in_float64() -> None:
    """Too large for the interior point method, and outputs that float32 cannot tell from the targets to within eps."""
    X, W = layer(1, 400, 30, 40)
    program = LayerProgram(X.float(), Ball((X @ W).float(), 1e-6 * float((X @ W).norm())))
    solution = solve(program, max_iter=3000)
    assert solution.status is Status.SOLVED
    assert solution.trace[-1].stage == "admm in float64"
    assert solution.provenance["effective"]["iterate dtype"] == "torch.float64"


@dataclass(frozen=True)
class Walks(IterativeSolver[list[Tensor]]):
    """Shows the weights given, one an iteration; what is no tensor is raised."""

    shown: tuple[Any, ...] = ()

    def refuses(self, program: LayerProgram) -> str | None:
        return None

    def init(self, program: LayerProgram, start: Start | None) -> list[Tensor]:
        return [torch.zeros(program.shape, dtype=torch.float64), *self.shown]

    def step(self, state: list[Tensor]) -> None:
        del state[0]
        if isinstance(state[0], Exception):
            raise state[0]

    def ready(self, state: list[Tensor], limits: Any) -> bool:
        return True

    def residuals(self, state: list[Tensor]) -> Mapping[str, float]:
        return {}

    def finish(self, state: list[Tensor]) -> tuple[Tensor, None]:
        return state[0], None


def reached() -> tuple[LayerProgram, Tensor]:
    X, W = layer(3, 30, 6, 4)
    return LayerProgram(X, Ball(X @ W, 0.1 * float((X @ W).norm()))), W


def test_the_best_iterate_comes_back_not_the_last() -> None:
    program, W = reached()
    solution = solve(program, Walks((2 * W, W, 5 * W)), max_iter=3)
    assert torch.equal(solution.weights, W)
    assert solution.status is Status.ITERATION_LIMIT
    assert solution.iterations == 3


@pytest.mark.parametrize(
    "error", [torch.linalg.LinAlgError("singular"), OverflowError("too large"), ZeroDivisionError()]
)
def test_arithmetic_that_breaks_down_is_a_status(error: Exception) -> None:
    program, W = reached()
    solution = solve(program, Walks((W, error)))
    assert solution.status is Status.UNCERTIFIED
    assert "broke down" in solution.provenance["message"]
    assert torch.equal(solution.weights, W)


@pytest.mark.parametrize("precision", [2.0**-23, 2.0**-52])
@pytest.mark.parametrize(("primal", "moved"), [(1.0, 1e-9), (1e-9, 1.0)])
def test_penalties_stay_in_the_range_of_their_precision(precision: float, primal: float, moved: float) -> None:
    """However long residuals ask for more: a sum keeps half of the digits of its scaled dual, or of its variable."""
    parameter, dual = PenaltyParameter(1.0, precision), 1.0
    for _ in range(100):
        parameter.measure(1.0, primal, moved, dual)
        dual /= parameter.rebalance(0.1)
    half = math.sqrt(precision)
    assert half * (1 - EXACT) <= dual <= (1 + EXACT) / half
    assert dual < 2 * half or dual > 0.5 / half


def test_units_that_float32_cannot_square() -> None:
    X, W = layer(4, 30, 6, 4)
    Y = (X @ W).float()
    small, large = (solve(LayerProgram(X.float() * c, Ball(Y * c, 0.1 * c * float(Y.norm())))) for c in (1.0, 1e20))
    assert large.status is Status.SOLVED
    assert large.certificate.value == pytest.approx(small.certificate.value, rel=1e-3)
