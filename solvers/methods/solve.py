"""Solve a program with any solver, or with several, and judge what comes back."""

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, check_shape
from convexprune.solvers.certificate import Solution, certify
from convexprune.solvers.errors import MissingExtra, SolverRefused
from convexprune.solvers.methods.interface import Limits, Proposal, Solver, Start, options_of
from convexprune.solvers.methods.judge import Callback, Judge, checked_limits
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.programs import LayerProgram
from convexprune.solvers.programs.program import moderated


def solve(
    program: LayerProgram,
    solver: str | Solver | None = None,
    *,
    tol: float = 1e-4,
    feas_tol: float = 1e-5,
    max_iter: int | None = None,
    time_limit: float | None = None,
    start: Solution | Start | ArrayLike | None = None,
    callback: Callback | None = None,
    stop: Callable[[], bool] | None = None,
    **options: Any,
) -> Solution:
    """Minimise penalty(U) + fit(X U).

    Args:
        program: What to solve.
        solver: A registered name (``available()`` lists them) or an instance. None: "admm", or "continuation" where the
            penalty is an exact budget. For a ``Ball`` or ``SquaredLoss``, "quadratic" is the faster one.
        tol: Certified relative gap to reach.
        feas_tol: Violation to reach, relative to eps.
        max_iter: Iterations at most; None: the solver's own default.
        time_limit: Seconds at most, judging included. Checked between iterations: one, or a set-up, is not interrupted.
        start: Weights [N, M], a ``Start`` with multipliers too, or an earlier ``Solution``.
        callback: Called with a ``TracePoint`` each time the solve is judged; a true answer stops it.
        stop: Called between iterations, as the clock is read; a true answer ends the solve. Solvers of other packages,
            which keep time themselves, do not call it.
        **options: The solver's own, by name.

    Returns:
        The solution, its status set from the float64 certificate.

    Raises:
        UnknownSolver, UnknownOption: No such solver, or it has no such option.
        SolverRefused, MissingExtra: The solver cannot take this program, or its package is not installed.
        InvalidTolerance: A tolerance or a limit outside its range.
        ShapeMismatch, NonFinite: The start does not fit the program.
    """
    name, method = make_solver(default_solver(program) if solver is None else solver, options)
    limits = Limits(tol, feas_tol, max_iter, time_limit, stop)
    return attempt(program, name, method, limits, _as_start(program, start), callback)[0]


def default_solver(program: LayerProgram) -> str:
    """The name of the solver of ours that takes any such program."""
    return "admm" if program.penalty.convex else "continuation"


def attempt(
    program: LayerProgram, name: str, method: Solver, limits: Limits, start: Start | None, callback: Callback | None
) -> tuple[Solution, Any]:
    """As ``solve``, for a solver already made; the solution, and the state that the solver may go on from."""
    limits = checked_limits(limits)
    reason = method.refuses(program)
    if reason:
        raise SolverRefused(f"solver {name!r} cannot take this program: {reason}. Choose another solver")
    program, unit = moderated(program)
    if start is not None and start.multipliers is not None:
        start = replace(start, multipliers=start.multipliers / unit)
    known = None if start is None else start.weights
    judge = Judge(partial(certify, program), limits, callback, convex=program.penalty.convex, start=known)
    proposal = method.run(program, limits, start, judge)
    nothing = torch.full(program.shape, math.nan, dtype=program.dtype)
    solution = judge.verdict(proposal, nothing, provenance(name, method, program.inputs, limits, proposal))
    if unit != 1:
        multipliers = None if solution.multipliers is None else solution.multipliers * unit
        record = dict(solution.provenance) | {"outputs multiplied by": unit}
        solution = replace(solution, multipliers=multipliers, provenance=record)
    return solution, proposal.state


def _as_start(program: LayerProgram, start: Solution | Start | ArrayLike | None) -> Start | None:
    if start is None:
        return None
    weights = start.weights if isinstance(start, Solution | Start) else start
    multipliers = start.multipliers if isinstance(start, Solution | Start) else None
    device = program.inputs.device
    weights = check_shape("start", as_matrix("start", weights), program.shape, "[N, M] of the program").to(device)
    if multipliers is not None:
        multipliers = as_matrix("start multipliers", multipliers).to(device)
        check_shape("start multipliers", multipliers, program.fit.shape, "[P, M] of the program")
    return Start(weights, multipliers)


def provenance(name: str, method: object, inputs: Tensor, limits: Limits, proposal: Proposal) -> dict[str, Any]:
    """Solver, options in force, tolerances, dtype, device, threads, versions, the solver's own message."""
    return {
        "solver": name,
        "options": options_of(method),
        "effective": dict(proposal.effective),
        "message": proposal.message,
        "ended": proposal.ended,
        "limits": {key: getattr(limits, key) for key in ("tol", "feas_tol", "max_iter", "time_limit")},
    } | environment(inputs, *getattr(method, "packages", ()))


def environment(data: Tensor, *packages: str) -> dict[str, Any]:
    """What a computation with such data runs on: dtype, device, threads, versions."""
    return {
        "dtype": str(data.dtype),
        "device": str(data.device),
        "threads": torch.get_num_threads(),
        "versions": versions("convexprune", "torch", "numpy", *packages),
    }


def versions(*packages: str) -> dict[str, str]:
    """Python's version and those of installed packages."""
    return {"python": platform.python_version()} | {package: _installed(package) for package in packages}


@cache
def _installed(package: str) -> str:
    """Read once: its files take as long to find as a small program to solve."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


_REFUSED, _MISSING = "refused: ", "missing: "


@dataclass(frozen=True)
class CrosscheckRow:
    """One solver's certified answer; where there was none, ``status`` is "refused: …" or "missing: …" and why."""

    solver: str
    status: str
    value: float = math.inf
    bound: float = 0.0
    gap: float = math.inf
    violation: float = math.inf
    scale: float = math.inf
    nonzeros: int = 0
    iterations: int = 0
    seconds: float = math.inf

    @property
    def ran(self) -> bool:
        """Whether the solver ran at all."""
        return not self.status.startswith((_REFUSED, _MISSING))


@dataclass(frozen=True)
class Crosscheck:
    """A row a solver, in the order asked for; ``str()`` gives a table of those that ran, and why others did not."""

    rows: tuple[CrosscheckRow, ...]

    @property
    def disagreement(self) -> float:
        """max |v_a − v_b| / max(scale_a, scale_b) over pairs of solved rows; inf where fewer than two are solved."""
        solved = [row for row in self.rows if row.status == "solved"]
        pairs = [abs(a.value - b.value) / (max(a.scale, b.scale) or 1.0) for a, b in combinations(solved, 2)]
        return max(pairs, default=math.inf)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"rows": [asdict(row) for row in self.rows], "disagreement": self.disagreement}

    def __str__(self) -> str:
        head = f"{'solver':<12}{'value':>14}{'bound':>14}{'gap':>10}{'violation':>11}{'seconds':>9}  status"
        lines = [
            f"{r.solver:<12}{r.value:>14.6g}{r.bound:>14.6g}{r.gap:>10.1e}{r.violation:>11.1e}{r.seconds:>9.3f}  "
            f"{r.status}"
            for r in self.rows
            if r.ran
        ]
        lines = [head, *lines] if lines else []
        if math.isinf(self.disagreement):
            lines.append("no disagreement to tell: fewer than two solvers ended solved")
        else:
            lines.append(f"largest disagreement {self.disagreement:.1e}")
        return "\n".join([*lines, *(f"{row.solver}: {row.status}" for row in self.rows if not row.ran)])


def crosscheck(
    program: LayerProgram, solvers: Sequence[str | Solver] = ("admm", "clarabel", "scs"), **limits: Any
) -> Crosscheck:
    """Solve with several solvers, names or instances, at the ``limits`` of ``solve``; compare what is certified.

    A solver that refuses the program, or lacks its package, has a row that says so.
    """
    rows = []
    for solver in solvers:
        name, _ = make_solver(solver, {})
        try:
            solution = solve(program, solver, **limits)
        except (SolverRefused, MissingExtra) as error:
            rows.append(CrosscheckRow(name, f"{_REFUSED if isinstance(error, SolverRefused) else _MISSING}{error}"))
            continue
        c, work = solution.certificate, (solution.nonzeros, solution.iterations, solution.seconds.total)
        row = CrosscheckRow(name, str(solution.status), c.value, c.bound, c.gap, c.violation, c.scale, *work)
        rows.append(row)
    return Crosscheck(tuple(rows))
