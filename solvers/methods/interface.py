"""What a solver is: the protocol, what it is given, and what it gives back."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from convexprune.solvers.arrays import as_number, checked_radius
from convexprune.solvers.errors import InvalidInput, InvalidTolerance
from convexprune.solvers.programs import LayerProgram


@dataclass(frozen=True)
class Limits:
    """Tolerances on the certificate, and where to give up (None: nowhere); a true answer of ``stop`` ends the solve.

    Raises:
        InvalidTolerance: A tolerance or a limit outside its range.
        InvalidInput: ``stop`` is no function.
    """

    tol: float
    feas_tol: float
    max_iter: int | None
    time_limit: float | None
    stop: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        most, seconds = self.max_iter, self.time_limit
        tolerances = {name: checked_radius(name, getattr(self, name)) for name in ("tol", "feas_tol")}
        if most is not None and not (isinstance(most, Integral) and most >= 1):
            raise InvalidTolerance(f"max_iter: expected a whole number ≥ 1 or None, found {most!r}")
        if seconds is not None and not as_number("time_limit", seconds) > 0:
            raise InvalidTolerance(f"time_limit: expected seconds > 0 or None, found {seconds!r}")
        if self.stop is not None and not callable(self.stop):
            raise InvalidInput(f"stop: expected a function without arguments, found {self.stop!r}")
        limits = {"max_iter": most and int(most), "time_limit": seconds and float(seconds)}
        for name, value in (tolerances | limits).items():
            object.__setattr__(self, name, value)  # as plain numbers, which a provenance can keep

    def left(self, iterations: int, seconds: float) -> "Limits":
        """What is left of them after so many iterations and seconds: a little at least."""
        most, limit = self.max_iter, self.time_limit
        most, limit = most and max(1, most - iterations), limit and max(1e-3, limit - seconds)
        return dataclasses.replace(self, max_iter=most, time_limit=limit)


@dataclass(eq=False)
class Deadline:
    """Called between iterations: whether the limits of a call say to end."""

    limits: Limits
    began: float  # by time.perf_counter
    reason: str | None = None  # "stopped" or "time limit"

    def __call__(self) -> bool:
        """Whether they do now, or did before."""
        stop, seconds = self.limits.stop, self.limits.time_limit
        if self.reason is None and stop is not None and stop():
            self.reason = "stopped"
        elif self.reason is None and seconds is not None and time.perf_counter() - self.began >= seconds:
            self.reason = "time limit"
        return self.reason is not None


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
    """What a solver hands back to be judged, with multipliers Λ of Z = XU in g(U) + f(Z) + ⟨Λ, XU − Z⟩."""

    weights: Tensor | None  # U [N, M], or None where the solver has nothing
    multipliers: Tensor | None  # Λ [P, M]
    ended: str  # "own rule", "iteration limit", "time limit", "stopped", "watch", "diverged" or "failed"
    iterations: int
    setup: float  # seconds before the first iteration
    message: str = ""  # the solver's own word, kept in the provenance
    effective: Mapping[str, Any] = field(default_factory=dict)  # what it derived itself, such as tolerances, penalties
    state: Any = None  # what it could go on from
    stage: str = ""  # what made it where a run went on in another precision or by another method


class Excess(NamedTuple):
    """By what factors a certificate's gap and violation are too large: NaN where there is nothing finite to judge."""

    gap: float
    violation: float


Watch = Callable[[int, Callable[[], Proposal], Mapping[str, float]], Excess]
"""Judges an iterate while a solver runs, from its iteration, a proposal made on demand, and the residuals.

``max(…) <= 1`` of what it returns ends the run.
"""


@runtime_checkable
class Solver(Protocol):
    """Anything that proposes weights for a program. Its own parameters are fields of a frozen dataclass."""

    def refuses(self, program: LayerProgram) -> str | None:
        """Why this program cannot be taken, or None."""

    def run(self, program: LayerProgram, limits: Limits, start: Start | None, watch: Watch) -> Proposal:
        """Solve it as well as the limits allow."""


def options_of(solver: object) -> dict[str, Any]:
    """A solver's parameters by name."""
    if not dataclasses.is_dataclass(solver) or isinstance(solver, type):
        return {}
    values = {f.name: getattr(solver, f.name) for f in dataclasses.fields(solver)}
    return {name: str(value) if isinstance(value, torch.dtype) else value for name, value in values.items()}
