"""When a run, or the work on a layer, is to end early."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from convexprune.nettrim.posed import How
from convexprune.solvers import Status
from convexprune.solvers.arrays import checked_positive
from convexprune.solvers.errors import InvalidInput
from convexprune.solvers.methods import PathPoint


@dataclass(eq=False)
class Stop:
    """Asked between iterations and between layers.

    Attributes:
        seconds: For the whole run; None: no limit.
        asked: Called; a true answer ends the run (Ctrl-C).
        ended: The reason, once there was one.

    Raises:
        InvalidTolerance: Seconds that are no number > 0.
        InvalidInput: Something to ask that is no function.
    """

    seconds: float | None = None
    asked: Callable[[], bool] | None = None
    began: float = field(default_factory=time.monotonic)
    ended: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.seconds is not None:
            self.seconds = checked_positive("time_limit", self.seconds)
        if self.asked is not None and not callable(self.asked):
            raise InvalidInput(f"stop: expected a function without arguments, found {self.asked!r}")

    def interrupted(self) -> bool:
        """Whether the caller asks for an end, or the run has one already."""
        if self.ended is None and self.asked is not None and self.asked():
            self.ended = "it was interrupted"
        return self.ended is not None

    def reason(self) -> str | None:
        """Why the run is to end, or None; once there is a reason, it stays."""
        self.interrupted()
        if self.ended is None and self.seconds is not None and time.monotonic() - self.began >= self.seconds:
            self.ended = f"the time limit of {self.seconds:g} s ran out"
        return self.ended

    def left(self) -> float | None:
        """Seconds until the limit, at least a little; None without one."""
        return None if self.seconds is None else max(1e-3, self.seconds - (time.monotonic() - self.began))


@dataclass(eq=False)
class Until:
    """Asked between the steps of a layer that takes several solves: whether to end.

    Attributes:
        how: With the time for the layer, and whom to ask.
        ended: STOPPED or TIME_LIMIT, once there was a reason; it stays.
    """

    how: How
    ended: Status | None = None
    began: float = field(default_factory=time.monotonic)

    def __call__(self) -> bool:
        """Whether there is, or was, a reason."""
        limit = self.how.options.get("time_limit")
        if self.ended is None and self.how.stop is not None and self.how.stop():
            self.ended = Status.STOPPED
        elif self.ended is None and limit is not None and time.monotonic() - self.began >= limit:
            self.ended = Status.TIME_LIMIT
        return self.ended is not None

    def seen(self, point: PathPoint) -> bool:
        """The same, once the caller has seen a point of a path."""
        trace = point.solution.trace
        if self.how.callback is not None and trace and self.how.callback(trace[-1]):
            self.ended = self.ended or Status.STOPPED
        return self()
