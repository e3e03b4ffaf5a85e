"""Solve a program with any solver, or with several, and judge what comes back."""

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, check_shape, count_nonfinite
from convexprune.solvers.certificate import Certificate, Solution, Status, certify
from convexprune.solvers.certificate.solution import Seconds, TracePoint
from convexprune.solvers.errors import InvalidInput, MissingExtra, SolverRefused
from convexprune.solvers.methods.interface import Excess, Limits, Proposal, Solver, Start, options_of
from convexprune.solvers.methods.registry import make_solver
from convexprune.solvers.programs import LayerProgram
from convexprune.solvers.programs.program import moderated

Callback = Callable[[TracePoint], bool | None]
"""Called each time a solve is judged; a true answer stops it."""

Certify = Callable[[Tensor, Tensor | None], Certificate]
"""What is proven about weights, with their multipliers where there are any."""

_ENDED = {s.value: s for s in (Status.ITERATION_LIMIT, Status.TIME_LIMIT, Status.STOPPED, Status.DIVERGED)}


class Judge:
    """The ``Watch`` of a solve: certifies what the solver has, keeps the trace, says when it is enough.

    A program is not called infeasible where weights shown, or those of ``start``, satisfy it. InvalidInput is raised
    where the callback is none.
    """

    def __init__(
        self, certify: Certify, limits: Limits, callback: Callback | None, *, convex: bool = True, start: Any = None
    ) -> None:
        if callback is not None and not callable(callback):
            raise InvalidInput(f"callback: expected a function of a TracePoint, found {callback!r}")
        self.certify, self.limits, self.callback, self.convex, self.start = certify, limits, callback, convex, start
        self.trace: list[TracePoint] = []
        self.began, self.judging, self.stopped = time.perf_counter(), 0.0, False
        self.last: tuple[Tensor | None, Tensor | None, tuple[int, ...], Certificate] | None = None
        self.best: tuple[Tensor, Certificate] | None = None  # the cheapest feasible weights shown so far

    def __call__(self, iteration: int, proposal: Callable[[], Proposal], residuals: Mapping[str, float]) -> Excess:
        """How far ``proposal()`` is from the tolerances."""
        c, limits = self.judge(iteration, proposal(), residuals), self.limits
        if c is None:
            return Excess(math.nan, math.nan)
        if self.stopped or self._infeasible(c) or c.within(limits.tol, limits.feas_tol):
            return Excess(0.0, 0.0)
        pairs = ((c.gap, limits.tol), (c.violation, limits.feas_tol))
        excess = Excess(*(a / tol if tol > 0 else math.inf if a > 0 else 0.0 for a, tol in pairs))
        return excess if max(excess) > 1 else Excess(math.inf, math.inf)

    def judge(self, iteration: int, proposal: Proposal, residuals: Mapping[str, float]) -> Certificate | None:
        """The certificate of a proposal, traced; None where there is nothing finite to certify."""
        weights, multipliers = proposal.weights, proposal.multipliers
        if weights is None or any(a is not None and count_nonfinite(a) for a in (weights, multipliers)):
            return None
        before = time.perf_counter()
        solving = before - self.began - self.judging
        c = self.certify(weights, multipliers)
        self.last = (weights, multipliers, _versions(proposal), c)
        if c.violation <= self.limits.feas_tol and (self.best is None or c.value < self.best[1].value):
            self.best = (weights.clone(), c)
        point = TracePoint(iteration, solving, c.value, c.bound, c.gap, c.violation, dict(residuals), proposal.stage)
        self.trace.append(point)
        self.stopped = bool(self.callback and self.callback(point))
        self.judging += time.perf_counter() - before
        return c

    def verdict(self, proposal: Proposal, nothing: Tensor, provenance: dict[str, Any]) -> Solution:
        """The solution, with its status; ``nothing`` stands for weights that a solver did not return."""
        solving = time.perf_counter() - self.began - self.judging
        certificate = self._known(proposal) or self.judge(proposal.iterations, proposal, {})
        status = self._status(proposal, certificate)
        weights = nothing if proposal.weights is None else proposal.weights
        interrupted = status in (Status.STOPPED, Status.TIME_LIMIT) and certificate is not None
        if interrupted and certificate.violation > self.limits.feas_tol and self.best is not None:  # type: ignore[union-attr]
            weights = self.best[0]
            certificate = self.certify(weights, proposal.multipliers)
        return Solution(
            weights=weights,
            multipliers=proposal.multipliers,
            status=status,
            certificate=certificate or Certificate(math.inf, 0.0, math.inf, math.inf, math.inf),
            trace=tuple(self.trace),
            iterations=proposal.iterations,
            seconds=Seconds(proposal.setup, solving - proposal.setup, self.judging),
            provenance=provenance,
        )

    def _known(self, proposal: Proposal) -> Certificate | None:
        """The last certificate, if it is of the very same tensors and these have not been changed since."""
        if self.last is None:
            return None
        weights, multipliers, versions, certificate = self.last
        same = weights is proposal.weights and multipliers is proposal.multipliers
        return certificate if same and -1 not in versions and versions == _versions(proposal) else None

    def _infeasible(self, certificate: Certificate) -> bool:
        """Whether it proves that there is no solution of a sensible size, and none is known."""
        if not certificate.infeasible or self.best is not None or self.start is None:
            return certificate.infeasible and self.best is None
        return self.certify(self.start, None).violation > self.limits.feas_tol

    def _status(self, proposal: Proposal, certificate: Certificate | None) -> Status:
        if certificate is None:
            return Status.FAILED if proposal.weights is None else Status.DIVERGED
        if certificate.within(self.limits.tol, self.limits.feas_tol):
            return Status.SOLVED
        if self._infeasible(certificate):
            return Status.INFEASIBLE
        if self.stopped:
            return Status.STOPPED
        ended = _ENDED.get(proposal.ended, Status.UNCERTIFIED)
        if not self.convex and certificate.violation <= self.limits.feas_tol and ended is Status.UNCERTIFIED:
            # A budget that is broken has an infinite value.
            return Status.NO_BOUND if certificate.value < math.inf else Status.UNCERTIFIED
        return ended


def _versions(proposal: Proposal) -> tuple[int, ...]:
    """How often each tensor was changed in place; -1 for inference tensors, which do not count."""
    arrays = (proposal.weights, proposal.multipliers)
    return tuple(-1 if array.is_inference() else array._version for array in arrays if array is not None)


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
            which keep time themselves, call it between programs and rounds at most.
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
    device, multipliers = program.inputs.device, None
    if isinstance(start, Solution | Start):
        multipliers, start = start.multipliers, start.weights
    weights = check_shape("start", as_matrix("start", start), program.shape, "[N, M] of the program").to(device)
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


_WIDE = 1000  # characters: reasons are not broken into lines


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
        return math.isfinite(self.seconds)


@dataclass(frozen=True)
class Crosscheck:
    """A row a solver, in the order of the call; ``str()`` gives a table, with the reasons of those that did not run."""

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
        from rich.console import Console
        from rich.table import Table

        text, table = StringIO(), Table("solver", "value", "bound", "gap", "violation", "seconds", "status", box=None)
        for r in self.rows:
            figures = (f"{r.value:.6g}", f"{r.bound:.6g}", f"{r.gap:.1e}", f"{r.violation:.1e}", f"{r.seconds:.3f}")
            table.add_row(r.solver, *(figures if r.ran else [""] * len(figures)), r.status)
        Console(file=text, width=_WIDE, markup=False, highlight=False).print(table)
        summary = f"largest disagreement {self.disagreement:.1e}"
        if math.isinf(self.disagreement):
            summary = "no disagreement to tell: fewer than two solvers ended solved"
        return "\n".join([*map(str.rstrip, text.getvalue().splitlines()), summary])


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
            why = "refused" if isinstance(error, SolverRefused) else "missing"
            rows.append(CrosscheckRow(name, f"{why}: {error}"))
            continue
        c, seconds = solution.certificate, solution.seconds.total
        proven = (str(solution.status), c.value, c.bound, c.gap, c.violation, c.scale)
        rows.append(CrosscheckRow(name, *proven, solution.nonzeros, solution.iterations, seconds))
    return Crosscheck(tuple(rows))
