"""What a solver is: the protocol, what it is given, what it gives back, and the one loop of every iterative method."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from convexprune.solvers.program import LayerProgram

__all__ = ["IterativeSolver", "Limits", "Proposal", "Solver", "Start", "Watch"]


@dataclass(frozen=True)
class Limits:
    """What a call asks of a solver: tolerances on the certificate, and where to give up (None: nowhere)."""

    tol: float
    feas_tol: float
    max_iter: int | None
    time_limit: float | None


@dataclass(frozen=True, eq=False)
class Start:
    """Where to start: weights [N, M] and, where known, multipliers [P, M]."""

    weights: Tensor
    multipliers: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Proposal:
    """What a solver hands back to be judged.

    Attributes:
        weights: U [N, M], or None where the solver has nothing.
        multipliers: Λ [P, M] of Z = XU in the Lagrangian g(U) + f(Z) + ⟨Λ, XU − Z⟩, or None.
        ended: Why it stopped: "own rule", "iteration limit", "time limit", "watch", "diverged" or "failed".
        iterations: How many it took.
        setup: Seconds before the first iteration.
        message: The solver's own word, kept in the provenance.
        effective: Options that the solver derived itself (its own tolerances, penalties), for the provenance.
    """

    weights: Tensor | None
    multipliers: Tensor | None
    ended: str
    iterations: int
    setup: float
    message: str = ""
    effective: Mapping[str, Any] = field(default_factory=dict)


class Watch(Protocol):
    """Judges an iterate while a solver runs; True asks it to stop."""

    def __call__(self, iteration: int, proposal: Callable[[], Proposal], residuals: Mapping[str, float]) -> bool:
        """Judge ``proposal()`` at ``iteration``."""


@runtime_checkable
class Solver(Protocol):
    """Anything that proposes weights for a program. Its own parameters are fields of a frozen dataclass."""

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None."""

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        """Solve it as well as the limits allow."""


State = TypeVar("State")


@dataclass(frozen=True)
class IterativeSolver(Generic[State]):
    """Base of methods that iterate: write ``refuses``, ``init``, ``step``, ``residuals`` and ``finish``.

    The loop, its counting, the time limit, the guard against NaN and the rhythm of the judging are here, once. Every
    piece can be called by hand: ``state = m.init(program, None); m.step(state); m.finish(state)``.
    """

    default_max_iter: ClassVar[int] = 10_000

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None."""
        raise NotImplementedError

    def init(self, program: LayerProgram, start: Start | None) -> State:
        """Everything that is computed once."""
        raise NotImplementedError

    def step(self, state: State) -> None:
        """One iteration, in place."""
        raise NotImplementedError

    def residuals(self, state: State) -> Mapping[str, float]:
        """Relative residuals of the last step, by name."""
        raise NotImplementedError

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        """Weights [N, M] and multipliers [P, M] in the caller's units."""
        raise NotImplementedError

    def done(self, state: State) -> bool:  # noqa: ARG002 - most methods leave stopping to the certificate
        """The method's own stopping rule."""
        return False

    def effective(self, state: State) -> Mapping[str, Any]:  # noqa: ARG002
        """What the method chose by itself."""
        return {}

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        """Iterate until the watch, the method's own rule or a limit says stop."""
        began = time.perf_counter()
        state = self.init(program, start)
        setup = time.perf_counter() - began
        last = limits.max_iter if limits.max_iter is not None else self.default_max_iter
        ended, k, rhythm = "iteration limit", 0, _Rhythm()
        latest: list[Proposal] = []  # the last one, so that what was judged is what is returned

        def propose() -> Proposal:
            if not latest or latest[0].iterations != k:
                latest[:] = [Proposal(*self.finish(state), ended, k, setup, effective=self.effective(state))]
            return latest[0]

        while k < last:
            self.step(state)
            k += 1
            own, late = self.done(state), _past(began, limits.time_limit)
            if not (k == rhythm.due or k == last or own or late):
                continue
            residuals = self.residuals(state)
            if any(map(math.isnan, residuals.values())):
                ended = "diverged"
                break
            if watch(k, propose, residuals):
                ended = "watch"
                break
            if own or late:
                ended = "own rule" if own else "time limit"
                break
            rhythm.next(k)
        return dataclasses.replace(propose(), ended=ended)


@dataclass
class _Rhythm:
    """Judging costs a few iterations, so it comes every 10th at first and then every tenth of those done so far."""

    due: int = 10

    def next(self, k: int) -> None:
        self.due = k + max(10, k // 10)


def _past(began: float, time_limit: float | None) -> bool:
    return time_limit is not None and time.perf_counter() - began >= time_limit


def options_of(solver: object) -> dict[str, Any]:
    """A solver's parameters by name."""
    if not dataclasses.is_dataclass(solver) or isinstance(solver, type):
        return {}
    return {f.name: _plain(getattr(solver, f.name)) for f in dataclasses.fields(solver)}


def _plain(value: object) -> object:
    return str(value) if isinstance(value, torch.dtype) else value
