"""When a run is to end early."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Stop"]


@dataclass(eq=False)
class Stop:
    """Asked between iterations and between layers.

    Attributes:
        seconds: For the whole run; None: no limit.
        asked: Called; a true answer ends the run (Ctrl-C).
    """

    seconds: float | None = None
    asked: Callable[[], bool] | None = None
    began: float = field(default_factory=time.monotonic)

    def reason(self) -> str | None:
        """Why the run is to end now, or None."""
        if self.asked is not None and self.asked():
            return "it was interrupted"
        if self.seconds is not None and time.monotonic() - self.began >= self.seconds:
            return f"the time limit of {self.seconds:g} s ran out"
        return None

    def left(self) -> float | None:
        """Seconds until the limit, at least a little; None without one."""
        return None if self.seconds is None else max(1e-3, self.seconds - (time.monotonic() - self.began))
