"""The one loop of every iterative method, and what happens where a method can go no further."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from convexprune.solvers.methods.interface import Deadline, Excess, Limits, Proposal, Start, Watch
from convexprune.solvers.programs import LayerProgram

Problem = TypeVar("Problem")
State = TypeVar("State")
Given = TypeVar("Given", contravariant=True)

_USUAL = 0.16  # by how much the logarithm of an excess falls an iteration near the end, until it is known
_PATIENCE = 200  # iterations in which the excess is to halve, or half of those done before where that is more
_BREAKDOWNS = (torch.linalg.LinAlgError, ArithmeticError)  # type: ignore[attr-defined]  # of arithmetic out of its range
_NOT_FINITE = "iterates were no longer finite"


class Successor(Protocol[Given]):
    """What a method that can go no further passes its best iterate on to."""

    @property
    def stage(self) -> str:
        """What it is, in words, for the trace and the provenance."""

    def run(self, program: Given, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        """As a solver's."""


@dataclass(frozen=True)
class Iterative(Generic[Problem, State]):
    """Base of methods that iterate: write ``refuses``, ``init``, ``step``, ``residuals`` and ``finish``.

    The loop, its counting, the time limit, the guard against NaN, the rhythm of the judging, the memory of the best
    iterate and its passing on to a ``successor`` are here, once. Every piece can be called by hand:
    ``state = m.init(program, None); m.step(state); m.finish(state)``.
    """

    default_max_iter: ClassVar[int] = 10_000
    first_judged: ClassVar[int] = 10
    """The iteration that is shown to the watch first, unless the method is ready before."""

    def refuses(self, program: Problem) -> str | None:
        """Why this program cannot be taken, or None."""
        raise NotImplementedError

    def init(self, program: Problem, start: Start | None) -> State:
        """Everything that is computed once."""
        raise NotImplementedError

    def step(self, state: State) -> None:
        """One iteration, in place."""
        raise NotImplementedError

    def residuals(self, state: State) -> Mapping[str, float]:
        """Relative residuals of the last step, by name."""
        raise NotImplementedError

    def finish(self, state: State) -> tuple[Tensor, Tensor | None]:
        """Weights [N, M] and multipliers [P, M] in the caller's units."""
        raise NotImplementedError

    def retarget(self, state: State, program: Problem) -> State | None:  # noqa: ARG002
        """A state that goes on from another fit of the same samples and penalty, or None: start anew."""
        return None

    def steer(self, state: State, excess: Excess) -> None:
        """Adapt to what the certificate still lacks; called each time it is not enough."""

    def done(self, state: State) -> bool:  # noqa: ARG002
        """The method's own stopping rule; most methods leave stopping to the certificate."""
        return False

    def ready(self, state: State, limits: Limits) -> bool:  # noqa: ARG002
        """Whether the method itself can tell that the certificate should close now; it is then judged at once."""
        return False

    def effective(self, state: State) -> Mapping[str, Any]:  # noqa: ARG002
        """What the method chose by itself."""
        return {}

    def gone_on(self, state: State) -> str:  # noqa: ARG002
        """What the method has passed on to by itself, in words for the trace; "" where it has not."""
        return ""

    def finite(self, state: State) -> bool:  # noqa: ARG002
        """Whether the last step left finite numbers, as far as next to no work can tell; weights are checked anyway."""
        return True

    def exhausted(self, state: State) -> str:  # noqa: ARG002
        """Why the method itself knows that it will get no further, "" if it may."""
        return ""

    def successor(self, program: Problem) -> Successor[Problem] | None:  # noqa: ARG002
        """What goes on from the best iterate where this method breaks down or stops improving; None: nothing can."""
        return None

    def run(self, program: Problem, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        """Iterate until the watch, the method's own rule or a limit says stop.

        A method that breaks down, stops improving or uses up its own default of iterations is followed by its
        successor, if it has one. What comes back is what the watch was content with, else the best that it was shown.
        """
        began, best, successor = time.perf_counter(), Best(watch), self.successor(program)
        last, why = self._iterate(program, limits, start, best, successor is not None)
        if successor is not None and why:
            left = limits.left(last.iterations, time.perf_counter() - began)
            best.before, best.stage = last.iterations, successor.stage
            on = successor.run(program, left, best.start() or start, best)
            message = f"{why} after {last.iterations} iterations: {successor.stage} went on"
            last = replace(
                on,
                iterations=last.iterations + on.iterations,
                setup=last.setup + on.setup,
                message="; ".join(filter(None, (message, on.message))),
                effective=dict(last.effective) | dict(on.effective),
                state=on.state if isinstance(successor, type(self)) else None,
            )
        elif last.ended == "diverged":
            last = replace(last, message=f"{why} after {last.iterations} iterations")
        return best.of(last)

    def _iterate(
        self, program: Problem, limits: Limits, start: Start | None, watch: Watch, replaceable: bool
    ) -> tuple[Proposal, str]:
        """The last iterate, and why another method should go on, "" where nothing is wrong."""
        began = time.perf_counter()
        late = Deadline(limits, began)
        try:
            kept = None if start is None or start.state is None else self.retarget(start.state, program)
            state = self.init(program, start) if kept is None else kept
        except _BREAKDOWNS as error:
            return Proposal(None, None, "diverged", 0, time.perf_counter() - began), f"the set-up broke down ({error})"
        setup = time.perf_counter() - began
        last = limits.max_iter if limits.max_iter is not None else self.default_max_iter
        ended, why, k = "iteration limit", "", 0
        rhythm, progress = _Rhythm(self.first_judged if start is None else start.expected), _Progress()
        latest: list[Proposal] = []  # the last one, so that what was judged is what is returned

        def propose() -> Proposal:
            if not latest or latest[0].iterations != k:
                made, effective = self.finish(state), self.effective(state)
                stage = self.gone_on(state)
                latest[:] = [Proposal(*made, ended, k, setup, effective=effective, state=state, stage=stage)]
            return latest[0]

        while k < last:
            why = self._stepped(state)
            k += 1
            own = not why and self.done(state)
            if not (why or k == rhythm.due or k == last or own or late() or self.ready(state, limits)):
                continue
            residuals = {} if why else self.residuals(state)
            broken = bool(why) or any(map(math.isnan, residuals.values()))
            excess = Excess(math.nan, math.nan) if broken else watch(k, propose, residuals)
            if any(map(math.isnan, excess)):
                ended, why = "diverged", why or _NOT_FINITE
                break
            if max(excess) <= 1 or own or late():
                ended = "watch" if max(excess) <= 1 else "own rule" if own else late.reason or ""
                break
            why = self.exhausted(state) or progress.stalled(k, max(excess)) if replaceable else ""
            if why:
                break
            self.steer(state, excess)
            rhythm.next(k, max(excess))
        if ended == "iteration limit" and limits.max_iter is None:
            why = why or "no solution"
        return replace(propose(), ended=ended), why

    def _stepped(self, state: State) -> str:
        """One step; what broke down in it, "" where nothing did."""
        try:
            self.step(state)
        except _BREAKDOWNS as error:
            return f"a step broke down ({error})"
        return "" if self.finite(state) else _NOT_FINITE


@dataclass(frozen=True)
class IterativeSolver(Iterative[LayerProgram, State]):
    """An iterative method for layer programs."""


@dataclass
class _Rhythm:
    """Judging costs a few iterations, so it comes when the excess, falling as it fell, is about to be gone.

    It is at least 3 iterations on, and at most half of those done so far and 10.
    """

    due: int = 10
    last: tuple[int, float] | None = None

    def next(self, k: int, excess: float) -> None:  # after iteration k, which had this excess
        ahead = max(min(10, self.due), k // 10)
        if self.last is None and 1 < excess < math.inf:
            ahead = min(ahead, math.ceil(math.log(excess) / _USUAL))
        elif self.last and 1 < excess < self.last[1] < math.inf:
            ahead = round(math.log(excess) * (k - self.last[0]) / math.log(self.last[1] / excess))
            ahead = min(ahead, k // 2 + 10)
        self.due, self.last = k + max(3, ahead), (k, excess)


@dataclass
class _Progress:
    """Whether a run still gets nearer to its end: its least excess is to halve every so often."""

    since: int = 0
    least: float = math.inf

    def stalled(self, k: int, excess: float) -> str:
        """Why iteration k, of this excess, is one too many, "" if it is not."""
        if excess <= self.least / 2:
            self.since, self.least = k, excess
        patient = k - self.since < max(_PATIENCE, self.since // 2)
        return "" if patient or math.isinf(excess) else "no more progress"


@dataclass(eq=False)
class Best:
    """A watch that keeps the best proposal it was shown, also of the methods that went on."""

    watch: Watch
    least: float = math.inf
    proposal: Proposal | None = None
    before: int = 0  # iterations of the methods before
    stage: str = ""  # of what is shown now, unless it is of a later one

    def __call__(self, iteration: int, proposal: Callable[[], Proposal], residuals: Mapping[str, float]) -> Excess:
        """What the watch says."""

        def staged() -> Proposal:
            made = proposal()
            return replace(made, stage=made.stage or self.stage) if self.stage else made

        excess = self.watch(self.before + iteration, staged, residuals)
        if 1 < max(excess) < self.least:
            # A copy, for the next step overwrites the memory of the last.
            made = staged()
            U, L = (None if A is None else A.clone() for A in (made.weights, made.multipliers))
            self.least, self.proposal = max(excess), replace(made, weights=U, multipliers=L)
        return excess

    def start(self) -> Start | None:
        """The best iterate, for another method to go on from."""
        kept = self.proposal
        return None if kept is None or kept.weights is None else Start(kept.weights, kept.multipliers)

    def of(self, last: Proposal) -> Proposal:
        """The last proposal if the watch was content with it; else the best one, with how the run ended.

        One that is finite is no divergence: the method could get no further.
        """
        if self.proposal is None or last.ended == "watch":
            return last
        kept, ended = self.proposal, "own rule" if last.ended == "diverged" else last.ended
        return replace(last, weights=kept.weights, multipliers=kept.multipliers, stage=kept.stage, ended=ended)
