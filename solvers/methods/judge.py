"""The judge of a running solver: it certifies what it is shown, keeps the trace, and sets the status at the end."""

import math
import time
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

from torch import Tensor

from convexprune.solvers.arrays import as_number, checked_radius, count_nonfinite
from convexprune.solvers.certificate import Certificate, Solution, Status
from convexprune.solvers.certificate.solution import Seconds, TracePoint
from convexprune.solvers.errors import InvalidInput, InvalidTolerance
from convexprune.solvers.methods.interface import Excess, Limits, Proposal

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
        """How far ``proposal()`` is from what was asked for."""
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


def checked_limits(limits: Limits) -> Limits:
    """The limits, once they are in their ranges.

    Raises:
        InvalidTolerance: A tolerance or a limit outside its range.
        InvalidInput: ``stop`` is no function.
    """
    tol, feas_tol = checked_radius("tol", limits.tol), checked_radius("feas_tol", limits.feas_tol)
    max_iter, seconds = limits.max_iter, limits.time_limit
    if max_iter is not None and not (isinstance(max_iter, Integral) and max_iter >= 1):
        raise InvalidTolerance(f"max_iter: expected a whole number ≥ 1 or None, found {max_iter!r}")
    if seconds is not None and not as_number("time_limit", seconds) > 0:
        raise InvalidTolerance(f"time_limit: expected seconds > 0 or None, found {seconds!r}")
    if limits.stop is not None and not callable(limits.stop):
        raise InvalidInput(f"stop: expected a function without arguments, found {limits.stop!r}")
    most = None if max_iter is None else int(max_iter)
    return Limits(tol, feas_tol, most, None if seconds is None else float(seconds), limits.stop)
