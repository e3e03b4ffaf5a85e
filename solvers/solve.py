"""Solve a program with any solver and judge what comes back."""

import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from convexprune.solvers.arrays import ArrayLike, as_matrix, as_number, check_shape, checked_radius, count_nonfinite
from convexprune.solvers.certificate import Certificate, certify
from convexprune.solvers.errors import InvalidTolerance, SolverRefused
from convexprune.solvers.interface import Excess, Limits, Proposal, Solver, Start, options_of
from convexprune.solvers.program import LayerProgram
from convexprune.solvers.registry import make_solver
from convexprune.solvers.solution import Seconds, Solution, Status, TracePoint

__all__ = ["Callback", "attempt", "default_solver", "solve", "versions"]

Callback = Callable[[TracePoint], bool | None]
"""Called each time a solve is judged; a true answer stops it."""


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
        **options: The solver's own, by name.

    Returns:
        The solution, its status set from the float64 certificate.

    Raises:
        UnknownSolver, UnknownOption: No such solver, or it has no such option.
        SolverRefused, MissingExtra: The solver cannot take this program, or its package is not installed.
        InvalidTolerance: A tolerance or a limit outside its range.
        ShapeMismatch, NonFinite: The start does not fit the program.
    """
    if solver is None:
        solver = default_solver(program)
    name, method = make_solver(solver, options)
    limits = Limits(tol, feas_tol, max_iter, time_limit)
    return attempt(program, name, method, limits, _as_start(program, start), callback)[0]


def default_solver(program: LayerProgram) -> str:
    """The name of the solver of ours that takes any such program."""
    return "admm" if program.penalty.convex else "continuation"


def attempt(
    program: LayerProgram, name: str, method: Solver, limits: Limits, start: Start | None, callback: Callback | None
) -> tuple[Solution, Any]:
    """As ``solve``, for a solver already made; the solution, and the state that the solver may go on from."""
    limits = _checked(limits)
    reason = method.refuses(program)
    if reason:
        raise SolverRefused(f"solver {name!r} cannot take this program: {reason}. Choose another solver")
    judge = _Judge(program, limits, callback)
    proposal = method.run(program, limits, start, judge)
    return judge.verdict(proposal, _provenance(name, method, program, limits, proposal)), proposal.state


class _Judge:
    """Certifies what a running solver has, keeps the trace, and says when it is enough."""

    def __init__(self, program: LayerProgram, limits: Limits, callback: Callback | None) -> None:
        self.program, self.limits, self.callback = program, limits, callback
        self.trace: list[TracePoint] = []
        self.began = time.perf_counter()
        self.judging = 0.0
        self.stopped = False
        self.last: tuple[_Identity, Certificate] | None = None

    def __call__(self, iteration: int, proposal: Callable[[], Proposal], residuals: Mapping[str, float]) -> Excess:
        c, limits = self.judge(iteration, proposal(), residuals), self.limits
        if c is None or self.stopped or c.infeasible or c.meets(limits.tol, limits.feas_tol):
            return Excess(0.0, 0.0)
        gap, violation = _ratio(c.gap, limits.tol), _ratio(c.violation, limits.feas_tol)
        return Excess(gap, violation) if max(gap, violation) > 1 else Excess(math.inf, math.inf)

    def judge(self, iteration: int, proposal: Proposal, residuals: Mapping[str, float]) -> Certificate | None:
        """The certificate of a proposal, traced; None where there is nothing finite to certify."""
        if not _finite(proposal):
            return None
        assert proposal.weights is not None  # noqa: S101 - _finite saw them
        solving = time.perf_counter() - self.began - self.judging
        before = time.perf_counter()
        certificate = certify(self.program, proposal.weights, proposal.multipliers)
        self.last = (_Identity.of(proposal), certificate)
        c = certificate
        point = TracePoint(iteration, solving, c.value, c.bound, c.gap, c.violation, dict(residuals))
        self.trace.append(point)
        self.stopped = bool(self.callback and self.callback(point))
        self.judging += time.perf_counter() - before
        return certificate

    def verdict(self, proposal: Proposal, provenance: dict[str, Any]) -> Solution:
        """The solution, with its status."""
        solving = time.perf_counter() - self.began - self.judging
        # What came back may not be what was shown last: only the very same tensors, unchanged, are not judged again.
        if self.last is not None and self.last[0].same(proposal):
            certificate: Certificate | None = self.last[1]
        else:
            certificate = self.judge(proposal.iterations, proposal, {})
        weights = proposal.weights
        if weights is None:
            weights = torch.full(self.program.shape, math.nan, dtype=self.program.dtype)
        return Solution(
            weights=weights,
            multipliers=proposal.multipliers,
            status=self._status(proposal, certificate),
            certificate=certificate or Certificate(math.inf, 0.0, math.inf, math.inf, math.inf),
            trace=tuple(self.trace),
            iterations=proposal.iterations,
            seconds=Seconds(proposal.setup, solving - proposal.setup, self.judging),
            provenance=provenance,
        )

    def _status(self, proposal: Proposal, certificate: Certificate | None) -> Status:
        if certificate is None:
            return Status.FAILED if proposal.weights is None else Status.DIVERGED
        if certificate.meets(self.limits.tol, self.limits.feas_tol):
            return Status.SOLVED
        if certificate.infeasible:
            return Status.INFEASIBLE
        if self.stopped:
            return Status.STOPPED
        ended = _ENDED.get(proposal.ended, Status.UNCERTIFIED)
        if (
            not self.program.penalty.convex
            and certificate.violation <= self.limits.feas_tol
            and ended is Status.UNCERTIFIED
        ):
            # A budget that is broken has an infinite value.
            return Status.NO_BOUND if certificate.value < math.inf else Status.UNCERTIFIED
        return ended


def _ratio(value: float, tolerance: float) -> float:
    return value / tolerance if tolerance > 0 else math.inf if value > 0 else 0.0


@dataclass(frozen=True, eq=False)
class _Identity:
    """Which tensors were judged, in which state."""

    arrays: tuple[Tensor | None, Tensor | None]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, proposal: Proposal) -> "_Identity":
        arrays = (proposal.weights, proposal.multipliers)
        return cls(arrays, tuple(_version(array) for array in arrays if array is not None))

    def same(self, proposal: Proposal) -> bool:
        other = _Identity.of(proposal)
        known = -1 not in self.versions and self.versions == other.versions
        return known and all(a is b for a, b in zip(self.arrays, other.arrays, strict=True))


def _version(array: Tensor) -> int:
    """How often the tensor was changed in place; -1 for inference tensors, which do not count."""
    return -1 if array.is_inference() else array._version


_ENDED = {
    "iteration limit": Status.ITERATION_LIMIT,
    "time limit": Status.TIME_LIMIT,
    "diverged": Status.DIVERGED,
}


def _finite(proposal: Proposal) -> bool:
    arrays = (proposal.weights, proposal.multipliers)
    return proposal.weights is not None and all(a is None or count_nonfinite(a) == 0 for a in arrays)


def _checked(limits: Limits) -> Limits:
    tol, feas_tol = checked_radius("tol", limits.tol), checked_radius("feas_tol", limits.feas_tol)
    max_iter, seconds = limits.max_iter, limits.time_limit
    if max_iter is not None and not (isinstance(max_iter, Integral) and max_iter >= 1):
        raise InvalidTolerance(f"max_iter: expected a whole number ≥ 1 or None, found {max_iter!r}")
    if seconds is not None and not as_number("time_limit", seconds) > 0:
        raise InvalidTolerance(f"time_limit: expected seconds > 0 or None, found {seconds!r}")
    return Limits(
        tol, feas_tol, None if max_iter is None else int(max_iter), None if seconds is None else float(seconds)
    )


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


def _provenance(name: str, method: Solver, program: LayerProgram, limits: Limits, proposal: Proposal) -> dict[str, Any]:
    return {
        "solver": name,
        "options": options_of(method),
        "effective": dict(proposal.effective),
        "message": proposal.message,
        "ended": proposal.ended,
        "limits": {"tol": limits.tol, "feas_tol": limits.feas_tol}
        | {"max_iter": limits.max_iter, "time_limit": limits.time_limit},
        "dtype": str(program.inputs.dtype),
        "device": str(program.inputs.device),
        "threads": torch.get_num_threads(),
        "versions": versions("convexprune", "torch", "numpy", *getattr(method, "packages", ())),
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
