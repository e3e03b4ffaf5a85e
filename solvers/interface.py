"""What a solver is: the protocol, what it is given, what it gives back, and the one loop of every iterative method."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from convexprune.solvers.program import LayerProgram

__all__ = ["Ending", "Excess", "Iterative", "IterativeSolver", "Limits", "Proposal", "Solver", "Start", "Watch"]


@dataclass(frozen=True)
class Limits:
    """What a call asks of a solver: tolerances on the certificate, and where to give up (None: nowhere).

    ``stop`` is asked between iterations; a true answer ends the solve as the time limit does.
    """

    tol: float
    feas_tol: float
    max_iter: int | None
    time_limit: float | None
    stop: Callable[[], bool] | None = None


@dataclass(eq=False)
class Ending:
    """Asked between iterations: whether the limits say to end now.

    Attributes:
        limits: Those of the call.
        began: When it began, by ``time.perf_counter``.
        why: "stopped" or "time limit", once there was a reason; it stays.
    """

    limits: Limits
    began: float
    why: str | None = None

    def __call__(self) -> bool:
        """Whether there is, or was, a reason."""
        stop, seconds = self.limits.stop, self.limits.time_limit
        if self.why is None and stop is not None and stop():
            self.why = "stopped"
        elif self.why is None and seconds is not None and time.perf_counter() - self.began >= seconds:
            self.why = "time limit"
        return self.why is not None


@dataclass(frozen=True, eq=False)
class Start:
    """Where to start: weights [N, M] and, where known, multipliers [P, M].

    ``state`` is what the same solver left behind on a program that differs in its fit alone; it may go on from there,
    and is first judged after ``expected`` iterations.
    """

    weights: Tensor
    multipliers: Tensor | None = None
    state: Any = None
    expected: int = 10


@dataclass(frozen=True, eq=False)
class Proposal:
    """What a solver hands back to be judged.

    Attributes:
        weights: U [N, M], or None where the solver has nothing.
        multipliers: Λ [P, M] of Z = XU in the Lagrangian g(U) + f(Z) + ⟨Λ, XU − Z⟩, or None.
        ended: Why it stopped: "own rule", "iteration limit", "time limit", "stopped", "watch", "diverged" or "failed".
        iterations: How many it took.
        setup: Seconds before the first iteration.
        message: The solver's own word, kept in the provenance.
        effective: Options that the solver derived itself (its own tolerances, penalties), for the provenance.
        state: What it could go on from, or None.
    """

    weights: Tensor | None
    multipliers: Tensor | None
    ended: str
    iterations: int
    setup: float
    message: str = ""
    effective: Mapping[str, Any] = field(default_factory=dict)
    state: Any = None


class Excess(NamedTuple):
    """How many times larger than asked for a certificate's gap and violation are; ``max(excess) <= 1`` is enough."""

    gap: float
    violation: float


class Watch(Protocol):
    """Judges an iterate while a solver runs."""

    def __call__(self, iteration: int, proposal: Callable[[], Proposal], residuals: Mapping[str, float]) -> Excess:
        """Judge ``proposal()``; ``max(…) <= 1`` asks to stop."""


@runtime_checkable
class Solver(Protocol):
    """Anything that proposes weights for a program. Its own parameters are fields of a frozen dataclass."""

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None."""

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        """Solve it as well as the limits allow."""


Problem = TypeVar("Problem")
State = TypeVar("State")

_USUAL = 0.16  # by how much the logarithm of an excess falls an iteration near the end, until it is known


@dataclass(frozen=True)
class Iterative(Generic[Problem, State]):
    """Base of methods that iterate: write ``refuses``, ``init``, ``step``, ``residuals`` and ``finish``.

    The loop, its counting, the time limit, the guard against NaN and the rhythm of the judging are here, once. Every
    piece can be called by hand: ``state = m.init(program, None); m.step(state); m.finish(state)``.
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
        """Told what the certificate still lacks, each time it is not enough."""

    def done(self, state: State) -> bool:  # noqa: ARG002 - most methods leave stopping to the certificate
        """The method's own stopping rule."""
        return False

    def ready(self, state: State, limits: Limits) -> bool:  # noqa: ARG002
        """Whether the method itself can tell that the certificate should close now; it is then judged at once."""
        return False

    def effective(self, state: State) -> Mapping[str, Any]:  # noqa: ARG002
        """What the method chose by itself."""
        return {}

    def run(self, program: Problem, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        """Iterate until the watch, the method's own rule or a limit says stop."""
        began = time.perf_counter()
        late = Ending(limits, began)
        left = None if start is None else start.state
        state = None if left is None else self.retarget(left, program)
        state = self.init(program, start) if state is None else state
        setup = time.perf_counter() - began
        last = limits.max_iter if limits.max_iter is not None else self.default_max_iter
        ended, k, rhythm = "iteration limit", 0, _Rhythm(self.first_judged if start is None else start.expected)
        latest: list[Proposal] = []  # the last one, so that what was judged is what is returned

        def propose() -> Proposal:
            if not latest or latest[0].iterations != k:
                made = self.finish(state)
                latest[:] = [Proposal(*made, ended, k, setup, effective=self.effective(state), state=state)]
            return latest[0]

        while k < last:
            self.step(state)
            k += 1
            own = self.done(state)
            if not (k == rhythm.due or k == last or own or late() or self.ready(state, limits)):
                continue
            residuals = self.residuals(state)
            if any(map(math.isnan, residuals.values())):
                ended = "diverged"
                break
            excess = watch(k, propose, residuals)
            if max(excess) <= 1:
                ended = "watch"
                break
            if own or late():
                ended = "own rule" if own else late.why or ""
                break
            self.steer(state, excess)
            rhythm.next(k, max(excess))
        return dataclasses.replace(propose(), ended=ended)


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

    def next(self, k: int, excess: float) -> None:
        """Iteration k had this excess."""
        ahead = max(min(10, self.due), k // 10)
        if self.last is None and 1 < excess < math.inf:
            ahead = min(ahead, math.ceil(math.log(excess) / _USUAL))
        elif self.last and 1 < excess < self.last[1] < math.inf:
            ahead = round(math.log(excess) * (k - self.last[0]) / math.log(self.last[1] / excess))
            ahead = min(ahead, k // 2 + 10)
        self.due, self.last = k + max(3, ahead), (k, excess)


def options_of(solver: object) -> dict[str, Any]:
    """A solver's parameters by name."""
    if not dataclasses.is_dataclass(solver) or isinstance(solver, type):
        return {}
    return {f.name: _plain(getattr(solver, f.name)) for f in dataclasses.fields(solver)}


def _plain(value: object) -> object:
    return str(value) if isinstance(value, torch.dtype) else value
